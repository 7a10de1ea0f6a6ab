"""HEIC images, as phones make them, are read by pillow-heif, which is imported when used."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from tokenexit.errors import DataError
from tokenexit.inputs.images import MAX_PIXELS, decoder_reason, load_image

SUFFIXES = {".heic", ".heif", ".hif"}
FORMATS = ("HEIF",)
CURE = "HEIC needs the package pillow-heif: pip install 'tokenexit[heic]', or convert it to JPEG"


def is_available() -> bool:
    """Return whether pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


def load_heic(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load a HEIC file as `load_image` does others: RGB, 8 bits per channel, upright.

    Raises `DataError` for a file that is missing, damaged or too large, and where pillow-heif is not installed.
    """
    what = f"image {str(path)!r}"
    try:
        from pillow_heif import HeifImagePlugin  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        raise DataError(f"{what} cannot be read: {CURE}.") from None
    try:
        with Image.open(path, formats=FORMATS) as image:  # whatever the name says, no other decoder
            return _named(what, image, max_pixels)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} does not exist: check the path.") from None
    except MemoryError:
        raise DataError(f"{what} does not fit into memory: shrink it.") from None
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise DataError(
            f"{what} cannot be decoded ({decoder_reason(error, FORMATS)}): check that it is an undamaged image."
        ) from None


def _named(what: str, image: Image.Image, max_pixels: int) -> Image.Image:
    """Call `load_image` with the file's name in its errors."""
    try:
        return load_image(image, max_pixels).copy()
    except DataError as error:
        raise DataError(str(error).replace(f"image of mode {image.mode!r}", what, 1)) from None
