"""A method on images of another size, whose maps come back at the full size.

Fewer pixels are fewer tokens in every block: the cheapest saving of all, and one that exits add to. The network, its
windows and the exits that are closed by size see the resized images; the dense model at full size is still what costs
are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid
from tokenexit.errors import ConfigError
from tokenexit.inputs.preprocessing import scaled_size
from tokenexit.methods.base import Method, ModelView
from tokenexit.methods.wrapper import Wrapper

LARGEST = 4.0
"""The largest factor on a side."""


@dataclass(frozen=True)
class Resized(Wrapper):
    """A method on images whose sides are multiplied by `scale`: bilinear, with antialiasing where they shrink.

    It stands around all other wrappers, and serves inference alone: losses are taken at the size that is trained on.

    Attributes:
        method: the method inside.
        scale: factor on both sides, above 0 and at most 4.

    Raises:
        ConfigError: for a scale out of range, and for one `Resized` in another.
    """

    name: ClassVar[str] = "resized"
    title: ClassVar[str] = "Resized"
    outermost: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.scale <= LARGEST:
            raise ConfigError(f"scale must be above 0 and at most {LARGEST:g}, got {self.scale}: 1 is the full size.")

    @property
    def label(self) -> str:
        return f"{self.method.label} @{self.scale:g}"

    @property
    def input_scale(self) -> float:
        return self.scale

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[Any]]]:
        """Yield the runs of the method inside. grids: of the resized images."""
        return ((run, replace(self, method=each)) for run, each in self.method.runs(grids, max_tokens))

    def check(self, model: ModelView) -> None:
        if model.with_records:
            raise ConfigError("Resized serves inference alone: train, take losses and record with the method inside.")
        super().check(model)

    def for_export(self) -> NoReturn:
        raise ConfigError(
            "a graph takes images at the size they run at: export the method inside, and give it images resized by "
            f"{self.scale:g}."
        )


def resize(image: Tensor, scale: float) -> Tensor:
    """Return an image `(3, H, W)` with both sides multiplied by `scale`, as `Preprocessing.to_tensor` rounds them."""
    size = scaled_size((image.shape[1], image.shape[2]), scale)
    if size == (image.shape[1], image.shape[2]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
