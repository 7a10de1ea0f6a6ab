"""How much a reducer merges, chosen together with the thresholds of exits.

Values of its main option are tried from merging little to much, and none at all beside them. Exits are calibrated on
top of each, on some of the images, and what is best there is kept: the most agreement with dense at a budget, or the
least cost within a bound. Thresholds are then chosen anew, on all images, beside the value that was kept.

A bound stays valid although several values were tried: they are compared on the images that fix the path alone, so that
those it is tested on have no part in the choice, and the whole level goes to one walk along one path (fixed-sequence
testing, see `risk_control`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenexit.calibration.calibration_set import CalibrationSet, mean_error
from tokenexit.calibration.for_bound import PILOT_FRACTION, SequentialTest, crossing, fix_path
from tokenexit.calibration.for_budget import for_budget
from tokenexit.calibration.planner import COMPARED_IMAGES, Planner
from tokenexit.calibration.targets import Average, Bound, Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, Reduced, ThresholdMethod
from tokenexit.reducers import Reducer, reducer_spec
from tokenexit.runtime.notebook import Notebook

LOOKED_AT = 8
"""Images on which it is seen what merging alone costs."""
APART = 0.03
"""Values are tried whose costs, as a share of dense, are so far apart at least."""


@dataclass(frozen=True)
class Tried:
    """Exits beside one value of a reducer's main option, on the images that values are compared on.

    Attributes:
        by: the reducer, None for no merging.
        share: multiply-adds over dense ones; None where it does not meet the target.
        unlike: share of pixels unlike the dense model, or wrong where a target needs labels; None likewise.
        loss: what is to be least; None likewise.
    """

    by: Reducer | None
    share: float | None
    unlike: float | None
    loss: float | None

    def __str__(self) -> str:
        name = "no merging" if self.by is None else self.by.label
        if self.share is None or self.unlike is None:
            return f"{name}: does not meet the target"
        return f"{name}: {1 - self.unlike:.1%} of pixels as the reference has them at {self.share:.1%} of dense"

    def record(self) -> dict[str, Any]:
        """Return it as `calibration.json` has it."""
        by = None if self.by is None else reducer_spec(self.by)
        return {"by": by, "share_of_dense": self.share, "pixels_unlike": self.unlike}


def for_merging(
    calibration_set: CalibrationSet,
    method: ThresholdMethod[Any],
    target: Budget | Bound,
    average: Average,
    by: Reducer,
    notebook: Notebook,
    say: Callable[[str], None],
) -> tuple[Tried, ...]:
    """Try values of the reducer's main option beside the method; the best one first.

    calibration_set: images that values are compared on; for a bound those that fix the path, and no others. by: its
        other options stay. notebook: keeps what was tried, so that an interrupted call goes on.

    Raises `ConfigError` for a reducer without such values.
    """
    if not by.trials:
        raise ConfigError(
            f"reducer '{by.name}' has nothing to choose, as its {by.main_option} sets no amount: give it as it is."
        )
    enough = target.value if isinstance(target, Budget) and target.unit == "budget" else 0.0
    values = notebook.once("values", lambda: [_value(by, one) for one in apart(calibration_set, by, enough)])
    say(f"{by.name}: trying {by.main_option} {', '.join(map(str, values))}, and no merging")
    found = []
    for one in (None, *(with_value(by, value) for value in values)):

        def figures(one: Reducer | None = one) -> list[float] | None:
            return _figures(calibration_set, method, target, average, one)

        share, unlike, loss = notebook.once("none" if one is None else one.label, figures) or (None, None, None)
        found.append(Tried(one, share, unlike, loss))
        say(str(found[-1]))
    return tuple(
        sorted(found, key=lambda tried: (tried.loss is None, tried.loss))
    )  # of equals the one that merges less


def with_value(by: Reducer, value: Any) -> Reducer:
    """Return the reducer with a value of its main option, as JSON may hold it."""
    changed: Reducer = replace(by, **{by.main_option: tuple(value) if isinstance(value, list) else value})
    return changed


def _value(by: Reducer, one: Reducer) -> Any:
    return getattr(one, by.main_option)


def apart(calibration_set: CalibrationSet, by: Reducer, enough: float) -> Iterator[Reducer]:
    """Yield reducers that merge more and more, each of which alone saves `APART` of dense more than the one before.

    enough: a share of dense; behind the first value that costs less without any exit no other is of use.
    """
    few = calibration_set.part(calibration_set.spread(LOOKED_AT))
    before = 1.0
    for value in by.trials:
        one = with_value(by, value)
        outputs = [output.ledger for _, _, output in few.forward(Reduced(Dense(), one), f"what {one.label} saves")]
        share = sum(sum(ledger.macs) for ledger in outputs) / sum(sum(ledger.dense_macs) for ledger in outputs)
        if share > before - APART:
            continue
        yield one
        before = share
        if share < enough:
            return


def _figures(
    calibration_set: CalibrationSet,
    method: ThresholdMethod[Any],
    target: Budget | Bound,
    average: Average,
    by: Reducer | None,
) -> list[float] | None:
    """Return cost, pixels unlike the reference, and what is to be least, of exits beside a reducer; None off target."""
    if isinstance(target, Budget):
        few = calibration_set.part(calibration_set.spread(COMPARED_IMAGES))
        try:
            run = for_budget(few, method, target, average, None, by).run
        except ConfigError:  # out of reach beside this value; if it is beside all, choosing on all images says so
            return None
        return [run.mac_ratio, mean_error(run, "pixels"), mean_error(run, average)]
    planner, pilot = Planner(calibration_set, method, average, by=by), SequentialTest.on(calibration_set, target)
    spots, seen = fix_path(planner, pilot)
    if seen[0] > PILOT_FRACTION:  # merging alone loses more than a test lets pass
        return None
    run = pilot.run(planner.method_at(crossing(spots, seen, PILOT_FRACTION)))
    return [run.mac_ratio, mean_error(run, "pixels"), run.mac_ratio]
