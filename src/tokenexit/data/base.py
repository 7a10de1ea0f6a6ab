"""The protocol of datasets: a `Sample`, and a sequence of samples with `Labels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenexit.errors import DataError
from tokenexit.inputs.labels import Labels

Mask: TypeAlias = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its ground truth.

    image: RGB, H pixels high and W wide. mask: (H, W) class indices, void pixels at the dataset's ignore_index.
    name: identifies the image within its split.

    Raises `DataError` where image and mask do not belong together.
    """

    image: Image.Image
    mask: Mask
    name: str

    def __post_init__(self) -> None:
        if self.image.mode != "RGB":
            raise DataError(f"sample {self.name!r} has an image of mode {self.image.mode!r}: convert it to RGB.")
        if self.mask.ndim != 2 or not np.issubdtype(self.mask.dtype, np.integer):
            raise DataError(
                f"sample {self.name!r} has a mask of shape {self.mask.shape} and type {self.mask.dtype}: "
                "give one whole number per pixel, shape (height, width)."
            )
        if self.mask.shape != (self.image.height, self.image.width):
            raise DataError(
                f"sample {self.name!r} has an image of {self.image.height}x{self.image.width} and a mask of "
                f"{self.mask.shape[0]}x{self.mask.shape[1]} pixels: both must have the same height and width."
            )

    @property
    def size(self) -> tuple[int, int]:
        """The size as (height, width) in pixels."""
        return self.image.height, self.image.width


@runtime_checkable
class SegmentationDataset(Protocol):
    """Samples by index, and the labels of their masks. Reading is lazy: opening a dataset decodes no image."""

    @property
    def labels(self) -> Labels: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
