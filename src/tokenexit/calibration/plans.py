"""Plans join three savings: a smaller image, a stop for all tokens after some block, and exits for each token.

Each alone is a rival of the other two, and which mix is best depends on the model and on what is in the images. All are
predicted from one dense pass at each of a few sizes, with heads after many blocks; the best of each kind is then run.
Static plans (a size, a stop, both) are judged as fairly as those with exits, and win where they are better.

Without labels a plan is judged by how well it agrees with the dense model at full size; such a judge cannot see where
late blocks do harm. With labels it is judged by what is true.

A place is named by its block, or by its number among those where the model has exits, 0 for the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from tokenexit.calibration.calibration_set import TrueRun, mean_error, true_run
from tokenexit.calibration.clock import TIMED_IMAGES
from tokenexit.calibration.dense_pass import compose, context_price, live_counts
from tokenexit.calibration.latency import timed_in_turn
from tokenexit.calibration.planner import Planner
from tokenexit.calibration.search import TOLERANCE, meet_budget
from tokenexit.calibration.survey import Searched, Survey
from tokenexit.calibration.targets import Budget
from tokenexit.calibration.threshold_path import ThresholdPath, class_guard, even_path, position_where
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, Method, Resized, ThresholdMethod, Truncated
from tokenexit.methods.resized import LARGEST
from tokenexit.methods.thresholded import blocks_of_live_tokens
from tokenexit.segmenter import ExitSegmenter

MOST_EXITS = 4
PRICE = 0.03
"""Multiple of `context_price` in the search."""
PRICES = (0.0, 0.03)
"""Multiples of it that paths of thresholds are built with."""
WORTH = 0.01
"""Share by which another exit must lower the loss to be added."""
FINALISTS = 2
"""Plans with exits that are run, beside the best of each static kind and of exits alone."""
TIME_TOLERANCE = 0.04
"""As `TOLERANCE`, for budgets of time: less than two runs of one plan differ by."""
GUARDS = (0.1, 0.05)
"""Shares of wrong samples above which tokens of a class do not leave, tried beside no guard."""
AS_GOOD = 0.02
"""Share of the loss by which a simpler plan may be worse and still be chosen: less than other images would change."""
AS_QUICK = 0.1
"""Share of the time by which a simpler plan may be slower, if it is as good: less than a busy machine would change."""


@dataclass(frozen=True)
class Plan:
    """Where a model saves, before thresholds.

    Attributes:
        scale: factor on both sides of an image.
        stop: number of blocks after which all tokens leave; None if those that are left run to the end.
        exits: number of blocks before each exit where a token may leave by its score, all of them before the stop.
        price: predicted multiply-adds, or time, over those of dense at full size.
        loss: predicted loss, as the search judges it.
    """

    scale: float = 1.0
    stop: int | None = None
    exits: tuple[int, ...] = ()
    price: float = 1.0
    loss: float = 0.0

    @property
    def places(self) -> tuple[int, ...]:
        """Number of blocks before each exit head that runs."""
        return self.exits if self.stop is None else (*self.exits, self.stop)

    @property
    def parts(self) -> int:
        """Number of things that a reader of the plan must know: the fewer, the simpler."""
        return (self.scale != 1.0) + (self.stop is not None) + len(self.exits)

    def __str__(self) -> str:
        parts = [] if self.scale == 1.0 else [f"image at {self.scale:g}"]
        if self.exits:
            parts.append(f"exits after {listed(self.exits)}")
        if self.stop is not None:
            parts.append(f"everybody stopped after {self.stop}")
        return ", ".join(parts) or "dense"


@dataclass(frozen=True)
class TriedPlan:
    """A plan with thresholds and its true run.

    Attributes:
        plan: the plan.
        kind: "plan" for the best ones with exits, or what is simpler: "exits alone", "size alone", "stop alone", "size
            and stop".
        method: the method, on the model with the plan's places alone (`plan.places`).
        run: its true run on the images that it was chosen on.
        loss: what it loses there, by the judge of this search.
        ms: median milliseconds of an image on this machine, beside the other plans; NaN where it was not timed.
    """

    plan: Plan
    kind: str
    method: Method[Any]
    run: TrueRun
    loss: float
    ms: float = math.nan

    @property
    def agreement(self) -> float:
        """Share of pixels that are as they should be, the mean over images."""
        return 1.0 - mean_error(self.run, "pixels")


@dataclass(frozen=True)
class Held:
    """What a user holds fixed of a plan; None leaves it to the search.

    Attributes:
        scale: factor on the sides, at most `LARGEST`.
        depth: number of blocks after which everybody stops, the network's depth for no stop.
        exits: number of blocks before each exit, increasing; empty for none.

    Raises:
        ConfigError: for values that no plan has, and for an exit that is not before the stop.
    """

    scale: float | None = None
    depth: int | None = None
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not 0.0 < self.scale <= LARGEST:
            raise ConfigError(
                f"size must be above 0 and at most {LARGEST:g}, got {self.scale:g}: it is a factor on the sides."
            )
        if self.depth is not None and self.depth < 1:
            raise ConfigError(f"depth must be at least 1, got {self.depth}: it is a number of blocks.")
        exits = self.exits or ()
        if list(exits) != sorted(set(exits)):
            raise ConfigError(f"exits must be increasing numbers of blocks, got {listed(exits)}.")
        if self.depth is not None and exits and exits[-1] >= self.depth:
            raise ConfigError(
                f"exits must be before depth={self.depth}, where everybody stops, got {exits[-1]}: leave it out, or go "
                "deeper."
            )


def static_plans(survey: Survey, budget: float, held: Held = Held()) -> list[Plan]:
    """Return the best static plan for each place to stop at, and for none: the size that loses least within the budget.

    There is none where exits are held.
    """
    end, prices = len(survey.blocks) - 1, survey.static_prices
    plans = []
    for n, block in enumerate(survey.blocks):
        if held.exits or held.depth not in (None, block) or not survey.may_stop(n):
            continue
        fitting = [
            Plan(scale, None if n == end else block, (), prices[scale][n], losses[n])
            for scale, losses in survey.static_losses.items()
            if held.scale in (None, scale) and prices[scale][n] <= budget
        ]
        if fitting:
            plans.append(min(fitting, key=lambda plan: plan.loss))
    return plans


def search_plans(survey: Survey, budget: float, held: Held = Held()) -> list[Plan]:
    """Return plans within the budget, the best one by prediction first: the best of each size and each stop.

    Exits are added one at a time, each where the loss falls most, with one threshold for all of them that meets the
    budget. A size and stop which alone lose more than the best plan found so far are passed over.
    """
    end = len(survey.blocks) - 1
    found = static_plans(survey, budget, held)
    if held.exits == ():
        return sorted(found, key=lambda plan: plan.loss)
    behind, prices = held.exits[-1] if held.exits else 0, survey.static_prices
    places = [
        (loss, scale, n)
        for scale in survey.scales
        for n, loss in enumerate(survey.static_losses[scale])
        if (held.exits or prices[scale][n] > budget)  # within the budget no token has to leave
        and held.scale in (None, scale)
        and held.depth in (None, survey.blocks[n])
        and (n == end or (survey.blocks[n] > behind and survey.may_stop(n) and not survey.method.decodes_grid))
    ]
    for loss, scale, n in sorted(places):
        if held.exits is None and found and loss > min(plan.loss for plan in found):
            continue
        stop = None if n == end else n
        found += _with_exits(survey, budget, scale, stop, held.exits)
    return sorted(found, key=lambda plan: plan.loss)


def _with_exits(
    survey: Survey, budget: float, scale: float, stop: int | None, exits: tuple[int, ...] | None
) -> list[Plan]:
    """Return the best plan at a size and a stop, by adding exits one at a time; none if the budget is out of reach."""
    places = survey.model.config.exits
    before = range(len(places) if stop is None else stop)
    searched = survey.searched(scale)

    def judged(numbers: tuple[int, ...]) -> tuple[float, float]:
        return _at_budget(survey, searched, numbers, stop, budget)

    if exits is not None:
        numbers = tuple(places.index(block) for block in exits)
        loss, price = judged(numbers)
        chosen: tuple[int, ...] = numbers
    else:
        chosen, loss, price = (), math.inf, math.inf
        while len(chosen) < MOST_EXITS:
            tried = [(*judged(tuple(sorted((*chosen, n)))), n) for n in before if n not in chosen]
            if not tried or not min(tried)[0] < loss * (1 - WORTH):
                break
            loss, price, n = min(tried)
            chosen = tuple(sorted((*chosen, n)))
    if loss == math.inf:
        return []
    return [Plan(scale, None if stop is None else places[stop], tuple(places[n] for n in chosen), price, loss)]


LIMITS = even_path(1).limits.flatten().tolist()


def _at_budget(
    survey: Survey, searched: Searched, numbers: tuple[int, ...], stop: int | None, budget: float
) -> tuple[float, float]:
    """Return loss and price at one threshold for all exits that meets the budget, both between two thresholds; infinity
    if none does."""
    used = numbers if stop is None else (*numbers, stop)
    some = searched.dense.at_exits(used)
    table = searched.prices.at_exits(used, None if stop is None else len(numbers))
    method = stopping(survey.method, None if stop is None else len(used))
    losses = searched.losses[[*used, len(searched.losses) - 1]]
    price = context_price([survey.blocks[n] for n in used], blocks_of_live_tokens(survey.method, survey.model.view()))
    if stop is not None:
        price = (price - price[len(numbers)]).clamp(min=0.0)  # at the stop nobody is left whom others could miss
    losses = losses + PRICE * price[:, None] / len(some.image)

    def at(limit: float) -> tuple[float, float]:
        exit_index = compose(some, method, (limit,) * len(used))
        return table.share(live_counts(some, exit_index)), losses.gather(0, exit_index[None]).sum().item()

    low, high = 0, len(LIMITS) - 1
    cheap = at(LIMITS[high])
    if cheap[0] > budget:
        return math.inf, math.inf
    dear = at(LIMITS[low])
    if dear[0] <= budget:
        return dear[1], dear[0]
    while high - low > 1:
        middle = (low + high) // 2
        one = at(LIMITS[middle])
        low, high, dear, cheap = (middle, high, one, cheap) if one[0] > budget else (low, middle, dear, one)
    part = (dear[0] - budget) / max(dear[0] - cheap[0], 1e-12)
    return (1 - part) * dear[1] + part * cheap[1], budget


def at_exits(method: ThresholdMethod[Any], numbers: Sequence[int]) -> ThresholdMethod[Any]:
    """Return the method for a model that has these of the exits alone: with their temperatures."""
    if isinstance(method.temperature, int | float):
        return method
    return replace(method, temperature=tuple(method.temperature[n] for n in numbers))


def stopping(method: ThresholdMethod[Any], stop: int | None) -> ThresholdMethod[Any]:
    """Return the method with a stop at this exit, 1 the first; as it is for none."""
    return method if stop is None else replace(method, stop=stop)  # type: ignore[call-arg]


def finalists(plans: Sequence[Plan]) -> list[tuple[str, Plan]]:
    """Return the plans to run: the best ones with exits, and the best of each simpler kind, with the kind's name."""
    kinds: list[tuple[str, Callable[[Plan], bool], int]] = [
        ("plan", lambda plan: bool(plan.exits), FINALISTS),
        ("exits alone", lambda plan: bool(plan.exits) and plan.scale == 1.0 and plan.stop is None, 1),
        ("stop alone", lambda plan: not plan.exits and plan.scale == 1.0, 1),
        ("size alone", lambda plan: not plan.exits and plan.stop is None, 1),
        ("size and stop", lambda plan: not plan.exits and plan.stop is not None and plan.scale != 1.0, 1),
    ]
    found: dict[Plan, str] = {}
    for kind, belongs, count in kinds:
        for plan in [plan for plan in sorted(plans, key=lambda plan: plan.loss) if belongs(plan)][:count]:
            found[plan] = kind  # the simpler name stays
    return [(kind, plan) for plan, kind in found.items()]


def try_plan(survey: Survey, plan: Plan, budget: float, kind: str = "plan") -> TriedPlan | None:
    """Choose thresholds for a plan by true runs and run it on all images; None if it cannot meet the budget.

    A static plan that takes longer than predicted is tried at smaller sizes.
    """
    model = survey.model
    some = replace(survey.images, model=model.with_exits(plan.places))
    numbers = [model.config.exits.index(block) for block in plan.places]
    if not plan.exits:
        inner: Method[Any] = Dense() if plan.stop is None else Truncated(1)
        method = inner if plan.scale == 1.0 else Resized(inner, plan.scale)
        run = true_run(some, method, survey.reference, f"true run: {plan}")
        price = survey.price_of(some, method, run, plan.scale, numbers)
        if price > budget and survey.clock is not None:
            smaller = [scale for scale in survey.scales if scale < plan.scale]
            return try_plan(survey, replace(plan, scale=max(smaller)), budget, kind) if smaller else None
        return TriedPlan(replace(plan, price=price), kind, method, run, survey.loss_of(run))
    planner = Planner(
        some,
        stopping(at_exits(survey.method, numbers), None if plan.stop is None else len(plan.places)),
        survey.average,
        scale=plan.scale,
        dense=survey.passes[plan.scale].at_exits(numbers),
        full_grids=survey.full_grids,
        prices=PRICES,
    )
    table = survey.prices[plan.scale].at_exits(numbers, planner.method.last_exit)

    def predicted(position: float) -> float:
        return table.share(planner.live(position))

    def measured(position: float) -> tuple[float, TrueRun]:
        method = planner.method_at(position)
        run = true_run(some, method, survey.reference, f"true run: {plan}")
        return survey.price_of(some, method, run, plan.scale, numbers), run

    share = budget
    if survey.clock is not None:  # paths are compared at equal multiply-adds
        share = planner.mac_ratio(position_where(predicted, budget, planner.path.end))
    loss = planner.compare(some, survey.reference, share, survey.loss_of)
    for rivals in (_guarded, _in_other_contexts):
        own = planner.method, planner.path
        others = rivals(planner)
        lost = planner.compare(some, survey.reference, share, survey.loss_of, others) if others else math.inf
        if lost < loss:
            loss = lost
        else:
            planner.method, planner.path = own
    tolerance = TOLERANCE if survey.clock is None else TIME_TOLERANCE
    fit = meet_budget(budget, planner.path.end, predicted, measured, tolerance)
    if fit is None:
        return None
    method = planner.method_at(fit.position)
    return TriedPlan(replace(plan, price=fit.reached), kind, method, fit.run, survey.loss_of(fit.run))


def _guarded(planner: Planner) -> list[tuple[ThresholdMethod[Any], ThresholdPath]]:
    """Return the method on the path in use, with classes that exits answer badly held back."""
    return [(planner.method, replace(planner.path, guard=class_guard(planner.dense, most))) for most in GUARDS]


def _in_other_contexts(planner: Planner) -> list[tuple[ThresholdMethod[Any], ThresholdPath]]:
    """Return the method with other tokens kept as context, where the model can run it, on the path in use."""
    return [(method, planner.path) for method in planner.method.contexts if _runs(planner.model, method)]


def _runs(model: ExitSegmenter, method: Method[Any]) -> bool:
    try:
        model.check(method)
    except ConfigError:
        return False
    return True


def priced_by(survey: Survey, target: Budget) -> tuple[Survey, float]:
    """Return the survey in the unit of a budget, and the budget as a share of dense in it.

    Raises:
        ConfigError: for a budget of time and a model that takes windows.
    """
    if target.unit == "budget":
        return survey, target.value
    if target.unit == "budget_gmacs":
        return survey, target.value / (survey.costs[1.0].dense.sum().item() / len(survey.images) / GIGA)
    timed = survey.by_the_clock()
    assert timed.clock is not None
    return timed, target.value / timed.clock.dense_ms


def choose_plan(
    survey: Survey,
    budget: float,
    held: Held = Held(),
    plans: Sequence[Plan] | None = None,
    timed: bool = False,
) -> list[TriedPlan]:
    """Return the plans that were run within the budget, the best one first; of plans as good, the simplest is best.

    plans: those to choose from; those of `search_plans` if not given. timed: time the plans on this machine, and of
        plans as good pass over those that are slower than another.

    Raises `ConfigError` where no plan meets the budget.
    """
    plans = search_plans(survey, budget, held) if plans is None else plans
    tried = [try_plan(survey, plan, budget, kind) for kind, plan in finalists(plans)]
    found = sorted((one for one in tried if one is not None), key=lambda one: one.loss)
    if not found:
        raise ConfigError(_out_of_reach(survey, budget, held))
    if timed:
        runs = [(survey.model.with_exits(one.plan.places), one.method) for one in found]
        times = timed_in_turn(survey.images, runs, TIMED_IMAGES, "timing plans")
        found = [replace(one, ms=median(own)) for one, own in zip(found, times)]
    as_good = [one for one in found if one.loss <= found[0].loss * (1 + AS_GOOD)]
    if timed:
        quickest = min(one.ms for one in as_good)
        as_good = [one for one in as_good if one.ms <= quickest * (1 + AS_QUICK)]
    best = min(as_good, key=lambda one: one.plan.parts)
    return [best, *(one for one in found if one is not best)]


def _out_of_reach(survey: Survey, budget: float, held: Held) -> str:
    """Say why there is no plan."""
    stops = [n for n, block in enumerate(survey.blocks) if held.depth in (None, block) and survey.may_stop(n)]
    if not stops or (held.exits and held.depth not in (None, survey.blocks[-1]) and survey.method.decodes_grid):
        return f"depth={held.depth} cannot be held: this decode head reads the whole grid at the end; leave it out."
    least = min(costs[n] for scale, costs in survey.static_prices.items() for n in stops if held.scale in (None, scale))
    asked, unit = f"budget={budget:g} is out of reach", "of dense multiply-adds"
    if survey.clock is not None:
        budget, least = budget * survey.clock.dense_ms, least * survey.clock.dense_ms
        asked, unit = f"latency_ms={budget:.3g} is out of reach", "ms here"
    if held.exits is None:
        return f"{asked}: the cheapest plan takes {least:.2f} {unit}; ask for more, or hold less of it."
    return f"{asked} with what is held of the plan: ask for more, or hold less."


def listed(numbers: Sequence[int]) -> str:
    """Return numbers in words: `3, 6 and 9`."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
