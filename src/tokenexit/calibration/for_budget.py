"""Thresholds for a budget: mean multiply-adds, or milliseconds, at most a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import Bench, Run, dense_reference, error, true_run
from tokenexit.calibration.latency import latency_on_this_machine, timed_runs
from tokenexit.calibration.planner import Planner, _cap_words, _Chosen, _figures
from tokenexit.calibration.search import Met, meet_budget
from tokenexit.calibration.targets import Average, Budget
from tokenexit.calibration.threshold_path import place_where
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError
from tokenexit.methods import ThresholdMethod


def _for_budget(
    bench: Bench, method: ThresholdMethod[Any], wish: Budget, average: Average, cap: float | None
) -> _Chosen:
    model = bench.model
    planner = Planner(bench, method, average)
    reference = dense_reference(bench)
    dense_mean = planner.costs.dense.double().sum().item() / len(bench)
    exits, depth = model.config.exits, model.config.backbone.depth
    scale = {"budget": 1.0, "budget_gmacs": dense_mean / GIGA, "latency_ms": 0.0}[wish.unit]
    unit = {"budget": "of dense multiply-adds", "budget_gmacs": "GMACs", "latency_ms": "ms"}[wish.unit]
    end = planner.path.end

    if wish.unit == "latency_ms":
        if model.preprocessing.window is not None:
            raise ConfigError("latency_ms is for pictures taken whole, and this model takes windows: ask for a budget.")
        clock = latency_on_this_machine(model, method, bench.precision)

        def modelled(place: float) -> float:
            return clock.ms(planner.live(place), exits, depth).mean().item()

        # The model is of parts timed alone; one true run says by what factor the whole is off.
        times = timed_runs(bench, planner.at(end / 2))
        factor = sum(times) / len(times) / modelled(end / 2)

        def predicted(place: float) -> float:
            return factor * modelled(place)

        def measured(place: float) -> tuple[float, Run | None]:
            times = timed_runs(bench, planner.at(place))
            return sum(times) / len(times), None
    else:

        def predicted(place: float) -> float:
            return planner.share(place) * scale

        def measured(place: float) -> tuple[float, Run | None]:
            run = true_run(bench, planner.at(place), reference, "true run")
            return run.share * scale, run

    least = predicted(end)
    if cap is None and least > wish.value:
        raise ConfigError(_out_of_reach(wish, least, unit, exits))
    if cap is not None:
        planner.hold_to(cap, place_where(predicted, wish.value, end))
    planner.compare(bench, reference, planner.share(place_where(predicted, wish.value, end)), average)
    end = planner.path.end
    met: Met[Any] | None = meet_budget(wish.value, end, predicted, measured)
    if met is None:
        raise ConfigError(_out_of_reach(wish, measured(end)[0], unit, exits))
    chosen = planner.at(met.place)
    run = met.run if met.run is not None else true_run(bench, chosen, reference, "true run")
    reached = {
        **_figures(run, planner, met.place),
        "pixels_unlike_dense": error(run.confusion, "pixels").mean().item(),
        "pixels_unlike_dense_mean_over_classes": error(run.confusion, "classes").mean().item(),
    }
    words = f"{met.reached:.4g} {unit}"
    if wish.unit == "latency_ms":
        reached |= {"latency_ms_mean": met.reached, "latency_ms_predicted": met.predicted}
    promise = (
        f"The mean over these {len(bench)} images is {words}, with {1 - reached['pixels_unlike_dense']:.2%} of pixels "
        "as the dense model has them. A figure of these images: others like them differ by sampling, here by a "
        f"standard error of {reached['share_of_dense_standard_error']:.2g} of dense."
    )
    promise += _cap_words(cap) + fall_off_note(reached["pixels_unlike_dense"], len(bench))
    return _Chosen(chosen, run, reached, {"count": len(bench)}, promise)


def _out_of_reach(wish: Budget, least: float, unit: str, exits: Sequence[int]) -> str:
    least = math.ceil(least * 1e3) / 1e3
    return (
        f"{wish.unit}={wish.value:g} is out of reach: with exits after blocks {', '.join(map(str, exits))} this model "
        f"takes at least {least:g} {unit}, when all tokens leave as early as they can; ask for {least:g} or more."
    )
