"""Paths of thresholds on some images, one of them in use, with predicted costs and true figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import Bench, Reference, Run, error, true_run
from tokenexit.calibration.dense_pass import Costs, DensePass, compose, context_price, live_counts, with_limits
from tokenexit.calibration.search import cap_shares, meet_budget
from tokenexit.calibration.targets import Average
from tokenexit.calibration.threshold_path import Path, build_path, even_path
from tokenexit.engine.ops import GIGA
from tokenexit.methods import Method, ThresholdMethod

PRICES = (0.0, 0.01, 0.03, 0.1)
"""Multiples of `context_price` that paths are built with."""
COMPARED_IMAGES = 32
"""Images on which paths are compared by true runs."""


@dataclass(frozen=True)
class _Chosen:
    method: Method[Any]
    run: Run
    reached: dict[str, Any]
    images: dict[str, Any]
    promise: str


class Planner:
    """Paths of a method on some images, one of them in use, and costs at its places as the dense pass predicts them."""

    def __init__(self, bench: Bench, method: ThresholdMethod[Any], average: Average) -> None:
        self.model, self.method = bench.model, method
        exits, depth = bench.model.config.exits, bench.model.config.backbone.depth
        never = with_limits(method, (0.0,) * len(exits))
        next(bench.part([0]).forward(never, "first image"))  # a method that cannot run on the model says so here
        self.dense = DensePass.of(bench, method)
        self.costs = Costs(self.model, method, self.dense.grids)
        prices = [price * context_price(exits, depth) for price in PRICES]

        def costs_of(dense: DensePass) -> Costs:
            return Costs(self.model, method, dense.grids)

        greedy = [build_path(self.dense, method, costs_of, average, price) for price in prices]
        self.paths = [*greedy, even_path(len(exits))]
        self.path: Path = greedy[0]

    def live(self, place: float) -> Tensor:
        return live_counts(self.dense, compose(self.dense, self.method, self.path.at(place)))

    def share(self, place: float) -> float:
        return self.costs.share(self.live(place))

    def at(self, place: float) -> ThresholdMethod[Any]:
        return with_limits(self.method, self.path.at(place))

    def disagreement(self, place: float) -> float:
        """Share of samples that differ from dense, as the dense pass predicts it."""
        stage = compose(self.dense, self.method, self.path.at(place))
        return self.dense.losses("pixels").gather(0, stage[None]).sum().item()

    def compare(self, bench: Bench, reference: Reference, share: float, average: Average) -> None:
        """Use the path that keeps most agreement with `reference`, dense labels, at this share of dense compute.

        What the loss of context does differs from model to model and cannot be seen on a dense pass, so paths that
        send tokens away earlier or later are compared by true runs, on a few images.
        """
        places = torch.linspace(0, len(bench) - 1, min(len(bench), COMPARED_IMAGES)).round().long().tolist()
        few, said = bench.part(places), reference.part(places)

        def measured(place: float) -> tuple[float, Run]:
            run = true_run(few, self.at(place), said, "comparing paths")
            return run.share, run

        losses: list[float] = []
        for path in self.paths:
            self.path = path
            met = meet_budget(share, self.path.end, self.share, measured, tolerance=0.02, runs=3)
            losses.append(2.0 if met is None else error(met.run.confusion, average).mean().item())
        self.path = self.paths[losses.index(min(losses))]

    def hold_to(self, cap: float, place: float) -> None:
        """From now on with a cap, shared out over exits as it binds least at this place."""
        shares = cap_shares(self.costs, self.live(place), cap)
        self.method = replace(self.method, cap=shares)


def _cap_words(cap: float | None) -> str:
    if cap is None:
        return ""
    return f" No image costs more than {cap:g} of its dense multiply-adds, on grids as large as these or larger."


def _figures(run: Run, planner: Planner, place: float) -> dict[str, Any]:
    """Costs at the chosen place by the true run, beside what the dense pass predicted for them."""
    return {
        **costs_of(run),
        "dense_pass_share_of_dense": planner.share(place),
        "dense_pass_pixels_unlike_dense": planner.disagreement(place),
    }


def costs_of(run: Run) -> dict[str, Any]:
    """What a true run cost, over its images."""
    return {
        "share_of_dense": run.share,
        "share_of_dense_standard_error": run.share_error,
        "gmacs_mean": run.macs.double().mean().item() / GIGA,
        "share_of_dense_largest": (run.macs.double() / run.dense_macs).max().item(),
        "live_after_exit": [round(x, 5) for x in (run.live.double() / run.tokens[:, None]).mean(0).tolist()],
    }
