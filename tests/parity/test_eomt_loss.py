"""Losses of mask classification against transformers' module for EoMT; the same seed draws the same points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import distance
from tokenexit.outputs.mask_losses import mask_classification_loss, mask_targets, match
from tokenexit.outputs.matching import assign

pytestmark = pytest.mark.library("transformers", "scipy")

CLASSES, QUERIES, POINTS, VOID = 7, 12, 300, 255


@pytest.mark.parametrize("void", [False, True], ids=["whole", "void counted"])
@pytest.mark.parametrize("seed", range(4))
def test_terms_and_gradients__agree_with_transformers(seed: int, void: bool) -> None:
    from transformers import EomtConfig
    from transformers.models.eomt.modeling_eomt import EomtLoss

    config = EomtConfig(num_labels=CLASSES, train_num_points=POINTS)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    torch.manual_seed(seed)
    masks = (3 * torch.randn(3, QUERIES, 8, 10)).requires_grad_()
    classes = torch.randn(3, QUERIES, CLASSES + 1).requires_grad_()
    labels = torch.randint(0, CLASSES, (3, 4, 5)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :16] = 2  # images with different numbers of masks
    if void:
        labels[:, :9, :11] = VOID
    targets = [mask_targets(each, VOID, "counted") for each in labels]

    torch.manual_seed(100 + seed)
    theirs = EomtLoss(config, weights)(
        masks, classes, [each.masks for each in targets], [each.classes for each in targets]
    )
    expected = sum(weights[name] * term for name, term in theirs.items())
    expected_gradients = torch.autograd.grad(expected, [masks, classes])

    torch.manual_seed(100 + seed)
    found = mask_classification_loss(masks, classes, targets, POINTS)
    assert found.classes.item() == pytest.approx(theirs["loss_cross_entropy"].item(), rel=1e-5)
    assert found.entropy.item() == pytest.approx(theirs["loss_mask"].item(), rel=1e-5)
    assert found.dice.item() == pytest.approx(theirs["loss_dice"].item(), rel=1e-5)
    for ours, other in zip(torch.autograd.grad(found.weighted(), [masks, classes]), expected_gradients):
        assert distance(ours, other) <= 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_matching__agrees_with_transformers(seed: int) -> None:
    from transformers.models.eomt.modeling_eomt import EomtHungarianMatcher

    torch.manual_seed(seed)
    masks, classes = 3 * torch.randn(1, QUERIES, 8, 10), torch.randn(1, QUERIES, CLASSES + 1)
    targets = mask_targets(torch.randint(0, CLASSES, (32, 40)), VOID)
    matcher = EomtHungarianMatcher(2.0, 5.0, 5.0, POINTS)
    torch.manual_seed(100 + seed)
    ((query, mask),) = matcher(masks, classes, [targets.masks], [targets.classes])
    torch.manual_seed(100 + seed)
    found = match(masks[0], classes[0], targets, POINTS)
    assert (found[0].tolist(), found[1].tolist()) == (query.tolist(), mask.tolist())


@pytest.mark.parametrize("shape", [(1, 1), (9, 100), (100, 9), (35, 40), (60, 60)])
def test_assignment__costs_what_scipys_does(shape: tuple[int, int]) -> None:
    from scipy.optimize import linear_sum_assignment

    random = np.random.default_rng(sum(shape))
    for cost in (random.normal(size=shape), random.integers(0, 4, shape).astype(float)):  # the second is full of ties
        assert cost[assign(cost)].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), abs=1e-9)
