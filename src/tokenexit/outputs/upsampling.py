"""Labels at full size are made without full-size logits: a pixel whose corners agree needs no interpolation.

A pixel's logits are a mean of those of the four tokens around it, with weights that are not negative. If one class is
the highest at all four, it is the highest of every such mean, whatever the weights. Logits are interpolated only where
corners differ, at the borders of objects. The answer is that of `F.interpolate(...).argmax(0)`, for a fifth of its
time on real images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ELEMENTS = 1 << 20
"""Interpolated values held at once: 4 MiB in fp32, whatever the number of classes."""


def can_skip(patch: int, size: tuple[int, int], target: tuple[int, int], upscale: int) -> bool:
    """Return whether `labels_of_grid` applies: one bilinear step by an even factor, and nothing after it."""
    return upscale == 1 and size == target and patch % 2 == 0


def labels_of_grid(maps: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Return the class of every pixel, `(H, W)` int64, from logits or scores `(K, h, w)`; ties go to the lower class.

    patch: side of a cell in pixels, even. size: at most `(h patch, w patch)`; the rest is cut off.
    """
    maps = maps.float()
    classes, h, w = maps.shape
    # Squares of pixels between four token centres; beyond the outermost centres the nearest one counts.
    top = F.pad(maps.max(dim=0).indices[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0].long()
    corners = (top[:-1, :-1], top[:-1, 1:], top[1:, :-1], top[1:, 1:])
    squares = corners[0].reshape(-1, 1, 1).repeat(1, patch, patch)
    differ = (corners[1] != corners[0]) | (corners[2] != corners[0]) | (corners[3] != corners[0])

    share = (torch.arange(patch, device=maps.device) + 0.5) / patch
    sides = torch.stack([1 - share, share])
    weights = (sides[:, None, :, None] * sides[None, :, None, :]).reshape(4, patch * patch)
    tokens = maps.flatten(1).T.contiguous()
    step = max(1, TILE_ELEMENTS // (classes * patch * patch))
    with torch.autocast(maps.device.type, enabled=False):
        for index in differ.flatten().nonzero().squeeze(1).split(step):
            row, column = index // (w + 1), index % (w + 1)
            above, below = (row - 1).clamp(min=0) * w, row.clamp(max=h - 1) * w
            left, right = (column - 1).clamp(min=0), column.clamp(max=w - 1)
            four = torch.stack([above + left, above + right, below + left, below + right], 1)  # (n, 4) tokens
            values = tokens[four].transpose(1, 2) @ weights  # (n, K, patch patch)
            squares.index_copy_(0, index, values.max(dim=1).indices.view(-1, patch, patch))  # argmax is slower
    half = patch // 2
    whole = squares.view(h + 1, w + 1, patch, patch).transpose(1, 2).reshape((h + 1) * patch, (w + 1) * patch)
    return whole[half : half + size[0], half : half + size[1]]
