"""A path of threshold vectors, from "nobody leaves" to "everybody leaves at the first exit".

All targets are met on one path: a budget is the position where it costs so much, a bound the last position that passes.
It is built on a dense pass, greedily: of all ways to let some more tokens leave at some exit, the one is taken that
loses least agreement with the dense model for each multiply-add it saves. Limits never fall along the path, so
decisions grow with it and losses nearly do.

Legend: E exits, m points of the path. A limit is 1 - threshold: tokens leave if their uncertainty is below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenexit.calibration.dense_pass import DensePass, Limits, MacTable, compose, live_counts
from tokenexit.methods import ThresholdMethod

LEVELS = 40
"""Limits that are tried at each exit: quantiles of the uncertainties of its tokens."""
STEPS = (1, 2, 4)
"""Numbers of levels that a step may take at once, so that it is not stopped by one that gains nothing."""
PATH_TOKENS = 60_000
"""Tokens of the dense pass on which the path is built; more change little."""
DIGITS = 4


@dataclass(frozen=True)
class ThresholdPath:
    """limits: `(m, E)` fp64, from zeros on, never falling. guard: `(E, K)`, the largest limits of classes, if any."""

    limits: Tensor
    guard: Tensor | None = None

    def __len__(self) -> int:
        return len(self.limits)

    @property
    def end(self) -> float:
        return float(len(self.limits) - 1)

    def limits_at(self, position: float) -> Limits:
        """Limits at a position in [0, m - 1], linear between points, to four significant digits."""
        position = min(max(position, 0.0), self.end)
        low = min(int(position), len(self.limits) - 2)
        mixed = torch.lerp(self.limits[low], self.limits[low + 1], position - low)
        if self.guard is None:
            return tuple(map(_rounded, mixed.tolist()))
        guarded = torch.minimum(mixed[:, None], self.guard)
        return tuple(tuple(map(_rounded, exit)) for exit in guarded.tolist())


def _rounded(limit: float) -> float:
    return float(f"{limit:.{DIGITS}g}")


def class_guard(dense: DensePass, most: float) -> Tensor:
    """Return the limit of each class at each exit below which at most a share of samples is wrong: `(E, K)` fp64.

    A class that an exit answers badly keeps its tokens longer; one that no token is given keeps all of them.

    most: share of the samples of tokens that an exit calls by the class, the surest first.
    """
    guard = torch.zeros(len(dense.uncertainty), dense.num_classes, dtype=torch.float64)
    counted = dense.wanted >= 0
    for n, (uncertainty, label, said) in enumerate(zip(dense.uncertainty, dense.label, dense.said)):
        wrong = ((said != dense.wanted) & counted).sum(1).double() / counted.sum(1).clamp(min=1)
        for c in range(dense.num_classes):
            own = (label == c).nonzero().squeeze(1)
            order = own[uncertainty[own].float().sort(stable=True).indices]
            error = wrong[order].cumsum(0) / torch.arange(1, len(order) + 1)
            within = (error <= most).nonzero()
            if len(within):
                last = int(within[-1])
                guard[n, c] = 1.0 if last == len(order) - 1 else uncertainty[order[last]].double()
    return guard


def even_path(num_exits: int) -> ThresholdPath:
    """One threshold for all exits, from 1 to 0, as methods are set by hand; finer where models are sure."""
    limits = [0.0, *(2.0 ** (n / 2) for n in range(-20, 1))]
    return ThresholdPath(torch.tensor(limits, dtype=torch.float64)[:, None].expand(-1, num_exits))


def build_path(
    dense: DensePass,
    method: ThresholdMethod[Any],
    costs_of: Callable[[DensePass], MacTable],
    average: str,
    price: Tensor,
) -> ThresholdPath:
    """The greedy path on the first images of the dense pass.

    average: see `DensePass.losses`. price: what leaving costs beyond a token's own loss, by exit, `(E + 1,)`.
    """
    images = max(1, round(len(dense) * min(1.0, PATH_TOKENS / len(dense.image))))
    dense = dense.first(images) if images < len(dense) else dense
    costs, losses = costs_of(dense), dense.losses(average) + price[:, None] / len(dense.image)
    levels = [_levels(uncertainty) for uncertainty in dense.uncertainty]
    exits = range(len(levels) if method.last_exit is None else method.last_exit)  # at a stop limits mean nothing

    def limits(at: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(level[step] for level, step in zip(levels, at))

    def judge(at: tuple[int, ...]) -> tuple[float, float]:
        exit_index = compose(dense, method, limits(at))
        return losses.gather(0, exit_index[None]).sum().item(), costs.share(live_counts(dense, exit_index))

    here = (0,) * len(levels)
    loss, cost = judge(here)
    points = [limits(here)]
    while True:
        best: tuple[float, tuple[int, ...], float, float] | None = None
        for n in exits:
            for step in STEPS:
                if here[n] + step > LEVELS:
                    continue
                there = (*here[:n], here[n] + step, *here[n + 1 :])
                new_loss, new_cost = judge(there)
                gain = cost - new_cost
                # A step that saves nothing is taken where none does: others may lie behind it.
                worth = (new_loss - loss + 1e-9) / gain if gain > 1e-9 else float("inf")
                if best is None or worth < best[0]:
                    best = worth, there, new_loss, new_cost
        if best is None:
            return ThresholdPath(torch.tensor(points, dtype=torch.float64))
        _, here, loss, cost = best
        points.append(limits(here))


def _levels(uncertainty: Tensor) -> list[float]:
    """Limits that about 0/40, 1/40, ... of the tokens are below; the last lets everybody leave."""
    ordered = uncertainty.float().sort().values
    positions = torch.linspace(0, len(ordered) - 1, LEVELS + 1).round().long()[1:-1]
    return [0.0, *ordered[positions].double().tolist(), 1.0]


def position_where(value: Callable[[float], float], target: float, end: float) -> float:
    """The first position of the path at which a falling value is at most `target`, to a thousandth of a point; `end`
    if it never is."""
    low, high = 0.0, end
    if value(low) <= target:
        return low
    if value(high) > target:
        return high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) > target else (low, middle)
    return high
