"""Thresholds for what one can afford: a mean over images, and a cap on every image.

The position on the path is found on the dense pass and corrected by a few true runs, since live tokens that lost
context decide a little differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tokenexit.calibration.dense_pass import MacTable
from tokenexit.calibration.threshold_path import position_where
from tokenexit.errors import ConfigError

TOLERANCE = 0.01
"""A budget is met if it is not exceeded and at most this share of it is left over."""
TRUE_RUNS = 6

T = TypeVar("T")


@dataclass(frozen=True)
class BudgetFit(Generic[T]):
    """The position on the path that was chosen, its predicted and its true cost, and the true run itself."""

    position: float
    predicted: float
    reached: float
    run: T


def meet_budget(
    budget: float,
    end: float,
    predicted: Callable[[float], float],
    measured: Callable[[float], tuple[float, T]],
    tolerance: float = TOLERANCE,
    runs: int = TRUE_RUNS,
) -> BudgetFit[T] | None:
    """The least saving position of the path `[0, end]` whose true cost is at most `budget`; None if there is none.

    predicted: cost at a position by the dense pass, falling. measured: the same by a true run, and the run. At most
    `runs` true runs, and one at the end if all were too dear; between positions known to be too dear and cheap enough,
    the next guess moves the prediction by what it was last wrong.
    """
    best: BudgetFit[T] | None = None
    dear, cheap = 0.0, end
    position = position_where(predicted, budget, end)
    for _ in range(runs):
        guess = predicted(position)
        reached, run = measured(position)
        if reached <= budget:
            cheap = min(cheap, position)
            if best is None or reached > best.reached:
                best = BudgetFit(position, guess, reached, run)
            if reached >= (1 - tolerance) * budget or position == 0.0:
                return best
        else:
            dear = max(dear, position)
            if position == end:
                return None
        position = position_where(predicted, (1 - tolerance / 2) * budget - (reached - guess), end)
        if not dear < position < cheap:
            position = (dear + cheap) / 2 if best is not None or cheap < end else end
    if best is None:  # every guess was too dear, as predictions may be far off
        reached, run = measured(end)
        best = BudgetFit(end, predicted(end), reached, run) if reached <= budget else None
    return best


def cap_shares(costs: MacTable, live: Tensor, cap: float) -> tuple[float, ...]:
    """Shares of an image's tokens that may go on after each exit so that no image costs more than `cap` of dense.

    live: `(n, E + 1)` counts at the chosen thresholds. Of all shares that keep the cap, those are taken that bind as
    few images as possible, at every exit alike: the same quantile of what images keep. Holds for grids as large as
    the smallest of these images or larger. Raises `ConfigError` for a cap that cannot be kept.
    """
    cells = live[:, :1].double()
    shares = live[:, 1:].double() / cells

    def at(q: float) -> Tensor:
        """Shares for q in [-1, 2]: 0 to 1 are quantiles, below them shares fall to none, above them rise to all."""
        if q < 0:
            return (1 + q) * shares.amin(0)
        if q > 1:
            return shares.amax(0) + (q - 1) * (1 - shares.amax(0))
        return torch.quantile(shares, q, dim=0)

    def worst(q: float) -> float:
        kept = torch.cat([cells, (_rounded_down(at(q)) * cells + 1e-9).floor()], dim=1).long()
        return (costs.macs(kept).double() / costs.dense).max().item()

    low, high = -1.0, 2.0
    if worst(low) > cap:
        raise ConfigError(
            f"a cap of {cap:g} cannot be kept: an image costs at least {worst(low):.3f} of dense even if no token goes "
            "on after the first exit; ask for more."
        )
    if worst(high) <= cap:
        return tuple(_rounded_down(at(high)).tolist())
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle) <= cap else (low, middle)
    return tuple(_rounded_down(at(low)).tolist())


def _rounded_down(shares: Tensor) -> Tensor:
    return (shares * 1e4 + 1e-6).floor() / 1e4
