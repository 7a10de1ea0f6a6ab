"""Methods that a request may choose, and the dial between accuracy and compute.

A *compute* of 1 lets no token leave, of 0 every token at the first exit. In between, 1 - threshold changes by
equal factors, since confidences near 1 differ by orders of magnitude. The dial of
a calibrated model runs through its calibrated thresholds and keeps their proportions; else all exits share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tokenexit.errors import ConfigError
from tokenexit.methods import METHODS, Dense, Method, Reduced, Resized, build_method
from tokenexit.methods.base import Threshold
from tokenexit.methods.thresholded import NEVER, per_exit
from tokenexit.reducers import Reducer
from tokenexit.segmenter import ExitSegmenter

OCTAVES = 10.0
"""The dial spans values of 1 - threshold from 2^-10 (a threshold of 0.999) to 1."""


@dataclass(frozen=True)
class Offer:
    """A method on the page. compute: the dial position of its own thresholds, None if it has none.

    calibrated: whether they were chosen by `tokenexit calibrate`. refusal: why this model cannot run it, else None.
    """

    name: str
    title: str
    compute: float | None
    calibrated: bool
    refusal: str | None


class Choices:
    """The methods of a model: the calibrated one as it was calibrated, others with their own thresholds."""

    def __init__(self, model: ExitSegmenter, by: Reducer | None = None) -> None:
        """by: what merges tokens beside every method."""
        self.calibrated = model.calibrated_method()
        self._model, self._by = model, by
        if by is not None:  # one that cannot run says so before the first request
            model.check(self._merged(self.usual))

    @property
    def usual(self) -> Method[Any]:
        """The default method, as in all commands: the calibrated one, else dense."""
        return Dense() if self.calibrated is None else self.calibrated

    def offers(self) -> list[Offer]:
        """Return the methods of the page: those with `offered`, and the default one."""
        usual = self.usual.name
        offered = [name for name, kind in METHODS.items() if kind.offered or name == usual]
        return [self._offer(name) for name in dict.fromkeys([*offered, usual])]

    def choose(self, name: str | None, threshold: str | None = None, compute: float | None = None) -> Method[Any]:
        """Return the method that a request names.

        threshold: one for all exits, or one for each as `0.98/0.9/0.8`. compute: see above. Raises `ConfigError`.
        """
        method = self._named(name)
        if threshold is not None and compute is not None:
            raise ConfigError("threshold and compute exclude each other: give one of the two.")
        values = None if threshold is None else _numbers(threshold)
        if compute is not None:
            check_compute(compute)
        if name is None and self.calibrated is None and (threshold is not None or compute is not None):
            raise ConfigError("threshold and compute need a method, as this model is not calibrated: name one.")
        if values is not None:
            method = method.with_thresholds(values)
        elif compute is not None and method.inner.has_exits:
            method = dialled(method, compute, self._num_exits)
        method = self._merged(method)
        self._model.check(method)
        return method

    def _merged(self, method: Method[Any]) -> Method[Any]:
        if self._by is None:
            return method
        if isinstance(method, Resized):  # which is the outermost
            return replace(method, method=Reduced(method.method, self._by))
        return Reduced(method, self._by)

    @property
    def _num_exits(self) -> int:
        return len(self._model.config.exits)

    def _named(self, name: str | None) -> Method[Any]:
        if name is None:
            return self.usual
        if self.calibrated is not None and self.calibrated.name == name:
            return self.calibrated
        if name not in METHODS:
            raise ConfigError(f"method '{name}' is unknown: choose one of {', '.join(METHODS)}.")
        return build_method(name)

    def _offer(self, name: str) -> Offer:
        method = self._named(name)
        compute = dial_position(method, self._num_exits) if method.inner.has_exits else None
        return Offer(name, method.title, compute, method is self.calibrated, self._refusal(method))

    def _refusal(self, method: Method[Any]) -> str | None:
        try:
            self._model.check(self._merged(method))
        except ConfigError as error:
            return str(error)
        return None


def check_compute(compute: float) -> None:
    """Reject values that are no position of the dial."""
    if not 0.0 <= compute <= 1.0:
        raise ConfigError(f"compute must lie in [0, 1], got {compute:g}: 1 runs the whole network for every token.")


def dialled(method: Method[Any], compute: float, num_exits: int) -> Method[Any]:
    """Return the method with the thresholds of a dial position, `compute` in [0, 1]."""
    check_compute(compute)
    power = compute / dial_position(method, num_exits)

    def moved(tau: float) -> float:
        return NEVER if compute == 1.0 else round(1.0 - (1.0 - tau) ** power, 6)

    exits = _thresholds(method, num_exits)
    return method.with_thresholds(
        tuple(moved(exit) if isinstance(exit, int | float) else tuple(map(moved, exit)) for exit in exits)
    )


def dial_position(method: Method[Any], num_exits: int) -> float:
    """Return the dial position of a method's thresholds: the mean over its exits, away from the ends."""
    octaves = [-math.log2(max(1.0 - tau, 2.0**-OCTAVES)) for tau in _flat(_thresholds(method, num_exits))]
    return min(max(sum(octaves) / len(octaves) / OCTAVES, 0.05), 0.95) if octaves else 0.5


def _thresholds(method: Method[Any], num_exits: int) -> tuple[Threshold, ...]:
    return per_exit(NEVER if method.thresholds is None else method.thresholds, num_exits)


def _flat(thresholds: Iterable[Threshold]) -> list[float]:
    return [tau for exit in thresholds for tau in ((exit,) if isinstance(exit, int | float) else exit)]


def _numbers(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(
            f"threshold must be a number, got {text!r}: write 0.95, or 0.98/0.9/0.8 for one per exit."
        ) from None
    return values[0] if len(values) == 1 else values
