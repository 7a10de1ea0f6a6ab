"""Confidence intervals of mIoU by a bootstrap over images (Efron, 1979): what other images of the kind would change.

An interval covers the draw of the images and nothing else: no other training run, camera or city. Of two methods on the
same images, the difference is far better known than either mIoU, since easy and hard images are shared.

Legend: n images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 1000
CONFIDENCE = 0.95


def class_counts(confusion: Tensor) -> Tensor:
    """Reduce `(..., K, K)` counts, truth by row, to the `(..., 3, K)` that IoU needs: right, in truth, predicted."""
    return torch.stack([confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)], dim=-2)


def resampled_miou(counts: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Return mIoU in percent of `draws` resamples of n images with replacement: `(n, 3, K)` to `(draws,)` fp64.

    The same n and seed draw the same images, so that values of two methods may be subtracted draw by draw.
    """
    n = len(counts)
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(draws, n, dtype=torch.float64)
    times.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return weighted_miou(times, counts)


def weighted_miou(weights: Tensor, counts: Tensor) -> Tensor:
    """Return mIoU in percent of weighted sums over images: `(D, n)` and `(n, 3, K)` to `(D,)`.

    Classes in neither truth nor prediction do not count."""
    right, truth, predicted = (weights @ counts.flatten(1).double()).unflatten(1, counts.shape[1:]).unbind(1)
    iou: Tensor = 100 * right / (truth + predicted - right)
    return iou.nanmean(dim=1)


def miou_interval(counts: Tensor, minus: Tensor | None = None) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of mIoU, or of its difference to that of `minus` on the same images.

    counts, minus: `(n, 3, K)`. None for fewer than two images, which do not show how images differ.
    """
    if len(counts) < 2:
        return None
    values = resampled_miou(counts)
    if minus is not None:
        values = values - resampled_miou(minus)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.nanquantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
