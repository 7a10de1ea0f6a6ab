"""Losses of mask classification against loops over queries, masks and points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import random_image, tiny_segmenter
from tests.oracles import mask_losses as oracle
from tokenexit.heads import MaskPrediction
from tokenexit.outputs.losses import IgnoredPixels, exit_loss, segmentation_loss
from tokenexit.outputs.mask_losses import (
    draw_points,
    mask_classification_loss,
    mask_targets,
    match,
    read_points,
)

VOID, CLASSES, QUERIES, POINTS = 255, 3, 4, 24


def prediction(seed: int, cells: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = 2 * torch.randn(QUERIES, *cells, generator=generator)
    return masks, torch.randn(QUERIES, CLASSES + 1, generator=generator)


def labels_with_void(seed: int) -> Tensor:
    labels = torch.randint(0, CLASSES, (9, 7), generator=torch.Generator().manual_seed(seed))
    labels[:3, :4] = VOID
    return labels


@given(st.integers(0, 10**6), st.sampled_from(["left_out", "counted"]))
@settings(max_examples=20, deadline=None)
def test_loss__is_that_of_loops_over_queries_masks_and_points(seed: int, ignored: IgnoredPixels) -> None:
    (mask_logits, class_logits), labels = prediction(seed), labels_with_void(seed)
    targets, counted = mask_targets(labels, VOID, ignored), ignored == "counted"
    torch.manual_seed(seed)
    found = mask_classification_loss(mask_logits[None], class_logits[None], [targets], POINTS)

    torch.manual_seed(seed)  # points in the order in which they are drawn: those of matching, then of every mask
    image = (mask_logits.tolist(), class_logits.tolist(), labels.tolist(), VOID)
    pairs = oracle.best_pairs(*image, torch.rand(1, POINTS, 2)[0].tolist(), counted)
    by_query = sorted(pairs, key=lambda c: pairs[c])
    points = draw_points(mask_logits[[pairs[c] for c in by_query]], POINTS)
    expected = oracle.terms(*image, pairs, dict(zip(by_query, points.tolist())), counted)
    assert [float(term) for term in found] == pytest.approx(expected, rel=1e-4)
    assert float(found.weighted()) == pytest.approx(2 * expected[0] + 5 * expected[1] + 5 * expected[2], rel=1e-4)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_points__are_read_bilinearly_and_zero_beyond_the_border(seed: int) -> None:
    torch.manual_seed(seed)
    maps, points = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(2, 6, 2, dtype=torch.float64)
    expected = [[oracle.read(each.tolist(), p) for p in some.tolist()] for each, some in zip(maps, points)]
    assert torch.allclose(read_points(maps, points), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_points__lie_for_three_quarters_where_the_prediction_is_least_certain() -> None:
    edge = torch.linspace(-8, 8, 32).expand(1, 32, 32)  # certain left and right, uncertain in the middle column
    points = draw_points(edge, 400)
    assert points.shape == (1, 400, 2)
    assert points.min() >= 0
    assert points.max() < 1
    uncertain, even = read_points(edge, points).abs()[0].split([300, 100])
    assert uncertain.max() < 3  # the quarter of 1200 even points around the edge lies within 2 of it
    assert 2 < even.mean() < 6


def test_targets__are_one_mask_for_each_class_present_and_none_for_void() -> None:
    labels = torch.tensor([[2, 2, VOID], [0, 2, VOID]])
    targets = mask_targets(labels, VOID)
    assert targets.classes.tolist() == [0, 2]
    assert targets.masks.tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 1, 0]]]
    assert targets.ignored.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert not mask_targets(labels, VOID, "counted").ignored.any()


def test_void_pixels__teach_nothing_but_where_they_are_counted() -> None:
    labels = torch.zeros(8, 8, dtype=torch.int64)
    labels[:, 4:] = VOID
    void_alone: list[Tensor] = []
    both: tuple[IgnoredPixels, ...] = ("left_out", "counted")
    for ignored in both:
        masks = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
        mask_classification_loss(
            masks, torch.zeros(1, 1, 2), [mask_targets(labels, VOID, ignored)]
        ).weighted().backward()
        assert masks.grad is not None
        assert masks.grad[..., :4].all()
        void_alone.append(masks.grad[..., 5:])  # a point just left of the border reads the first void cell, too
    assert not void_alone[0].any()
    assert void_alone[1].all()


def test_matching__finds_the_queries_that_drew_the_masks_in_whatever_order() -> None:
    labels = torch.arange(CLASSES).repeat_interleave(4)[:, None].expand(12, 10)
    drawn = 10 * (mask_targets(labels, VOID).masks - 0.5)
    queries = torch.stack([torch.full((12, 10), -5.0), drawn[2], drawn[0], drawn[1]])
    query, mask = match(queries, torch.zeros(4, CLASSES + 1), mask_targets(labels, VOID), 200)
    assert query.tolist() == [1, 2, 3]
    assert mask.tolist() == [2, 0, 1]


def test_an_image_of_void_alone__teaches_no_object_and_gives_every_input_a_gradient() -> None:
    masks = torch.randn(1, QUERIES, 4, 4, requires_grad=True)
    classes = torch.randn(1, QUERIES, CLASSES + 1, requires_grad=True)
    void = mask_targets(torch.full((8, 8), VOID), VOID)
    found = mask_classification_loss(masks, classes, [void], POINTS)
    assert found.entropy == found.dice == 0
    assert found.classes.item() == pytest.approx(-classes.log_softmax(2)[..., -1].mean().item(), rel=1e-5)
    found.weighted().backward()
    assert masks.grad is not None
    assert not masks.grad.any()
    assert classes.grad is not None
    assert classes.grad.any()


def test_more_masks_than_queries__leaves_some_masks_without_one() -> None:
    labels = torch.arange(6)[:, None].expand(6, 6)
    query, mask = match(torch.randn(QUERIES, 4, 4), torch.randn(QUERIES, 7), mask_targets(labels, VOID), POINTS)
    assert query.tolist() == list(range(QUERIES))
    assert len(set(mask.tolist())) == QUERIES


def test_loss__is_the_same_for_the_same_random_state_and_another_for_another() -> None:
    mask_logits, class_logits = prediction(3)
    targets = [mask_targets(labels_with_void(3), VOID)]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(mask_classification_loss(mask_logits[None], class_logits[None], targets, POINTS).weighted())
    assert found[0] == found[1] != found[2]


def test_loss_of_a_head_of_masks__is_the_sum_over_its_predictions_beside_weighted_exits() -> None:
    model = tiny_segmenter("fcn").train()
    patch, classes = model.config.backbone.patch_size, model.config.num_classes
    size = (4 * patch, 3 * patch - 1)  # a column of padding, which is void
    output = model(random_image(*size)[None])
    predictions = tuple(
        MaskPrediction(torch.randn(1, QUERIES, 16, 12), torch.randn(1, QUERIES, classes + 1)) for _ in range(3)
    )
    *exits, final = output.exit_records
    output = replace(output, exit_records=(*exits, replace(final, logits=None, masks=predictions)))
    labels = torch.randint(0, classes, (1, *size))
    torch.manual_seed(5)
    found = segmentation_loss(output, labels, VOID, aux_weight=0.3, points=POINTS)
    padded = torch.cat([labels[0], torch.full((size[0], 1), VOID)], dim=1)
    torch.manual_seed(5)
    terms = [
        mask_classification_loss(each.logits, each.classes, [mask_targets(padded, VOID)], POINTS).weighted()
        for each in predictions
    ]
    expected = sum(term.item() for term in terms)
    expected += 0.3 * sum(exit_loss(output, record, labels, VOID).item() for record in exits)
    assert found.item() == pytest.approx(expected, rel=1e-5)
