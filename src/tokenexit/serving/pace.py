"""Estimates of the cost of a request: multiply-adds of the dense model, in seconds of this machine.

A method with exits is reckoned as if nobody left: a threshold decides how many do, and an image too.
"""

from __future__ import annotations

from tokenexit.calibration.latency import seconds_per_mac
from tokenexit.outputs import windows
from tokenexit.outputs.ledger import Size
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

SECONDS = 0.5
"""Duration of the measurement: another program may be using the machine at first."""


class Pace:
    """The seconds per multiply-add of a model on this machine: the best measured at the start and since.

    A slow call, of a busy moment or of an image that is too small to fill the machine, therefore refuses nobody later.
    """

    def __init__(self, seconds_per_mac: float) -> None:
        self._seconds_per_mac = seconds_per_mac

    @classmethod
    def measured(cls, model: ExitSegmenter, precision: Precision) -> Pace:
        """Measure one block of the backbone, for half a second."""
        with inference(model.device, precision):
            return cls(seconds_per_mac(model, SECONDS))

    def seconds(self, macs: int) -> float:
        return macs * self._seconds_per_mac

    def observe(self, macs: int, seconds: float) -> None:
        """Update from the multiply-adds and seconds of a call of the model."""
        self._seconds_per_mac = min(self._seconds_per_mac, seconds / macs)


def dense_macs(model: ExitSegmenter, size: Size, scale: float = 1.0) -> int:
    """Return the multiply-adds of the dense model for an image of the resized `size`, in its windows.

    scale: by which a method resizes each of them.
    """
    window, stride = model.preprocessing.window, model.preprocessing.stride
    return windows.dense_macs(model.backbone, model.decode_head, size, window, stride, scale)
