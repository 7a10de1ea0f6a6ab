"""Paths of thresholds on some images, one of them in use, with predicted costs and true figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, Reference, TrueRun, true_run
from tokenexit.calibration.dense_pass import DensePass, MacTable, compose, context_price, live_counts, with_thresholds
from tokenexit.calibration.search import cap_shares, meet_budget
from tokenexit.calibration.targets import Average
from tokenexit.calibration.threshold_path import ThresholdPath, build_path, even_path
from tokenexit.engine.ops import GIGA
from tokenexit.engine.tokens import Grid
from tokenexit.methods import Method, Reduced, Resized, ThresholdMethod
from tokenexit.methods.thresholded import blocks_of_live_tokens
from tokenexit.reducers import Reducer

PRICES = (0.0, 0.01, 0.03, 0.1)
"""Multiples of `context_price` that paths are built with."""
COMPARED_IMAGES = 32
"""Images on which paths are compared by true runs."""
LIVE_QUANTILES = 21
"""Of the live shares behind an exit over images: every twentieth, least and largest included."""


@dataclass(frozen=True)
class Outcome:
    """The method that meets a target, its true run, and what calibration says of it.

    reached, images: as in `Calibration`. guarantee: one or two sentences on what holds, and what does not.
    """

    method: Method[Any]
    run: TrueRun
    reached: dict[str, Any]
    images: dict[str, Any]
    guarantee: str


class Planner:
    """Paths of a method on some images, one of them in use, and costs at its positions as the dense pass predicts
    them.

    scale: factor on the images' sides. dense: the dense pass at that size, if there is one. full_grids: patches of the
        images, or windows, at their full size, where `scale` is not 1. prices: see `PRICES`. by: what merges tokens
        beside the method; a dense pass counts the cells of a group as tokens, so predicted costs are multiplied by what
        a run on a few images says.
    """

    def __init__(
        self,
        calibration_set: CalibrationSet,
        method: ThresholdMethod[Any],
        average: Average,
        *,
        scale: float = 1.0,
        dense: DensePass | None = None,
        full_grids: tuple[Grid, ...] | None = None,
        prices: Sequence[float] = PRICES,
        by: Reducer | None = None,
    ) -> None:
        self.model, self.method, self.scale, self.by = calibration_set.model, method, scale, by
        exits, depth = calibration_set.model.config.exits, blocks_of_live_tokens(method, self.model.view())
        never = self._sized(with_thresholds(method, (0.0,) * len(exits)))
        next(calibration_set.part([0]).forward(never, "first image"))  # a method that cannot run says so here
        self.dense = DensePass.of(calibration_set, method, by=by) if dense is None else dense
        self.costs = MacTable(self.model, method, self.dense.grids, full_grids)

        def costs_of(dense: DensePass) -> MacTable:
            return self.costs.first(len(dense))

        greedy = [
            build_path(self.dense, method, costs_of, average, price * context_price(exits, depth)) for price in prices
        ]
        self.paths = [*greedy, even_path(len(exits))]
        self.path: ThresholdPath = greedy[0]
        self.merged_share = 1.0
        if by is not None:
            middle = self.path.end / 2
            few = calibration_set.part(calibration_set.spread(COMPARED_IMAGES))
            ledgers = [output.ledger for _, _, output in few.forward(self.method_at(middle), "what merging saves")]
            measured = sum(sum(ledger.macs) for ledger in ledgers) / sum(sum(ledger.dense_macs) for ledger in ledgers)
            self.merged_share = measured / self.mac_ratio(middle)

    def live(self, position: float) -> Tensor:
        return live_counts(self.dense, compose(self.dense, self.method, self.path.limits_at(position)))

    def mac_ratio(self, position: float) -> float:
        return self.merged_share * self.costs.share(self.live(position))

    def method_at(self, position: float) -> Method[Any]:
        return self._sized(with_thresholds(self.method, self.path.limits_at(position)))

    def _sized(self, method: ThresholdMethod[Any]) -> Method[Any]:
        merging: Method[Any] = method if self.by is None else Reduced(method, self.by)
        return merging if self.scale == 1.0 else Resized(merging, self.scale)

    def disagreement(self, position: float) -> float:
        """Share of samples that differ from dense, as the dense pass predicts it."""
        exit_index = compose(self.dense, self.method, self.path.limits_at(position))
        return self.dense.losses("pixels").gather(0, exit_index[None]).sum().item()

    def compare(
        self,
        calibration_set: CalibrationSet,
        reference: Reference,
        share: float,
        loss_of: Callable[[TrueRun], float],
        rivals: Sequence[tuple[ThresholdMethod[Any], ThresholdPath]] | None = None,
    ) -> float:
        """Use the method and path that lose least at this share of dense compute, and return what they lose.

        What the loss of context does differs from model to model and cannot be seen on a dense pass, so paths that
        send tokens away earlier or later, and methods that keep other tokens, are compared by true runs, on a few
        images.

        loss_of: loss of a true run, compared with `reference`. rivals: the planner's own method and paths if not given.
        A path that cannot meet the share loses infinitely much.
        """
        positions = calibration_set.spread(COMPARED_IMAGES)
        few, said = calibration_set.part(positions), reference.part(positions)

        def measured(position: float) -> tuple[float, TrueRun]:
            run = true_run(few, self.method_at(position), said, "comparing paths")
            return run.mac_ratio, run

        rivals = [(self.method, path) for path in self.paths] if rivals is None else rivals
        losses: list[float] = []
        for method, path in rivals:
            self.method, self.path = method, path
            fit = meet_budget(share, self.path.end, self.mac_ratio, measured, tolerance=0.02, runs=3)
            losses.append(math.inf if fit is None else loss_of(fit.run))
        self.method, self.path = rivals[losses.index(min(losses))]
        return min(losses)

    def hold_to(self, cap: float, position: float) -> None:
        """From now on with a cap, shared out over exits as it binds least at this position."""
        shares = cap_shares(self.costs, self.live(position), cap)
        self.method = replace(self.method, cap=shares)


def cap_sentence(cap: float | None) -> str:
    """Say behind a guarantee what a cap adds to it."""
    if cap is None:
        return ""
    return f" No image costs more than {cap:g} of its dense multiply-adds, on grids as large as these or larger."


def figures_of(run: TrueRun, planner: Planner, position: float) -> dict[str, Any]:
    """Costs at the chosen position by the true run, beside what the dense pass predicted for them."""
    return {
        **costs_of(run),
        "dense_pass_share_of_dense": planner.mac_ratio(position),
        "dense_pass_pixels_unlike_dense": planner.disagreement(position),
    }


def costs_of(run: TrueRun) -> dict[str, Any]:
    """Return the costs of a true run, over its images, under their names in `calibration.json`."""
    live = run.live.double() / run.tokens[:, None]
    shares = torch.linspace(0, 1, LIVE_QUANTILES, dtype=live.dtype)
    return {
        "share_of_dense": run.mac_ratio,
        "share_of_dense_standard_error": run.mac_ratio_error,
        "gmacs_mean": run.macs.double().mean().item() / GIGA,
        "share_of_dense_largest": (run.macs.double() / run.dense_macs).max().item(),
        "live_after_exit": [round(x, 5) for x in live.mean(0).tolist()],
        "live_after_exit_quantiles": [
            [round(x, 4) for x in of_exit.quantile(shares).tolist()] for of_exit in live.unbind(1)
        ],
    }
