"""Pure functions that find which tokens are alike: windows, mutual neighbours, bipartite matching, components.

All decide for each image by itself, in fp32 under any autocast, and without gradient. They take patch tokens alone
(`Tokens.patches`) and answer with `into`, as `Tokens.merge` takes it.

Legend: P live patch tokens of the batch in packed order, C channels of what is compared, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.ranks import rank
from tokenexit.engine.tokens import Grid, Packing, Tokens

SCORES_AT_ONCE = 2**24
"""Similarities that are held at once: 64 MiB."""
TOLERANCE = 1e-6
"""Similarities this much below a relative threshold count as on it: rounding of the mean decides nothing."""


def unit(x: Tensor) -> Tensor:
    """Return rows of length one in fp32, without gradient: `(..., C)`."""
    return F.normalize(x.detach().float(), dim=-1)


def own_rows(tokens: Tokens) -> Tensor:
    """Return `into` of tokens that all stay, `(P,)` int64."""
    return torch.arange(len(tokens.position), device=tokens.position.device)


def row_of_cell(tokens: Tokens) -> Tensor:
    """Return the row of the live token at each cell, -1 where there is none: `(cells,)` int64."""
    empty = torch.full((tokens.cells,), -1, device=tokens.position.device)
    return empty.index_copy(0, tokens.position, own_rows(tokens))


# ---------------------------------------------------------------------------------------------------- windows


def windows(grids: Sequence[Grid], side: int, device: torch.device) -> Tensor:
    """Return the cells of all complete `side x side` windows, each in raster order: `(W, side^2)` int64.

    They are cut from the upper left; rows and columns that are left over belong to none.
    """
    parts, start = [torch.empty(0, side * side, dtype=torch.int64, device=device)], 0
    for h, w in grids:
        cells = torch.arange(start, start + h * w, device=device).view(h, w)[: h // side * side, : w // side * side]
        parts.append(
            cells.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).reshape(-1, side * side)
            if cells.numel()
            else parts[0]
        )
        start += h * w
    return torch.cat(parts)


@torch.no_grad()
def window_similarity(x: Tensor) -> Tensor:
    """Return the mean cosine of the ordered pairs in each window: `(W, n, C)` to `(W,)`.

    For unit vectors u it is `(|sum u|^2 - n) / (n (n - 1))`: no pairwise products.
    """
    n, total = x.shape[1], unit(x).sum(1)
    return (inner(total, total) - n) / (n * (n - 1))


@torch.no_grad()
def alike_windows(tokens: Tokens, side: int, threshold: float) -> Tensor:
    """Return `into` in which windows whose similarity is at least the threshold join their first token.

    Windows in which a token has left, or stands for several cells already, stay.
    """
    members, row, size = windows(tokens.grids, side, tokens.x.device), row_of_cell(tokens), tokens.sizes()
    rows = row[members]  # (W, n)
    seen = rows.clamp(min=0)
    if len(tokens.x) == 0 or len(members) == 0:
        return own_rows(tokens)
    whole = ((rows >= 0) & (size[seen] == 1)).all(1)
    merges = whole & (window_similarity(tokens.x[seen]) >= threshold)
    nobody = len(tokens.x)
    index = torch.where(rows >= 0, rows, nobody)
    target = torch.where(merges[:, None], index[:, :1], index)
    into = torch.arange(nobody + 1, device=rows.device).index_copy(0, index.flatten(), target.flatten())
    return into[:nobody]


def window_ops(grid: Grid, side: int, channels: int) -> Ops:
    """Count `window_similarity` on all windows of an image: one inner product each."""
    return Ops(macs=(grid[0] // side) * (grid[1] // side) * channels)


# ---------------------------------------------------------------------------------------------------- neighbours


@torch.no_grad()
def mutual_neighbours(x: Tensor, packing: Packing) -> Tensor:
    """Return `into` in which two tokens that are each other's nearest become one, at the lower row; ties go low.

    x: `(P, C)`, compared by cosine. Of Ravé et al., 2026.
    """
    parts = [torch.empty(0, dtype=torch.int64, device=x.device)]
    start = 0
    for image in unit(x).split(packing.lengths):
        n = len(image)
        if n:
            own = torch.arange(n, device=x.device)
            other = nearest(image, image, exclude_own=True)[1] if n > 1 else own
            mutual = other[other] == own
            parts.append(start + torch.where(mutual & (other < own), other, own))
        start += n
    return torch.cat(parts)


@torch.no_grad()
def bipartite(x: Tensor, packing: Packing, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Return for every token of set A its best similarity in set B and the row of it; of B -inf and its own row.

    Sets alternate along the image's sequence, the first of its prefix tokens in A; prefix tokens are compared with
    nobody. x: `(P, C)`, compared by cosine. Returns `(P,)` fp32 and `(P,)` int64. Of Bolya et al., 2023.
    """
    best = torch.full((len(x),), -torch.inf, device=x.device)
    partner = torch.arange(len(x), device=x.device)
    first, start = num_prefix % 2, 0
    for image in unit(x).split(packing.lengths):
        a, b = image[first::2], image[1 - first :: 2]
        if len(a) and len(b):
            rows_a = torch.arange(start + first, start + len(image), 2, device=x.device)
            value, index = nearest(a, b)
            best = best.index_copy(0, rows_a, value)
            partner = partner.index_copy(0, rows_a, start + 1 - first + 2 * index)
        start += len(image)
    return best, partner


def bipartite_ops(live: int, num_prefix: int, channels: int) -> Ops:
    """Count `bipartite` on one image."""
    a = (live + 1 - num_prefix % 2) // 2
    return Ops(macs=a * (live - a) * channels)


def nearest(a: Tensor, b: Tensor, exclude_own: bool = False) -> tuple[Tensor, Tensor]:
    """Return the largest inner product of each row of `a` with rows of `b`, and that row, the lowest if several."""
    values, rows, start = [], [], 0
    with torch.autocast(a.device.type, enabled=False):
        for some in a.split(max(SCORES_AT_ONCE // len(b), 1)):
            scores = some @ b.T
            if exclude_own:
                scores.diagonal(start).fill_(-torch.inf)
            value, row = scores.max(1)
            values.append(value)
            rows.append(row)
            start += len(some)
    return torch.cat(values), torch.cat(rows)


def above_mean(best: Tensor, image: Tensor, images: int, divisor: float) -> Tensor:
    """Return who of set A is at least as alike as `mean + std / divisor` of its image's set A: `(P,)` bool.

    best: of `bipartite`, `(P,)`; image: `(P,)`. The deviation is the unbiased one, 0 of a single token.
    """
    in_a = best > -torch.inf
    value = torch.where(in_a, best, 0.0).double()
    zeros = torch.zeros(images, dtype=torch.float64, device=best.device)
    count = zeros.index_add(0, image, in_a.double())
    mean = zeros.index_add(0, image, value) / count.clamp(min=1)
    apart = torch.where(in_a, (value - mean[image]) ** 2, 0.0)
    deviation = (zeros.index_add(0, image, apart) / (count - 1).clamp(min=1)).sqrt()
    return in_a & (value >= (mean + deviation / divisor - TOLERANCE)[image])


def most_alike(best: Tensor, image: Tensor, count: Tensor) -> Tensor:
    """Return the `count (B,)` most alike of set A in each image, or all of it, ties by lowest row: `(P,)` bool."""
    return (best > -torch.inf) & (rank(image, best, descending=True) < count[image])


# ---------------------------------------------------------------------------------------------------- components


@torch.no_grad()
def components(tokens: Tokens, threshold: float) -> Tensor:
    """Return `into` in which connected groups of alike neighbours become one, at the least row.

    Cells that touch at a side are connected where the cosine of their tokens is strictly above the threshold; cells
    whose token has left or was merged away connect nobody. One host synchronisation per round. Of Bercy et al., 2026.
    """
    row, u, own = row_of_cell(tokens), unit(tokens.x), own_rows(tokens)
    ends = []
    for cell in neighbours(tokens.grids, tokens.x.device).unbind(1):  # to the right, below
        other = torch.where(cell >= 0, row[cell.clamp(min=0)], -1)[tokens.position]
        alike = (other >= 0) & (inner(u, u[other.clamp(min=0)]) > threshold)
        ends.append(torch.where(alike, other, own))
    a, b = own.repeat(2), torch.cat(ends)
    label = own
    while True:
        low = torch.minimum(label[a], label[b])
        at = torch.cat([a, b, label[a], label[b]])
        lower = label.scatter_reduce(0, at, low.repeat(4), "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower


def neighbours(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Return the cells to the right of and below each cell, -1 at the edge: `(cells, 2)` int64."""
    parts, start = [torch.empty(0, 2, dtype=torch.int64, device=device)], 0
    for h, w in grids:
        cells = torch.arange(start, start + h * w, device=device).view(h, w)
        right = F.pad(cells[:, 1:], (0, 1), value=-1)
        below = F.pad(cells[1:], (0, 0, 0, 1), value=-1)
        parts.append(torch.stack([right.flatten(), below.flatten()], 1))
        start += h * w
    return torch.cat(parts)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products of rows, `(n, C)` and `(n, C)` to `(n,)` fp32."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
