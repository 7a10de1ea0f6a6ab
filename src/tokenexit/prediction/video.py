"""Read and write videos through PyAV, which is imported when used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from tokenexit.errors import DataError
from tokenexit.inputs.images import MAX_PIXELS, decoder_reason, load_image
from tokenexit.runtime.atomic import atomic_write

CODECS = ("libx264", "mpeg4")
"""The first one that PyAV was built with encodes: H.264, which browsers play, or what every build has."""

RATE = Fraction(25)
"""Frames per second of a video without a rate."""


def frames(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Callable[[], Image.Image]]:
    """Yield a function for each frame, in order, that makes it an upright RGB image.

    Raises `DataError` for a video that is missing, damaged, cut off or holds no frame, and where PyAV is not installed.
    """
    with _opened(path) as (av, container):
        count = 0
        try:
            for frame in container.decode(video=0):
                yield lambda frame=frame: load_image(_upright(frame), max_pixels)  # type: ignore[misc]
                count += 1
        except av.error.FFmpegError as error:
            reason = f"after {count} frames" if count else decoder_reason(error)
            raise DataError(
                f"video '{path}' cannot be decoded ({reason}): check that it is an undamaged video."
            ) from None
        if count == 0:
            raise DataError(f"video '{path}' holds no frame: check that it is an undamaged video.")


def rate_of(path: Path) -> Fraction:
    """Return the frames per second."""
    with _opened(path) as (_, container):
        return Fraction(container.streams.video[0].average_rate or RATE)


@contextmanager
def encoder(path: Path, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that adds an image to a video, which is there whole or not at all.

    All images have one size. Encoders want even sides; an odd one is cut by a pixel.
    """
    av = _av(path.name, "save overlays")
    with atomic_write(path) as unfinished, av.open(str(unfinished), "w") as container:
        codec = next(name for name in CODECS if name in av.codecs_available)
        stream: Any = None

        def add(image: Image.Image) -> None:
            nonlocal stream
            size = tuple(max(2, side // 2 * 2) for side in image.size)
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.width, stream.height = size
                stream.pix_fmt = "yuv420p"
            if size != (stream.width, stream.height):
                raise DataError(
                    f"a frame of {image.height}x{image.width} pixels follows one of {stream.height}x{stream.width} "
                    f"in {path.name}: frames of a video have one size."
                )
            container.mux(stream.encode(av.VideoFrame.from_image(image.crop((0, 0, *size)))))

        try:
            yield add
            if stream is not None:
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise DataError(f"{path.name} cannot be encoded ({decoder_reason(error)}): save the overlays.") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield the library and the open video."""
    av = _av(f"video '{path}'", "give its frames")
    if not path.exists():
        raise DataError(f"video '{path}' does not exist: check the path.")
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"video '{path}' is no regular file: give a video file.")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(
            f"video '{path}' cannot be read ({decoder_reason(error)}): check that it is an undamaged video."
        ) from None
    with container:
        if not container.streams.video:
            raise DataError(f"video '{path}' has no images: check that it is an undamaged video.")
        yield av, container


def _upright(frame: Any) -> Image.Image:
    """Return a frame turned upright: phones store the rotation beside the images."""
    image: Image.Image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image.rotate(turn, expand=True) if turn else image


def _av(what: str, instead: str) -> Any:
    try:
        import av  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(f"{what} needs the package av: pip install 'tokenexit[video]', or {instead}.") from None
    return av
