"""How much a reducer merges, chosen together with thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.calibration.test_dense_pass import calibration_set
from tokenexit.calibration import for_bound, for_merging, planner
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, mean_error, true_run
from tokenexit.calibration.for_bound import split
from tokenexit.calibration.targets import Bound, Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP, Reduced, build_method
from tokenexit.methods.reduced import parted
from tokenexit.reducers import ALGM, MPM, ToMe, build_reducer

TRIALS = (0.05, 0.1, 0.15)
METHOD = DToP(keep_per_class=1)


@pytest.fixture(autouse=True)
def _fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PRICES", (0.0,))
    monkeypatch.setattr(for_bound, "PILOT_RUNS", 3)
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 12)
    monkeypatch.setattr(ToMe, "trials", TRIALS)


@pytest.fixture(scope="module")
def images() -> CalibrationSet:
    return calibration_set(4, depth=8, exits=(2, 5))


def chosen_of(found: Any) -> tuple[Any, Any]:
    return parted(build_method(found.method))


def test_calibrate__keeps_the_amount_of_merging_that_agrees_most_at_the_budget(images: CalibrationSet) -> None:
    target = Budget("budget", 0.5)
    said: list[str] = []
    found = calibrate(images, Reduced(METHOD, ToMe()), target, average="pixels", choose_merging=True, say=said.append)
    reference = dense_reference(images)
    losses = {}
    for by in (None, *map(ToMe, TRIALS)):  # each by itself, as a user would
        alone = calibrate(images, METHOD if by is None else Reduced(METHOD, by), target, average="pixels")
        losses[by] = mean_error(true_run(images, build_method(alone.method), reference), "pixels")
    method, by = chosen_of(found)
    assert losses[by] == min(losses.values())
    assert len(set(losses.values())) == 4  # there was something to choose
    assert found.reached["share_of_dense"] <= 0.5
    assert found.reached["pixels_unlike_dense"] == losses[by]
    assert len(method.threshold) == 2
    tried = found.reached["merging_tried"]
    assert {None if one["by"] is None else build_reducer(one["by"]) for one in tried} == set(losses)
    assert tried[0]["by"] is None if by is None else build_reducer(tried[0]["by"]) == by
    assert said[0] == "tome: trying ratio 0.05, 0.1, 0.15, and no merging"


def test_calibrate__merges_within_a_bound_and_tests_it_on_images_that_chose_nothing(
    images: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, compared, run = Bound("max_disagreement", 0.6, confidence=0.5), [], for_merging._figures
    many = calibration_set(16, depth=8, exits=(2, 5))

    def spied(some: CalibrationSet, *others: Any) -> Any:
        compared.append(set(some.indices))
        return run(some, *others)

    monkeypatch.setattr(for_merging, "_figures", spied)
    found = calibrate(many, Reduced(METHOD, ToMe()), target, choose_merging=True, seed=3)
    path, test = split(16, target, 3)
    assert compared == [set(path)] * 4
    assert not set(path) & set(test)
    assert found.images["test"] == len(test)
    tried = [one["share_of_dense"] for one in found.reached["merging_tried"]]
    met = [share for share in tried if share is not None]
    assert tried[: len(met)] == sorted(met)
    assert "With confidence 0.5" in found.guarantee


def test_for_merging__an_amount_that_loses_too_much_by_itself_is_none_within_the_bound(images: CalibrationSet) -> None:
    target = Bound("max_disagreement", 0.02, confidence=0.5)
    tried = for_merging._figures(images, METHOD, target, "pixels", ToMe(0.1))
    assert tried is None
    assert for_merging._figures(images, METHOD, target, "pixels", None) is not None


def test_apart__leaves_out_amounts_that_cost_as_much_and_ends_below_what_is_enough(
    images: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, reference = images.part(images.spread(8)), dense_reference(images.part(images.spread(8)))
    shares = {ratio: true_run(few, Reduced(Dense(), ToMe(ratio)), reference).mac_ratio for ratio in TRIALS}
    monkeypatch.setattr(ToMe, "trials", (0.0, 0.05, 0.0501, 0.1, 0.15))
    assert list(for_merging.apart(images, ToMe(), 0.0)) == [ToMe(0.05), ToMe(0.1), ToMe(0.15)]
    assert list(for_merging.apart(images, ToMe(), (shares[0.05] + shares[0.1]) / 2)) == [ToMe(0.05), ToMe(0.1)]


def test_calibrate__goes_on_where_it_was_interrupted(
    images: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = for_merging._figures

    def counted(*values: Any) -> Any:
        if len(calls) == 2:
            calls.append("interrupted")
            raise KeyboardInterrupt
        calls.append(values[-1])
        return run(*values)

    monkeypatch.setattr(for_merging, "_figures", counted)
    words: Any = {"choose_merging": True, "progress": tmp_path / "progress.json"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(images, Reduced(METHOD, ToMe()), Budget("budget", 0.5), **words)
    again = calibrate(images, Reduced(METHOD, ToMe()), Budget("budget", 0.5), **words)
    assert calls == [None, ToMe(0.05), "interrupted", ToMe(0.1), ToMe(0.15)]
    assert chosen_of(again) == chosen_of(
        calibrate(images, Reduced(METHOD, ToMe()), Budget("budget", 0.5), choose_merging=True)
    )
    with pytest.raises(ConfigError, match="was made with target="):
        calibrate(images, Reduced(METHOD, ToMe()), Budget("budget", 0.8), **words)


def test_calibrate__refuses_to_choose_where_there_is_nothing(images: CalibrationSet) -> None:
    with pytest.raises(ConfigError, match="'mpm' has nothing to choose"):
        calibrate(images, Reduced(METHOD, MPM((1,))), Budget("budget", 0.5), choose_merging=True)
    with pytest.raises(ConfigError, match="choose_merging needs a reducer"):
        calibrate(images, METHOD, Budget("budget", 0.5), choose_merging=True)
    with pytest.raises(ConfigError, match=r"budget=0\.01 is out of reach"):
        calibrate(images, Reduced(METHOD, ToMe()), Budget("budget", 0.01), choose_merging=True)


@pytest.mark.parametrize("name", ["algm", "g2tm", "supertokens", "tome", "zerotprune"])
def test_trials__are_values_of_the_main_option(name: str) -> None:
    by = build_reducer(name)
    assert len({for_merging.with_value(by, value) for value in by.trials}) == len(by.trials) > 1
    assert isinstance(ALGM(0.7), type(for_merging.with_value(ALGM(), 0.7)))
