"""Losses against slow loops written from the papers' procedures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenexit
from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels, default_palette
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, DToP, Truncated
from tokenexit.outputs.losses import (
    atm_loss,
    cross_entropy,
    dice_loss,
    exit_loss,
    focal_loss,
    one_hot_masks,
    segmentation_loss,
)
from tokenexit.outputs.segmentation import SegmentationOutput

VOID = 255


def masks_with_void(images: int = 2, height: int = 6, width: int = 5, classes: int = 4) -> Tensor:
    masks = torch.randint(0, classes - 1, (images, height, width))  # the last class is in no image
    masks[:, :2, :3] = VOID
    return masks


def atm_by_loops(presence: Tensor, maps: Tensor, masks: Tensor, counted: bool = False) -> float:
    """The loss of DToP's release, a pixel and a class at a time; ignored pixels are left out of every sum, or counted
    as negatives of every class."""
    images, classes = presence.shape[:2]
    entropy, weights, focal, dice, present_masks = 0.0, 0.0, 0.0, 0.0, 0
    for b in range(images):
        truth = masks[b].flatten().tolist()
        for c in range(classes):
            present = c in truth
            weight = 1.0 if present else 0.1
            yes, no = (math.exp(v) for v in presence[b, c].tolist())
            entropy -= weight * math.log((yes if present else no) / (yes + no))
            weights += weight
            if not present:
                continue
            present_masks += 1
            values = maps[b, c].flatten().tolist()
            judged = [(v, t == c) for v, t in zip(values, truth) if counted or t != VOID]
            total = overlap = areas = 0.0
            for value, inside in judged:
                p = 1 / (1 + math.exp(-value))
                p_true, alpha = (p, 0.25) if inside else (1 - p, 0.75)
                total -= alpha * (1 - p_true) ** 2 * math.log(p_true)
                overlap += p * inside
                areas += p + inside
            focal += total / len(judged)
            dice += 1 - (2 * overlap + 1) / (areas + 1)
    return entropy / weights + (20 * focal + dice) / present_masks


def test_cross_entropy_is_the_mean_over_judged_pixels() -> None:
    logits, masks = torch.randn(2, 4, 6, 5, dtype=torch.float64), masks_with_void()
    losses = []
    for b in range(2):
        for y in range(6):
            for x in range(5):
                if masks[b, y, x] != VOID:
                    column = logits[b, :, y, x]
                    losses.append(float(column.logsumexp(0) - column[masks[b, y, x]]))
    assert cross_entropy(logits, masks, VOID).item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_cross_entropy_that_counts_ignored_pixels_is_the_published_mean_over_all() -> None:
    """mmsegmentation's `avg_non_ignore=False`: a quarter ignored leaves three quarters of the loss."""
    logits, masks = torch.randn(2, 4, 8, 4), torch.randint(0, 4, (2, 8, 4))
    masks[:, :2] = VOID
    published = F.cross_entropy(logits, masks, reduction="none", ignore_index=VOID).mean()
    counted = cross_entropy(logits, masks, VOID, ignored="counted")
    torch.testing.assert_close(counted, published)
    torch.testing.assert_close(counted, 0.75 * cross_entropy(logits, masks, VOID))
    masks[:, :2] = 0
    assert cross_entropy(logits, masks, VOID, ignored="counted") == cross_entropy(logits, masks, VOID)


@pytest.mark.parametrize("ignore_index", [255, -1])
def test_cross_entropy_does_not_see_ignored_pixels(ignore_index: int) -> None:
    logits, masks = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    masks[:, 0] = ignore_index
    disturbed = logits.clone()
    disturbed[:, :, 0] += 100 * torch.randn(1, 3, 4)
    assert torch.equal(cross_entropy(logits, masks, ignore_index), cross_entropy(disturbed, masks, ignore_index))


def test_cross_entropy_of_a_crop_without_judged_pixels_is_zero_and_has_a_zero_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 4, 4), VOID), VOID)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_class_weights_are_factors_on_the_pixels_of_each_class() -> None:
    logits, masks, factors = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4)), [0.5, 2.0, 0.0]
    masks[0, 0, 0] = VOID
    parts = []
    for k, factor in enumerate(factors):
        of_class = torch.where(masks == k, masks, VOID)
        share = (masks == k).sum() / (masks != VOID).sum()
        parts.append(factor * share * cross_entropy(logits, of_class, VOID))
    torch.testing.assert_close(cross_entropy(logits, masks, VOID, factors), torch.stack(parts).sum())


@pytest.mark.parametrize("seed", range(3))
def test_atm_loss_is_that_of_the_slow_loop(seed: int) -> None:
    torch.manual_seed(seed)
    presence, maps = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    masks = masks_with_void()
    assert atm_loss(presence, maps, masks, VOID).item() == pytest.approx(atm_by_loops(presence, maps, masks), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_atm_loss_that_counts_ignored_pixels_is_that_of_the_release(seed: int) -> None:
    torch.manual_seed(seed)
    presence, maps = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    masks = masks_with_void()
    loss = atm_loss(presence, maps, masks, VOID, "counted").item()
    assert loss == pytest.approx(atm_by_loops(presence, maps, masks, counted=True), rel=1e-9)
    assert abs(loss - atm_loss(presence, maps, masks, VOID).item()) > 1e-4
    masks[masks == VOID] = 0
    assert atm_loss(presence, maps, masks, VOID, "counted") == atm_loss(presence, maps, masks, VOID)


def test_atm_loss_does_not_see_mask_logits_of_absent_classes_nor_ignored_pixels() -> None:
    presence, maps, masks = torch.randn(2, 4, 2), torch.randn(2, 4, 6, 5), masks_with_void()
    disturbed = maps.clone()
    disturbed[:, 3] += 50.0  # in no image
    disturbed[:, :, :2, :3] -= 50.0  # void
    torch.testing.assert_close(atm_loss(presence, disturbed, masks, VOID), atm_loss(presence, maps, masks, VOID))


def test_atm_loss_without_judged_pixels_asks_for_absence_alone_and_is_finite() -> None:
    presence = torch.randn(1, 3, 2, requires_grad=True)
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = atm_loss(presence, maps, torch.full((1, 4, 4), VOID), VOID)
    loss.backward()
    expected = -presence.log_softmax(dim=2)[..., 1].mean()
    torch.testing.assert_close(loss, expected)
    assert maps.grad is not None
    assert maps.grad.abs().sum() == 0  # still part of the graph, as other processes expect


def test_focal_loss_of_a_certain_and_right_mask_is_nothing_and_of_a_wrong_one_is_large() -> None:
    target, judged = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    right = focal_loss(torch.tensor([[[30.0, -30.0]]]), target, judged)
    wrong = focal_loss(torch.tensor([[[-30.0, 30.0]]]), target, judged)
    assert right.item() == pytest.approx(0.0, abs=1e-9)
    assert wrong.item() == pytest.approx((0.25 * 30 + 0.75 * 30) / 2, rel=1e-4)


def test_dice_loss_is_smoothed_by_one() -> None:
    logits, judged = torch.zeros(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    target = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    assert dice_loss(logits, target, judged).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_mask_losses_have_the_gradient_of_finite_differences(loss: object) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (2, 3, 4)).double()
    judged = torch.rand(2, 3, 4) > 0.2
    assert torch.autograd.gradcheck(lambda x: loss(x, target, judged), (logits,))  # type: ignore[operator]


def test_atm_loss_has_the_gradient_of_finite_differences() -> None:
    presence = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 3, (2, 3, 3))
    masks[0, 0, 0] = VOID

    def loss(p: Tensor, m: Tensor) -> Tensor:
        value: Tensor = atm_loss(p, m, masks, VOID)
        return value

    assert torch.autograd.gradcheck(loss, (presence, maps))


def test_one_hot_masks_are_empty_where_the_truth_is_void() -> None:
    truth, judged = one_hot_masks(torch.tensor([[[0, 2, VOID]]]), 3, VOID)
    assert truth[0, :, 0].tolist() == [[True, False, False], [False, False, False], [False, True, False]]
    assert judged.tolist() == [[[True, True, False]]]


@pytest.mark.parametrize("head", ["fcn", "atm", "setr_naive", "setr_pup"])
@pytest.mark.parametrize("aux_weight", [0.0, 0.4, 1.0])
def test_total_is_the_last_loss_plus_weighted_losses_of_all_exits(head: str, aux_weight: float) -> None:
    model = tiny_segmenter(head)
    output = model(random_image(12, 16)[None], Dense(), with_records=True)
    masks = torch.randint(0, 5, (1, 12, 16))
    first, second, last = (exit_loss(output, stage, masks, VOID) for stage in output.exit_records)
    total = segmentation_loss(output, masks, VOID, aux_weight)
    torch.testing.assert_close(total, last + aux_weight * (first + second))


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_ignored_pixels_are_counted_at_every_stage_alike(head: str) -> None:
    model = tiny_segmenter(head)
    output = model(random_image(12, 16)[None], Dense(), with_records=True)
    masks = torch.randint(0, 5, (1, 12, 16))
    masks[:, :3] = VOID
    first, second, last = (exit_loss(output, stage, masks, VOID, ignored="counted") for stage in output.exit_records)
    total = segmentation_loss(output, masks, VOID, 0.4, ignored="counted")
    torch.testing.assert_close(total, last + 0.4 * (first + second))
    assert total != segmentation_loss(output, masks, VOID, 0.4)


def test_loss_of_a_model_without_exits_is_that_of_its_head() -> None:
    model = tiny_segmenter("fcn", exits=())
    output = model(random_image(8, 8)[None], Dense(), with_records=True)
    masks = torch.randint(0, 5, (1, 8, 8))
    assert segmentation_loss(output, masks, VOID, 0.4) == cross_entropy(output.logits, masks, VOID)


def test_exit_loss_is_taken_on_the_full_size_map() -> None:
    model = tiny_segmenter("fcn")
    output = model(random_image(13, 18)[None], Dense(), with_records=True)  # no multiple of the patch
    masks = torch.randint(0, 5, (1, 13, 18))
    torch.testing.assert_close(
        exit_loss(output, output.exit_records[-1], masks, VOID), cross_entropy(output.logits, masks, VOID)
    )


def test_stride_judges_every_second_pixel_of_both_axes() -> None:
    model = tiny_segmenter("fcn")
    output = model(random_image(12, 16)[None], Dense(), with_records=True)
    masks = torch.full((1, 12, 16), VOID)
    masks[:, 1::2, 1::2] = 3
    full = torch.full((1, 12, 16), 3)
    assert segmentation_loss(output, masks, VOID, 0.4, stride=2) == segmentation_loss(output, full, VOID, 0.4, stride=2)
    assert segmentation_loss(output, masks.roll(1, 1), VOID, 0.4, stride=2) == 0.0


def test_stride_leaves_the_loss_of_smooth_maps_nearly_as_it_was() -> None:
    model = tiny_segmenter("fcn")
    output = model(random_image(32, 48)[None], Dense(), with_records=True)
    masks = torch.full((1, 32, 48), 2)
    coarse = segmentation_loss(output, masks, VOID, 0.4, stride=2)
    torch.testing.assert_close(coarse, segmentation_loss(output, masks, VOID, 0.4), rtol=0.02, atol=0.0)


def test_losses_reach_every_parameter_when_exits_are_on() -> None:
    for head in ("fcn", "atm"):
        model = tiny_segmenter(head, class_token=False).train()
        output = model(random_image(12, 16)[None], DToP(threshold=0.3))
        segmentation_loss(output, torch.randint(0, 5, (1, 12, 16)), VOID, 1.0).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_loss_of_a_later_stage_flows_into_the_exit_that_decided() -> None:
    """Exited tokens carry their exit's logits to later losses, as in DToP's release, unless the canvas is detached."""
    for detach, flows in ((False, True), (True, False)):
        model = tiny_segmenter("fcn").train()
        output = model(random_image(12, 16)[None], DToP(threshold=0.0, keep_per_class=0, detach_canvas=detach))
        exit_loss(output, output.exit_records[-1], torch.randint(0, 5, (1, 12, 16)), VOID).backward()
        gradient = model.exit_heads[0].classifier.weight.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) is flows


# --------------------------------------------------------------------------------------- the function for own loops


def judged_output(head: str = "fcn", training: bool = True, **options: object) -> tuple[SegmentationOutput, Tensor]:
    """What a model says of two images, and masks for it."""
    model = tiny_segmenter(head).train(training)
    images = torch.stack([random_image(12, 16), random_image(12, 16, seed=1)])
    return model(images, Dense(), **options), torch.randint(0, 5, (2, 12, 16))


@pytest.mark.parametrize(("head", "weight"), [("fcn", 0.4), ("atm", 1.0)])
def test_segmentation_loss__weighs_exits_as_published_for_their_kind(head: str, weight: float) -> None:
    output, masks = judged_output(head)
    assert tokenexit.segmentation_loss(output, masks) == segmentation_loss(output, masks, VOID, weight)


def test_segmentation_loss__takes_masks_of_any_whole_number_and_size() -> None:
    output, masks = judged_output()
    assert segmentation_loss(output, masks.byte()) == segmentation_loss(output, masks)
    assert segmentation_loss(output, masks.repeat_interleave(2, 1).repeat_interleave(2, 2)).isfinite()


def test_segmentation_loss__warns_where_exit_heads_get_no_gradient() -> None:
    output, masks = judged_output(training=False)
    with pytest.warns(UserWarning, match="^2 of 2 exit heads get no gradient.*call model.train"):
        loss = segmentation_loss(output, masks)
    torch.testing.assert_close(loss, exit_loss(output, output.exit_records[-1], masks, VOID))
    output, masks = judged_output()
    with pytest.warns(UserWarning, match="no gradient, as aux_weight is 0: raise it"):
        segmentation_loss(output, masks, aux_weight=0.0)


@pytest.mark.filterwarnings("error")
def test_segmentation_loss__does_not_warn_where_exits_learn_or_nothing_does() -> None:
    segmentation_loss(*judged_output())
    segmentation_loss(*judged_output(training=False, with_records=True))
    with torch.no_grad():
        segmentation_loss(*judged_output(training=False))


@pytest.mark.parametrize(
    ("masks", "ignore_index", "words"),
    [
        (torch.zeros(2, 1, 12, 16, dtype=torch.long), VOID, r"masks of shape \(2, 1, 12, 16\) and type torch.int64 do"),
        (torch.zeros(1, 12, 16, dtype=torch.long), VOID, r"do not fit 2 images: pass whole numbers of shape \(2, h"),
        (torch.zeros(2, 12, 16), VOID, "type torch.float32"),
        (torch.full((2, 12, 16), 7), VOID, r"masks hold the value 7, but classes are 0\.\.4 and ignore_index is 255"),
        (torch.full((2, 12, 16), VOID), 0, "masks hold the value 255"),
        (torch.full((2, 12, 16), -1), VOID, "masks hold the value -1"),
    ],
)
def test_segmentation_loss__refuses_masks_that_do_not_belong_to_the_output(
    masks: Tensor, ignore_index: int, words: str
) -> None:
    output, _ = judged_output()
    with pytest.raises(DataError, match=words):
        segmentation_loss(output, masks, ignore_index)


def test_segmentation_loss__refuses_images_of_several_sizes_and_outputs_without_a_last_map() -> None:
    model = tiny_segmenter("fcn")
    output = model([random_image(12, 16), random_image(8, 8)], Dense(), with_records=True)
    with pytest.raises(ConfigError, match="images of several sizes have no loss in common"):
        segmentation_loss(output, torch.zeros(2, 12, 16, dtype=torch.long))
    with pytest.raises(ConfigError, match="no map of the decode head"):
        segmentation_loss(model(random_image(12, 16)[None], Truncated()), torch.zeros(1, 12, 16, dtype=torch.long))


@pytest.mark.parametrize("training", [True, False])
def test_output_loss__is_the_loss_of_all_exits_where_labels_are_given(training: bool) -> None:
    output, masks = judged_output(training=training)
    assert output.loss is None
    masks[:, :3] = VOID
    labelled, _ = judged_output(training=training, labels=masks)
    recorded, _ = judged_output(training=training, with_records=True)
    assert labelled.loss is not None
    assert torch.equal(labelled.loss, segmentation_loss(recorded, masks))
    labelled.loss.backward()
    assert labelled[0].loss is None


def test_output_loss__leaves_out_the_void_of_the_models_labels() -> None:
    model = tiny_segmenter("fcn").train()
    model.preprocessing = Preprocessing(labels=Labels(tuple("abcde"), default_palette(5), ignore_index=-1))
    masks = torch.full((1, 12, 16), -1)
    output = model(random_image(12, 16)[None], labels=masks)
    assert output.loss is not None
    assert output.loss.item() == 0.0
