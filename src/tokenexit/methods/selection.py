"""Scores and rules are pure functions: they grade tokens and choose which ones leave.

Legend: P live patch tokens of the batch in packed order, K classes, cells = all patches of all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.ranks import among_first, rank
from tokenexit.engine.tokens import Grid, Packing, on_host, pack_grids, unpack_grids

Score = Literal["probability", "margin", "entropy"]
"""The measure of a head's confidence in a token: see `confidence`."""


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature, in fp32; at 1 they stay as they are.

    One number per head, above 1 where it is overconfident (Guo et al., 2017). Their order, and so the predicted class,
    stays; only scores move.
    """
    return logits if temperature == 1.0 else logits.float() / temperature


def confidence(probabilities: Tensor, score: Score = "probability", dim: int = -1) -> Tensor:
    """Return the confidence of a head, in [0, 1]: `(P, K)` to `(P,)`.

    probabilities: of the classes, along `dim`, fp32. score: the highest "probability", its "margin" over the second
    highest, or "entropy", `1 - H / log K` for the entropy H of the distribution. With one class it is its probability.
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
    """Average the score on the softmax head's fine grid over each patch (`do_vit.py` of DoViT's release).

    logits: `(sum h w scale^2, K)` on complete grids; they are first interpolated by `upscale`. Returns `(cells,)`.
    """
    logits = scale_logits(logits, temperature)
    if scale == upscale == 1:
        return confidence(logits.float().softmax(dim=-1), score)
    fine = _fine_probabilities(logits, grids, scale, upscale)
    pooled = [(members, F.avg_pool2d(confidence(p, score, 1).unsqueeze(1), scale * upscale)) for members, p in fine]
    return pack_grids(pooled).squeeze(1)


def pooled_label(logits: Tensor, grids: Sequence[Grid], scale: int, upscale: int) -> Tensor:
    """Return the class of the highest probability, averaged over each patch as scores are: `(cells,)` int64."""
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
    """Return where scores `(P,)` are strictly above the threshold, a number or `(P,)` of them: `(P,)` bool."""
    return score > threshold


def on_boundary(label: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Mark patches above, below, left or right of one of another class: `(cells,)` to `(cells,)` bool.

    Corners do not touch. Images of any sizes at once, without a loop.
    """
    index = torch.arange(len(label), device=label.device)
    _, height, width, row, column = _places(grids, label.device)
    right = (column + 1 < width) & (label != label.roll(-1))
    below = (row + 1 < height) & (label != label[(index + width).clamp(max=len(label) - 1)])
    above = (row > 0) & below[(index - width).clamp(min=0)]
    return right | right.roll(1) | below | above


def windows_of(grids: Sequence[Grid], side: int, device: torch.device) -> Tensor:
    """Return the window of every patch, `(cells,)` int64: equal within an image's squares of `side` x `side` patches.

    side: at least 2. Images of any sizes at once, without a loop; what lies at the right and lower edge may be smaller.
    """
    image, _, width, row, column = _places(grids, device)
    of_image = row // side * (width // side + 1) + column // side
    return of_image if image is None else image * max(h * w for h, w in grids) + of_image


def lattice(grids: Sequence[Grid], distance: int, position: Tensor) -> Tensor:
    """Return which patches, at these rows of the canvas `(P,)`, lie where every so many rows and columns cross.

    The first row and column are half a distance from the border. Returns `(P,)` bool.
    """
    *_, row, column = _places(grids, position.device)
    on = (row % distance == distance // 2) & (column % distance == distance // 2)
    return on.index_select(0, position)


def _places(
    grids: Sequence[Grid], device: torch.device
) -> tuple[Tensor | None, Tensor | int, Tensor | int, Tensor, Tensor]:
    """Return every patch's image, the rows and columns of its grid, and its own row and column, each `(cells,)`.

    Of one image, which may be traced at any size, rows and columns are numbers, and there is no tensor of images.
    """
    if len(grids) == 1:
        ((rows, columns),) = grids
        index = torch.arange(rows * columns, device=device)
        row = index // columns
        return None, rows, columns, row, index - row * columns  # ONNX has no remainder of an open number
    cells = Packing.of([h * w for h, w in grids], device)
    image = cells.image_index()
    height, width = torch.tensor(grids, device=device).index_select(0, image).unbind(1)
    index_in_image = torch.arange(len(image), device=device) - cells.offsets[:-1].long().index_select(0, image)
    return image, height, width, index_in_image // width, index_in_image % width


def nobody(mask: Tensor) -> bool:
    """Return whether no row is true, where that can be read at no cost; else False.

    What is true of no token need not be computed.
    """
    return on_host(mask) and not len(mask.numpy().nonzero()[0])


def inherit(mass: Tensor, leaves: Tensor, label: Tensor, image: Tensor, images: int, num_classes: int) -> Tensor:
    """Share what tokens that leave stand for among those of the same image and predicted class that stay.

    All heirs get equal parts; what a class leaves that has no heir is lost.

    mass: `(P,)` fp32, how many patches each token stands for; leaves `(P,)` bool; label `(P,)` predicted class; image
    `(P,)`, of so many. Returns `(P,)`: what each stands for then, 0 for those that leave.
    """
    group = image * num_classes + label
    nothing = torch.zeros(images * num_classes, device=mass.device)
    left = nothing.index_add(0, group, mass * leaves)
    heirs = nothing.index_add(0, group, (~leaves).to(mass.dtype))
    share = (left / heirs.clamp(min=1)).index_select(0, group)
    return torch.where(leaves, 0.0, mass + share)


def retain_top_k(
    candidate: Tensor, score: Tensor, label: Tensor, image: Tensor | None, num_classes: int, k: int
) -> Tensor:
    """Return the candidates that stay: the k most confident of each image and predicted class, ties by lowest position.

    candidate: `(P,)` bool; score `(P,)`; label `(P,)` predicted class; image `(P,)`, None for one image. Rows are in
    raster order within an image. Returns `(P,)` bool. No loop over images or classes (`PruneHead` of DToP's release).
    """
    if k == 0:
        return torch.zeros_like(candidate)
    group = label if image is None else image * num_classes + label
    if on_host(candidate):
        rows = np.flatnonzero(candidate.numpy())
        return torch.from_numpy(_retain_top_k(rows, score.numpy(), group.numpy(), k)) if len(rows) else candidate
    # Within a group, candidates rank before all other tokens.
    return candidate & among_first(group, torch.where(candidate, score, -1.0), k)


def _retain_top_k(
    rows: npt.NDArray[np.int64], score: npt.NDArray[np.floating], group: npt.NDArray[np.int64], k: int
) -> npt.NDArray[np.bool_]:
    """Return the same for the candidates `rows` on a CPU, where calls of numpy take a third of torch's time."""
    rows = rows[np.lexsort((-score[rows], group[rows]))]  # ties by row, as this sort is stable
    ordered = group[rows]
    stays = np.zeros(len(score), dtype=np.bool_)
    stays[rows] = True
    stays[rows[k:][ordered[k:] == ordered[:-k]]] = False  # k places before is one of the same group
    return stays


def keep_at_most(leaves: Tensor, score: Tensor, image: Tensor, limit: Tensor) -> Tensor:
    """Return the tokens that leave once every image is held to its limit: beyond `leaves`, the most confident ones.

    leaves: `(P,)` bool; score, image `(P,)`; limit: `(B,)` int64, how many tokens of each image may go on. The least
    confident go on, ties by lowest position. Returns `(P,)` bool.
    """
    group = torch.where(leaves, len(limit), image)
    return leaves | (rank(group, score, descending=False) >= limit.index_select(0, image))
