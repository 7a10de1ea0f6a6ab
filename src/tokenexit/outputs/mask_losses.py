"""The losses of mask classification: queries are matched with the classes of their image and judged at drawn points.

A semantic target is one mask for each class that an image shows. Points are read bilinearly from masks of any size in
coordinates from 0 to 1, so that predictions are not upsampled. A point that touches an ignored pixel counts in nothing;
where ignored pixels are "counted", as in the release, they are negatives of every mask.

Source: Mask2Former (Cheng et al., 2022), as EoMT (Kerssies et al., 2025) is trained.

Legend: B images, Q queries, K classes, M masks, P points, h x w cells of mask logits, H x W pixels of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.inputs.labels import IgnoredPixels
from tokenexit.outputs.matching import assign
from tokenexit.runtime.distributed import mean_over_processes

POINTS = 12544
"""Points of an image that matching reads, and points of every matched mask that losses read."""
OVERSAMPLED, UNCERTAIN_SHARE = 3, 0.75
CLASS_WEIGHT, ENTROPY_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1


class Terms(NamedTuple):
    """The three terms of the loss of one prediction, not yet weighted, as scalars."""

    classes: Tensor
    entropy: Tensor
    dice: Tensor

    def weighted(self) -> Tensor:
        return CLASS_WEIGHT * self.classes + ENTROPY_WEIGHT * self.entropy + DICE_WEIGHT * self.dice


@dataclass(frozen=True)
class MaskTargets:
    """What the queries of one image are to predict.

    Attributes:
        classes: `(M,)` int64, the class of each mask, increasing.
        masks: `(M, H, W)` fp32, 1 inside a mask.
        ignored: `(H, W)` fp32, 1 at pixels that count in nothing.
    """

    classes: Tensor
    masks: Tensor
    ignored: Tensor


def mask_targets(labels: Tensor, ignore_index: int, ignored: IgnoredPixels = "left_out") -> MaskTargets:
    """Make the targets of one image from its labels `(H, W)`: one mask for each class in them."""
    void = labels == ignore_index
    classes = labels[~void].unique()
    masks = (labels == classes[:, None, None]).float()
    return MaskTargets(classes, masks, torch.zeros_like(void).float() if ignored == "counted" else void.float())


def mask_classification_loss(
    mask_logits: Tensor, class_logits: Tensor, targets: Sequence[MaskTargets], points: int = POINTS
) -> Terms:
    """Return the terms of the loss of one prediction on a batch; points are drawn from torch's random state.

    Args:
        mask_logits: `(B, Q, h, w)`, before the sigmoid.
        class_logits: `(B, Q, K + 1)`, the last for "no object".
        targets: those of each image.
        points: number P of points.

    Returns:
        Cross-entropy over all queries, its mean weighted by 0.1 for "no object"; binary cross-entropy and dice of the
        matched masks, summed and divided by the number of masks, averaged over processes.
    """
    mask_logits, class_logits = mask_logits.float(), class_logits.float()
    device, no_object = class_logits.device, class_logits.shape[2] - 1
    pairs = [match(*each, points) for each in zip(mask_logits, class_logits, targets)]
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])

    wanted = torch.full(class_logits.shape[:2], no_object, dtype=torch.int64, device=device)
    wanted[image, query] = torch.cat([each.classes[mask] for each, (_, mask) in zip(targets, pairs)])
    weight = torch.ones(no_object + 1, device=device)
    weight[no_object] = NO_OBJECT_WEIGHT
    classes = F.cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), weight)

    matched = mask_logits[image, query]  # (M of all images, h, w)
    masks = torch.cat([each.masks[mask] for each, (_, mask) in zip(targets, pairs)])
    place = draw_points(matched.detach(), points)
    logits, inside = read_points(matched, place), read_points(masks, place)
    judged = (read_points(torch.stack([each.ignored for each in targets])[image], place) == 0).float()
    total = torch.tensor(sum(len(each.classes) for each in targets), dtype=torch.float32, device=device)
    total = mean_over_processes(total).clamp(min=1.0)
    return Terms(
        classes,
        mask_entropy(logits, inside, judged).sum() / total,
        dice_loss(logits, inside, judged).sum() / total,
    )


@torch.no_grad()
def match(
    mask_logits: Tensor, class_logits: Tensor, targets: MaskTargets, points: int = POINTS
) -> tuple[Tensor, Tensor]:
    """Match the queries of one image `(Q, h, w)` and `(Q, K + 1)` with its masks, at one set of points for all.

    Returns the query, by increasing number, and the mask of each pair, int64.
    """
    place = torch.rand(1, points, 2, device=mask_logits.device)
    cost = matching_cost(
        read_points(mask_logits[None], place)[0],
        class_logits,
        read_points(targets.masks[None], place)[0],
        targets.classes,
        (read_points(targets.ignored[None, None], place)[0, 0] == 0).float(),
    )
    mask, query = assign(cost.T.cpu().numpy())  # few masks, many queries: rows are what assigning is slow in
    order = query.argsort()
    pairs = [torch.from_numpy(each[order]).to(mask_logits.device) for each in (query, mask)]
    return pairs[0], pairs[1]


def matching_cost(mask_logits: Tensor, class_logits: Tensor, masks: Tensor, classes: Tensor, judged: Tensor) -> Tensor:
    """Return the cost of every pair, `(Q, M)`: 2 (minus probability) + 5 binary cross-entropy + 5 dice.

    mask_logits: `(Q, P)` and masks `(M, P)` at the points; class_logits: `(Q, K + 1)`; classes: `(M,)`; judged: `(P,)`,
    0 for points that count in nothing.
    """
    positive, negative = F.softplus(-mask_logits) * judged, F.softplus(mask_logits) * judged
    entropy = (positive @ masks.T + negative @ (1 - masks).T) / judged.sum().clamp(min=1.0)
    inside, masks = mask_logits.sigmoid() * judged, masks * judged
    dice = 1 - (2 * inside @ masks.T + 1) / (inside.sum(1)[:, None] + masks.sum(1) + 1)
    return -CLASS_WEIGHT * class_logits.softmax(1)[:, classes] + ENTROPY_WEIGHT * entropy + DICE_WEIGHT * dice


def draw_points(logits: Tensor, points: int) -> Tensor:
    """Draw points for each mask `(M, h, w)`, `(M, P, 2)`: three quarters where its sign is least certain.

    These are the ones with the smallest logits, positive or negative, of three times as many drawn evenly; the last
    quarter is drawn evenly.
    """
    drawn = torch.rand(len(logits), OVERSAMPLED * points, 2, device=logits.device)
    uncertain = int(UNCERTAIN_SHARE * points)
    chosen = (-read_points(logits, drawn).abs()).topk(uncertain, dim=1).indices
    even = torch.rand(len(logits), points - uncertain, 2, device=logits.device)
    return torch.cat([drawn.gather(1, chosen[:, :, None].expand(-1, -1, 2)), even], dim=1)


def read_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps bilinearly at points (x, y) in [0, 1], zero beyond the border.

    maps: `(M, h, w)` with points `(M, P, 2)` for each, to `(M, P)`; or `(M, C, h, w)`, to `(M, C, P)`.
    """
    single = maps.ndim == 3
    read = F.grid_sample(maps[:, None] if single else maps, 2 * points[:, :, None] - 1, align_corners=False)
    return read[:, 0, :, 0] if single else read[..., 0]


def mask_entropy(logits: Tensor, target: Tensor, judged: Tensor) -> Tensor:
    """Return the binary cross-entropy of each mask, averaged over its judged points: `(M, P)` to `(M,)`."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * judged
    return entropy.sum(1) / judged.sum(1).clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor, judged: Tensor) -> Tensor:
    """Return the dice loss with smoothing 1 of each mask over what is judged: `(M, ...)` to `(M,)`."""
    probability = (torch.sigmoid(logits) * judged).flatten(1)
    target = (target * judged).flatten(1)
    overlap = (probability * target).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
