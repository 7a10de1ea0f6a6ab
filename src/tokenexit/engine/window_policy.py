"""A small network that says which windows of patches may share one token, from the image alone.

Strided 3x3 convolutions lead from pixels to one position for each patch; from there a convolution of each window's size
leads to one position for each whole window, and from that to the next larger ones. It stands in place of CTS's
EfficientNet-lite0 (Lu, de Geus, Dubbelman; CVPR 2023), and its design is ours. It is fitted by
`tokenexit.training.window_policy`; the blocks of the backbone neither know it nor learn with it.

Legend: b images of one size, h x w patches of side p, W whole windows of one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid

FIRST_WIDTH, WIDTH = 8, 32
"""Channels of the first convolution, which double with every further one up to `WIDTH`."""


class WindowPolicy(nn.Module):
    """The network for patches of one size, and for windows of some sides, each a multiple of the one before.

    patch_size: side p of a patch in pixels. sides: of windows in patches.
    """

    def __init__(self, patch_size: int, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.trunk = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2 if kernel > stride else 0)
            for inputs, outputs, kernel, stride in _trunk(patch_size)
        )
        width = _width(patch_size)
        factors = [side // before for before, side in pairwise((1, *self.sides))]
        self.shrink = nn.ModuleList(nn.Conv2d(width, width, factor, factor) for factor in factors)
        self.answer = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in self.sides)

    def forward(self, pixels: Tensor, largest: int) -> dict[int, Tensor]:
        """Return the logit of "one class" of every whole window, by side: `(b, W)`, windows in raster order.

        pixels: of whole patches, normalised, `(b, 3, h p, w p)`. largest: side of the largest windows that are wanted;
            sides of which the images hold no whole window are left out. In full precision under any autocast.
        """
        found: dict[int, Tensor] = {}
        with torch.autocast(pixels.device.type, enabled=False):
            x = pixels.to(next(self.parameters()).dtype)
            for convolution in self.trunk:
                x = convolution(x).relu()
            before = 1
            for side, shrink, answer in zip(self.sides, self.shrink, self.answer):
                if side > largest or min(x.shape[2:]) < side // before:
                    break
                x = shrink(x).relu()
                found[side] = answer(x).flatten(1)
                before = side
        return found


def policy_ops(grid: Grid, patch_size: int, sides: Sequence[int], largest: int) -> Ops:
    """Count the network on one image of a grid of patches, with the sides it has, up to the largest that is wanted."""
    work, rows, columns = Ops(), grid[0] * patch_size, grid[1] * patch_size
    for inputs, outputs, kernel, stride in _trunk(patch_size):
        rows, columns = rows // stride, columns // stride
        work += ops.conv2d(rows, columns, inputs, outputs, kernel)
    width = _width(patch_size)
    for before, side in pairwise((1, *sides)):
        factor = side // before
        if side > largest or min(rows, columns) < factor:
            break
        rows, columns = rows // factor, columns // factor
        work += ops.conv2d(rows, columns, width, width, factor) + ops.conv2d(rows, columns, width, 1, 1)
    return work


def nested(sides: Sequence[int]) -> bool:
    """Return whether sides of windows nest: each is a multiple of the one before, and the first of 1."""
    return all(side > before and side % before == 0 for before, side in pairwise((1, *sides)))


def _trunk(patch_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield channels in and out, kernel and stride of the convolutions from pixels to patches.

    Strides are the prime factors of a patch's side; those below 3 have a kernel that looks one pixel beyond.
    """
    inputs, outputs = 3, FIRST_WIDTH
    for stride in _factors(patch_size):
        yield inputs, outputs, max(stride, 3), stride
        inputs, outputs = outputs, min(2 * outputs, WIDTH)


def _width(patch_size: int) -> int:
    return list(_trunk(patch_size))[-1][1]


def _factors(number: int) -> list[int]:
    """Return the prime factors of a number, the smallest first; 1 of 1."""
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found or [1]
