"""Losses of every exit and of the decode head are taken on full maps at label size.

Ignored pixels take part in no loss, or are "counted" as in the authors' releases: cross-entropy then divides by the
number of all pixels (mmsegmentation's `avg_non_ignore=False`, its default, which DoViT trains with), and mask losses
take ignored pixels as negatives of every class (DToP's release).

Legend: B images, K classes, (H, W) labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import unpack_grids
from tokenexit.errors import ConfigError, DataError
from tokenexit.methods import ExitRecord
from tokenexit.outputs.mask_losses import POINTS, dice_loss, mask_classification_loss, mask_targets
from tokenexit.outputs.segmentation import SegmentationOutput, padded_size, resize_maps
from tokenexit.runtime.distributed import mean_over_processes

IgnoredPixels = Literal["left_out", "counted"]
"""How losses treat ignored pixels: see this module."""

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
FOCAL_WEIGHT, DICE_WEIGHT = 20.0, 1.0
ABSENT_WEIGHT = 0.1


def segmentation_loss(
    output: SegmentationOutput,
    masks: Tensor,
    ignore_index: int = 255,
    aux_weight: float | None = None,
    stride: int = 1,
    class_weights: Sequence[float] | None = None,
    ignored: IgnoredPixels = "left_out",
    points: int = POINTS,
) -> Tensor:
    """Return the loss to train a model with: that of the decode head plus `aux_weight` times that of every exit.

    It warns where the exit heads get no gradient.

    Args:
        output: result for a batch of images of one size, from a model in training mode, or called with
            `with_records=True`.
        masks: `(B, H, W)` whole numbers, classes from 0 and `ignore_index`, usually at the size of the images; maps are
            resized to theirs.
        ignore_index: value of pixels that take part in no loss.
        aux_weight: weight of the exits' losses; if not given 0.4 for softmax heads (SETR, DoViT) and 1.0 for ATM heads
            (DToP), as in the releases' configurations.
        stride: take the loss on every n-th pixel of both axes; 1 as published, 2 saves most of its time on a CPU.
        class_weights: factor on the cross-entropy of each class, which ATM heads do not have.
        ignored: whether ignored pixels are "left_out" or "counted", see this module.
        points: number of points of an image, and of every mask, at which losses of heads of masks are taken; drawn from
            torch's random state.

    Returns:
        The loss, a scalar fp32 tensor.

    Raises:
        ConfigError: for images of several sizes, and for an output without the decode head's map.
        DataError: for masks that do not belong to the output.
    """
    _check_masks(output, masks, ignore_index)
    *exits, final = output.exit_records
    if final.logits is None and not final.masks:
        raise ConfigError("this output has no map of the decode head to take a loss of: run the model with Dense.")
    if aux_weight is None:
        aux_weight = 1.0 if any(record.kind == "atm" for record in exits) else 0.4
    recorded = [record for record in exits if record.logits is not None]
    _warn_without_gradient(len(exits), len(recorded), aux_weight)
    masks = masks[:, stride // 2 :: stride, stride // 2 :: stride].long()
    losses = [
        exit_loss(output, record, masks, ignore_index, class_weights, ignored, points) for record in (*recorded, final)
    ]
    return losses[-1] + aux_weight * torch.stack(losses[:-1]).sum() if len(losses) > 1 else losses[-1]


def _check_masks(output: SegmentationOutput, masks: Tensor, ignore_index: int) -> None:
    if len(set(output.sizes)) > 1:
        raise ConfigError("images of several sizes have no loss in common: pass a batch of one size.")
    if masks.ndim != 3 or len(masks) != len(output) or masks.is_floating_point() or 0 in masks.shape:
        raise DataError(
            f"masks of shape {tuple(masks.shape)} and type {masks.dtype} do not fit {len(output)} images: pass whole "
            f"numbers of shape ({len(output)}, height, width)."
        )
    classes = output.num_classes
    if masks.device.type != "cpu":  # a look at every value would make the host wait for the device
        return
    foreign = masks[(masks != ignore_index) & ((masks < 0) | (masks >= classes))]
    if len(foreign):
        raise DataError(
            f"masks hold the value {foreign[0].item()}, but classes are 0..{classes - 1} and ignore_index is "
            f"{ignore_index}: correct them, or name the value of void pixels as ignore_index."
        )


def _warn_without_gradient(exits: int, recorded: int, aux_weight: float) -> None:
    """Warn of untrained exit heads: such a model looks fine until tokens leave."""
    if not torch.is_grad_enabled() or not exits:
        return
    if recorded < exits:
        warnings.warn(
            f"{exits - recorded} of {exits} exit heads get no gradient, as this output has no maps of them: call "
            "model.train(), or the model with with_records=True.",
            stacklevel=3,
        )
    elif aux_weight == 0:
        warnings.warn("this loss gives the exit heads no gradient, as aux_weight is 0: raise it.", stacklevel=3)


def exit_loss(
    output: SegmentationOutput,
    record: ExitRecord,
    masks: Tensor,
    ignore_index: int,
    class_weights: Sequence[float] | None = None,
    ignored: IgnoredPixels = "left_out",
    points: int = POINTS,
) -> Tensor:
    """Return the loss on the full map of one exit, at the masks' resolution: cross-entropy, or the ATM loss.

    Heads of masks have none on a map but the sum of those of all their predictions (deep supervision).
    """
    if record.masks:
        return masks_loss(output, record, masks, ignore_index, ignored, points)
    assert record.logits is not None, "losses are taken on outputs of a model in training mode"
    grids = [output.grid(i) for i in range(len(output))]
    ((_, maps),) = unpack_grids(record.logits, grids, record.scale)  # training crops have one size
    size = (masks.shape[1], masks.shape[2])
    maps = resize_maps(maps.float(), grids[0], output.patch_size, record.upscale, output.sizes[0], size)
    if record.kind == "atm":
        assert record.presence is not None
        return atm_loss(record.presence.float(), maps, masks, ignore_index, ignored)
    return cross_entropy(maps, masks, ignore_index, class_weights, ignored)


def masks_loss(
    output: SegmentationOutput,
    record: ExitRecord,
    masks: Tensor,
    ignore_index: int,
    ignored: IgnoredPixels = "left_out",
    points: int = POINTS,
) -> Tensor:
    """Return the sum of the losses of all predictions of a head of masks; each is matched and judged at its own points.

    Predictions cover whole patches: padding beyond the image is void.
    """
    size = (masks.shape[1], masks.shape[2])
    height, width = padded_size(output.grid(0), output.patch_size, output.sizes[0], size)
    masks = F.pad(masks, (0, width - size[1], 0, height - size[0]), value=ignore_index)
    targets = [mask_targets(each, ignore_index, ignored) for each in masks]
    terms = [mask_classification_loss(each.logits, each.classes, targets, points) for each in record.masks]
    return torch.stack([each.weighted() for each in terms]).sum()


def cross_entropy(
    logits: Tensor,
    masks: Tensor,
    ignore_index: int,
    class_weights: Sequence[float] | None = None,
    ignored: IgnoredPixels = "left_out",
) -> Tensor:
    """Return the mean cross-entropy over the judged pixels; zero (not NaN) where none is judged.

    logits: `(B, K, H, W)`. ignored: "counted" divides the sum by the number of all pixels. class_weights: factor on the
        pixels of each class; the mean stays one over pixels, so weights should average to one.
    """
    weight = None if class_weights is None else logits.new_tensor(class_weights)
    total = F.cross_entropy(logits, masks, weight, ignore_index=ignore_index, reduction="sum")
    if ignored == "counted":
        return total / masks.numel()
    return total / (masks != ignore_index).sum().clamp(min=1)


def atm_loss(
    presence: Tensor, mask_logits: Tensor, masks: Tensor, ignore_index: int, ignored: IgnoredPixels = "left_out"
) -> Tensor:
    """Return presence cross-entropy + 20 focal + dice, each query for its own class (DToP's release).

    presence: `(B, K, 2)` logits of present and absent; mask_logits `(B, K, H, W)`; masks `(B, H, W)`.
    Mask losses are taken on classes present in the truth, and divided by the mean number of such masks over processes.
    """
    truth, judged = one_hot_masks(masks, mask_logits.shape[1], ignore_index)
    if ignored == "counted":
        judged = torch.ones_like(judged)
    present = truth.flatten(2).any(dim=2)  # (B, K)
    weight = presence.new_tensor([1.0, ABSENT_WEIGHT])
    presence_loss = F.cross_entropy(presence.flatten(0, 1), (~present).long().flatten(), weight=weight)
    logits, target = mask_logits[present], truth[present].to(mask_logits.dtype)  # (M, H, W)
    pixels = judged[:, None].expand_as(truth)[present]
    masks_per_process = mean_over_processes(present.sum().float()).clamp(min=1.0)
    focal = focal_loss(logits, target, pixels).sum() / masks_per_process
    dice = dice_loss(logits, target, pixels).sum() / masks_per_process
    return presence_loss + FOCAL_WEIGHT * focal + DICE_WEIGHT * dice


def one_hot_masks(masks: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Turn labels `(B, H, W)` into bool masks `(B, K, H, W)` and a bool map `(B, H, W)` of judged pixels."""
    judged = masks != ignore_index
    classes = torch.arange(num_classes, device=masks.device)
    return (masks[:, None] == classes[:, None, None]) & judged[:, None], judged


def focal_loss(logits: Tensor, target: Tensor, judged: Tensor) -> Tensor:
    """Return the sigmoid focal loss of each mask, averaged over its judged pixels: `(M, H, W)` to `(M,)`."""
    probability = torch.sigmoid(logits)
    p_true = probability * target + (1 - probability) * (1 - target)
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = alpha * (1 - p_true) ** FOCAL_GAMMA * entropy * judged
    return loss.flatten(1).sum(1) / judged.flatten(1).sum(1).clamp(min=1)
