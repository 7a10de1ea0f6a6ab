"""Evaluation against figures worked out by hand on images small enough to do so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_segmenter
from tokenexit.data.base import Sample
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.evaluation.results import Evaluation, Scaled
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.methods import Dense, DoViT, DToP, Gated, Method, Resized, build_method
from tokenexit.methods.reference import FrozenContext, LabelledExits, PrescribedExits, agreement_exits, patch_labels
from tokenexit.outputs.ledger import with_frozen_keys
from tokenexit.outputs.windows import window_boxes
from tokenexit.segmenter import ExitSegmenter

CLASSES = 5
VOID = 255


class Images:
    """Noise of several sizes with random truth; a class is in no image, and some pixels are void."""

    def __init__(self, count: int = 3, classes: int = CLASSES) -> None:
        self.labels: Labels = default_labels(classes)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        height, width = 10 + index, 17 - index
        mask = rng.integers(0, CLASSES - 1, (height, width)).astype(np.uint8)
        mask[0, : index + 1] = VOID
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        return Sample(image, mask, f"picture{index}")


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return tiny_segmenter("fcn", num_classes=CLASSES)


METHODS: list[Method[Any]] = [Dense(), DToP(threshold=0.5, keep_per_class=0), DoViT(threshold=0.5)]


def by_hand(model: ExitSegmenter, data: Images, method: Method[Any]) -> npt.NDArray[np.int64]:
    """The confusion matrix, a pixel at a time, from the model's own answers to the images."""
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for i in range(len(data)):
        predicted = model.predict(data[i].image, method).labels[0]
        for truth, answer in zip(data[i].mask.flatten().tolist(), predicted.flatten().tolist()):
            if truth != VOID:
                confusion[truth, answer] += 1
    return confusion


@pytest.mark.parametrize("windowed", [False, True])
def test_a_resized_method_is_counted_at_full_size_and_over_dense_there(windowed: bool) -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    if windowed:
        model.preprocessing = replace(model.preprocessing, window=(8, 8), stride=(6, 6))
    plan = Resized(Gated(DToP((0.9, 0.5), 1, stop=2), (0,)), 0.7)
    dense, row = evaluate(model, Images(), [Dense(), plan])
    assert row.label == "dtop 0.9/0.5 keep_per_class=1 stop=2 gated @0.7"
    assert row.confusion.tolist() == by_hand(model, Images(), plan).tolist()
    assert row.dense_gmacs == dense.gmacs
    ledgers = [model.predict(Images()[i].image, plan).ledger for i in range(3)]
    assert row.gmacs == tuple(ledger.gmacs[0] for ledger in ledgers)
    assert row.share_of_dense == pytest.approx(
        sum(ledger.macs[0] for ledger in ledgers) / sum(ledger.dense_macs[0] for ledger in ledgers)
    )
    assert all(live == (1.0, 0.0) for live in row.live)
    assert build_method(row.to_dict(Images().labels.names)["method"]) == plan


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_counts_and_scores_are_those_worked_out_by_hand(model: ExitSegmenter, method: Method[Any]) -> None:
    (result,) = evaluate(model, Images(), [method])
    confusion = by_hand(model, Images(), method)
    assert result.confusion.tolist() == confusion.tolist()
    ious, hits = [], []
    for k in range(CLASSES):
        union = confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]
        if union:
            ious.append(100 * confusion[k, k] / union)
        if confusion[k].sum():
            hits.append(100 * confusion[k, k] / confusion[k].sum())
    assert result.scores.miou == pytest.approx(np.mean(ious))
    assert result.scores.macc == pytest.approx(np.mean(hits))
    assert result.scores.aacc == pytest.approx(100 * np.trace(confusion) / confusion.sum())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_costs_and_live_shares_are_those_of_every_single_image(model: ExitSegmenter, method: Method[Any]) -> None:
    (result,) = evaluate(model, Images(), [method])
    for i in range(3):
        output = model.predict(Images()[i].image, method)
        assert result.gmacs[i] == output.ledger.macs[0] / GIGA
        assert result.dense_gmacs[i] == output.ledger.dense_macs[0] / GIGA
        stage = output.exit_index[0]
        assert result.live[i] == pytest.approx([float((stage > n).float().mean()) for n in range(2)])
    assert result.share_of_dense == pytest.approx(sum(result.gmacs) / sum(result.dense_gmacs))
    assert result.live_mean == pytest.approx(np.mean(result.live, axis=0))


def test_dense_costs_what_dense_costs(model: ExitSegmenter) -> None:
    (result,) = evaluate(model, Images(), [Dense()])
    assert result.gmacs == result.dense_gmacs
    assert result.share_of_dense == 1.0
    assert result.live_mean == (1.0, 1.0)


def same_figures(a: Evaluation, b: Evaluation) -> bool:
    """All but the times, which are never equal."""
    return (
        a.label == b.label
        and a.confusion.tolist() == b.confusion.tolist()
        and (a.gmacs, a.dense_gmacs, a.live) == (b.gmacs, b.dense_gmacs, b.live)
        and a.boundary_iou == b.boundary_iou
    )


def test_results_do_not_depend_on_which_methods_share_the_call(model: ExitSegmenter) -> None:
    together = evaluate(model, Images(), [*METHODS, DToP(threshold=0.6)], references=True)
    by_label = {result.label: result for result in together}
    for method in (*METHODS, DToP(threshold=0.6)):
        alone = evaluate(model, Images(), [method], references=True)
        assert len(alone) == (3 if isinstance(method, DToP) else 2)
        for result in alone:
            assert same_figures(result, by_label[result.label]), result.label


def test_the_same_method_twice_gives_the_same_row_twice(model: ExitSegmenter) -> None:
    results = evaluate(model, Images(), [METHODS[1], METHODS[1]], references=True)
    assert len(results) == 5
    assert same_figures(results[0], results[1])
    assert same_figures(results[2], results[3])


def test_limit_takes_the_first_images(model: ExitSegmenter) -> None:
    (two,) = evaluate(model, Images(), [Dense()], limit=2)
    (of_two,) = evaluate(model, Images(2), [Dense()])
    (beyond,) = evaluate(model, Images(2), [Dense()], limit=99)
    assert same_figures(two, of_two)
    assert same_figures(beyond, of_two)


def test_progress_wraps_the_loop_over_images(model: ExitSegmenter) -> None:
    seen: list[int] = []

    def watched(items: Iterable[int]) -> Iterable[int]:
        for item in items:
            seen.append(item)
            yield item

    evaluate(model, Images(), [Dense()], progress=watched)
    assert seen == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------- references


def test_random_exits_leave_exactly_as_many_tokens_at_every_exit(model: ExitSegmenter) -> None:
    own, at_random, _ = evaluate(model, Images(), [METHODS[1]], references=True)
    assert at_random.label == f"random, counts of {own.label}"
    assert at_random.live == own.live
    assert at_random.gmacs == pytest.approx(own.gmacs, rel=1e-12)
    assert min(own.live_mean) < 1.0  # tokens do leave


def test_random_exits_are_in_other_places(model: ExitSegmenter) -> None:
    own, at_random, _ = evaluate(model, Images(), [METHODS[1]], references=True)
    assert at_random.confusion.tolist() != own.confusion.tolist()


def test_the_agreement_oracle_is_that_of_a_search_over_the_dense_pass(model: ExitSegmenter) -> None:
    """Every token leaves at the first exit from which on all heads say what the last one says."""
    *_, oracle = evaluate(model, Images(), [Dense()], references=True)
    assert oracle.label == "agreement oracle"
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    data = Images()
    for i in range(3):
        image = model.preprocessing.to_tensor(data[i].image)
        with torch.inference_mode():
            dense = model([image], with_records=True)
            maps = [stage.logits.argmax(1).tolist() for stage in dense.exit_records]  # type: ignore[union-attr]
            exits = []
            for token in range(len(maps[0])):
                says = [labels[token] for labels in maps]
                exits.append(next(n for n in range(3) if all(says[m] == says[2] for m in range(n, 3))))
            output = model([image], PrescribedExits(exit_index=torch.tensor(exits)))
        assert oracle.live[i] == pytest.approx([sum(e > n for e in exits) / len(exits) for n in range(2)])
        for truth, answer in zip(data[i].mask.flatten().tolist(), output.labels[0].flatten().tolist()):
            if truth != VOID:
                confusion[truth, answer] += 1
    assert oracle.confusion.tolist() == confusion.tolist()


def test_the_oracle_in_context_has_the_exits_of_the_agreement_oracle_and_frozen_tokens_as_keys(
    model: ExitSegmenter,
) -> None:
    alone, context = evaluate(model, Images(), [Dense()], references=("oracle", "context"))[1:]
    assert context.label == "oracle in context"
    assert context.live == alone.live
    assert min(context.live_mean) < 1.0
    assert all(math.isnan(ms) for ms in context.latency_ms)
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for i in range(3):
        image = model.preprocessing.to_tensor(Images()[i].image)
        with torch.inference_mode():
            dense = model([image], with_records=True)
            exits = agreement_exits(dense.exit_records, dense.ledger.tokens)
            output = model([image], FrozenContext(exit_index=exits))
            plain = model([image], PrescribedExits(exit_index=exits)).ledger
        assert context.gmacs[i] == with_frozen_keys(plain, model.backbone).gmacs[0] > alone.gmacs[i]
        for truth, answer in zip(Images()[i].mask.flatten().tolist(), output.labels[0].flatten().tolist()):
            if truth != VOID:
                confusion[truth, answer] += 1
    assert context.confusion.tolist() == confusion.tolist()
    assert context.confusion.tolist() != alone.confusion.tolist()


@pytest.mark.parametrize("options", [{}, {"window": (8, 9), "stride": (5, 5)}, {"resize": (20, 30)}])
def test_the_greedy_rule_sees_the_most_frequent_label_of_each_patch(options: dict[str, Any]) -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    model.preprocessing = replace(model.preprocessing, **options)
    (greedy,) = evaluate(model, Images(), [Dense()], references=["labels"])[1:]
    assert greedy.label == "greedy by labels"
    for i in range(3):
        mask = Image.fromarray(Images()[i].mask)
        image = model.preprocessing.to_tensor(Images()[i].image)
        height, width = image.shape[1:]
        truth = np.array(mask.resize((width, height), Image.Resampling.NEAREST))
        ended, cells = [0, 0], 0
        for top, left, bottom, right in window_boxes((height, width), options.get("window"), options.get("stride")):
            part = torch.from_numpy(truth[top:bottom, left:right].astype(np.int64))
            labels = patch_labels(part, model.config.backbone.patch_size, CLASSES, VOID)
            with torch.inference_mode():
                output = model([image[:, top:bottom, left:right]], LabelledExits(labels=labels))
            cells += len(labels)
            for n in range(2):
                ended[n] += int((output.exit_index[0] > n).sum())
        assert greedy.live[i] == pytest.approx([n / cells for n in ended])
    assert 0.0 < greedy.live_mean[1] < greedy.live_mean[0] < 1.0


def test_references_follow_the_finish_of_their_method() -> None:
    atm = tiny_segmenter("atm", num_classes=CLASSES)
    frozen = DToP(threshold=0.2, keep_per_class=0, finish="frozen")
    frozen_random = evaluate(atm, Images(), [frozen], references=True)[1]
    last_random = evaluate(atm, Images(), [replace(frozen, finish="auto")], references=True)[1]
    assert frozen_random.live_mean[0] < 1.0
    assert frozen_random.live == last_random.live
    assert frozen_random.confusion.tolist() != last_random.confusion.tolist()


# ---------------------------------------------------------------------------------------------------- input scale


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("scale", [0.5, 1.3])
def test_a_scaled_row_is_that_of_resized_images_against_full_size_truth_and_dense(
    model: ExitSegmenter, method: Method[Any], scale: float
) -> None:
    full, scaled = evaluate(model, Images(), [method, Scaled(method, scale)])
    assert (full.input_scale, scaled.input_scale) == (1.0, scale)
    assert scaled.label == f"{full.label} @{scale}"
    assert scaled.dense_gmacs == full.dense_gmacs
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for i in range(3):
        image, mask = Images()[i].image, Images()[i].mask
        size = (int(image.width * scale + 0.5), int(image.height * scale + 0.5))
        small = model.preprocessing.to_tensor(image.resize(size, Image.Resampling.BILINEAR))
        with torch.inference_mode():
            output = model([small], method, targets=[mask.shape])
        assert scaled.gmacs[i] == output.ledger.gmacs[0]
        for truth, answer in zip(mask.flatten().tolist(), output.labels[0].flatten().tolist()):
            if truth != VOID:
                confusion[truth, answer] += 1
    assert scaled.confusion.tolist() == confusion.tolist()
    assert scaled.share_of_dense == pytest.approx(sum(scaled.gmacs) / sum(full.dense_gmacs))
    assert scaled.to_dict(Images().labels.names)["input_scale"] == scale


def test_dense_on_smaller_images_has_a_smaller_share_of_dense(model: ExitSegmenter) -> None:
    results = evaluate(model, Images(), [Scaled(Dense(), scale) for scale in (1.0, 0.8, 0.5)])
    assert [result.label for result in results] == ["dense", "dense @0.8", "dense @0.5"]
    assert results[0].share_of_dense == 1.0 > results[1].share_of_dense > results[2].share_of_dense


def test_scaled_rows_share_the_call_and_have_random_exits_of_their_own(model: ExitSegmenter) -> None:
    row = Scaled(METHODS[1], 0.7)
    together = {result.label: result for result in evaluate(model, Images(), [*METHODS, row], references=True)}
    own, at_random, oracle = evaluate(model, Images(), [row], references=True)
    assert at_random.label == f"random, counts of {row.label}"
    assert at_random.live == own.live
    for result in (own, at_random, oracle):
        assert same_figures(result, together[result.label])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=rf"input_scale={scale} is no share of a side: give a number above 0\."):
        Scaled(Dense(), scale)


# -------------------------------------------------------------------------------------------------------- windows


@pytest.fixture
def windowed() -> ExitSegmenter:
    other = tiny_segmenter("fcn", num_classes=CLASSES)
    other.preprocessing = replace(other.preprocessing, window=(8, 9), stride=(5, 5))
    return other


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_windows_of_the_preprocessing_are_used_and_all_counted(
    model: ExitSegmenter, windowed: ExitSegmenter, method: Method[Any]
) -> None:
    (result,) = evaluate(windowed, Images(), [method])
    (whole,) = evaluate(model, Images(), [method])
    assert result.confusion.tolist() == by_hand(windowed, Images(), method).tolist() != whole.confusion.tolist()
    for i in range(3):
        image = model.preprocessing.to_tensor(Images()[i].image)
        boxes = window_boxes((image.shape[1], image.shape[2]), (8, 9), (5, 5))
        with torch.inference_mode():
            crops = [image[None, :, top:bottom, left:right] for top, left, bottom, right in boxes]
            alone = [model(crop, method).ledger for crop in crops]
        assert result.gmacs[i] == sum(ledger.macs[0] for ledger in alone) / GIGA
        assert result.dense_gmacs[i] == sum(ledger.dense_macs[0] for ledger in alone) / GIGA > whole.dense_gmacs[i]
        tokens = sum(ledger.tokens[0] for ledger in alone)
        live = [sum(ledger.live[0][n] for ledger in alone) / tokens for n in model.config.exits]
        assert result.live[i] == pytest.approx(live)


def test_a_window_that_holds_every_image_changes_nothing(model: ExitSegmenter, windowed: ExitSegmenter) -> None:
    windowed.preprocessing = replace(windowed.preprocessing, window=(20, 20), stride=(9, 9))
    for whole, window in zip(*(evaluate(m, Images(), METHODS, references=True) for m in (model, windowed))):
        assert same_figures(whole, window)


def test_references_hold_in_windows_too(windowed: ExitSegmenter) -> None:
    own, at_random, oracle = evaluate(windowed, Images(), [METHODS[1]], references=True)
    assert at_random.live == own.live
    assert at_random.gmacs == pytest.approx(own.gmacs, rel=1e-12)  # as many tokens in every single window
    assert at_random.confusion.tolist() != own.confusion.tolist()
    assert 0.0 < oracle.live_mean[1] < oracle.live_mean[0] < 1.0


def test_a_scaled_row_in_windows_is_counted_against_dense_in_windows_at_full_size(windowed: ExitSegmenter) -> None:
    full, half = evaluate(windowed, Images(), [Dense(), Scaled(Dense(), 0.5)])
    assert half.dense_gmacs == full.dense_gmacs == full.gmacs
    for i in range(3):
        image = windowed.preprocessing.to_tensor(Images()[i].image, 0.5)
        with torch.inference_mode():
            assert half.gmacs[i] == windowed.segment([image]).ledger.gmacs[0]


# -------------------------------------------------------------------------------------------------------- options


def test_another_number_of_classes_is_refused_with_both_numbers(model: ExitSegmenter) -> None:
    with pytest.raises(ConfigError, match="the model predicts 5 classes, the dataset has 7: evaluate on the dataset"):
        evaluate(model, Images(classes=7), [Dense()])


@pytest.mark.parametrize("data", ["street", [], {}, None, 3, Labels(("a",), ((0, 0, 0),))])
def test_what_is_no_dataset_is_refused_in_one_sentence(data: Any, model: ExitSegmenter) -> None:
    with pytest.raises(ConfigError, match=r"^data must be a dataset with labels, .*, got a \w+: open one"):
        evaluate(model, data, [Dense()])


def test_methods_are_welcome_by_name_and_one_alone(model: ExitSegmenter) -> None:
    spec = {"name": "dtop", "threshold": 0.5}
    by_name = evaluate(model, Images(), ["dense", spec, Scaled(DToP(), 0.5)])
    assert [row.method for row in by_name] == [Dense(), DToP(threshold=0.5), DToP()]
    for alone in ("dense", Dense(), Scaled(Dense())):
        (row,) = evaluate(model, Images(), alone)
        assert torch.equal(row.confusion, by_name[0].confusion)
    with pytest.raises(ConfigError, match="method 'dtopp' is unknown"):
        evaluate(model, Images(), ["dtopp"])


def test_nothing_to_evaluate_is_refused(model: ExitSegmenter) -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        evaluate(model, Images(), [Dense()], limit=0)
    with pytest.raises(ConfigError, match="one image and one method, got 0 and 1"):
        evaluate(model, Images(0), [Dense()])
    with pytest.raises(ConfigError, match="one image and one method, got 3 and 0"):
        evaluate(model, Images(), [])


def test_a_method_that_cannot_run_on_the_model_is_refused(model: ExitSegmenter) -> None:
    with pytest.raises(ConfigError, match="3 values for 2 exits"):
        evaluate(model, Images(), [Dense(), DToP(threshold=(0.1, 0.2, 0.3))])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_bf16_changes_few_answers_and_no_dense_cost(model: ExitSegmenter, method: Method[Any]) -> None:
    (exact,) = evaluate(model, Images(), [method])
    (rough,) = evaluate(model, Images(), [method], precision="bf16")
    assert rough.dense_gmacs == exact.dense_gmacs
    assert int((rough.confusion - exact.confusion).abs().sum()) < 0.2 * int(exact.confusion.sum())


def test_evaluation_leaves_the_model_as_it_was(model: ExitSegmenter) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, Images(), METHODS, references=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (Dense(), "dense"),
        (DToP(), "dtop 0.95"),
        (DToP(threshold=(0.98, 0.9, 0.8), keep_per_class=3), "dtop 0.98/0.9/0.8 keep_per_class=3"),
        (DoViT(threshold=1, blend_weight=0.0), "dovit 1 blend_weight=0.0"),
        (DToP(threshold=(0.8, (0.95, 0.9)), score="margin"), "dtop 0.8-0.95 per class score=margin"),
        (Gated(DToP(threshold=0.9), (0,)), "dtop 0.9 gated"),
    ],
)
def test_a_row_is_named_by_what_differs_from_the_defaults(method: Method[Any], label: str) -> None:
    assert method.label == label


def test_figures_of_a_row_are_complete(model: ExitSegmenter) -> None:
    (result,) = evaluate(model, Images(), [METHODS[1]])
    figures = result.to_dict(Images().labels.names)
    options = {"threshold": 0.5, "keep_per_class": 0, "finish": "auto", "threshold_warmup": 0.0}
    assert figures["method"].items() >= {"name": "dtop", **options}.items()
    assert figures["method"].keys() == {"name", *(f.name for f in fields(DToP))}
    assert figures["images"] == 3
    assert list(figures["IoU"]) == list(Images().labels.names)
    assert figures["gmacs_p5"] <= figures["gmacs_mean"] <= figures["gmacs_p95"]
    assert figures["latency_ms_median"] > 0
