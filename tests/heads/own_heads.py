"""Decode heads as users write them, for models of 32 channels and 5 classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, CLASSES = 32, 5


class Plain(nn.Module):
    """A 3x3 convolution, BatchNorm and a classifier; keeps the grid."""

    def __init__(self, channels: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.norm(self.conv(x))))


class Up(Plain):
    """Twice as fine by a transposed convolution, and twice again by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.norm(self.conv(x))))
        return F.interpolate(self.classifier(x), scale_factor=2, mode="bilinear", align_corners=False)


class Attending(nn.Module):
    """Attention in the two forms that torch has, over all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 48, batch_first=True)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(x.flatten(2).mT)
        rows = F.scaled_dot_product_attention(rows[:, None], rows[:, None], rows[:, None])[:, 0]
        return self.classifier(rows.mT.unflatten(2, x.shape[2:]))


class Remembering(nn.Module):
    """A buffer that is not saved, a tensor that is no buffer, and a branch that reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((1, CLASSES, 1, 1), 3.0), persistent=False)
        self.offset = torch.full((1, CLASSES, 1, 1), 0.5)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(x)
        return x * self.factor + self.offset if bool(x.isfinite().all()) else x


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.second.weight = self.first.weight
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.second(F.gelu(self.first(x))))


class FixedSize(Plain):
    """Gives 8x8 whatever it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), (8, 8))


class Stretched(Plain):
    """Grows in one direction alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), (x.shape[2] * 2, x.shape[3]))


class Several(Plain):
    """Reads two maps, as an FPN's head does."""

    def forward(self, maps: list[Tensor]) -> Tensor:  # type: ignore[override]
        last, before = maps
        return super().forward(last + before)


class MultipleSelect(Plain):
    """What mmsegmentation's heads of several maps say of themselves."""

    input_transform = "multiple_select"
    in_index = (0, 1, 2, 3)


class Answer(Plain):
    """Gives a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(x)}
