"""Preprocessing turns an image into the tensor a model was trained on: size, mean and std, class names, colours.

All of it is saved with the model, since another preprocessing would make its answers silently wrong.

Legend: H, W height and width in pixels; K classes. Sizes are always (height, width), except inside PIL calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image

from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import load_image
from tokenexit.inputs.labels import Labels, is_int
from tokenexit.runtime.schema import check_keys, fits, shown

Resize: TypeAlias = Literal["none"] | int | tuple[int, int]
Stride: TypeAlias = Literal["even"] | tuple[int, int]

MAX_SIDE = 8192
"""The largest side in pixels that a model may resize images to, or cut them in."""


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an RGB image to the model's input: resize, scale to 0..1, subtract `mean`, divide by `std`.

    Attributes:
        mean: mean per channel (red, green, blue), in the pixel range 0..1.
        std: standard deviation per channel, in the same range.
        resize: "none" keeps the image's size; one number is the shortest side in pixels, aspect ratio kept;
            (height, width) is exactly that size. Bilinear, with antialiasing where it shrinks.
        labels: names and colours of the model's classes, if known.
        window: height and width in pixels of the windows in which the resized image is segmented; one number stands for
            both. Without a window the image is taken whole.
        stride: distance in pixels of the windows, (rows, columns); "even" takes the fewest windows that cover the image
            and spreads them evenly, as EoMT is evaluated; without it windows touch.

    Raises:
        ConfigError: for values that cannot work.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "none"
    labels: Labels | None = None
    window: tuple[int, int] | None = None
    stride: Stride | None = None

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
        """Turn an image into the model's input.

        Args:
            image: a PIL image, or anything that `load_image` takes.
            scale: factor on both sides after `resize`.

        Returns:
            `(3, H, W)` float32, resized and normalised.

        Raises:
            DataError: for an image that cannot be read.
        """
        image = load_image(image)
        height, width = scaled_size(resized_size((image.height, image.width), self.resize), scale)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return self.normalise(image)

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """Normalise an RGB image without resizing it, as training crops need it: their masks have the same size.

        Args:
            image: a PIL image of mode RGB.

        Returns:
            `(3, H, W)` float32 of the same size.

        Raises:
            DataError: for an image of another mode.
        """
        if image.mode != "RGB":
            raise DataError(f"an image of mode {image.mode!r} cannot be normalised: open it with load_image first.")
        pixels = torch.from_numpy(np.array(image))  # (H, W, 3); a copy, as a view of PIL's memory is read-only
        channels = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return channels.div_(255.0).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers only, as JSON and YAML hold them."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "labels": None if self.labels is None else self.labels.to_dict(),
            "window": None if self.window is None else list(self.window),
            "stride": list(self.stride) if isinstance(self.stride, tuple) else self.stride,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build a preprocessing from what `to_dict` returns; keys left out take their defaults.

        Raises `ConfigError` for unknown keys and impossible values.
        """
        check_keys("preprocessing", values, known=("mean", "std", "resize", "labels", "window", "stride"))
        labels = values.get("labels")
        if labels is not None and not isinstance(labels, Labels):
            labels = Labels.from_dict(labels)
        return cls(**{**values, "labels": labels})


def checked_resize(name: str, resize: object) -> Resize:
    """Return `resize` in its one form: "none", int, or two ints. Raises `ConfigError` about the option `name`."""
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


def checked_window(prefix: str, window: object, stride: object) -> tuple[tuple[int, int], Stride] | tuple[None, None]:
    """Return window and stride as two (height, width) pairs, or None twice without a window; a stride may be "even".

    A number is a square, and a stride of None the window itself. Raises `ConfigError` about the options
    `{prefix}window` and `{prefix}stride` for values that are no size, and for strides that leave pixels out.
    """
    if window is None:
        if stride is not None:
            raise ConfigError(f"{prefix}stride={stride!r} has no {prefix}window: give both, or neither.")
        return None, None
    window = _checked_pair(f"{prefix}window", window)
    if stride == "even":
        return window, "even"
    stride = window if stride is None else _checked_pair(f"{prefix}stride", stride, ', or "even"')
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ConfigError(
            f"{prefix}stride={stride} is longer than {prefix}window={window} and would leave pixels out: shorten it."
        )
    return window, stride


def windows_in_words(window: tuple[int, int], stride: Stride) -> str:
    """Return windows as people read them, such as `windows of 512x512 every 341x341`."""
    every = ", evenly spread" if stride == "even" else f" every {stride[0]}x{stride[1]}"
    return f"windows of {window[0]}x{window[1]}{every}"


def _checked_pair(name: str, size: object, otherwise: str = "") -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_side, pair)):
        return pair[0], pair[1]
    raise ConfigError(
        f"{name}={shown(size)} is no size: give one side in pixels, or a (height, width) pair, of 1 to {MAX_SIDE} each"
        f"{otherwise}."
    )


def resized_size(size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Return (height, width) of an image of `size` after `resize`; the long side is rounded, and at least one pixel."""
    if isinstance(resize, str):
        return size
    if isinstance(resize, tuple):
        return resize
    height, width = size
    factor = resize / min(height, width)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return (height, width) of an image of `size` with both sides multiplied, rounded, and at least one pixel."""
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def _is_side(value: Any) -> bool:
    return is_int(value) and 1 <= value <= MAX_SIDE


def _three_floats(name: str, value: Any) -> tuple[float, float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(fits(v, float) for v in value):
        return float(value[0]), float(value[1]), float(value[2])
    raise ConfigError(f"preprocessing.{name}={shown(value)} is no colour: give three numbers (red, green, blue).")
