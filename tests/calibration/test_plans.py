"""Plans of size, stop and exits: what they cost, which are found, and which is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.calibration.test_dense_pass import Noise
from tests.helpers import tiny_segmenter
from tokenexit.calibration import plans as module
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, true_run
from tokenexit.calibration.plans import Held, Plan, choose_plan, finalists, search_plans, static_plans, try_plan
from tokenexit.calibration.survey import Survey
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Method, Resized, ThresholdMethod, Truncated
from tokenexit.segmenter import ExitSegmenter

SCALES = (1.25, 1.0, 0.7, 0.5)
ODD = ((18, 23), (13, 26))
"""Heights and widths that are no whole patches."""


def survey_of(
    model: ExitSegmenter | None = None,
    method: ThresholdMethod[Any] | None = None,
    count: int = 6,
    labels: bool = False,
    scales: tuple[float, ...] = SCALES,
    average: Any = "pixels",
) -> Survey:
    model = tiny_segmenter("linear", exits=(1, 2, 3)) if model is None else model
    images = CalibrationSet(model, Noise(count, ODD), tuple(range(count)))
    return Survey(images, DToP() if method is None else method, average, scales, labels)


@pytest.fixture(scope="module")
def survey() -> Survey:
    return survey_of()


@pytest.fixture(scope="module")
def grid_survey() -> Survey:
    """A model whose decode head reads the whole grid at a finer resolution than its exits answer."""
    model = tiny_segmenter("linear", "setr_pup", exits=(1, 2, 3))
    return survey_of(model, DoViT(), count=4, scales=(1.0, 0.5))


def run_of(survey: Survey, scale: float, n: int) -> Any:
    """A true run of a static plan, on the model with its one exit."""
    block = survey.blocks[n]
    stops = n < len(survey.blocks) - 1
    images = replace(survey.images, model=survey.model.with_exits((block,) if stops else ()))
    inner = Truncated(1) if stops else Dense()
    return true_run(images, inner if scale == 1.0 else Resized(inner, scale), survey.reference)


# ---------------------------------------------------------------------------------------------------------- static


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [0, 2, 3])
def test_costs__of_static_plans_are_the_ledger_of_their_runs(survey: Survey, scale: float, n: int) -> None:
    assert survey.static_costs[scale][n] == pytest.approx(run_of(survey, scale, n).mac_ratio, rel=1e-9)


def test_costs__of_windows_are_the_ledger_of_their_runs() -> None:
    model = tiny_segmenter("linear", exits=(1, 2))
    model.preprocessing = replace(model.preprocessing, window=(11, 14), stride=(7, 9))
    found = survey_of(model, count=4)
    for scale in found.scales:
        for n in range(3):
            assert found.static_costs[scale][n] == pytest.approx(run_of(found, scale, n).mac_ratio, rel=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_losses__of_static_plans_are_nearly_those_of_their_runs(survey: Survey, scale: float) -> None:
    for n in range(len(survey.blocks)):
        run = run_of(survey, scale, n)
        assert survey.static_losses[scale][n] == pytest.approx(survey.loss_of(run), abs=0.06)
    assert survey.static_losses[1.0][-1] == 0.0


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_static_plans__lose_least_of_all_sizes_within_the_budget(survey: Survey, budget: float) -> None:
    plans = static_plans(survey, budget)
    assert len(plans) >= 1
    for plan in plans:
        n = survey.blocks.index(plan.stop or survey.blocks[-1])
        assert plan.price <= budget + 1e-9
        assert all(
            survey.static_costs[scale][n] > budget or survey.static_losses[scale][n] >= plan.loss
            for scale in survey.scales
        )
    assert len({plan.stop for plan in plans}) == len(plans)


def test_static_plans__that_hold_a_size_or_a_depth_have_it(survey: Survey) -> None:
    assert {plan.scale for plan in static_plans(survey, 0.9, Held(scale=0.7))} == {0.7}
    assert [plan.stop for plan in static_plans(survey, 0.9, Held(depth=2))] == [2]
    (plan,) = static_plans(survey, 0.9, Held(depth=4))
    assert (plan.stop, plan.exits) == (None, ())
    assert static_plans(survey, 1e-4) == []
    assert static_plans(survey, 1.0, Held(exits=(1,))) == []


def test_static_plans__of_a_grid_head_never_stop(grid_survey: Survey) -> None:
    assert {plan.stop for plan in static_plans(grid_survey, 0.9)} == {None}


# ---------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
def test_search__finds_no_plan_above_the_budget_and_the_best_one_first(survey: Survey, budget: float) -> None:
    plans = search_plans(survey, budget)
    assert all(plan.price <= budget + 1e-9 for plan in plans)
    assert [plan.loss for plan in plans] == sorted(plan.loss for plan in plans)
    assert any(plan.exits for plan in plans)
    for plan in plans:
        assert len(plan.exits) <= module.MOST_EXITS
        assert plan.stop is None or all(exit < plan.stop for exit in plan.exits)


def test_search__holds_what_is_held(survey: Survey) -> None:
    assert all(not plan.exits for plan in search_plans(survey, 0.5, Held(exits=())))
    assert search_plans(survey, 0.5, Held(exits=())) == sorted(static_plans(survey, 0.5), key=lambda one: one.loss)
    for budget in (0.5, 0.9, 1.0):
        plans = search_plans(survey, budget, Held(exits=(1, 2)))
        assert plans
        assert {plan.exits for plan in plans} == {(1, 2)}
        assert {plan.stop for plan in plans} <= {None, 3}
    assert {plan.scale for plan in search_plans(survey, 0.5, Held(scale=0.7))} == {0.7}
    assert {plan.stop for plan in search_plans(survey, 0.4, Held(depth=3))} == {3}
    (plan,) = search_plans(survey, 0.6, Held(1.0, 3, (1,)))
    assert (plan.scale, plan.stop, plan.exits) == (1.0, 3, (1,))


def test_search__of_a_grid_head_lets_no_plan_with_exits_stop(grid_survey: Survey) -> None:
    plans = search_plans(grid_survey, 0.9)
    assert any(plan.exits for plan in plans)
    assert {plan.stop for plan in plans} == {None}


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"depth": 3, "exits": (1, 3)}, "exits must be before depth=3, where everybody stops, got 3"),
        ({"depth": 3, "exits": (6,)}, "exits must be before depth=3"),
        ({"exits": (3, 1)}, "exits must be increasing numbers of blocks, got 3 and 1"),
        ({"scale": 0.0}, "size must be above 0 and at most 4, got 0"),
        ({"scale": 4.5}, "size must be above 0 and at most 4, got 4.5"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_held__refuses_what_no_plan_has(held: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Held(**held)


# ---------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_choose__runs_within_the_budget_and_ends_with_the_least_loss_or_a_simpler_one(
    survey: Survey, budget: float
) -> None:
    best, *others = choose_plan(survey, budget)
    for one in (best, *others):
        assert one.run.mac_ratio <= budget + 1e-9
        images = replace(survey.images, model=survey.model.with_exits(one.plan.places))
        again = true_run(images, one.method, survey.reference)
        assert torch.equal(again.macs, one.run.macs)
        assert one.loss == pytest.approx(survey.loss_of(again))
        assert one.plan.price == one.run.mac_ratio
    least = min(one.loss for one in (best, *others))
    assert best.loss <= least * (1 + module.AS_GOOD)
    assert [one.loss for one in others] == sorted(one.loss for one in others)


def test_choose__takes_the_simplest_of_plans_that_are_as_good(survey: Survey) -> None:
    """The same plan by two ways, an exit that never fires being one of them."""
    simple = Plan(0.7, None, (), 0.6, 0.1)
    plans = [simple, Plan(0.7, None, (2,), 0.99, 0.05)]
    best, other = choose_plan(survey, 0.99, plans=plans)
    assert best.plan.parts < other.plan.parts
    assert best.loss == pytest.approx(other.loss, rel=module.AS_GOOD)
    assert str(best.plan) == "image at 0.7"


def test_choose__out_of_reach_says_what_is(survey: Survey, grid_survey: Survey) -> None:
    with pytest.raises(ConfigError, match=r"budget=0.001 is out of reach: the cheapest plan takes 0\.\d\d of dense"):
        choose_plan(survey, 0.001)
    with pytest.raises(ConfigError, match=r"budget=0.5 is out of reach with what is held"):
        choose_plan(survey, 0.5, Held(1.0, 4, ()))
    for exits in (None, (1,)):
        with pytest.raises(ConfigError, match="depth=2 cannot be held: this decode head reads the whole grid"):
            choose_plan(grid_survey, 0.9, Held(depth=2, exits=exits))


def test_choose__with_a_grid_head_runs_within_the_budget(grid_survey: Survey) -> None:
    best, *_ = choose_plan(grid_survey, 0.7)
    assert best.run.mac_ratio <= 0.7


def test_finalists__are_the_best_of_each_kind_by_the_simpler_name() -> None:
    plans = [
        Plan(0.7, None, (1, 2), 0.5, 0.01),
        Plan(0.5, 3, (1,), 0.5, 0.02),
        Plan(1.0, None, (1,), 0.5, 0.03),
        Plan(1.0, 2, (), 0.5, 0.04),
        Plan(0.6, None, (), 0.5, 0.05),
        Plan(0.8, 3, (), 0.5, 0.06),
        Plan(0.7, 2, (), 0.5, 0.07),
    ]
    assert [(kind, plan.loss) for kind, plan in finalists(plans)] == [
        ("plan", 0.01),
        ("plan", 0.02),
        ("exits alone", 0.03),
        ("stop alone", 0.04),
        ("size alone", 0.05),
        ("size and stop", 0.06),
    ]


class Answers(Noise):
    """Noise whose truth is what a model says of it by some method."""

    def __init__(self, count: int, model: ExitSegmenter, method: Method[Any]) -> None:
        super().__init__(count, ODD)
        images = CalibrationSet(model, Noise(count, ODD), tuple(range(count)))
        run = [out for _, _, out in images.forward(method, "truth")]
        self.masks = [one.numpy() for out in run for one in out.labels]

    def __getitem__(self, index: int, /) -> Any:
        return replace(super().__getitem__(index), mask=self.masks[index])


def test_labels__see_that_late_blocks_do_harm_and_agreement_cannot() -> None:
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    with torch.no_grad():  # what the last blocks add has nothing to do with the image's truth
        model.exit_heads[1].classifier.weight.copy_(model.decode_head.classifier.weight)  # type: ignore[union-attr,operator,arg-type]
    images = CalibrationSet(model, Answers(6, model, Truncated(2)), tuple(range(6)))
    taught = Survey(images, DToP(), "pixels", (1.0,), labels=True)
    best, *_ = choose_plan(taught, 0.9)
    assert (best.plan.stop, best.plan.exits) == (2, ())
    assert best.loss == 0.0 < taught.dense_loss
    untaught = Survey(images, DToP(), "pixels", (1.0,))
    blind, *_ = choose_plan(untaught, 0.9)
    assert blind.plan.stop != 2
    assert untaught.dense_loss == 0.0


@pytest.mark.parametrize(
    "context", [{"keep_per_class": 5}, {"keep_per_class": 0, "keep_in_window": 4, "frozen_context": 2}]
)
def test_try_plan__keeps_the_context_that_loses_least(context: dict[str, Any]) -> None:
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    truth = Answers(6, model, DToP(0.5, **context))
    images = CalibrationSet(model, truth, tuple(range(6)))
    survey = Survey(images, DToP(), "pixels", (1.0,), labels=True)
    spent = true_run(images, DToP(0.5, **context), survey.reference).mac_ratio
    found = try_plan(survey, Plan(1.0, None, (1, 2, 3), spent, 0.0), spent + 0.005)
    assert found is not None
    method = found.method
    assert isinstance(method, DToP)
    assert {name: getattr(method, name) for name in context} == context


def test_try_plan__leaves_a_context_that_somebody_chose() -> None:
    for method in (DToP(keep_per_class=4), DToP(keep_in_window=3), DToP(frozen_context=4), DToP(context_weight=0.5)):
        assert method.contexts == ()
    assert [(one.keep_per_class, one.keep_in_window, one.frozen_context) for one in DToP(0.7, stop=2).contexts] == [
        *((1, 0, 3), (0, 4, 2))
    ]
    assert all((one.threshold, one.stop) == (0.7, 2) for one in DToP(0.7, stop=2).contexts)


def test_labels__see_that_a_larger_image_is_better_and_agreement_does_not_look() -> None:
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    truth = Answers(6, model, Resized(Truncated(1), 1.25))
    images = CalibrationSet(model, truth, tuple(range(6)))
    taught = Survey(images, DToP(), "pixels", labels=True)
    best, *_ = choose_plan(taught, 0.9)
    assert (best.plan.scale, best.plan.stop, best.loss) == (1.25, 1, 0.0)
    assert max(Survey(images, DToP(), "pixels").scales) == 1.0


def test_survey__judges_another_model_by_the_dense_answers_of_the_first() -> None:
    first, other = (tiny_segmenter("linear", exits=(1, 2, 3), seed=seed) for seed in (0, 1))
    images = CalibrationSet(other, Noise(4, ODD), tuple(range(4)))
    found = Survey(images, DToP(), "pixels", (1.0,), dense=first)
    expected = dense_reference(replace(images, model=first))
    assert all(torch.equal(found.reference[i], expected[i]) for i in range(4))
    assert found.static_losses[1.0][-1] > 0.2


def test_try_plan__with_a_stop_lets_all_leave_there(survey: Survey) -> None:
    one = try_plan(survey, Plan(1.0, 3, (1,), 0.6, 0.0), 0.6)
    assert one is not None
    assert one.method.last_exit == 1
    assert (one.run.live[:, -1] == 0).all()
    assert try_plan(survey, Plan(1.0, None, (3,), 0.2, 0.0), 0.2) is None


def test_choose_plan__of_plans_as_good_passes_over_those_that_are_slow_here(
    survey: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple, mixed = Plan(stop=3), Plan(stop=3, exits=(1, 2))
    run = run_of(survey, 1.0, 0)
    tried = {
        simple: module.TriedPlan(simple, "stop alone", Truncated(1), run, 0.1),
        mixed: module.TriedPlan(mixed, "plan", Truncated(1), run, 0.1),
    }
    monkeypatch.setattr(module, "finalists", lambda _: [("", simple), ("", mixed)])
    monkeypatch.setattr(module, "try_plan", lambda _survey, plan, _budget, _kind: tried[plan])
    assert choose_plan(survey, 0.5, plans=[simple, mixed])[0].plan == simple
    for times, best in (([20.0, 10.0], mixed), ([10.5, 10.0], simple)):
        monkeypatch.setattr(module, "timed_in_turn", lambda *_, ms=times: [[one] for one in ms])
        found = choose_plan(survey, 0.5, plans=[simple, mixed], timed=True)
        assert found[0].plan == best
        assert sorted(one.ms for one in found) == sorted(times)
