"""Thresholds that are chosen with a reducer on, and what says so where they are used otherwise."""

from __future__ import annotations

import json

import pytest
import torch

from tests.calibration.test_dense_pass import calibration_set
from tests.helpers import gently_varied
from tokenexit.calibration import for_bound, planner
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import dense_reference, true_run
from tokenexit.calibration.dense_pass import DensePass
from tokenexit.calibration.store import write_calibration
from tokenexit.calibration.targets import Bound, Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, FixedRatio, Reduced, build_method
from tokenexit.reducers import ALGM, G2TM, MPM, Supertokens
from tokenexit.report.sweep import plan_method, plan_rule
from tokenexit.segmenter import ExitSegmenter


@pytest.fixture(autouse=True)
def _fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PRICES", (0.0,))
    monkeypatch.setattr(for_bound, "PILOT_RUNS", 3)
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 12)


@pytest.mark.parametrize("method", [DToP(keep_per_class=1), DoViT()])
def test_dense_pass__of_a_reducer_that_never_fires_is_that_without(method: DToP | DoViT) -> None:
    images = calibration_set()
    alone, beside = DensePass.of(images, method), DensePass.of(images, method, by=G2TM(2.0))
    for name in ("uncertainty", "label", "said", "wanted"):
        assert torch.equal(getattr(alone, name), getattr(beside, name))


@pytest.mark.parametrize("method", [DToP(keep_per_class=1), DoViT()])
def test_dense_pass__of_merged_tokens_stands_at_all_their_cells(method: DToP | DoViT) -> None:
    images = calibration_set()
    merged = DensePass.of(images, method, by=Supertokens(-1.0, (2,)))
    first = merged.uncertainty[:, :20].view(2, 4, 5)  # the first image has 4 rows of 5 patches
    for part in (first[:, ::2, :4:2], first[:, 1::2, 1:4:2]):
        assert torch.equal(part, first[:, ::2, :4:2])


@pytest.mark.parametrize("method", [DToP(keep_per_class=1), DoViT()])
@pytest.mark.parametrize("by", [MPM((1,)), Supertokens(-1.0, (2,))])
def test_calibrate__meets_a_budget_with_the_reducer_on(method: DToP | DoViT, by: MPM | Supertokens, tmp_path) -> None:
    images = calibration_set(depth=8, exits=(2, 5))
    alone = true_run(images, Reduced(Dense(), by), dense_reference(images)).mac_ratio
    target = 0.8 * alone
    found = calibrate(images, Reduced(method, by), Budget("budget", target))
    chosen = build_method(found.method)
    assert isinstance(chosen, Reduced)
    assert (chosen.by, chosen.method.name) == (by, method.name)
    assert found.reached["share_of_dense"] <= target
    run = true_run(images, chosen, dense_reference(images))
    assert run.mac_ratio == pytest.approx(found.reached["share_of_dense"])
    assert run.mac_ratio > 0.85 * target  # tokens of tiny images leave in large steps

    images.model.save_pretrained(tmp_path)
    write_calibration(found, tmp_path, tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path)
    assert again.calibrated_method() == chosen
    image = gently_varied(16, 20)
    with torch.no_grad():
        a, b = again([image], again.calibrated_method()), images.model([image], chosen)
    assert torch.equal(a.grid_logits[0], b.grid_logits[0])


def test_calibrate__tests_a_bound_with_the_reducer_on() -> None:
    images = calibration_set(24)
    found = calibrate(
        images, Reduced(DToP(keep_per_class=1), MPM((3,))), Bound("max_disagreement", 0.97, confidence=0.5)
    )
    assert isinstance(build_method(found.method), Reduced)
    assert "With confidence 0.5" in found.guarantee
    with pytest.raises(ConfigError, match="out of reach"):  # merging alone loses more
        calibrate(
            images,
            Reduced(DToP(keep_per_class=1), MPM((1,))),
            Bound("max_disagreement", 0.1, confidence=0.5),
        )


@pytest.mark.parametrize("options", [{"cap": 0.9}, {"plan": "dense"}, {"temperatures": True}])
def test_calibrate__chooses_thresholds_alone_beside_merging(options: dict) -> None:
    with pytest.raises(ConfigError, match="beside merging thresholds alone are chosen"):
        calibrate(calibration_set(), Reduced(DToP(keep_per_class=1), MPM((1,))), Budget("budget", 0.5), **options)
    with pytest.raises(ConfigError, match="has no thresholds"):
        calibrate(calibration_set(), Reduced(Dense(), MPM((1,))), Budget("budget", 0.5))


def test_sweep__has_a_line_with_the_reducer_on() -> None:
    images = calibration_set(depth=6, exits=(2, 4))
    points = plan_method(images, Reduced(DToP(keep_per_class=1), MPM((1,))), 3, "pixels", full_range=True)
    assert points
    assert all(point.series == "dtop + mpm after=1, thresholds chosen" for point in points)
    assert all(build_method(point.method).by == MPM((1,)) for point in points)  # type: ignore[attr-defined]
    costs = [true_run(images, build_method(point.method), dense_reference(images)).mac_ratio for point in points]
    assert costs[0] > costs[-1]
    rule = plan_rule(Reduced(FixedRatio(), ALGM(0.5, 1, 3)), 2, 2)
    assert rule is not None
    assert [json.dumps(point.method["by"]) for point in rule] == [
        '{"name": "algm", "threshold": 0.5, "global_block": 3}'
    ] * 2
    assert [point.series for point in plan_rule(Reduced(Dense(), MPM((1,))), 2, 2) or []] == ["dense + mpm after=1"]
