"""CBT: Class Based Thresholding (Görmez and Koyuncu, 2022, arXiv 2210.15621): easy classes leave at lower scores.

As its authors describe it: of all training pixels of true class k, the mean of the class probabilities is taken at
every exit, and then over exits. The gap between its two largest elements says how easy the class is. Gaps are mapped
inversely to [alpha, beta]: the easiest class has the lowest threshold alpha, the hardest has beta. A pixel leaves where
its highest probability exceeds the threshold of its class, at all exits the same. On Cityscapes they take 0.9 to 0.998
where one threshold for all classes was 0.998.

Our reading where that leaves room: the end of the network counts as an exit; the mapping is linear; classes that the
training images do not show have beta. The authors let a pixel leave if any class exceeds its own threshold, which for
thresholds of at least 1/2 is the one predicted.

Legend: E exits, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, recorded_windows, true_run
from tokenexit.calibration.planner import costs_of
from tokenexit.calibration.store import calibration_of
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.engine.tokens import unpack_grids
from tokenexit.errors import ConfigError, DataError
from tokenexit.evaluation.evaluate import check_classes
from tokenexit.heads import class_scores
from tokenexit.methods import ExitRecord, Method
from tokenexit.methods.thresholded import calibratable
from tokenexit.outputs.segmentation import SegmentationOutput, resize_maps


def cbt_thresholds(
    calibration_set: CalibrationSet, alpha: float = 0.9, beta: float = 0.998
) -> tuple[tuple[float, ...], ...]:
    """Thresholds by exit and class, `(E, K)`, from training images, for `DToP(threshold=..., keep_per_class=0)`.

    calibration_set: the model in evaluation mode, and training images with their truth. alpha, beta: thresholds of the
    easiest and the hardest class. Raises `ConfigError` for a range that is none and for another number of classes,
    `DataError` for images without truth.
    """
    if not 0.0 <= alpha <= beta <= 1.0:
        raise ConfigError(f"alpha={alpha:g} and beta={beta:g} are no range in [0, 1]: give alpha <= beta.")
    check_classes(calibration_set.model, calibration_set.data)
    by_class = thresholds_by_gap(class_means(calibration_set).mean(dim=0), alpha, beta)
    return (by_class,) * len(calibration_set.model.config.exits)


def calibrate_by_class(
    calibration_set: CalibrationSet,
    method: Method[Any],
    alpha: float = 0.9,
    beta: float = 0.998,
    about: dict[str, Any] | None = None,
) -> Calibration:
    """`method` with class-based thresholds, and what it reaches on the same images; raises as `cbt_thresholds` does.

    CBT itself keeps nobody: `DToP(keep_per_class=0)`.
    """
    method = calibratable(method).with_thresholds(cbt_thresholds(calibration_set, alpha, beta))
    run = true_run(calibration_set, method, dense_reference(calibration_set))
    unlike = error(run.confusion, "pixels").mean().item()
    return calibration_of(
        calibration_set.model,
        method,
        run,
        asked={"cbt": [alpha, beta], "precision": calibration_set.precision},
        guarantee=f"Class-based thresholds from {alpha:g} to {beta:g} (CBT): no budget and no bound was asked for. The "
        f"mean over these {len(calibration_set)} images is {run.mac_ratio:.3f} of dense "
        f"multiply-adds, with {1 - unlike:.2%} of "
        "pixels as the dense model has them." + fall_off_note(unlike, len(calibration_set)),
        reached={**costs_of(run), "pixels_unlike_dense": unlike},
        images={**(about or {}), "count": len(calibration_set)},
    )


def thresholds_by_gap(means: Tensor, alpha: float, beta: float) -> tuple[float, ...]:
    """The class with the widest gap between its two largest means has `alpha`, that with the narrowest `beta`.

    means: `(K, K)` mean probabilities by true class, NaN for a class never seen.
    """
    highest = F.pad(means, (0, 1)).topk(2, dim=1).values  # padded as one class alone has no second
    gap = highest[:, 0] - highest[:, 1]
    seen = gap[~gap.isnan()]
    width = (seen.max() - seen.min()).clamp(min=torch.finfo(gap.dtype).tiny)
    ease = ((gap - seen.min()) / width).nan_to_num(0.0)
    return tuple(round(beta - e * (beta - alpha), 6) for e in ease.tolist())


def class_means(calibration_set: CalibrationSet) -> Tensor:
    """Mean class probabilities over the pixels of each true class at each exit and at the end, in a dense pass.

    Returns `(E + 1, K, K)` fp64, true class by row; NaN for a class that no pixel shows. ATM heads say presence times
    sigmoid, heads of masks the sum over their queries. Truth is taken at the size that the network sees, windows one by
    one.
    """
    model, labels = calibration_set.model, calibration_set.data.labels
    device = model.device
    sums = torch.zeros(
        len(model.config.exits) + 1, labels.num_classes, labels.num_classes, dtype=torch.float64, device=device
    )
    pixels = torch.zeros(labels.num_classes, dtype=torch.int64, device=device)
    for output, truth in recorded_windows(calibration_set, "class probabilities"):
        own = truth.to(device)
        members = {k: own == k for k in own.unique().tolist() if k != labels.ignore_index}
        for k, member in members.items():
            pixels[k] += member.sum()
        for n, record in enumerate(output.exit_records):
            probabilities = _probabilities(output, record)
            for k, member in members.items():
                sums[n, k] += probabilities[:, member].sum(dim=1, dtype=torch.float64)
    if not pixels.any():
        raise DataError("these images have no labels: CBT needs the truth of training images.")
    return torch.where(pixels[:, None] > 0, sums / pixels[:, None], torch.nan)


def _probabilities(output: SegmentationOutput, record: ExitRecord) -> Tensor:
    """Class probabilities of an exit at every pixel of one image, `(K, H, W)` fp32; of masks their scores."""
    if record.kind == "masks":
        return output.maps(0)(slice(None))
    assert record.logits is not None, "exits are recorded"
    values = record.logits.float()
    if record.kind == "atm":
        values = class_scores(
            "atm", values, record.presence, torch.zeros(len(values), dtype=torch.long).to(values.device)
        )
    grid = output.grid(0)
    ((_, maps),) = unpack_grids(values, [grid], record.scale)
    maps = resize_maps(maps, grid, output.patch_size, record.upscale, output.sizes[0])[0]
    return maps if record.kind == "atm" else maps.softmax(dim=0)
