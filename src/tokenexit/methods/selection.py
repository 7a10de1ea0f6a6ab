"""Grading tokens and choosing which ones leave: scores and rules, as pure functions.

Legend: P live patch tokens of the batch in packed order, K classes, cells = all patches of all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing, pack_grids, unpack_grids

Score = Literal["probability", "margin", "entropy"]
"""How sure a head is of a token: see `confidence`."""


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, in fp32; at 1 as they are (Guo et al., 2017: one number per head, above 1 where it
    is too sure). Order and so classes stay; only scores move."""
    return logits if temperature == 1.0 else logits.float() / temperature


def confidence(probabilities: Tensor, score: Score = "probability", dim: int = -1) -> Tensor:
    """How sure a head is, in [0, 1], 1 for what cannot be surer: `(P, K)` to `(P,)`.

    probabilities: of the classes, along `dim`, fp32. score: the highest "probability", its "margin" over the second
    highest, or "entropy", `1 - H / log K` for the entropy H of the distribution. Of one class it is its probability.
    """
    if score == "probability" or probabilities.shape[dim] == 1:
        return probabilities.amax(dim)
    if score == "margin":
        highest: Tensor = probabilities.topk(2, dim).values
        return highest.select(dim, 0) - highest.select(dim, 1)
    entropy: Tensor = torch.special.entr(probabilities).sum(dim)
    return (1.0 - entropy / math.log(probabilities.shape[dim])).clamp(0.0, 1.0)


def pooled_score(
    logits: Tensor,
    grids: Sequence[Grid],
    scale: int,
    upscale: int,
    score: Score = "probability",
    temperature: float = 1.0,
) -> Tensor:
    """Score on the softmax head's fine grid, averaged over each patch (DoViT, release, `do_vit.py`).

    logits: `(sum h w scale^2, K)` on complete grids; they are first interpolated by `upscale`. Returns `(cells,)`.
    """
    logits = scale_logits(logits, temperature)
    if scale == upscale == 1:
        return confidence(logits.float().softmax(dim=-1), score)
    fine = _fine_probabilities(logits, grids, scale, upscale)
    pooled = [(members, F.avg_pool2d(confidence(p, score, 1).unsqueeze(1), scale * upscale)) for members, p in fine]
    return pack_grids(pooled).squeeze(1)


def pooled_label(logits: Tensor, grids: Sequence[Grid], scale: int, upscale: int) -> Tensor:
    """Class of the highest probability, averaged over each patch as scores are: `(cells,)` int64."""
    if scale == upscale == 1:
        return logits.argmax(dim=-1)
    fine = _fine_probabilities(logits, grids, scale, upscale)
    return pack_grids([(members, F.avg_pool2d(p, scale * upscale)) for members, p in fine]).argmax(dim=-1)


def _fine_probabilities(
    logits: Tensor, grids: Sequence[Grid], scale: int, upscale: int
) -> Iterator[tuple[list[int], Tensor]]:
    for members, maps in unpack_grids(logits.float(), grids, scale):
        if upscale > 1:
            maps = F.interpolate(maps, scale_factor=upscale, mode="bilinear", align_corners=False)
        yield members, maps.softmax(dim=1)


def exceeds(score: Tensor, threshold: float | Tensor) -> Tensor:
    """Tokens that may leave: score strictly above the threshold, or its own of `(P,)`. `(P,)` to `(P,)` bool."""
    return score > threshold


def on_boundary(label: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Patches beside one of another class, above, below, left or right in their image: `(cells,)` to `(cells,)` bool.

    Corners do not touch. Images of any sizes at once, without a loop.
    """
    cells = Packing.of([h * w for h, w in grids], label.device)
    image, index = cells.image_index(), torch.arange(len(label), device=label.device)
    height, width = torch.tensor(grids, device=label.device).index_select(0, image).unbind(1)
    place = index - cells.offsets[:-1].long().index_select(0, image)
    row, column = place // width, place % width
    right = (column + 1 < width) & (label != label.roll(-1))
    below = (row + 1 < height) & (label != label[(index + width).clamp(max=len(label) - 1)])
    above = (row > 0) & below[(index - width).clamp(min=0)]
    return right | right.roll(1) | below | above


def retain_top_k(candidate: Tensor, score: Tensor, label: Tensor, image: Tensor, num_classes: int, k: int) -> Tensor:
    """Candidates that stay: of each image and predicted class the k most confident, ties by lowest position.

    candidate: `(P,)` bool; score `(P,)`; label `(P,)` predicted class; image `(P,)`. Rows are in raster order within
    an image. Returns `(P,)` bool. One sort, no loop over images or classes (DToP, release, `PruneHead`).
    """
    if k == 0:
        return torch.zeros_like(candidate)
    # Tokens that are no candidates come behind those of their group that are.
    rank = _rank(image * num_classes + label, torch.where(candidate, score, -1.0), descending=True)
    return candidate & (rank < k)


def keep_at_most(leaves: Tensor, score: Tensor, image: Tensor, limit: Tensor) -> Tensor:
    """Tokens that leave once every image is held to its limit: beyond those that leave anyway, the surest ones.

    leaves: `(P,)` bool; score, image `(P,)`; limit: `(B,)` int64, how many tokens of each image may go on. The least
    sure go on, ties by lowest position. Returns `(P,)` bool.
    """
    group = torch.where(leaves, len(limit), image)
    return leaves | (_rank(group, score, descending=False) >= limit.index_select(0, image))


def _rank(group: Tensor, score: Tensor, descending: bool) -> Tensor:
    """Place of every row among those of its group by score, ties by row: `(P,)` int64, 0 is first.

    group: `(P,)` int64, none negative. Operations that graphs can be exported with, and no host synchronisation.
    """
    place = torch.arange(group.shape[0], device=group.device)
    by_score = torch.sort(score, descending=descending, stable=True).indices
    # No two keys are equal: there are runtimes that sort a graph's groups without regard to the order before.
    order = by_score[torch.sort(group[by_score] * group.shape[0] + place).indices]
    ordered = group[order]
    run = (ordered.diff(prepend=ordered.new_full((1,), -1)) != 0).cumsum(0) - 1  # groups are in one piece now
    length = torch.zeros_like(run).scatter_add(0, run, torch.ones_like(run))
    start = length.cumsum(0) - length
    rank = place - start.index_select(0, run)
    return torch.empty_like(rank).index_copy(0, order, rank)
