"""From targets to thresholds: what is reached, what is refused, and what is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration.test_dense_pass import CLASSES, Noise, calibration_set, random_pass
from tests.helpers import tiny_segmenter
from tokenexit.calibration import for_bound, planner, risk_control
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import (
    CalibrationSet,
    dense_reference,
    drawn,
    error,
    true_run,
)
from tokenexit.calibration.dense_pass import DensePass, MacTable, compose, live_counts
from tokenexit.calibration.drift import (
    ALARM,
    LEAST_IMAGES,
    Histograms,
    Monitor,
    ReferenceStatistics,
    distances,
    hook_scores,
)
from tokenexit.calibration.for_bound import SequentialTest, split
from tokenexit.calibration.latency import Curve, Latency, latency_on_this_machine
from tokenexit.calibration.search import TRUE_RUNS, cap_shares, meet_budget
from tokenexit.calibration.store import reference_statistics_of, write_calibration
from tokenexit.calibration.targets import Bound, Budget, target_of
from tokenexit.calibration.threshold_path import ThresholdPath, build_path, even_path, position_where
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.data.photos import UnlabelledImages
from tokenexit.errors import CheckpointError, ConfigError, DataError
from tokenexit.methods import Dense, DoViT, DToP, build_method
from tokenexit.segmenter import ExitSegmenter

SMALL = ((16, 20),)


@pytest.fixture(autouse=True)
def _fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PRICES", (0.0,))
    monkeypatch.setattr(for_bound, "PILOT_RUNS", 3)
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 12)


# ------------------------------------------------------------------------------------------------------------- path


def test_path__never_falls_and_goes_from_nobody_to_everybody() -> None:
    images, method = calibration_set(4), DToP(keep_per_class=0)
    dense = DensePass.of(images, method)
    path = build_path(dense, method, lambda d: MacTable(images.model, method, d.grids), "pixels", torch.zeros(3))
    assert path.limits[0].tolist() == [0.0, 0.0]
    assert path.limits[-1].tolist() == [1.0, 1.0]
    assert (path.limits.diff(dim=0) >= 0).all()
    shares = [
        live_counts(dense, compose(dense, method, path.limits_at(p)))[:, 1:].sum().item() for p in range(len(path))
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0


def test_path__loses_no_more_than_one_threshold_for_all_exits() -> None:
    """At equal predicted compute, on the images it was built on."""
    images, method = calibration_set(6), DToP(keep_per_class=0)
    dense = DensePass.of(images, method)
    costs, losses = MacTable(images.model, method, dense.grids), dense.losses("pixels")
    greedy = build_path(dense, method, lambda d: MacTable(images.model, method, d.grids), "pixels", torch.zeros(3))

    def lost_at(path: ThresholdPath, share: float) -> float:
        def cost(position: float) -> float:
            return costs.share(live_counts(dense, compose(dense, method, path.limits_at(position))))

        exit_index = compose(dense, method, path.limits_at(position_where(cost, share, path.end)))
        return losses.gather(0, exit_index[None]).sum().item()

    shares = [0.9, 0.8, 0.7, 0.6]
    gains = [lost_at(even_path(2), share) - lost_at(greedy, share) for share in shares]
    assert sum(gains) > 0


def test_path_at__lies_between_its_points() -> None:
    path = ThresholdPath(torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.2, 0.123456]], dtype=torch.float64))
    assert path.limits_at(0.5) == (0.1, 0.0)
    assert path.limits_at(2.0) == (0.2, 0.1235)
    assert path.limits_at(-1.0) == (0.0, 0.0)
    assert path.limits_at(9.0) == path.limits_at(path.end)


def test_position_where__finds_the_first_position_cheap_enough() -> None:
    assert position_where(lambda x: 1 - x / 10, 0.75, 10.0) == pytest.approx(2.5, abs=2e-3)
    assert position_where(lambda x: 1 - x / 10, 1.0, 10.0) == 0.0
    assert position_where(lambda x: 1.0, 0.5, 10.0) == 10.0


# ---------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.55])
def test_meet_budget__corrects_a_wrong_prediction(shift: float, budget: float) -> None:
    def truth(position: float) -> float:
        return 1 - 0.06 * position + shift * position / 10

    fit = meet_budget(budget, 10.0, lambda position: 1 - 0.06 * position, lambda position: (truth(position), position))
    assert fit is not None
    assert 0.99 * budget <= fit.reached <= budget
    assert fit.run == fit.position


def test_meet_budget__stays_below_a_step_and_says_when_nothing_will_do() -> None:
    fit = meet_budget(0.6, 10.0, lambda x: 1 - 0.06 * x, lambda x: (0.8 if x < 7 else 0.5, None))
    assert fit is not None
    assert fit.reached == 0.5
    assert meet_budget(0.3, 10.0, lambda x: 1 - 0.08 * x, lambda x: (0.4, None)) is None
    assert meet_budget(2.0, 10.0, lambda x: 1 - 0.08 * x, lambda x: (1.0, None)).position == 0.0  # type: ignore[union-attr]


def test_meet_budget__tries_the_end_before_it_says_that_nothing_will_do() -> None:
    """Predictions may be so far off that six guesses are all too dear, and the end of the path is not."""
    tried: list[float] = []

    def measured(position: float) -> tuple[float, None]:
        tried.append(position)
        return 1.0 - 0.5 * (position / 30.0) ** 40, None

    fit = meet_budget(0.96, 30.0, lambda position: 1.0 - position / 68.0, measured)
    assert fit is not None
    assert (fit.position, fit.reached) == (30.0, 0.5)
    assert len(tried) == TRUE_RUNS + 1


def method_of(result: Calibration) -> Mapping[str, Any]:
    assert isinstance(result.method, Mapping)
    return result.method


@pytest.mark.parametrize("method", [DToP(keep_per_class=1), DoViT()], ids=["dtop", "dovit"])
@pytest.mark.parametrize("budget", [0.95, 0.8])
def test_calibrate__meets_a_budget_by_a_true_run(method: Any, budget: float) -> None:
    images = calibration_set(12)
    result = calibrate(images, method, Budget("budget", budget))
    run = true_run(images, build_method(result.method), dense_reference(images))
    assert run.mac_ratio == pytest.approx(result.reached["share_of_dense"])
    live = (run.live / run.tokens[:, None]).numpy()
    at = np.linspace(0, 1, 21)
    np.testing.assert_allclose(np.array(result.live_quantiles), np.quantile(live, at, axis=0).T, rtol=0, atol=1e-4)
    assert 0.95 * budget <= run.mac_ratio <= budget
    assert len(method_of(result)["threshold"]) == 2
    assert "no" not in result.asked
    assert result.asked["budget"] == budget


@pytest.mark.parametrize("stop", [1, 2])
def test_calibrate__meets_a_budget_with_a_stop(stop: int) -> None:
    images = calibration_set(6, exits=(1, 2, 3))
    method = DToP(keep_per_class=1, stop=stop)
    found = calibrate(images, method, Budget("budget", 0.4))
    chosen = build_method(json.loads(json.dumps(found.method)))
    run = true_run(images, chosen, dense_reference(images))
    assert chosen.last_exit == stop - 1
    assert run.mac_ratio == found.mac_ratio
    assert run.mac_ratio <= 0.4
    assert run.mac_ratio >= 0.39 or stop == 1  # a stop at the first exit has one cost alone
    assert (run.live[:, stop - 1 :] == 0).all()
    capped = calibrate(images, method, Budget("budget", 0.45), cap=0.35)
    assert capped.reached["share_of_dense_largest"] <= 0.35


def test_calibrate__meets_a_budget_in_gmacs() -> None:
    images = calibration_set(8)
    dense = true_run(images, Dense(), dense_reference(images)).macs.double().mean().item() / 1e9
    result = calibrate(images, DToP(keep_per_class=0), Budget("budget_gmacs", 0.8 * dense))
    assert 0.75 * dense <= result.reached["gmacs_mean"] <= 0.8 * dense


def test_calibrate__keeps_every_image_below_its_cap() -> None:
    images = calibration_set(8)
    result = calibrate(images, DToP(keep_per_class=3), Budget("budget", 0.85), cap=0.87)
    assert result.reached["share_of_dense_largest"] <= 0.87
    assert len(method_of(result)["cap"]) == 2
    # Whatever the scores: with thresholds at which nobody leaves of his own will, too.
    bare = DToP(threshold=1.0, cap=tuple(method_of(result)["cap"]))
    run = true_run(images, bare, dense_reference(images))
    assert (run.macs.double() / run.dense_macs).max() <= 0.87
    with pytest.raises(ConfigError, match=r"a cap of 0\.1 cannot be kept: an image costs at least 0\.\d+ of dense"):
        calibrate(images, DToP(), Budget("budget", 0.9), cap=0.1)


@pytest.mark.parametrize("cap", [0.0, -0.5, math.nan, math.inf])
def test_calibrate__refuses_a_cap_that_is_no_share(cap: float) -> None:
    with pytest.raises(ConfigError, match=r"^cap=.* must be a number above 0: it is a share of dense"):
        calibrate(calibration_set(2), DToP(), Budget("budget", 0.9), cap=cap)


def test_cap_shares__bind_no_image_if_they_need_not() -> None:
    dense = random_pass(1, exits=2, grids=((4, 5), (4, 4)))
    model = tiny_segmenter()
    costs = MacTable(model, DToP(), dense.grids)
    live = torch.tensor([[20, 10, 5], [16, 6, 4]])
    loose = cap_shares(costs, live, 1.5)
    assert loose == (1.0, 1.0)
    exact = (costs.macs(live).double() / costs.dense).max().item()
    shares = cap_shares(costs, live, exact + 0.1)
    assert shares[0] >= 0.5
    assert shares[1] >= 0.25


@pytest.mark.parametrize(
    "method", [DToP(threshold=0.8, cap=(0.5, 0.2)), DoViT(threshold=0.8, cap=(0.5, 0.2))], ids=repr
)
def test_cap__holds_for_each_image_of_a_mixed_batch(method: Any) -> None:
    model = tiny_segmenter()
    images = [torch.randn(3, 16, 20), torch.randn(3, 4, 4), torch.randn(3, 12, 24)]
    together = model(images, method)
    for i, image in enumerate(images):
        alone = model([image], method)
        assert torch.equal(together.exit_index[i], alone.exit_index[0])
        cells = together.ledger.tokens[i]
        after = [together.ledger.live[i][n] for n in model.config.exits]
        assert after[0] <= 0.5 * cells
        assert after[1] <= 0.2 * cells


@pytest.mark.parametrize(
    ("cap", "words"),
    [((0.5,), "cap has 1 values for 2 exits"), ((0.5, 1.2), "must be a share"), (0.5, "must be a share")],
)
def test_cap__nonsense_is_refused(cap: Any, words: str) -> None:
    for method in (DToP, DoViT):
        with pytest.raises(ConfigError, match=words):
            tiny_segmenter()(torch.randn(1, 3, 8, 8), method(cap=cap))
    with pytest.raises(ConfigError, match="batch_mode='mean' does not"):
        DoViT(cap=(0.5, 0.5), batch_mode="mean")


def test_calibrate__says_what_is_in_reach_of_a_budget() -> None:
    with pytest.raises(ConfigError) as refused:
        calibrate(calibration_set(4), DToP(keep_per_class=0), Budget("budget", 0.1))
    least = float(str(refused.value).split("ask for ")[1].split(" ")[0])
    assert "exits after blocks 1, 3" in str(refused.value)
    assert 0.1 < least < 0.9
    reached = calibrate(calibration_set(4), DToP(keep_per_class=0), Budget("budget", least)).reached["share_of_dense"]
    assert reached <= least


# ---------------------------------------------------------------------------------------------------------- latency


def test_latency__adds_up_blocks_exits_and_the_rest() -> None:
    latency = Latency(Curve(1, 0.5, 0), (Curve(2, 0, 0), Curve(0, 0.1, 0)), Curve(0, 0, 0.01))
    live = torch.tensor([[100, 40, 10], [50, 50, 0]])
    blocks = [1 * 51 + 2 * 21 + 1 * 6, 1 * 26 + 2 * 26 + 1 * 1]
    exits = [2 + 0.1 * 40, 2 + 0.1 * 50]
    rest = [100.0, 25.0]
    expected = [a + b + c for a, b, c in zip(blocks, exits, rest)]
    assert latency.ms(live, (1, 3), 4).tolist() == pytest.approx(expected)


def test_calibrate__to_a_latency_uses_a_cached_cost_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts multiply-adds, so that no figure hangs on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def clock(model: Any, image: Any, method: Any, target: Any, precision: str) -> Any:
        calls.append(method)
        with torch.inference_mode():
            output = model([image], method)
        return output, output.ledger.macs[0] / 1e5

    monkeypatch.setattr("tokenexit.calibration.latency.timed_forward", clock)
    measured = []

    def measure(model: Any, method: Any, precision: str) -> Latency:
        measured.append(method)
        block = model.backbone.block_ops(20).macs / 20 / 1e5
        return Latency(Curve(0, block, 0), (Curve(0, 0, 0),) * 2)

    monkeypatch.setattr("tokenexit.calibration.latency.measure_latency", measure)
    images = CalibrationSet(tiny_segmenter(), Noise(6, SMALL), tuple(range(6)))
    dense = images.model([torch.zeros(3, 16, 20)]).ledger.dense_macs[0] / 1e5
    result = calibrate(images, DToP(keep_per_class=0), Budget("latency_ms", 0.8 * dense))
    assert 0.7 * dense <= result.reached["latency_ms_mean"] <= 0.8 * dense
    assert len(list(tmp_path.rglob("*.json"))) == 1
    latency_on_this_machine(images.model, DToP())
    assert len(measured) == 1
    with pytest.raises(ConfigError, match=r"latency_ms=0\.001 is out of reach: .* takes at least [\d.]+ ms"):
        calibrate(images, DToP(keep_per_class=0), Budget("latency_ms", 0.001))


# ------------------------------------------------------------------------------------------------------------ bounds


def test_calibrate__bounds_the_disagreement_on_images_that_had_no_part_in_the_path() -> None:
    images = calibration_set(40)
    target = Bound("max_disagreement", 0.3, confidence=0.8)
    result = calibrate(images, DToP(keep_per_class=0), target)
    path, test = split(40, target, 0)
    assert result.images == {"count": 40, "path": len(path), "test": len(test), "seed": 0}
    run = true_run(images.part(test), build_method(result.method), dense_reference(images.part(test)))
    loss = error(run.confusion, "pixels").mean().item()
    assert loss == pytest.approx(result.reached["mean_loss"])
    assert risk_control.hoeffding_bentkus(loss, len(test), 0.3) <= 0.2
    assert result.reached["p_value"] <= 0.2
    assert run.mac_ratio == pytest.approx(result.reached["share_of_dense"])
    assert "With confidence 0.8" in result.guarantee
    assert "not for other cameras" in result.guarantee


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Bound("max_disagreement", 0.4, 0.8, images_above=0.3), "at most 0.3 of images like them have more than 0.4"),
        (Bound("max_disagreement", 0.3, in_expectation=True), "No confidence"),
        (Bound("max_disagreement", 0.3, 0.8, average="classes", clip=0.9), "clipped at 0.9 per image"),
        (Bound("max_error_increase", 0.3, 0.8), "over the dense model's (a decrease counts as none)"),
        (Bound("max_miou_drop", 30.0), "An estimate, not a guarantee"),
    ],
    ids=lambda target: getattr(target, "what", ""),
)
def test_calibrate__names_what_it_guarantees(target: Bound, words: str) -> None:
    result = calibrate(calibration_set(30), DToP(keep_per_class=0), target)
    assert words in result.guarantee
    assert result.asked[target.what] == target.value


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        (Bound("max_disagreement", 0.01, 0.95), 299),
        (Bound("max_disagreement", 0.01, 0.95, clip=0.5), 149),
        (Bound("max_disagreement", 0.01, 0.95, images_above=0.1), 29),
        (Bound("max_error_increase", 0.01, in_expectation=True), 99),
    ],
)
def test_split__says_how_many_images_a_target_needs(target: Bound, needed: int) -> None:
    with pytest.raises(ConfigError, match=rf"needs at least {needed} images to test on.* give {needed + 4} or more"):
        split(needed + 3, target, 0)
    path, test = split(needed + 4, target, 0)
    assert (len(path), len(test)) == (4, needed)


def test_split__parts_are_disjoint_and_a_function_of_the_seed() -> None:
    target = Bound("max_disagreement", 0.1)
    path, test = split(200, target, 3)
    assert sorted(path + test) == list(range(200))
    assert len(path) == 60
    assert split(200, target, 3) == (path, test)
    assert split(200, target, 4) != (path, test)


def test_calibrate__says_what_bound_is_in_reach() -> None:
    with pytest.raises(ConfigError, match=r"max_disagreement=0\.1 is out of reach: .* support a bound of 0\.\d+; ask"):
        calibrate(calibration_set(30, seed=3), DoViT(), Bound("max_disagreement", 0.1, 0.8))


@pytest.mark.parametrize("target", [Bound("max_disagreement", 0.9, 0.8), Bound("max_miou_drop", 50.0)], ids=repr)
def test_calibrate__tests_the_first_position_where_the_path_has_no_other(target: Bound) -> None:
    """With the k most confident of each class on grids this small everybody stays; a stop lets nobody stay anyway."""
    for method in (DToP(keep_per_class=100), DToP(stop=1)):
        result = calibrate(calibration_set(24), method, target)
        assert result.reached["places_tested"] >= 1


def test_sequential_test__accepts_the_last_position_before_the_first_failure() -> None:
    """The true procedure on a script of losses: what comes behind a failure is not looked at."""
    target = Bound("max_disagreement", 0.1, 0.9)
    images = calibration_set(2)
    sequential_test = SequentialTest(images, target, dense_reference(images), None)
    shares = iter([0.0, 0.02, 0.5, 0.0])

    def scripted(method: Any) -> Any:
        wrong = round(1000 * next(shares))
        confusion = torch.zeros(200, CLASSES, CLASSES)
        confusion[:, 0, 0], confusion[:, 0, 1] = 1000 - wrong, wrong
        return type("Run", (), {"confusion": confusion})()

    sequential_test.run = scripted  # type: ignore[method-assign]
    assert risk_control.fixed_sequence(4, lambda j: sequential_test.passes(DToP())) == 2
    assert sequential_test.figures["mean_loss"] == pytest.approx(0.02)
    assert next(shares) == 0.0


def test_sequential_test__in_expectation_judges_the_largest_loss_so_far() -> None:
    images = calibration_set(2)
    sequential_test = SequentialTest(
        images, Bound("max_disagreement", 0.5, in_expectation=True), dense_reference(images), None
    )
    for wrong, passed in ((0, True), (400, True), (0, True), (600, False)):
        confusion = torch.zeros(2, CLASSES, CLASSES)
        confusion[0, 0, 0], confusion[0, 0, 1], confusion[1, 0, 0] = 1000 - wrong, wrong, 1
        verdict, figures = sequential_test.judge(type("Run", (), {"confusion": confusion})())
        assert verdict is ((2 * figures["mean_of_largest_losses"] + 1) / 3 <= 0.5)
        assert verdict is passed
    assert figures["mean_of_largest_losses"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"value": 0.0}, "max_disagreement=0 is a share"),
        ({"value": 0.2, "confidence": 1.0}, "confidence=1 must be"),
        ({"value": 0.2, "clip": 0.0}, "clip=0 must be"),
        ({"value": 0.2, "clip": 0.1}, "says nothing of losses clipped at 0.1"),
        ({"value": 0.2, "images_above": 1.0}, "images_above=1 is a share"),
        ({"value": 0.2, "images_above": 0.1, "in_expectation": True}, "do not apply"),
        ({"what": "max_miou_drop", "value": 0.3, "in_expectation": True}, "max_miou_drop is estimated"),
    ],
)
def test_bound__nonsense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bound(**{"what": "max_disagreement", **values})


def test_target_of__takes_exactly_one() -> None:
    assert target_of({"budget": 0.6, "confidence": 0.9, "max_disagreement": None}) == Budget("budget", 0.6)
    assert target_of({"max_miou_drop": 0.3, "confidence": 0.8}) == Bound("max_miou_drop", 0.3, 0.8)
    with pytest.raises(ConfigError, match="2 targets are given"):
        target_of({"budget": 0.6, "latency_ms": 3.0})
    with pytest.raises(ConfigError, match="confidence belongs to a bound, and budget is a budget"):
        target_of({"budget": 0.6, "confidence": 0.8})


def test_calibrate__refuses_bounds_on_errors_without_labels(tmp_path: Path) -> None:
    for i in range(20):
        Noise(20, SMALL)[i].image.save(tmp_path / f"{i}.png")
    model = tiny_segmenter()
    assert model.preprocessing.labels is not None
    data = UnlabelledImages([tmp_path], model.preprocessing.labels)
    images = CalibrationSet(model, data, tuple(range(20)))
    with pytest.raises(DataError, match="no labels: ask for --max-disagreement"):
        calibrate(images, DToP(), Bound("max_error_increase", 0.4, 0.8))
    result = calibrate(images, DToP(keep_per_class=0), Budget("budget", 0.9))
    assert result.reached["share_of_dense"] <= 0.9


def test_calibrate__leaves_images_without_labels_out_of_bounds_on_errors() -> None:
    """They would count as images on which nothing is lost."""

    class HalfLabelled(Noise):
        def __getitem__(self, index: int, /) -> Any:
            sample = super().__getitem__(index)
            return replace(sample, mask=np.full_like(sample.mask, 255)) if index % 2 else sample

    images = CalibrationSet(tiny_segmenter(), HalfLabelled(40), range(40))
    result = calibrate(images, DToP(keep_per_class=0), Bound("max_error_increase", 0.4, 0.8))
    assert result.images["count"] == 20


def test_drawn__spreads_a_limit_over_all_images() -> None:
    assert drawn(5, None, 0) == drawn(5, 9, 0) == (0, 1, 2, 3, 4)
    some = drawn(1000, 50, 1)
    assert len(set(some)) == 50
    assert list(some) == sorted(some)
    assert max(some) > 700


# ------------------------------------------------------------------------------------------------------------- saved


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any]:
    images = calibration_set(6)
    images.model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", calibrate(images, DToP(keep_per_class=1), Budget("budget", 0.9), about={"data": "noise"})


def test_calibration__is_saved_with_the_model_and_used_by_predict(saved: tuple[Path, Any]) -> None:
    folder, result = saved
    path = write_calibration(result, folder, folder)
    content = json.loads(path.read_text())
    assert content["asked"]["budget"] == 0.9
    assert content["images"] == {"data": "noise", "count": 6}
    assert content["made"].startswith("20")
    model = ExitSegmenter.from_pretrained(folder)
    method = build_method(result.method)
    assert model.calibrated_method() == method
    image = Noise(1)[0].image
    assert model.predict(image).ledger.macs == model.predict(image, method).ledger.macs
    assert model.predict(image, Dense()).ledger.live[0] == (20,) * 4
    assert torch.equal(reference_statistics_of(model).mean, ReferenceStatistics.from_dict(content["scores"]).mean)


def test_calibration__goes_with_the_model_when_it_is_saved_again(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, result = saved
    write_calibration(result, folder, folder)
    ExitSegmenter.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert ExitSegmenter.from_pretrained(tmp_path / "again").calibrated_method() == build_method(result.method)


def test_calibration__of_a_copy_leaves_the_model_alone(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, result = saved
    write_calibration(result, folder, tmp_path / "copy")
    assert ExitSegmenter.from_pretrained(folder).calibrated_method() is None
    assert ExitSegmenter.from_pretrained(tmp_path / "copy").calibrated_method() is not None
    tiny_segmenter(seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other holds another model"):
        write_calibration(result, folder, tmp_path / "other")


def test_calibration__of_other_weights_is_refused_by_name(saved: tuple[Path, Any]) -> None:
    folder, result = saved
    write_calibration(result, folder, folder)
    tiny_segmenter(seed=8).save_pretrained(folder)
    model = ExitSegmenter.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="made for other weights: run `tokenexit calibrate` again"):
        model.predict(Noise(1)[0].image)
    model.predict(Noise(1)[0].image, Dense())


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_calibration__damaged_is_refused(saved: tuple[Path, Any], text: str) -> None:
    folder, _ = saved
    (folder / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json is damaged"):
        ExitSegmenter.from_pretrained(folder)


def test_calibration__with_missing_parts_is_refused_when_used(saved: tuple[Path, Any]) -> None:
    folder, result = saved
    values = result.to_dict()
    for part, use in (("method", ExitSegmenter.calibrated_method), ("scores", reference_statistics_of)):
        (folder / "calibration.json").write_text(json.dumps({k: v for k, v in values.items() if k != part}))
        model = ExitSegmenter.from_pretrained(folder)
        with pytest.raises(CheckpointError, match=r"damaged|lacks .scores., as of an earlier version: calibrate again"):
            use(model)


def test_write_calibration__interrupted_leaves_what_was_there(
    saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = saved
    path = write_calibration(result, folder, folder)
    before = path.read_text()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenexit.runtime.atomic.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_calibration(result, folder, folder)
    assert path.read_text() == before
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "config.json", "model.safetensors"]


# ------------------------------------------------------------------------------------------------------------- drift


def histograms(images: int, uncertainty: Callable[[np.random.Generator], Any], seed: int = 0) -> Histograms:
    rng = np.random.default_rng(seed)
    counts = [[np.bincount(uncertainty(rng), minlength=17)[:17] for _ in range(2)] for _ in range(images)]
    return Histograms(torch.from_numpy(np.array(counts)))


def sure(rng: np.random.Generator) -> Any:
    return rng.binomial(16, rng.beta(20, 30), 60)


def unsure(rng: np.random.Generator) -> Any:
    return rng.binomial(16, rng.beta(40, 20), 60)


def test_monitor__is_quiet_with_images_like_the_calibrations() -> None:
    reference = ReferenceStatistics.of(histograms(300, sure))
    alarms = 0
    for seed in range(1, 101):
        monitor = Monitor(reference)
        monitor.add(histograms(25, sure, seed))
        alarms += monitor.warning() is not None
    assert alarms <= 2


def test_monitor__warns_of_others_in_one_sentence() -> None:
    monitor = Monitor(ReferenceStatistics.of(histograms(300, sure)))
    assert monitor.warning() is None
    monitor.add(histograms(12, unsure, 5))
    warning = monitor.warning()
    assert warning is not None
    assert "of 12 images have scores unlike the calibration's" in warning
    assert warning.count(".") <= 2


def test_monitor__says_nothing_of_a_single_image() -> None:
    monitor = Monitor(ReferenceStatistics.of(histograms(300, sure)))
    monitor.add(histograms(1, unsure, 5))
    assert monitor.unusual == 1
    assert monitor.warning() is None


def varied(rng: np.random.Generator) -> Any:
    return rng.binomial(16, rng.beta(2, 3), 60)


def varied_and_surer(rng: np.random.Generator) -> Any:
    return rng.binomial(16, rng.beta(2, 6), 60)


def test_monitor__warns_where_no_image_is_unusual_and_all_together_are() -> None:
    reference = ReferenceStatistics.from_dict(
        json.loads(json.dumps(ReferenceStatistics.of(histograms(300, varied)).to_dict()))
    )
    few, many, same = (Monitor(reference) for _ in range(3))
    few.add(histograms(LEAST_IMAGES - 1, varied_and_surer, 1))
    many.add(histograms(200, varied_and_surer, 1))
    same.add(histograms(200, varied, 1))
    assert few.warning() is None
    assert same.warning() is None
    warning = many.warning()
    assert warning is not None
    assert many.p_value > ALARM, "for themselves they are not unusual"
    assert f"the scores of these 200 images are on average unlike the calibration's, by {many.apart:.0%}" in warning


def test_monitor__joins_what_processes_saw() -> None:
    reference = ReferenceStatistics.of(histograms(300, sure))
    alone, first, second = (Monitor(reference) for _ in range(3))
    halves = histograms(30, unsure, 1), histograms(20, sure, 2)
    alone.add(Histograms(torch.cat([half.counts for half in halves])))
    first.add(halves[0])
    second.add(halves[1])
    first.join([second])
    assert (first.images, first.unusual) == (alone.images, alone.unusual)
    assert first.apart == pytest.approx(alone.apart)


def test_distances__ignore_exits_that_saw_nothing() -> None:
    mean = ReferenceStatistics.of(histograms(50, sure)).mean
    counts = histograms(1, sure, 9).counts
    counts[:, 1] = 0
    assert distances(Histograms(counts), mean)[0] == distances(Histograms(counts[:, :1]), mean[:1])[0]
    assert distances(Histograms(torch.zeros_like(counts)), mean).tolist() == [0.0]


def test_reference_statistics__survives_json() -> None:
    reference = ReferenceStatistics.of(histograms(40, sure))
    again = ReferenceStatistics.from_dict(json.loads(json.dumps(reference.to_dict())))
    assert torch.allclose(again.mean, reference.mean, atol=1e-5)
    assert again.limit == pytest.approx(reference.limit, abs=1e-5)


def test_watch__counts_every_token_an_exit_head_saw_and_goes_away() -> None:
    model = tiny_segmenter()
    images = [torch.randn(3, 16, 20), torch.randn(3, 8, 8)]
    with hook_scores(model) as seen:
        output = model(images, DToP(threshold=0.6))
    counts = seen.histograms([1, 1]).counts.sum(2)
    assert counts[:, 0].tolist() == list(output.ledger.tokens)
    assert counts[:, 1].tolist() == [live[1] for live in output.ledger.live]
    model(images, DToP())
    assert len(seen.calls[0]) == 1
    assert seen.histograms([2]).counts.sum(2)[0, 0] == sum(output.ledger.tokens)
