"""Classes at full size without a full-size map: bilinear logits need no look where all corners agree.

A pixel's logits are a mean of those of the four tokens around it, with weights that are not negative. If one class is
the highest at all four, it is the highest of every such mean, whatever the weights. Only where corners differ, at the
borders of things, is anything interpolated. The answer is that of `F.interpolate(...).argmax(0)`, for a quarter of its
time where a third of the squares differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ELEMENTS = 1 << 22
"""Interpolated values held at once: 16 MiB in fp32, whatever the number of classes."""


def can_skip(patch: int, size: tuple[int, int], target: tuple[int, int], upscale: int) -> bool:
    """Whether `labels_of_grid` applies: one bilinear step by an even factor, and nothing behind it."""
    return upscale == 1 and size == target and patch % 2 == 0


def labels_of_grid(maps: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Class of every pixel, `(H, W)` int64, of logits or scores `(K, h, w)`; of equals the lower class.

    patch: pixels a side of each cell, even; size: at most `(h patch, w patch)`, what lies beyond is cut off.
    """
    maps = maps.float()
    classes, h, w = maps.shape
    # A square of pixels between four token centres; beyond the outermost centres the nearest one counts.
    top = F.pad(maps.argmax(0)[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0].long()
    corners = (top[:-1, :-1], top[:-1, 1:], top[1:, :-1], top[1:, 1:])
    pixels = corners[0][:, None, :, None].repeat(1, patch, 1, patch)  # (h + 1, patch, w + 1, patch)
    differ = (corners[1] != corners[0]) | (corners[2] != corners[0]) | (corners[3] != corners[0])
    rows, columns = differ.nonzero().unbind(1)

    share = (torch.arange(patch, device=maps.device) + 0.5) / patch
    sides = torch.stack([1 - share, share])
    weights = (sides[:, None, :, None] * sides[None, :, None, :]).reshape(4, patch * patch)
    flat = maps.flatten(1)
    step = max(1, TILE_ELEMENTS // (classes * patch * patch))
    with torch.autocast(maps.device.type, enabled=False):
        for row, column in zip(rows.split(step), columns.split(step)):
            above, below = (row - 1).clamp(min=0) * w, row.clamp(max=h - 1) * w
            left, right = (column - 1).clamp(min=0), column.clamp(max=w - 1)
            cells = torch.stack([above + left, above + right, below + left, below + right], 1).flatten()
            values = flat.index_select(1, cells).view(classes, -1, 4) @ weights
            pixels[row, :, column, :] = values.argmax(0).view(-1, patch, patch)
    half = patch // 2
    whole = pixels.view((h + 1) * patch, (w + 1) * patch)
    return whole[half : half + size[0], half : half + size[1]]
