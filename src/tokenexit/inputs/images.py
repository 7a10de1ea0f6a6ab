"""Images of any usual format are read as RGB, 8 bits per channel, upright."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Colour, is_int

ImageSource: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 178_956_970  # Pillow's own limit for refusing an image: 2 * (1 GiB / 4 / 3)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
"""Formats that are read, whatever a file is called: those that Pillow decodes itself, in this process.

Pillow knows more, but hands PostScript to Ghostscript and WMF to the system. JPEG includes the multi-picture files of
cameras.
"""

_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, background: Colour = (0, 0, 0)) -> Image.Image:
    """Load an image as RGB, 8 bits per channel, upright.

    - Files are read in one of `FORMATS`, found by their content and not by their name.
    - The EXIF orientation is applied; the first frame of an animation is taken.
    - 16-bit grey (PIL modes "I;16" and "I") and uint16 are divided by 257 and rounded, so that 65535 is 255.
    - PIL mode "F" counts as float: values in 0..1.

    Args:
        source: a path, the bytes of a file, an open binary file, a PIL image, or a numpy array of shape (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4) and type bool, uint8, uint16, or float with values in 0..1.
        max_pixels: the largest H * W that is decoded (default: Pillow's own limit, about 179 million).
        background: RGB colour (0..255) that transparent images are composited on; black if not given, as in `predict`,
            the datasets and the server.

    Returns:
        A loaded PIL image of mode RGB.

    Raises:
        DataError: for missing, damaged or truncated files, other formats, too many pixels, no pixels, and arrays of
            other shapes, types and values.
        ConfigError: for a background that is no colour.
    """
    if len(background) != 3 or not all(is_int(c) and 0 <= c <= 255 for c in background):
        raise ConfigError(f"background must be three whole numbers from 0 to 255, got {background!r}: give RGB.")
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"image of mode {source.mode!r}", max_pixels, background)
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, max_pixels, background)
    if isinstance(source, (str, Path)):
        return _decode(source, f"image {str(source)!r}", max_pixels, background)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"image of {len(source)} bytes", max_pixels, background)
    if hasattr(source, "read"):
        return _decode(source, f"image {getattr(source, 'name', 'stream')!r}", max_pixels, background)
    raise DataError(
        f"a {type(source).__name__} cannot be read as an image: give a path, bytes, a PIL image or a numpy array."
    )


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """`PIL.Image.open`, limited to `FORMATS`: the one way in which this package opens image files.

    It may raise nearly everything, and so may the decoding of what it returns: see `decoder_reason`.
    """
    Image.init()
    return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])  # some builds have no AVIF


def _decode(file: str | Path | BinaryIO, what: str, max_pixels: int, background: Colour) -> Image.Image:
    try:
        with open_image(file) as image:
            _check_size(image.height, image.width, what, max_pixels)
            rgb = _to_rgb(image, what, max_pixels, background)
            return rgb.copy() if rgb is image else rgb  # a copy without file and decoder
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} does not exist: check the path.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        if max_pixels < MAX_PIXELS:
            raise DataError(f"{what} has far more than {max_pixels} pixels: shrink it.") from None
        raise DataError(
            f"{what} has more pixels than Pillow opens: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except MemoryError:
        raise DataError(f"{what} does not fit into memory: shrink it.") from None
    except Exception as error:  # decoders of damaged files raise nearly everything, struct.error among it
        raise _undecodable(what, error) from None


def _undecodable(what: str, error: Exception) -> DataError:
    return DataError(f"{what} cannot be decoded ({decoder_reason(error)}): check that it is an undamaged image.")


def decoder_reason(error: Exception, formats: Sequence[str] = FORMATS) -> str:
    """Return the reason that a decoder gave, on one line, for the brackets of an error message.

    formats: those that were tried.
    """
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own words repeat the path, or the address of a buffer.
        *others, last = formats
        return f"no {', '.join(others)} or {last}" if others else f"no {last}"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _to_rgb(image: Image.Image, what: str, max_pixels: int, background: Colour) -> Image.Image:
    """Turn a PIL image of any mode into a loaded RGB image, upright. The given image is not changed."""
    _check_size(image.height, image.width, what, max_pixels)
    try:
        image.load()  # before the EXIF data: reading them may decode, too, and a damaged file fails only once
    except Exception as error:  # files are decoded here, not when they are opened
        raise _undecodable(what, error) from None
    try:
        image = _upright(image)
        if image.mode in _SIXTEEN_BIT_MODES:
            return _sixteen_to_rgb(np.asarray(image), what)
        if image.mode == "F":
            return Image.fromarray(_float_to_bytes(np.asarray(image), what)).convert("RGB")
        if image.has_transparency_data:
            return _composited(image.convert("RGBA"), background)
        return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # an exotic mode
        raise DataError(f"{what} cannot be converted to RGB ({decoder_reason(error)}): convert it before.") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        if orientation == 1:
            return image  # the usual case, without a copy
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about the pixels: take them as they lie
        return image


def _composited(image: Image.Image, background: Colour) -> Image.Image:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _sixteen_to_rgb(values: npt.NDArray[Any], what: str) -> Image.Image:
    """Turn (H, W) integers in 0..65535 into a grey RGB image."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"{what} holds values from {low} to {high}, more than 16 bits: scale them to 0..65535 or convert to 8 bits."
        )
    return Image.fromarray(_sixteen_to_bytes(values)).convert("RGB")


def _sixteen_to_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _float_to_bytes(values: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise DataError(f"{what} holds NaN or infinite values: replace them before.")
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > 1.0:
        raise DataError(f"{what} holds values from {low:g} to {high:g}: scale floats to 0..1, or give uint8.")
    return (values.astype(np.float32) * 255.0 + 0.5).astype(np.uint8)


def _array_to_rgb(array: npt.NDArray[Any], max_pixels: int, background: Colour) -> Image.Image:
    what = f"image array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 3 and array.shape[2] > 4 and array.shape[0] in (1, 3, 4):
        raise DataError(
            f"{what} has its channels first: give (height, width, channels), as array.transpose(1, 2, 0) does."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"{what} is no image: give (height, width) or (height, width, channels) with 1, 3 or 4 channels."
        )
    _check_size(array.shape[0], array.shape[1], what, max_pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.uint16:
        pixels = _sixteen_to_bytes(array)
    elif np.issubdtype(array.dtype, np.floating):
        pixels = _float_to_bytes(array, what)
    else:
        raise DataError(f"{what} has no known pixel range: convert it to uint8 (0..255) or to float (0..1).")
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _composited(image, background) if image.mode == "RGBA" else image.convert("RGB")


def _check_size(height: int, width: int, what: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise DataError(f"{what} has no pixels ({height}x{width}): give at least one.")
    if height * width > max_pixels:
        raise DataError(
            f"{what} has {height}x{width} pixels, more than max_pixels={max_pixels}: shrink it or raise max_pixels."
        )
