"""Metrics of label maps: integer counts per image, ratios once at the end.

Counts of images, batches and processes add up, so neither their number nor their order can change a score.

Legend: H, W height and width in pixels; K classes; d the boundary distance in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.errors import ConfigError, DataError

BOUNDARY_RATIO = 0.02
"""Boundary distance as a share of the image diagonal (Cheng et al., CVPR 2021)."""

_OUTSIDE = -1
"""The label of "no class" in boundaries: void pixels and everything outside the image."""


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, in percent; names and meanings follow mmsegmentation.

    aacc (aAcc): share of all counted pixels that are right.
    miou, macc (mIoU, mAcc): means of `iou` and `accuracy` over the classes where they are not NaN.
    iou: per class, right / (in truth or predicted); NaN where the class is in neither.
    accuracy: per class, right / in truth; NaN where the class is not in truth.

    All are NaN if no pixel was counted.
    """

    aacc: float
    miou: float
    macc: float
    iou: tuple[float, ...]
    accuracy: tuple[float, ...]


def confusion_matrix(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Count pixels of truth class i (row) predicted as class j (column): two `(H, W)` int maps to `(K, K)` int64.

    Pixels whose target is `ignore_index` are not counted, whatever was predicted there. Raises `DataError` for
    maps of different shape, and for counted values that are no class.
    """
    _check_maps(pred, target, num_classes, ignore_index)
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import
    except (ImportError, RuntimeError) as error:  # it imports torchvision where there is one, working or not
        raise ConfigError(
            f"torchmetrics cannot be imported ({str(error).splitlines()[0]}): run `tokenexit doctor`, which names the "
            "cause, most often a torchvision that does not match torch."
        ) from None
    counts: Tensor = multiclass_confusion_matrix(
        pred, target, num_classes=num_classes, ignore_index=ignore_index, validate_args=False
    )
    return counts


def scores(confusion: Tensor) -> Scores:
    """Return the scores in percent of a `(K, K)` integer confusion matrix with truth in rows, summed over a dataset."""
    counts = confusion.to("cpu", torch.int64)
    right, truth, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou = _percent(right, truth + predicted - right)
    accuracy = _percent(right, truth)
    return Scores(
        aacc=_percent(right.sum(), counts.sum()).item(),
        miou=iou.nanmean().item(),
        macc=accuracy.nanmean().item(),
        iou=tuple(iou.tolist()),
        accuracy=tuple(accuracy.tolist()),
    )


def boundary_counts(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int, dilation_ratio: float = BOUNDARY_RATIO
) -> tuple[Tensor, Tensor]:
    """Count boundary intersections and unions of one image: two `(H, W)` int maps to two `(K,)` int64 counts of pixels.

    Boundary IoU after Cheng et al. (CVPR 2021), applied to the mask of each class in each image. What
    was chosen:

    - the boundary region of a mask is the mask minus its erosion by a square of side 2 d + 1, which is what d
      erosions by a 3x3 square come to; d = max(1, round(dilation_ratio * diagonal of the image in pixels));
    - all beyond the image counts as outside of every mask, so a mask has a boundary along the image border;
    - void pixels (target is `ignore_index`) are taken out of the masks of truth and prediction alike before the
      erosion: they are never counted, and both masks have a boundary along them;
    - intersection is |Gd and Pd|, union |Gd or Pd|; both are added up over images, and divided once at the end.

    Raises `DataError` as `confusion_matrix` does.
    """
    _check_maps(pred, target, num_classes, ignore_index)
    void = target == ignore_index
    # Classes count up to K, so four bytes hold them; the passes over windows are bound by memory.
    maps = torch.stack([target.int(), pred.int()]).masked_fill_(void, _OUTSIDE)
    # Void pixels are no class and drop out of all three counts.
    at_truth, at_pred = near_edge(maps, boundary_distance(target.shape[-2], target.shape[-1], dilation_ratio)) & ~void
    truth, predicted = maps
    both = at_truth & at_pred & (truth == predicted)
    intersection = torch.bincount(truth[both], minlength=num_classes)
    region_sizes = torch.bincount(torch.cat([truth[at_truth], predicted[at_pred]]), minlength=num_classes)
    return intersection, region_sizes - intersection


def boundary_iou(intersection: Tensor, union: Tensor) -> float:
    """Return the mean boundary IoU in percent of two `(K,)` counts over a dataset, over classes with a union."""
    return _percent(intersection, union).nanmean().item()


def boundary_distance(height: int, width: int, dilation_ratio: float = BOUNDARY_RATIO) -> int:
    """Return the distance d in pixels: `dilation_ratio` of the diagonal, rounded, and at least 1."""
    return max(1, round(dilation_ratio * math.hypot(height, width)))


def near_edge(labels: Tensor, distance: int) -> Tensor:
    """Mark pixels that erosion takes off the mask of their own class: `(N, H, W)` int maps to `(N, H, W)` bool.

    A pixel survives in the eroded mask of its class exactly if the square of side 2 d + 1 around it holds that
    class alone, that is if minimum and maximum over the square agree. One pass therefore serves all classes.
    Labels are at least -1, and the outside of the image is -1.
    """
    padded = F.pad(labels, (distance,) * 4, value=_OUTSIDE)
    highest = lowest = padded
    for dim in (-1, -2):  # rows, then columns: the square is the window of windows
        highest = _window(highest, 2 * distance + 1, dim, torch.maximum)
        lowest = _window(lowest, 2 * distance + 1, dim, torch.minimum)
    return highest != lowest


def _window(values: Tensor, length: int, dim: int, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the maximum or minimum over every window of `length` along `dim`, which gets `length - 1` shorter.

    Windows of 1, 2, 4, ... by doubling; two of them, overlapping, make the last: log2 steps instead of `length`.
    """
    have = 1
    while have < length:
        shift = min(have, length - have)
        size = values.shape[dim] - shift
        values = extreme(values.narrow(dim, 0, size), values.narrow(dim, shift, size))
        have += shift
    return values


def agreement_counts(a: Tensor, b: Tensor, ignore: Tensor | None = None) -> tuple[int, int]:
    """Count pixels where two label maps agree, and pixels compared; both add up over images.

    a, b: int maps of one shape. ignore: bool map of that shape, true where a pixel is left out (for example
    `target == ignore_index`).
    """
    if a.shape != b.shape:
        raise DataError(f"label maps of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: resize one.")
    equal = a == b
    if ignore is None:
        return int(equal.sum()), equal.numel()
    return int((equal & ~ignore).sum()), int((~ignore).sum())


def pixel_agreement(a: Tensor, b: Tensor, ignore: Tensor | None = None) -> float:
    """Return the share in [0, 1] of pixels where two label maps agree; NaN without pixels. See `agreement_counts`."""
    equal, compared = agreement_counts(a, b, ignore)
    return equal / compared if compared else math.nan


def _percent(part: Tensor, whole: Tensor) -> Tensor:
    """Return 100 part / whole of integer counts, in fp64; 0 / 0 is NaN."""
    return 100.0 * part.double().cpu() / whole.double().cpu()


def _check_maps(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Reject maps whose values would silently land in another class's cell."""
    if pred.shape != target.shape:
        raise DataError(
            f"the prediction has shape {tuple(pred.shape)}, its target {tuple(target.shape)}: bring both to one size."
        )
    counted = target != ignore_index
    for what, values in (("prediction", pred), ("target", target)):
        wrong = counted & ((values < 0) | (values >= num_classes))
        # One host read per map, at the end of an image's evaluation: wrong counts would cost more.
        if bool(wrong.any()):
            raise DataError(
                f"the {what} holds class {int(values[wrong][0])}, outside 0..{num_classes - 1}: check num_classes="
                f"{num_classes} and ignore_index={ignore_index}."
            )
