"""Thresholds for a budget: mean multiply-adds, or milliseconds, at most a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import (
    CalibrationSet,
    Reference,
    TrueRun,
    dense_reference,
    mean_error,
    true_run,
)
from tokenexit.calibration.latency import check_timed, latency_on_this_machine, timed_runs
from tokenexit.calibration.planner import Outcome, Planner, cap_sentence, figures_of
from tokenexit.calibration.search import BudgetFit, meet_budget
from tokenexit.calibration.targets import Average, Budget
from tokenexit.calibration.threshold_path import position_where
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError
from tokenexit.methods import ThresholdMethod
from tokenexit.methods.thresholded import blocks_of_live_tokens
from tokenexit.reducers import Reducer


@dataclass(frozen=True)
class CostModel:
    """A budget's unit, and what positions on the path in use cost in it, as means over the images.

    unit: in words. predicted: from the dense pass, at a position. measured: by a true run at a position, with the run
    where it compares labels, too.
    """

    unit: str
    predicted: Callable[[float], float]
    measured: Callable[[float], tuple[float, TrueRun | None]]


def for_budget(
    calibration_set: CalibrationSet,
    method: ThresholdMethod[Any],
    target: Budget,
    average: Average,
    cap: float | None,
    by: Reducer | None = None,
) -> Outcome:
    """Choose the position on the path at which the mean cost over all images is the budget, or just below it.

    by: what merges tokens beside the method.

    Raises `ConfigError` where even the cheapest thresholds cost more.
    """
    exits = calibration_set.model.config.exits
    planner = Planner(calibration_set, method, average, by=by)
    reference = dense_reference(calibration_set)
    costs = (
        _in_ms(planner, calibration_set)
        if target.unit == "latency_ms"
        else _in_macs(planner, calibration_set, reference, target)
    )
    end = planner.path.end
    least = costs.predicted(end)
    if cap is None and by is None and least > target.value:  # beside merging a prediction is no proof
        raise ConfigError(_out_of_reach(target, least, costs.unit, exits))
    if cap is not None:
        planner.hold_to(cap, position_where(costs.predicted, target.value, end))
    mac_ratio = planner.mac_ratio(position_where(costs.predicted, target.value, end))
    planner.compare(calibration_set, reference, mac_ratio, partial(mean_error, average=average))
    end = planner.path.end
    fit: BudgetFit[Any] | None = meet_budget(target.value, end, costs.predicted, costs.measured)
    if fit is None:
        raise ConfigError(_out_of_reach(target, costs.measured(end)[0], costs.unit, exits))
    chosen = planner.method_at(fit.position)
    run = fit.run if fit.run is not None else true_run(calibration_set, chosen, reference, "true run")
    reached = {
        **figures_of(run, planner, fit.position),
        "pixels_unlike_dense": mean_error(run, "pixels"),
        "pixels_unlike_dense_mean_over_classes": mean_error(run, "classes"),
    }
    if target.unit == "latency_ms":
        reached |= {"latency_ms_mean": fit.reached, "latency_ms_predicted": fit.predicted}
    guarantee = _guarantee(f"{fit.reached:.4g} {costs.unit}", len(calibration_set), reached) + cap_sentence(cap)
    guarantee += fall_off_note(reached["pixels_unlike_dense"], len(calibration_set))
    return Outcome(chosen, run, reached, {"count": len(calibration_set)}, guarantee)


def _in_macs(planner: Planner, calibration_set: CalibrationSet, reference: Reference, target: Budget) -> CostModel:
    """Multiply-adds: over the dense model's, or in units of a billion."""
    dense_mean = planner.costs.dense.double().sum().item() / len(calibration_set)
    scale, unit = (1.0, "of dense multiply-adds") if target.unit == "budget" else (dense_mean / GIGA, "GMACs")

    def measured(position: float) -> tuple[float, TrueRun | None]:
        run = true_run(calibration_set, planner.method_at(position), reference, "true run")
        return run.mac_ratio * scale, run

    return CostModel(unit, lambda position: planner.mac_ratio(position) * scale, measured)


def _in_ms(planner: Planner, calibration_set: CalibrationSet) -> CostModel:
    """Milliseconds on this machine. Raises `ConfigError` for a model that takes windows."""
    model = calibration_set.model
    check_timed(model)
    exits, depth = model.config.exits, blocks_of_live_tokens(planner.method, model.view())
    latency = latency_on_this_machine(model, planner.method, calibration_set.precision)

    def modelled(position: float) -> float:
        return latency.ms(planner.live(position), exits, depth, planner.method.last_exit).mean().item()

    def measured(position: float) -> tuple[float, TrueRun | None]:
        times = timed_runs(calibration_set, planner.method_at(position))
        return sum(times) / len(times), None

    # The model is of parts timed alone; one true run says by what factor the whole is off.
    middle = planner.path.end / 2
    factor = measured(middle)[0] / modelled(middle)
    return CostModel("ms", lambda position: factor * modelled(position), measured)


def _guarantee(words: str, images: int, reached: Mapping[str, Any]) -> str:
    """Say what was reached on the images, and that it is no bound on others."""
    return (
        f"The mean over these {images} images is {words}, with "
        f"{1 - reached['pixels_unlike_dense']:.2%} of pixels "
        "as the dense model has them. A figure of these images: others like them differ by sampling, here by a "
        f"standard error of {reached['share_of_dense_standard_error']:.2g} of dense."
    )


def _out_of_reach(target: Budget, least: float, unit: str, exits: Sequence[int]) -> str:
    """Say that a budget cannot be met, and which one can."""
    least = math.ceil(least * 1e3) / 1e3
    return (
        f"{target.unit}={target.value:g} is out of reach: with exits after blocks "
        f"{', '.join(map(str, exits))} this model "
        f"takes at least {least:g} {unit}, when all tokens leave as early as they can; ask for {least:g} or more."
    )
