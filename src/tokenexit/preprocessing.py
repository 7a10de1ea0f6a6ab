"""From a picture to the tensor a model was trained on: size, mean and std, class names, colours.

All of it is saved with the model, which gives wrong answers without a word under another preprocessing.

Legend: H, W height and width in pixels; K classes. Sizes are always (height, width), except inside PIL calls.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenexit.errors import ConfigError, DataError
from tokenexit.runtime.schema import check_keys, fits, shown

Colour: TypeAlias = tuple[int, int, int]
ImageSource: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any]
Resize: TypeAlias = Literal["none"] | int | tuple[int, int]

MAX_SIDE = 8192
"""The largest side in pixels that a model may resize pictures to, or cut them in."""

MAX_PIXELS = 178_956_970  # Pillow's own limit for refusing a picture: 2 * (1 GiB / 4 / 3)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
"""Formats that are read, whatever a file is called: those that Pillow decodes itself, in this process.

It knows more: PostScript is handed to Ghostscript, WMF to the system. JPEG includes the multi-picture files of cameras.
"""

_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class Labels:
    """The classes a mask can hold: name and RGB colour (0..255) of each, and the value of void pixels.

    Class k is the mask value k. Raises `ConfigError` where lengths differ, a name is empty or given twice, a
    colour is no RGB triple, or `ignore_index` is also a class.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        # Lists (from JSON or YAML) become tuples, so that equal labels compare and hash equal.
        object.__setattr__(self, "names", _as_tuple("names", self.names))
        object.__setattr__(self, "palette", tuple(_as_tuple("palette", c) for c in _as_tuple("palette", self.palette)))
        if not self.names:
            raise ConfigError("labels.names is empty: name at least one class.")
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ConfigError(f"labels.names holds {shown(name)}: every class name must be a non-empty string.")
        repeated = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if repeated:
            raise ConfigError(f"labels.names holds {repeated[0]!r} more than once: give each class its own name.")
        if len(self.palette) != len(self.names):
            raise ConfigError(
                f"labels.palette has {len(self.palette)} colours for {len(self.names)} class names: give one "
                "colour per class."
            )
        for name, colour in zip(self.names, self.palette):
            if len(colour) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in colour):
                raise ConfigError(
                    f"labels.palette gives {shown(colour)} for class {name!r}: a colour is three whole numbers "
                    "from 0 to 255."
                )
        if not _is_int(self.ignore_index):
            raise ConfigError(f"labels.ignore_index is {shown(self.ignore_index)}: it must be a whole number.")
        if 0 <= self.ignore_index < len(self.names):
            raise ConfigError(
                f"labels.ignore_index={self.ignore_index} is also class {self.names[self.ignore_index]!r}: "
                f"choose a value outside 0..{len(self.names) - 1}."
            )

    @property
    def num_classes(self) -> int:
        """K, without the ignored value."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only: JSON and YAML hold it as it is."""
        return {
            "names": list(self.names),
            "palette": [list(colour) for colour in self.palette],
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Labels:
        """The inverse of `to_dict`. Raises `ConfigError` for unknown or missing keys."""
        check_keys("labels", values, known=("names", "palette", "ignore_index"), needed=("names", "palette"))
        return cls(**values)


def default_labels(num_classes: int) -> Labels:
    """Labels for a model without names: class_0, class_1, ..., each with its own colour, always the same."""
    if not _is_int(num_classes) or num_classes < 1:
        raise ConfigError(f"num_classes={num_classes!r} cannot be labelled: give a whole number of at least 1.")
    ignore_index = 255 if num_classes <= 255 else 65535
    return Labels(
        names=tuple(f"class_{k}" for k in range(num_classes)),
        palette=default_palette(num_classes),
        ignore_index=ignore_index,
    )


def default_palette(num_classes: int) -> tuple[Colour, ...]:
    """K different colours, always the same: the bits of k + 1 are dealt to red, green, blue in turn.

    The lowest bits weigh most. Neighbouring classes therefore lie far apart, no class is black, and the first
    colours do not change with K.
    """
    return tuple(_spread_colour(k + 1) for k in range(num_classes))


def _spread_colour(code: int) -> Colour:
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= ((code >> bit) & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB picture to the model's input: resize, scale to 0..1, subtract `mean`, divide by `std`.

    mean, std: per channel (red, green, blue), in the pixel range 0..1.
    resize: "none" keeps the picture's size; one number is the shortest side in pixels, aspect ratio kept;
        (height, width) is exactly that size. Bilinear, with antialiasing where it shrinks.
    labels: what the model's class indices mean, if known.
    window, stride: height and width of the windows in which the resized picture is segmented, and their distance;
        one number stands for both. Without a stride windows touch; without a window the picture is taken as a whole.

    Raises `ConfigError` for values that cannot work.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "none"
    labels: Labels | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _three_floats("mean", self.mean))
        object.__setattr__(self, "std", _three_floats("std", self.std))
        if min(self.std) <= 0:
            raise ConfigError(f"preprocessing.std={self.std} would divide by zero or less: give positive numbers.")
        object.__setattr__(self, "resize", checked_resize("preprocessing.resize", self.resize))
        if self.labels is not None and not isinstance(self.labels, Labels):
            raise ConfigError(f"preprocessing.labels is {shown(self.labels)}: give a Labels object or None.")
        window, stride = checked_window("preprocessing.", self.window, self.stride)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "stride", stride)

    def to_tensor(self, image: Image.Image, scale: float = 1.0) -> torch.Tensor:
        """image -> (3, H, W) float32, resized as `resize` says, both sides times `scale`, then normalised."""
        image = load_image(image)
        size = resized_size((image.height, image.width), self.resize)
        height, width = (max(1, int(side * scale + 0.5)) for side in size)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return self.normalise(image)

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, H, W) float32 of the same size.

        For training crops: a resize here would part them from their masks.
        """
        if image.mode != "RGB":
            raise DataError(f"an image of mode {image.mode!r} cannot be normalised: open it with load_image first.")
        pixels = torch.from_numpy(np.array(image))  # (H, W, 3); a copy, as a view of PIL's memory is read-only
        channels = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return channels.div_(255.0).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only: JSON and YAML hold it as it is."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "labels": None if self.labels is None else self.labels.to_dict(),
            "window": None if self.window is None else list(self.window),
            "stride": None if self.stride is None else list(self.stride),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; keys left out take their defaults.

        Raises `ConfigError` for unknown keys and impossible values.
        """
        check_keys("preprocessing", values, known=("mean", "std", "resize", "labels", "window", "stride"))
        labels = values.get("labels")
        if labels is not None and not isinstance(labels, Labels):
            labels = Labels.from_dict(labels)
        return cls(**{**values, "labels": labels})


def checked_resize(name: str, resize: object) -> Resize:
    """`resize` in its one form ("none", int, tuple of two ints), or a `ConfigError` about the option `name`."""
    if resize == "none":
        return "none"
    if isinstance(resize, int) and _is_side(resize):
        return resize
    if isinstance(resize, (list, tuple)) and len(resize) == 2 and all(map(_is_side, resize)):
        return resize[0], resize[1]
    raise ConfigError(
        f'{name}={shown(resize)} is no size: give "none", the shortest side in pixels, or a (height, width) pair, of '
        f"1 to {MAX_SIDE} each."
    )


def checked_window(
    prefix: str, window: object, stride: object
) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """Window and stride as two (height, width) pairs, or None twice without a window.

    A number is a square, and a stride of None the window itself. Raises `ConfigError` about the options
    `{prefix}window` and `{prefix}stride` for what is no size, and for strides that leave pixels out.
    """
    if window is None:
        if stride is not None:
            raise ConfigError(f"{prefix}stride={stride!r} has no {prefix}window: give both, or neither.")
        return None, None
    window = _checked_pair(f"{prefix}window", window)
    stride = window if stride is None else _checked_pair(f"{prefix}stride", stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ConfigError(
            f"{prefix}stride={stride} is longer than {prefix}window={window} and would leave pixels out: shorten it."
        )
    return window, stride


def _checked_pair(name: str, size: object) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_side, pair)):
        return pair[0], pair[1]
    raise ConfigError(
        f"{name}={shown(size)} is no size: give one side in pixels, or a (height, width) pair, of 1 to {MAX_SIDE} each."
    )


def resized_size(size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """(height, width) of a picture of `size` after `resize`; the long side is rounded, and at least one pixel."""
    if isinstance(resize, str):
        return size
    if isinstance(resize, tuple):
        return resize
    height, width = size
    factor = resize / min(height, width)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


# ------------------------------------------------------------------------------------------- pictures come in


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, background: Colour = (0, 0, 0)) -> Image.Image:
    """Load an image as RGB, 8 bits per channel, upright.

    source: a path, the bytes of a file, an open binary file, a PIL image, or a numpy array of shape (H, W),
        (H, W, 1), (H, W, 3) or (H, W, 4) and type bool, uint8, uint16, or float with values in 0..1.
    max_pixels: the largest H * W that is decoded (default: Pillow's own limit, about 179 million).
    background: RGB colour (0..255) that transparent images are composited on; black if not given, as what cannot be
        seen carries no light. `predict`, the datasets and the server use black.

    - Files are read in one of `FORMATS`, found by their content and not by their name.
    - The EXIF orientation is applied; of an animation the first frame is taken.
    - 16-bit grey (PIL modes "I;16" and "I") and uint16 are divided by 257 and rounded, so that 65535 is 255.
    - PIL mode "F" counts as float: values in 0..1.

    Raises `DataError` for everything else: missing, damaged or truncated files, other formats, too many pixels, no
    pixels, odd shapes, types and values; and `ConfigError` for a background that is no colour.
    """
    if len(background) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in background):
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
            return rgb.copy() if rgb is image else rgb  # an image that stands alone, without file and decoder
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
    return DataError(f"{what} cannot be decoded ({decoder_reason(error)}): check that it is an undamaged picture.")


def decoder_reason(error: Exception) -> str:
    """What a decoder complained of, on one line, to stand in brackets in a message of ours."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own words repeat the path, or the address of a buffer.
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _to_rgb(image: Image.Image, what: str, max_pixels: int, background: Colour) -> Image.Image:
    """PIL image of any mode -> loaded RGB image, upright. The given image is not changed."""
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
    """(H, W) integers in 0..65535 -> grey RGB."""
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
            f"{what} is no picture: give (height, width) or (height, width, channels) with 1, 3 or 4 channels."
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


# ---------------------------------------------------------------------------------------------------- helpers


def _is_int(value: object) -> bool:
    return fits(value, int)


def _is_side(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_SIDE


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ConfigError(f"labels.{name} is {shown(value)}: give a list.")


def _three_floats(name: str, value: Any) -> tuple[float, float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(fits(v, float) for v in value):
        return float(value[0]), float(value[1]), float(value[2])
    raise ConfigError(f"preprocessing.{name}={shown(value)} is no colour: give three numbers (red, green, blue).")
