"""`calibrate`: from a target to thresholds, with what was reached and what is guaranteed.

A *budget* (mean multiply-adds, or milliseconds) is met on all images. A *bound* on what is lost is tested: the path of
thresholds is fixed on one part of the images and tested on the others, an image being the unit. Neither needs labels,
but for the error and mIoU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

from tokenexit.calibration.calibration_set import CalibrationSet, labelled
from tokenexit.calibration.for_bound import for_bound, split
from tokenexit.calibration.for_budget import for_budget
from tokenexit.calibration.for_plan import for_plan
from tokenexit.calibration.store import calibration_of
from tokenexit.calibration.targets import Average, Bound, Budget, CalibrationTarget
from tokenexit.calibration.temperature import fit_temperature
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import ConfigError
from tokenexit.methods import MethodLike, as_method
from tokenexit.methods.reduced import parted
from tokenexit.methods.thresholded import calibratable


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
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Choose thresholds for `target`, one per exit, and say what they reach on these images.

    Args:
        calibration_set: a model and the images it is run on.
        method: a method with thresholds, its name or its specification; its thresholds are replaced, its other options
            stay. Or such a method in `Reduced`: thresholds are then chosen with the reducer on, which stays as it is.
        target: a `Budget` of compute, or a `Bound` on the loss.
        average: what the path of thresholds keeps, agreement over "pixels", or over "classes" so that rare ones are
            guarded.
        cap: no image may cost more than this share of its dense multiply-adds.
        seed: seed of the split of the images into parts.
        plan: choose the images' size, a stop for all tokens and which exits are open, too, as agrees best with the
            "dense" model at full size, or with "labels"; thresholds alone if not given. For budgets.
        temperatures: fit the temperatures of the exit heads first, to the labels of the images that fix the path.
        about: where the images are from, as the record keeps it.
        say: shows what was chosen on the way, a line at a time.

    Returns:
        The method with its thresholds, what it reached on these images, and what is guaranteed.

    Raises:
        ConfigError: for a target out of reach, with what is in reach; for too few images, with how many are needed; and
            for a method that cannot be calibrated.
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
    if plan == "labels" or (isinstance(target, Bound) and target.needs_labels):
        calibration_set = labelled(calibration_set)
    if temperatures:
        part = (
            calibration_set
            if isinstance(target, Budget)
            else calibration_set.part(split(len(calibration_set), target, seed)[0])
        )
        fit = fit_temperature(part)
        rule = replace(rule, temperature=fit)
        say(f"temperatures: {'/'.join(map(str, fit))}")
    if plan is not None:
        if not isinstance(target, Budget) or cap is not None:
            raise ConfigError("a plan is made for a budget, without a cap: leave one of the two out.")
        chosen = for_plan(calibration_set, rule, target, average, plan == "labels", say)
    elif isinstance(target, Budget):
        chosen = for_budget(calibration_set, rule, target, average, cap, by)
    else:
        chosen = for_bound(calibration_set, rule, target, average, cap, seed, say, by)
    asked = {f.name: getattr(target, f.name) for f in fields(target)}
    asked = {asked.pop("unit", None) or asked.pop("what"): asked.pop("value"), **asked}
    return calibration_of(
        calibration_set.model,
        chosen.method,
        chosen.run,
        asked={**asked, "path_keeps_agreement_over": average, "cap": cap, "precision": calibration_set.precision},
        guarantee=chosen.guarantee,
        reached=chosen.reached,
        images={**(about or {}), **chosen.images},
    )
