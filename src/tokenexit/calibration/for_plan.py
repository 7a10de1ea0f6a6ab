"""A plan for a budget: size, stop, and which of a model's exits are open, chosen together with the thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenexit.calibration.calibration_set import CalibrationSet, mean_error, true_run
from tokenexit.calibration.planner import Outcome, costs_of
from tokenexit.calibration.plans import Plan, TriedPlan, choose_plan, priced_by, stopping
from tokenexit.calibration.survey import Survey
from tokenexit.calibration.targets import Average, Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Method, Resized, ThresholdMethod, Truncated
from tokenexit.methods.gated import Gated
from tokenexit.methods.thresholded import NEVER, per_exit


def for_plan(
    calibration_set: CalibrationSet,
    method: ThresholdMethod[Any],
    target: Budget,
    average: Average,
    labels: bool,
    say: Callable[[str], None],
) -> Outcome:
    """Choose size, stop, open exits and thresholds together, at a mean cost of at most the budget.

    labels: judge plans by the images' labels, and not by the dense model.

    Raises `ConfigError` for a model without exits, for milliseconds of one that takes windows, and where no plan meets
    the budget.
    """
    exits = calibration_set.model.config.exits
    if not exits:
        raise ConfigError("the model has no exits to plan with: run tokenexit adapt on it.")
    survey = Survey(calibration_set, method, average, labels=labels)
    priced, share = priced_by(survey, target)
    best, *others = choose_plan(priced, share)
    unit = "right" if labels else "as dense has them"
    for one in (best, *others):
        say(f"{one.plan}: {one.agreement:.1%} of pixels {unit} at {one.run.mac_ratio:.0%} of dense multiply-adds")
    chosen = on_all_exits(exits, best)
    run = true_run(calibration_set, chosen, survey.reference, "true run")
    unlike = mean_error(run, "pixels")
    ms = None if priced.clock is None else best.plan.price * priced.clock.dense_ms
    key = "pixels_wrong" if labels else "pixels_unlike_dense"
    guarantee = (
        f"The mean over these {len(calibration_set)} images is {run.mac_ratio:.4g} of dense multiply-adds"
        f"{'' if ms is None else f' and {ms:.4g} ms on this machine'}, with "
        f"{1 - unlike:.2%} of pixels {unit} ({best.plan}). A figure of these images: others differ by sampling."
    )
    reached = {**costs_of(run), key: unlike, **({} if ms is None else {"latency_ms_mean": ms})}
    return Outcome(chosen, run, reached, {"count": len(calibration_set)}, guarantee)


def on_all_exits(exits: Sequence[int], tried: TriedPlan) -> Method[Any]:
    """Return the method of a plan for a model that has more exits than the plan uses: the others are closed.

    exits: number of blocks before each exit of that model.
    """
    plan, numbers = tried.plan, [list(exits).index(block) for block in tried.plan.places]
    inner = tried.method.inner
    if isinstance(inner, Truncated):
        inner = Truncated(numbers[0] + 1)
    elif isinstance(inner, ThresholdMethod):
        inner = _with_all_thresholds(inner, plan, exits, numbers)
    behind = len(exits) if plan.stop is None else numbers[-1]
    closed = tuple(n for n in range(behind) if n not in numbers)
    whole: Method[Any] = Gated(inner, closed) if closed and plan.exits else inner
    return whole if plan.scale == 1.0 else Resized(whole, plan.scale)


def _with_all_thresholds(
    method: ThresholdMethod[Any], plan: Plan, exits: Sequence[int], numbers: Sequence[int]
) -> ThresholdMethod[Any]:
    own = per_exit(method.threshold, len(numbers))
    thresholds = tuple(own[numbers.index(n)] if n in numbers else NEVER for n in range(len(exits)))
    if not isinstance(method.temperature, int | float):  # no token is scored at a closed exit
        given = dict(zip(numbers, method.temperature))
        method = replace(method, temperature=tuple(given.get(n, 1.0) for n in range(len(exits))))
    return stopping(method.with_thresholds(thresholds), None if plan.stop is None else numbers[-1] + 1)
