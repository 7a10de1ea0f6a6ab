"""Joint transforms of an image and its mask, with mmsegmentation's names and meanings.

Each is a frozen value called as `transform(sample, rng)`; all randomness comes from `rng`, so equal
generators give equal samples. Images are resized bilinearly (with antialiasing where they shrink), masks by
nearest neighbour. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenexit.data.base import Mask, Sample
from tokenexit.errors import ConfigError
from tokenexit.inputs.labels import Colour
from tokenexit.inputs.preprocessing import checked_resize, resized_size

_CROP_TRIES = 10


class Transform(Protocol):
    """A function from sample to sample, which must not change the given sample: it may lie in a cache."""

    def __call__(self, sample: Sample, rng: np.random.Generator, /) -> Sample: ...


@dataclass(frozen=True)
class Compose:
    """A sequence of transforms, all drawing from one generator."""

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


@dataclass(frozen=True)
class Foreign:
    """A transform from elsewhere: any `(image, mask) -> (image, mask)` on an RGB PIL image and an (H, W) array.

    Its randomness is its own: it does not repeat after a resume unless it is without any.
    """

    function: Callable[[Image.Image, Mask], tuple[Image.Image, Mask]]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, mask = self.function(sample.image, sample.mask)
        return Sample(image, mask, sample.name)


@dataclass(frozen=True)
class Resize:
    """Resize to (height, width) exactly, or to a shortest side with the aspect ratio kept."""

    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        if checked_resize("Resize size", self.size) == "none":
            raise ConfigError('Resize size="none" does nothing: leave the transform out.')

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return resize_sample(sample, resized_size(sample.size, self.size))


@dataclass(frozen=True)
class RandomResize:
    """Scale by a factor drawn evenly from `ratio`, aspect ratio kept.

    base: (long, short) in pixels, the box that factor 1 fits the image into: the longer side reaches at
    most `long`, the shorter at most `short`, as mmsegmentation's `scale`. None: the image's own size.
    """

    ratio: tuple[float, float] = (0.5, 2.0)
    base: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0.0 < low <= high < float("inf"):
            raise ConfigError(
                f"RandomResize ratio must be (low, high) with 0 < low <= high, got {self.ratio}: correct it."
            )
        if self.base is not None and min(self.base) < 1:
            raise ConfigError(
                f"RandomResize base must be (long, short) of at least 1 pixel, got {self.base}: correct it."
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        ratio = float(rng.uniform(*self.ratio))
        height, width = sample.size
        long, short = self.base or (max(height, width), min(height, width))
        return resize_sample(sample, fit_into(sample.size, (int(long * ratio), int(short * ratio))))


@dataclass(frozen=True)
class RandomCrop:
    """Crop a random window of (height, width), or of the image's side where it is smaller (see `Pad`).

    A window in which one class holds `cat_max_ratio` or more of the judged pixels is drawn again, ten times
    at most; 1.0 takes the first. Pixels at `ignore_index` are not counted.
    """

    size: tuple[int, int]
    cat_max_ratio: float = 0.75
    ignore_index: int = 255

    def __post_init__(self) -> None:
        _check_pixels("RandomCrop size", self.size)
        if not 0.0 < self.cat_max_ratio <= 1.0:
            raise ConfigError(f"RandomCrop cat_max_ratio must lie in (0, 1], got {self.cat_max_ratio}: change it.")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = min(self.size[0], sample.size[0]), min(self.size[1], sample.size[1])
        top, left = self._draw(sample.size, rng)
        if self.cat_max_ratio < 1.0:
            for _ in range(_CROP_TRIES):
                window = sample.mask[top : top + height, left : left + width]
                if largest_class_share(window, self.ignore_index) < self.cat_max_ratio:
                    break
                top, left = self._draw(sample.size, rng)
        return Sample(
            sample.image.crop((left, top, left + width, top + height)),
            sample.mask[top : top + height, left : left + width],
            sample.name,
        )

    def _draw(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        top = rng.integers(max(size[0] - self.size[0], 0) + 1)
        left = rng.integers(max(size[1] - self.size[1], 0) + 1)
        return int(top), int(left)


@dataclass(frozen=True)
class RandomFlip:
    """Flip horizontally with this probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ConfigError(f"RandomFlip probability must lie in [0, 1], got {self.probability}: change it.")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.probability:
            return sample
        image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Sample(image, np.ascontiguousarray(sample.mask[:, ::-1]), sample.name)


@dataclass(frozen=True)
class PhotometricDistortion:
    """Change brightness, contrast, saturation and hue, each with probability 0.5, in mmsegmentation's order.

    brightness: largest shift, in grey levels (0..255).
    contrast, saturation: range of the factor. Contrast comes before or after the colours, by the toss of a coin.
    hue: largest turn, in the steps of two degrees that 8-bit hues have elsewhere (180 to the circle).
    """

    brightness: int = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __post_init__(self) -> None:
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high:
                raise ConfigError(
                    f"PhotometricDistortion {name} must be (low, high) with 0 <= low <= high, got {(low, high)}: "
                    "correct it."
                )
        if self.brightness < 0 or self.hue < 0:
            raise ConfigError(
                f"PhotometricDistortion brightness={self.brightness}, hue={self.hue} must not be negative: "
                "0 switches one off."
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        bright, contrasted, saturated, hued, contrast_first = rng.random(5) < 0.5
        shift = float(rng.uniform(-self.brightness, self.brightness)) if bright else 0.0
        contrast = float(rng.uniform(*self.contrast)) if contrasted else 1.0
        saturation = float(rng.uniform(*self.saturation)) if saturated else 1.0
        hue = float(rng.uniform(-self.hue, self.hue)) if hued else 0.0

        image = _levels(sample.image, 1.0, shift)
        if contrast_first:
            image = _levels(image, contrast, 0.0)
        image = _shift_colour(image, saturation, hue / 180.0)
        if not contrast_first:
            image = _levels(image, contrast, 0.0)
        return Sample(image, sample.mask, sample.name)


@dataclass(frozen=True)
class Pad:
    """Pad to at least (height, width), at the right and the bottom: void in the mask, `fill` (RGB) in the image.

    The middle grey of the default lies near zero after normalisation.
    """

    size: tuple[int, int]
    ignore_index: int = 255
    fill: Colour = (127, 127, 127)

    def __post_init__(self) -> None:
        _check_pixels("Pad size", self.size)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        tall, wide = max(height, self.size[0]), max(width, self.size[1])
        if (tall, wide) == (height, width):
            return sample
        image = Image.new("RGB", (wide, tall), self.fill)
        image.paste(sample.image, (0, 0))
        mask = np.full((tall, wide), self.ignore_index, _type_that_holds(sample.mask, self.ignore_index))
        mask[:height, :width] = sample.mask
        return Sample(image, mask, sample.name)


def training_transform(
    crop: tuple[int, int],
    ignore_index: int = 255,
    ratio: tuple[float, float] = (0.5, 2.0),
    base: tuple[int, int] | None = None,
    cat_max_ratio: float = 0.75,
) -> Compose:
    """Return the usual augmentation: random scale, crop, flip, colours, padding; every result has the size `crop`."""
    return Compose(
        (
            RandomResize(ratio, base),
            RandomCrop(crop, cat_max_ratio, ignore_index),
            RandomFlip(),
            PhotometricDistortion(),
            Pad(crop, ignore_index),
        )
    )


# --------------------------------------------------------------------------------------------- pure functions


def fit_into(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same shape with long side <= max(box) and short <= min(box)."""
    height, width = size
    factor = min(max(box) / max(height, width), min(box) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_sample(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize to (height, width): the image bilinearly, the mask by nearest neighbour."""
    if size == sample.size:
        return sample
    height, width = size
    image = sample.image.resize((width, height), Image.Resampling.BILINEAR)
    return Sample(image, resize_mask(sample.mask, size), sample.name)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask (H, W) to (height, width): each pixel takes the value at its centre, whatever the integer type."""
    rows = ((np.arange(size[0]) + 0.5) * (mask.shape[0] / size[0])).astype(np.intp)
    columns = ((np.arange(size[1]) + 0.5) * (mask.shape[1] / size[1])).astype(np.intp)
    resized: Mask = mask.take(rows, axis=0).take(columns, axis=1)
    return resized


def largest_class_share(mask: Mask, ignore_index: int) -> float:
    """Return the share of the most frequent class in labelled pixels; 1.0 where there are none."""
    judged_values = mask[mask != ignore_index].astype(np.intp, copy=False)
    counts = np.bincount(judged_values)  # np.unique sorts, which costs ten times as much
    judged = int(counts.sum())
    return float(counts.max() / judged) if judged else 1.0


def _levels(image: Image.Image, factor: float, shift: float) -> Image.Image:
    """Apply value * factor + shift to all channels, by one table of 256 entries."""
    if factor == 1.0 and shift == 0.0:
        return image
    return image.point(_table(np.arange(256) * factor + shift) * 3)


def _shift_colour(image: Image.Image, saturation: float, hue: float) -> Image.Image:
    """Multiply saturation by a factor and turn hue by a share of the circle, in HSV."""
    if saturation == 1.0 and hue == 0.0:
        return image
    levels = np.arange(256)
    tables = _table((levels + round(hue * 256)) % 256) + _table(levels * saturation) + _table(levels)
    return image.convert("HSV").point(tables).convert("RGB")


def _table(values: npt.NDArray[Any]) -> list[int]:
    table: list[int] = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return table


def _type_that_holds(mask: Mask, value: int) -> np.dtype[Any]:
    return np.promote_types(mask.dtype, np.min_scalar_type(value))


def _check_pixels(name: str, size: tuple[int, int]) -> None:
    if not isinstance(checked_resize(name, size), tuple):
        raise ConfigError(f"{name}={size!r} is no size: give (height, width).")
