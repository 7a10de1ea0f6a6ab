import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tokenexit.errors import ConfigError
from tokenexit.methods import selection
from tokenexit.methods.selection import (
    confidence,
    exceeds,
    inherit,
    on_boundary,
    pooled_label,
    pooled_score,
    retain_top_k,
    scale_logits,
)
from tokenexit.methods.thresholded import (
    NEVER,
    check_thresholds,
    per_class,
    per_exit,
    threshold_of_tokens,
    warmed_up,
)


def by_hand(candidate, score, label, image, k):
    """Class by class, image by image; ties in the order of positions."""
    stays = [False] * len(score)
    for b in set(image):
        for c in set(label):
            members = [i for i in range(len(score)) if candidate[i] and image[i] == b and label[i] == c]
            members.sort(key=lambda i: (-score[i], i))
            for i in members[:k]:
                stays[i] = True
    return stays


EIGHT = {
    "candidate": torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]).bool(),
    "score": torch.tensor([0.7, 0.9, 0.8, 0.99, 0.6, 0.8, 0.8, 0.5]),
    "label": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    "image": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize(
    ("k", "stays"),
    [
        (0, [0, 0, 0, 0, 0, 0, 0, 0]),
        (1, [0, 1, 0, 0, 0, 1, 1, 0]),
        (2, [0, 1, 1, 0, 1, 1, 1, 1]),
        (3, [1, 1, 1, 0, 1, 1, 1, 1]),
        (9, [1, 1, 1, 0, 1, 1, 1, 1]),
    ],
)
def test_retain_top_k__on_eight_tokens_by_hand(k, stays):
    assert retain_top_k(**EIGHT, num_classes=2, k=k).int().tolist() == stays


def test_retain_top_k__ties_go_to_lowest_position():
    four = torch.ones(4)
    stays = retain_top_k(four.bool(), four * 0.5, four.long() * 0, four.long() * 0, num_classes=1, k=2)
    assert stays.tolist() == [True, True, False, False]


def test_retain_top_k__tokens_below_the_threshold_do_not_count_towards_k():
    candidate = torch.tensor([False, True, True])
    stays = retain_top_k(
        candidate, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long(), torch.zeros(3).long(), num_classes=1, k=1
    )
    assert stays.tolist() == [False, True, False]


def test_retain_top_k__no_token_at_all_is_no_error():
    empty = torch.zeros(0)
    stays = retain_top_k(empty.bool(), empty, empty.long(), empty.long(), num_classes=3, k=2)
    assert stays.shape == (0,)
    assert stays.dtype == torch.bool


@given(
    rows=st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40
    ),
    k=st.integers(0, 4),
    host=st.booleans(),
)
def test_retain_top_k__equals_a_loop_over_images_and_classes_with_many_ties(rows, k, host):
    rows.sort(key=lambda row: row[3])
    candidate, score, label, image = (list(column) for column in zip(*rows))
    with mock.patch.object(selection, "on_host", return_value=host):  # numpy on a CPU, torch in graphs and on CUDA
        stays = retain_top_k(
            torch.tensor(candidate),
            torch.tensor([s / 4 for s in score]),
            torch.tensor(label),
            torch.tensor(image),
            num_classes=3,
            k=k,
        )
    assert stays.tolist() == by_hand(candidate, score, label, image, k)


def test_select__is_strict():
    assert exceeds(torch.tensor([0.4, 0.5, 0.6]), 0.5).tolist() == [False, False, True]


def test_select__never_fires_at_the_threshold_called_never():
    assert not exceeds(torch.ones(3), NEVER).any()


def test_per_exit__one_number_serves_all_exits():
    assert per_exit(0.9, 3) == (0.9, 0.9, 0.9)
    assert per_exit([0.9, 0.8], 2) == (0.9, 0.8)
    assert per_exit(1, 1) == (1.0,)


def test_per_exit__refuses_another_number_of_values():
    with pytest.raises(ConfigError, match=r"threshold has 2 values for 3 exits: give one number"):
        per_exit([0.9, 0.8], 3)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), [0.5, 2.0], [0.5, [0.5, 2.0]], [[0.5], ["0.5"]]])
def test_check_thresholds__refuses_what_is_no_score(threshold):
    with pytest.raises(ConfigError, match=r"threshold must be in \[0, 1\], got .*use 1 for 'never'"):
        check_thresholds(threshold)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.2, 0.9), (0.4, 0.8), (0.7, 0.8), (1.0, 0.8)])
def test_warmed_up__falls_linearly_from_one_to_the_threshold(progress, expected):
    assert warmed_up(0.8, progress, warmup=0.4) == pytest.approx(expected)
    assert warmed_up([0.8, 1.0], progress, warmup=0.4) == pytest.approx((expected, 1.0))


def test_warmed_up__without_warm_up_is_the_threshold_from_the_start():
    assert warmed_up(0.8, 0.0, warmup=0.0) == 0.8


def test_warmed_up__of_thresholds_by_class_falls_for_each():
    of_all, by_class = warmed_up([0.8, [0.6, 1.0]], 0.1, warmup=0.2)
    assert of_all == pytest.approx(0.9)
    assert by_class == pytest.approx((0.8, 1.0))


def test_per_class__tells_whether_an_exit_has_one_for_each_class():
    assert not per_class(0.9)
    assert not per_class([0.9, 0.8])
    assert per_class([0.9, [0.9, 0.8]])


def test_threshold_of_tokens__is_the_threshold_of_the_class_predicted():
    label = torch.tensor([2, 0, 0, 1])
    assert threshold_of_tokens((0.5, 0.25, 0.75), label).tolist() == [0.75, 0.5, 0.5, 0.25]
    assert threshold_of_tokens(0.9, label) == 0.9


# Scores.


def by_definition(row, score):
    """In words and in double precision."""
    ordered = sorted(row, reverse=True)
    if score == "probability":
        return ordered[0]
    if score == "margin":
        return ordered[0] - ordered[1]
    return 1.0 - sum(-p * math.log(p) for p in ordered if p > 0) / math.log(len(row))


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
@given(rows=st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=6))
def test_confidence__is_its_definition_and_lies_in_the_unit_interval(score, rows):
    probabilities = torch.tensor(rows, dtype=torch.float64).softmax(dim=1)
    scores = confidence(probabilities.float(), score)
    assert_close(scores, torch.tensor([by_definition(row, score) for row in probabilities.tolist()]))
    assert ((scores >= 0) & (scores <= NEVER)).all()
    assert torch.equal(confidence(probabilities.float().T[None], score, dim=1), scores[None])


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
def test_confidence__is_one_for_certainty_and_least_for_none(score):
    assert confidence(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), score).item() == 1.0
    least = confidence(torch.full((1, 4), 0.25), score).item()
    assert least == pytest.approx(0.25 if score == "probability" else 0.0, abs=1e-6)


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
def test_confidence__of_a_single_class_is_its_probability(score):
    assert confidence(torch.tensor([[1.0], [0.25]]), score).tolist() == [1.0, 0.25]


@given(logits=st.lists(st.floats(-8, 8), min_size=2, max_size=5), hotter=st.floats(1.1, 5.0))
def test_scale_logits__heat_makes_less_sure_and_moves_no_class(logits, hotter):
    logits = torch.tensor([logits])
    top = logits.sort(descending=True).values[0]
    warm = scale_logits(logits, hotter)
    for score in ("probability", "margin", "entropy"):
        assert confidence(warm.softmax(1), score) <= confidence(logits.softmax(1), score) + 1e-6
    if top[0] - top[1] > 1e-4:
        assert warm.argmax() == logits.argmax()


def test_scale_logits__at_one_is_the_very_same_tensor():
    logits = torch.randn(3, 4).bfloat16()
    assert scale_logits(logits, 1.0) is logits
    assert scale_logits(logits, 2.0).dtype == torch.float32


def test_pooled_score__is_taken_in_fp32_in_any_precision():
    logits = torch.randn(20, 5).bfloat16()
    assert pooled_score(logits, [(4, 5)], 1, 1).dtype == torch.float32
    assert torch.equal(pooled_score(logits, [(4, 5)], 1, 1), logits.float().softmax(1).max(1).values)
    assert_close(pooled_score(logits, [(4, 5)], 1, 2), pooled_score(logits.float(), [(4, 5)], 1, 2))


@pytest.mark.parametrize(("score", "of_unsure"), [("probability", 0.5), ("margin", 0.0), ("entropy", 0.0)])
def test_pooled_score__averages_the_fine_grid_inside_each_patch(score, of_unsure):
    # One image of 1 x 2 patches, four cells each, in raster order of the 2 x 4 grid.
    sure, unsure = [50.0, 0.0], [0.0, 0.0]
    rows = torch.tensor([sure, sure, unsure, unsure, unsure, unsure, unsure, sure])
    pooled = pooled_score(rows, [(1, 2)], scale=2, upscale=1, score=score)
    assert_close(pooled, torch.tensor([0.5 + 0.5 * of_unsure, 0.25 + 0.75 * of_unsure]))


def test_pooled_score__at_a_temperature_is_that_of_the_divided_logits():
    logits, grids = torch.randn(8, 3), [(1, 2), (2, 3)]
    for upscale in (1, 4):
        hot = pooled_score(logits, grids, 1, upscale, "margin", 2.5)
        assert_close(hot, pooled_score(logits / 2.5, grids, 1, upscale, "margin"))
        assert not torch.allclose(hot, pooled_score(logits, grids, 1, upscale, "margin"))


@pytest.mark.parametrize("pooled", [pooled_score, pooled_label])
def test_pooled__images_of_several_sizes_keep_their_places(pooled):
    grids = [(1, 2), (2, 2), (1, 2)]
    logits = torch.randn(8, 3)
    together = pooled(logits, grids, 1, 4)
    alone = [pooled(part, [grid], 1, 4) for part, grid in zip(logits.split([2, 4, 2]), grids)]
    assert_close(together, torch.cat(alone))


def test_pooled_label__is_the_class_of_the_highest_mean_probability():
    # The first patch: two cells barely say class 1, two are sure of class 0. The second patch says class 1 throughout.
    sure, barely, other = [9.0, 0.0], [0.0, 0.5], [0.0, 9.0]
    rows = torch.tensor([sure, barely, other, other, barely, sure, other, other])
    assert pooled_label(rows, [(1, 2)], scale=2, upscale=1).tolist() == [0, 1]
    assert pooled_label(rows[:4], [(2, 2)], scale=1, upscale=1).tolist() == [0, 1, 1, 1]


# Boundaries.


def beside_another_class(label, h, w):
    """Cell by cell."""
    found = []
    for i in range(h):
        for j in range(w):
            near = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
            found.append(any(0 <= a < h and 0 <= b < w and label[a * w + b] != label[i * w + j] for a, b in near))
    return found


@given(
    grids=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    classes=st.integers(1, 3),
)
def test_on_boundary__equals_a_loop_over_cells_and_images_do_not_touch(grids, seed, classes):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(classes, (h * w,), generator=generator) for h, w in grids]
    expected = [found for image, grid in zip(images, grids) for found in beside_another_class(image.tolist(), *grid)]
    assert on_boundary(torch.cat(images), grids).tolist() == expected


def test_on_boundary__corners_do_not_touch():
    label = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert on_boundary(label, [(3, 3)]).tolist() == [False] * 5 + [True, False, True, True]


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1.0, 2.5, 4.0]), st.booleans(), st.integers(0, 2)), min_size=0, max_size=12
    ),
    first=st.integers(0, 12),
)
def test_inherit__shares_equally_within_an_image_and_class_and_loses_what_has_no_heir(rows, first):
    first = min(first, len(rows))
    image = [0] * first + [1] * (len(rows) - first)
    mass, leaves, label = (list(column) for column in zip(*rows)) if rows else ([], [], [])
    found = inherit(
        torch.tensor(mass), torch.tensor(leaves, dtype=torch.bool), torch.tensor(label, dtype=torch.int64),
        torch.tensor(image, dtype=torch.int64), 2, 3,
    )  # fmt: skip
    expected = [0.0 if gone else own for own, gone in zip(mass, leaves)]
    for i, gone in enumerate(leaves):
        heirs = [j for j in range(len(rows)) if not leaves[j] and (image[j], label[j]) == (image[i], label[i])]
        for j in heirs if gone else ():
            expected[j] += mass[i] / len(heirs)
    assert found.tolist() == pytest.approx(expected)
