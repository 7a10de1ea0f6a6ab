"""`calibrate`: from a target to thresholds, with what was reached and what is guaranteed.

A *budget* (mean multiply-adds, or milliseconds) is met on all images. A *bound* on what is lost is tested: the path of
thresholds is fixed on one part of the images and tested on the others, an image being the unit. Neither needs labels,
but for the error and mIoU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from tokenexit.calibration.calibration_set import CalibrationSet, labelled
from tokenexit.calibration.for_bound import for_bound, split
from tokenexit.calibration.for_budget import for_budget
from tokenexit.calibration.for_merging import Tried, for_merging
from tokenexit.calibration.for_plan import for_plan
from tokenexit.calibration.store import calibration_of
from tokenexit.calibration.targets import Average, Bound, Budget, CalibrationTarget
from tokenexit.calibration.temperature import fit_temperature
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import ConfigError
from tokenexit.methods import MethodLike, as_method, spec_of
from tokenexit.methods.reduced import Reduced, parted
from tokenexit.methods.thresholded import calibratable
from tokenexit.runtime.notebook import Notebook


def calibrate(
    calibration_set: CalibrationSet,
    method: MethodLike,
    target: CalibrationTarget,
    *,
    average: Average = "classes",
    cap: float | None = None,
    seed: int = 0,
    temperatures: bool = False,
    plan: Literal["dense", "labels"] | None = None,
    choose_merging: bool = False,
    progress: Path | None = None,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Choose thresholds for `target`, one per exit, and say what they reach on these images.

    Args:
        calibration_set: a model and the images it is run on.
        method: a method with thresholds, its name or its specification; its thresholds are replaced, its other options
            stay. Or such a method in `Reduced`: thresholds are then chosen with the reducer on.
        target: a `Budget` of compute, or a `Bound` on the loss.
        average: what the path of thresholds keeps, agreement over "pixels", or over "classes" so that rare ones are
            guarded.
        cap: no image may cost more than this share of its dense multiply-adds.
        seed: seed of the split of the images into parts.
        plan: choose the images' size, a stop for all tokens and which exits are open, too, as agrees best with the
            "dense" model at full size, or with "labels"; thresholds alone if not given. For budgets.
        choose_merging: choose the main option of the reducer in `Reduced`, too: values are tried with exits calibrated
            on top of each, and no merging beside them, which may be the best. A bound stays valid: values are compared
            on the images that fix the path, and the one that is kept is tested on the others (`for_merging`).
        progress: a file that keeps what was tried, so that an interrupted call goes on; to be deleted when the
            calibration is written. In memory alone if not given.
        temperatures: fit the temperatures of the exit heads first, to the labels of the images that fix the path.
        about: where the images are from, as the record keeps it.
        say: shows what was chosen on the way, a line at a time.

    Returns:
        The method with its thresholds, what it reached on these images, and what is guaranteed.

    Raises:
        ConfigError: for a target out of reach, with what is in reach; for too few images, with how many are needed; and
            for a method that cannot be calibrated, or a reducer with nothing to choose.
        DataError: if labels are needed and no image has any.
    """
    method, by = parted(as_method(method))
    rule = calibratable(method)
    if by is not None and (cap is not None or temperatures or plan is not None):
        raise ConfigError(
            "beside merging thresholds alone are chosen, for a budget or a bound: leave cap, temperatures and plan out."
        )
    if rule.cap is not None:
        raise ConfigError("a method that has a cap keeps it: calibrate one without, and give the cap as cap=.")
    if cap is not None and not 0.0 < cap < math.inf:
        raise ConfigError(f"cap={cap:g} must be a number above 0: it is a share of dense multiply-adds.")
    if len(calibration_set) == 0:
        raise ConfigError("there are no images to calibrate on: give some.")
    if choose_merging and by is None:
        raise ConfigError("choose_merging needs a reducer to choose for: put the method in Reduced, beside one.")
    if plan == "labels" or (isinstance(target, Bound) and target.needs_labels):
        calibration_set = labelled(calibration_set)
    if temperatures:
        fit = fit_temperature(_untested(calibration_set, target, seed))
        rule = replace(rule, temperature=fit)
        say(f"temperatures: {'/'.join(map(str, fit))}")
    asked = {f.name: getattr(target, f.name) for f in fields(target)}
    asked = {asked.pop("unit", None) or asked.pop("what"): asked.pop("value"), **asked}
    tried: tuple[Tried, ...] = ()
    if choose_merging and by is not None:
        settings = {
            "model": calibration_set.model.fingerprint(),
            "method": spec_of(Reduced(rule, by)),
            "target": asked,
            "average": average,
            "seed": seed,
            "images": [len(calibration_set), *calibration_set.indices],
            "precision": calibration_set.precision,
            **(about or {}),
        }
        notebook, some = Notebook(progress, settings), _untested(calibration_set, target, seed)
        tried = for_merging(some, rule, target, average, by, notebook, say)
        by = tried[0].by
        say(f"kept: {tried[0]}")
    if plan is not None:
        if not isinstance(target, Budget) or cap is not None:
            raise ConfigError("a plan is made for a budget, without a cap: leave one of the two out.")
        chosen = for_plan(calibration_set, rule, target, average, plan == "labels", say)
    elif isinstance(target, Budget):
        chosen = for_budget(calibration_set, rule, target, average, cap, by)
    else:
        chosen = for_bound(calibration_set, rule, target, average, cap, seed, say, by)
    return calibration_of(
        calibration_set.model,
        chosen.method,
        chosen.run,
        asked={**asked, "path_keeps_agreement_over": average, "cap": cap, "precision": calibration_set.precision},
        guarantee=chosen.guarantee,
        reached={**chosen.reached, **({"merging_tried": [one.record() for one in tried]} if tried else {})},
        images={**(about or {}), **chosen.images},
    )


def _untested(calibration_set: CalibrationSet, target: CalibrationTarget, seed: int) -> CalibrationSet:
    """Return the images that a target does not test on: all of them for a budget."""
    if isinstance(target, Budget):
        return calibration_set
    return calibration_set.part(split(len(calibration_set), target, seed)[0])
