"""The choice of a plan: the best one within a budget, or the cheapest one that passes the test of a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from tokenexit.adaptation.measure import Measured
from tokenexit.adaptation.options import Options
from tokenexit.calibration.agreement import FALL_OFF
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, true_run
from tokenexit.calibration.plans import Held, Plan, TriedPlan, choose_plan, priced_by, search_plans, try_plan
from tokenexit.calibration.risk_control import best_bet, betting
from tokenexit.calibration.survey import Survey
from tokenexit.calibration.targets import Bound, Budget, CalibrationTarget
from tokenexit.errors import ConfigError
from tokenexit.segmenter import ExitSegmenter

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
"""Budgets of the curve, and those that a bound is tested at, from safe to daring."""
HOPELESS = 1.5
"""Share of pixels unlike dense, over the bound, from which on cheaper plans are not looked at."""
NONE_PASSES = "no plan passes"
"""Beginning of the reason where a bound cannot be met."""
HALF, SMALL = 0.5, 200
"""Share of dense that exits are worth their trouble at, and number of tokens below which images are small."""


class Pilot:
    """Share of pixels unlike the dense model's, of plans that were tried, on photos that are not tested on.

    photos: those to choose on, with a model that has all places.
    """

    def __init__(self, survey: Survey, photos: CalibrationSet) -> None:
        self.survey, self.photos = survey, photos
        # judged by labels, plans were run on other images and compared with other maps
        self.reference = dense_reference(_with_exits(photos, ())) if survey.labels else None

    def losses(self, one: TriedPlan) -> Tensor:
        """Return the share of each photo, `(n,)`."""
        if self.reference is None:
            return error(one.run.confusion, "pixels")
        run = true_run(_with_exits(self.photos, one.plan.places), one.method, self.reference, "comparing with dense")
        return error(run.confusion, "pixels")


def chosen(
    survey: Survey,
    pilot: Pilot,
    tested_on: CalibrationSet,
    target: CalibrationTarget,
    options: Options,
    say: Callable[[str], None],
) -> tuple[list[TriedPlan], str]:
    """Return the plans that were run, the chosen one first, and why the wish was not met.

    Raises:
        ConfigError: where no plan meets the budget, or none is cheaper than dense.
    """
    if isinstance(target, Budget):
        priced, share = priced_by(survey, target)
        tried, shortfall = choose_plan(priced, share, options.held, timed=True), ""
    else:
        tried, shortfall = _within_bound(survey, pilot, tested_on, target, options, say)
    unit = "pixels that are right" if survey.labels else "pixels as dense has them"
    say(f"{unit}, and multiply-adds: {'; '.join(map(_in_words, tried))}")
    return tried, shortfall


def _in_words(one: TriedPlan) -> str:
    time = "" if math.isnan(one.ms) else f" ({one.ms:.0f} ms)"
    return f"{one.plan}: {one.agreement:.1%} at {one.run.mac_ratio:.0%}{time}"


def _within_bound(
    survey: Survey,
    pilot: Pilot,
    tested_on: CalibrationSet,
    target: Bound,
    options: Options,
    say: Callable[[str], None],
) -> tuple[list[TriedPlan], str]:
    """Return the cheapest plan that passes the test of the bound, and why none does; plans go from safe to daring.

    Plans, their order and the bets are fixed on the photos to choose on, and tested on the others one after the other
    (fixed-sequence testing), so that the chance of accepting one whose loss is above the bound is at most
    1 - confidence.
    """
    candidates: list[tuple[TriedPlan, Tensor]] = []
    for budget in LADDER:
        plans = search_plans(survey, budget, options.held)
        one = try_plan(survey, plans[0], budget) if plans else None
        if one is None:
            break
        candidates.append((one, pilot.losses(one)))
        if candidates[-1][1].mean().item() > HOPELESS * target.value:
            break
    if not candidates:
        raise ConfigError(
            f"no plan takes at most {LADDER[0]:.0%} of dense multiply-adds: hold less of the plan, or keep the model."
        )
    reference = dense_reference(_with_exits(tested_on, ()))
    accepted: list[TriedPlan] = []
    for one, losses in candidates:
        run = true_run(_with_exits(tested_on, one.plan.places), one.method, reference, "testing")
        bet = best_bet(losses.numpy(), target.alpha)
        if betting(target.losses(run, None).numpy(), target.alpha, bet) > 1 - target.confidence:
            break
        accepted.append(one)
    say(f"{len(accepted)} of {len(candidates)} plans pass the test on {len(tested_on)} photos, one after the other")
    if accepted:
        return accepted[::-1], ""
    safest = candidates[0][0]
    return [safest], f"{NONE_PASSES} the test of {target.what}={target.value:g}; this one is not guaranteed"


def _with_exits(photos: CalibrationSet, places: tuple[int, ...]) -> CalibrationSet:
    return replace(photos, model=photos.model.with_exits(places))


def curve_of(survey: Survey, held: Held) -> Iterator[tuple[float, Plan]]:
    """Yield the best plan by prediction at each budget."""
    for budget in LADDER:
        plans = search_plans(survey, budget, held)
        if plans:
            yield budget, plans[0]


def why_not(
    survey: Survey, best: TriedPlan, target: CalibrationTarget, measured: Measured, model: ExitSegmenter
) -> str:
    """Say why half the compute cannot be had within the wish; nothing if it can."""
    if isinstance(target, Bound):
        if measured.mac_ratio <= HALF:
            return ""
        short = f"within {target.value:g} this model takes {measured.mac_ratio:.0%} of dense, more than half"
    elif survey.labels:
        lost = best.loss - survey.dense_loss
        if lost <= FALL_OFF:
            return ""
        unit = "of pixels" if survey.average == "pixels" else "of mIoU"
        short = f"at this budget {lost:.1%} {unit} are lost on the labelled images"
    elif measured.disagreement <= FALL_OFF:
        return ""
    else:
        short = f"agreement with dense has fallen off at this budget ({measured.disagreement:.1%} of pixels are unlike)"
    return f"{short}: {_reason(measured, model)}"


def _reason(measured: Measured, model: ExitSegmenter) -> str:
    """Name what most likely stands in the way."""
    if measured.head_share > HALF:
        return f"the decode head takes {measured.head_share:.0%} of dense multiply-adds, which no exit saves"
    if measured.tokens < SMALL:
        return f"the images are small, {measured.tokens:.0f} tokens, of which most are needed"
    name, share = measured.weakest_class(model.classes.names)
    return f"exits answer '{name}' least well, {share:.0%} of its pixels as dense does"
