"""A plan for a model that has exits: the others are closed, and it is the plan itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calibration.test_dense_pass import Noise
from tests.helpers import random_image, tiny_segmenter
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.for_plan import on_all_exits
from tokenexit.calibration.plans import Plan, try_plan
from tokenexit.calibration.survey import Survey
from tokenexit.calibration.targets import Bound, Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import DToP, build_method

COUNT = 6


def images() -> CalibrationSet:
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    return CalibrationSet(model, Noise(COUNT), tuple(range(COUNT)))


def test_calibrate__with_a_plan_meets_the_budget_by_a_method_that_the_model_runs() -> None:
    some, lines = images(), list[str]()
    found = calibrate(some, DToP(), Budget("budget", 0.6), plan="dense", say=lines.append)
    assert found.mac_ratio is not None
    assert found.mac_ratio <= 0.6
    assert "as dense has them" in found.guarantee
    assert lines
    assert all("of pixels as dense has them" in line for line in lines)
    some.model.calibration = found
    some.model([random_image(24, 32)], build_method(found.method))


def test_calibrate__with_a_plan_for_milliseconds_says_what_it_takes() -> None:
    found = calibrate(images(), DToP(), Budget("latency_ms", 1e4), plan="dense")
    assert 0.0 < found.reached["latency_ms_mean"] < 1e4
    assert "ms on this machine, with 100.00% of pixels as dense" in found.guarantee


@pytest.mark.parametrize(
    "plan", [Plan(exits=(2,)), Plan(stop=3, exits=(1,)), Plan(scale=0.7, exits=(1, 3)), Plan(stop=2), Plan(scale=0.5)]
)
@pytest.mark.parametrize("temperature", [1.0, (2.0, 1.5, 0.5)])
def test_plan__on_a_model_with_more_exits_answers_as_on_one_with_its_own(plan: Plan, temperature: Any) -> None:
    some = images()
    survey = Survey(some, DToP(keep_per_class=1, temperature=temperature), "pixels", (1.0, 0.7, 0.5))
    tried = try_plan(survey, plan, 0.9)
    assert tried is not None
    image = random_image(24, 32)
    own = some.model.with_exits(plan.places)([image], tried.method)
    whole = some.model([image], on_all_exits((1, 2, 3), tried))
    torch.testing.assert_close(whole.grid_logits[0], own.grid_logits[0], rtol=0, atol=0)
    assert whole.ledger.macs == own.ledger.macs


def test_plan__is_refused_where_it_cannot_be_made() -> None:
    some = images()
    with pytest.raises(ConfigError, match="a plan is made for a budget"):
        calibrate(some, DToP(), Bound("max_disagreement", 0.5), plan="dense")
    with pytest.raises(ConfigError, match="latency_ms=1e-06 is out of reach"):
        calibrate(some, DToP(), Budget("latency_ms", 1e-6), plan="dense")
    bare = CalibrationSet(some.model.with_exits(()), some.data, some.indices)
    with pytest.raises(ConfigError, match="no exits to plan with"):
        calibrate(bare, DToP(), Budget("budget", 0.5), plan="dense")
