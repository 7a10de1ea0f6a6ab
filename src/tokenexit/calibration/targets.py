"""Targets of calibration: a budget of compute, or a bound on what is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from tokenexit.calibration import risk_control
from tokenexit.calibration.calibration_set import TrueRun, error
from tokenexit.errors import ConfigError

Average = Literal["pixels", "classes"]
Unit = Literal["budget", "budget_gmacs", "latency_ms"]
BoundName = Literal["max_disagreement", "max_error_increase", "max_miou_drop"]
UNITS, BOUNDS = get_args(Unit), get_args(BoundName)


@dataclass(frozen=True)
class Budget:
    """A limit on the mean cost over images.

    Attributes:
        unit: "budget", a share of dense multiply-adds; "budget_gmacs", giga multiply-adds; or "latency_ms",
            milliseconds on this machine.
        value: the largest mean cost in that unit.

    Raises:
        ConfigError: for a value that is not above 0, and for a share above 1.
    """

    unit: Unit
    value: float

    def __post_init__(self) -> None:
        if not 0.0 < self.value < math.inf:
            raise ConfigError(f"{self.unit}={self.value:g} must be above 0.")
        if self.unit == "budget" and self.value > 1.0:
            share = f"{self.value / 100:g}, or {self.value:g}%" if self.value <= 100 else "0.6, or 60%"
            raise ConfigError(f"budget={self.value:g} must be a share of dense, at most 1: write {share}.")


@dataclass(frozen=True)
class Bound:
    """Largest loss that is allowed: `value` in [0, 1] of the pixels, or points of mIoU.

    Attributes:
        what: "max_disagreement" with dense (no labels), "max_error_increase" over dense (an image where the error falls
            counts as 0), or "max_miou_drop", an estimate.
        value: the largest loss, a share in (0, 1) of the pixels, or points of mIoU.
        confidence: probability in (0, 1) with which the bound holds.
        average: mean of one image's error over "pixels", or over the "classes" that its reference has.
        clip: the largest loss in (0, 1] that an image counts with.
        images_above: bound this share of images that lose more than `value`, instead of the mean.
        in_expectation: conformal risk control, a guarantee on average and without a confidence.

    Raises:
        ConfigError: for a value out of range, and for options that do not go together.
    """

    what: BoundName
    value: float
    confidence: float = 0.9
    average: Average = "pixels"
    clip: float = 1.0
    images_above: float | None = None
    in_expectation: bool = False

    def __post_init__(self) -> None:
        if self.what == "max_miou_drop":
            if self.images_above is not None or self.in_expectation or self.clip != 1.0:
                raise ConfigError("max_miou_drop is estimated: images_above, in_expectation and clip do not apply.")
            if not 0.0 < self.value < 100.0:
                raise ConfigError(f"max_miou_drop={self.value:g} must be points between 0 and 100.")
        elif not 0.0 < self.value < 1.0:
            raise ConfigError(f"{self.what}={self.value:g} is a share of pixels: give one between 0 and 1.")
        if not 0.0 < self.confidence < 1.0:
            raise ConfigError(f"confidence={self.confidence:g} must be between 0 and 1.")
        if not 0.0 < self.clip <= 1.0:
            raise ConfigError(f"clip={self.clip:g} must be in (0, 1]: it is an image's largest loss.")
        if self.what != "max_miou_drop" and self.value >= self.clip:
            raise ConfigError(f"{self.what}={self.value:g} says nothing of losses clipped at {self.clip:g}: lower it.")
        if self.images_above is not None:
            if not 0.0 < self.images_above < 1.0:
                raise ConfigError(f"images_above={self.images_above:g} is a share of images between 0 and 1.")
            if self.in_expectation or self.clip != 1.0:
                raise ConfigError("images_above counts images: in_expectation and clip do not apply.")

    @property
    def needs_labels(self) -> bool:
        return self.what != "max_disagreement"

    @property
    def alpha(self) -> float:
        """The bound on the mean of losses scaled to [0, 1]."""
        return self.images_above if self.images_above is not None else self.value / self.clip

    def needed_images(self) -> int:
        """Images to test on without which no outcome could pass."""
        if self.what == "max_miou_drop":
            return 2
        if self.in_expectation:
            return risk_control.needed_images_in_expectation(self.alpha)
        return risk_control.needed_images(self.alpha, self.confidence)

    def losses(self, run: TrueRun, dense: TrueRun | None) -> Tensor:
        """Per image, `(n,)` in [0, 1]: the clipped loss over its bound `clip`, or whether it exceeds `value`."""
        loss = error(run.confusion, self.average)
        if self.what == "max_error_increase":
            assert dense is not None, "compared with the dense model's error"
            loss = (loss - error(dense.confusion, self.average)).clamp(min=0.0)
        if self.images_above is not None:
            return (loss > self.value).double()
        return loss.clamp(max=self.clip) / self.clip


CalibrationTarget = Budget | Bound


def target_of(options: Mapping[str, Any]) -> CalibrationTarget:
    """Return the target among options by name: exactly one `Budget` or `Bound`, and what goes with a bound."""
    asked = {name: options[name] for name in (*UNITS, *BOUNDS) if options.get(name) is not None}
    if len(asked) != 1:
        raise ConfigError(f"{len(asked)} targets are given: give one of {', '.join((*UNITS, *BOUNDS))}.")
    ((name, value),) = asked.items()
    own = {f.name: options[f.name] for f in fields(Bound) if options.get(f.name) is not None and f.name in options}
    if name in BOUNDS:
        return Bound(name, value, **own)
    default = Bound("max_disagreement", 0.5)
    extra = [key for key in own if own[key] != getattr(default, key)]
    if extra:
        raise ConfigError(f"{extra[0]} belongs to a bound, and {name} is a budget: leave it out.")
    return Budget(name, value)
