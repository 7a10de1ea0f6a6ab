"""Thresholds for a budget: mean multiply-adds, or milliseconds, at most a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import CalibrationSet, TrueRun, dense_reference, error, true_run
from tokenexit.calibration.latency import latency_on_this_machine, timed_runs
from tokenexit.calibration.planner import Chosen, Planner, cap_sentence, figures_of
from tokenexit.calibration.search import BudgetFit, meet_budget
from tokenexit.calibration.targets import Average, Budget
from tokenexit.calibration.threshold_path import position_where
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError
from tokenexit.methods import ThresholdMethod


def for_budget(
    calibration_set: CalibrationSet, method: ThresholdMethod[Any], target: Budget, average: Average, cap: float | None
) -> Chosen:
    model = calibration_set.model
    planner = Planner(calibration_set, method, average)
    reference = dense_reference(calibration_set)
    dense_mean = planner.costs.dense.double().sum().item() / len(calibration_set)
    exits, depth = model.config.exits, model.config.backbone.depth
    scale = {"budget": 1.0, "budget_gmacs": dense_mean / GIGA, "latency_ms": 0.0}[target.unit]
    unit = {"budget": "of dense multiply-adds", "budget_gmacs": "GMACs", "latency_ms": "ms"}[target.unit]
    end = planner.path.end

    if target.unit == "latency_ms":
        if model.preprocessing.window is not None:
            raise ConfigError("latency_ms is for images taken whole, and this model takes windows: ask for a budget.")
        clock = latency_on_this_machine(model, method, calibration_set.precision)

        def modelled(position: float) -> float:
            return clock.ms(planner.live(position), exits, depth).mean().item()

        # The model is of parts timed alone; one true run says by what factor the whole is off.
        times = timed_runs(calibration_set, planner.method_at(end / 2))
        factor = sum(times) / len(times) / modelled(end / 2)

        def predicted(position: float) -> float:
            return factor * modelled(position)

        def measured(position: float) -> tuple[float, TrueRun | None]:
            times = timed_runs(calibration_set, planner.method_at(position))
            return sum(times) / len(times), None
    else:

        def predicted(position: float) -> float:
            return planner.mac_ratio(position) * scale

        def measured(position: float) -> tuple[float, TrueRun | None]:
            run = true_run(calibration_set, planner.method_at(position), reference, "true run")
            return run.mac_ratio * scale, run

    least = predicted(end)
    if cap is None and least > target.value:
        raise ConfigError(_out_of_reach(target, least, unit, exits))
    if cap is not None:
        planner.hold_to(cap, position_where(predicted, target.value, end))
    planner.compare(
        calibration_set, reference, planner.mac_ratio(position_where(predicted, target.value, end)), average
    )
    end = planner.path.end
    fit: BudgetFit[Any] | None = meet_budget(target.value, end, predicted, measured)
    if fit is None:
        raise ConfigError(_out_of_reach(target, measured(end)[0], unit, exits))
    chosen = planner.method_at(fit.position)
    run = fit.run if fit.run is not None else true_run(calibration_set, chosen, reference, "true run")
    reached = {
        **figures_of(run, planner, fit.position),
        "pixels_unlike_dense": error(run.confusion, "pixels").mean().item(),
        "pixels_unlike_dense_mean_over_classes": error(run.confusion, "classes").mean().item(),
    }
    words = f"{fit.reached:.4g} {unit}"
    if target.unit == "latency_ms":
        reached |= {"latency_ms_mean": fit.reached, "latency_ms_predicted": fit.predicted}
    guarantee = (
        f"The mean over these {len(calibration_set)} images is {words}, with "
        f"{1 - reached['pixels_unlike_dense']:.2%} of pixels "
        "as the dense model has them. A figure of these images: others like them differ by sampling, here by a "
        f"standard error of {reached['share_of_dense_standard_error']:.2g} of dense."
    )
    guarantee += cap_sentence(cap) + fall_off_note(reached["pixels_unlike_dense"], len(calibration_set))
    return Chosen(chosen, run, reached, {"count": len(calibration_set)}, guarantee)


def _out_of_reach(target: Budget, least: float, unit: str, exits: Sequence[int]) -> str:
    least = math.ceil(least * 1e3) / 1e3
    return (
        f"{target.unit}={target.value:g} is out of reach: with exits after blocks "
        f"{', '.join(map(str, exits))} this model "
        f"takes at least {least:g} {unit}, when all tokens leave as early as they can; ask for {least:g} or more."
    )
