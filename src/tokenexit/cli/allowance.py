"""How many images a phase of a command may take, from the time that is left and the measured speed of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Allowance:
    """Time for several phases, one after the other.

    Speed is measured anew before each phase, as another program may have begun meanwhile.

    Attributes:
        end: when all shall be done, as `time.monotonic()` counts.
        seconds: measures the seconds of one forward pass.
    """

    end: float
    seconds: Callable[[], float]

    def images(self, most: int, fewest: int, each: float, later: float = 0.0) -> int:
        """Return the number of images for the next phase: `most` if time allows, never fewer than `fewest`.

        Args:
            most: number of images if there is time enough.
            fewest: number of images without which there is no point in the phase.
            each: time of one image, in forward passes.
            later: time of the phases after it at full size, in forward passes; all shrink by one factor.
        """
        seconds = self.seconds()
        return affordable(most, fewest, each, (self.end - time.monotonic()) / seconds, later)


def affordable(most: int, fewest: int, each: float, forwards: float, later: float = 0.0) -> int:
    """Return what `Allowance.images` does, for the number of forward passes that the time left is enough for."""
    wanted = most * each + later
    if wanted <= forwards:
        return most
    return max(min(most, fewest), int(most * max(0.0, forwards) / wanted))
