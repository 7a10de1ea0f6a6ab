"""Estimates of the cost of a request: multiply-adds of the dense model, in seconds of this machine.

A method with exits is reckoned as if nobody left: a threshold decides how many do, and an image too.
"""

from __future__ import annotations

import time
from collections import Counter

import torch

from tokenexit.outputs.ledger import Size, dense_ops
from tokenexit.outputs.windows import window_boxes
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

PROBE_SIDE = 32
"""Side, in patches, of the noise image that is timed: large enough that arithmetic dominates."""
REPEATS, SECONDS = 3, 0.5
"""Smallest number of timed runs, and their seconds: another program may be using the machine at first."""


class Pace:
    """The seconds per multiply-add of a model on this machine: the best measured at the start and since.

    A slow call, of a busy moment or of an image that is too small to fill the machine, therefore refuses nobody later.
    """

    def __init__(self, seconds_per_mac: float) -> None:
        self._seconds_per_mac = seconds_per_mac

    @classmethod
    def measured(cls, model: ExitSegmenter, precision: Precision) -> Pace:
        """Measure one block of the backbone, for half a second."""
        backbone, device = model.backbone, model.device
        pace = cls(float("inf"))
        side = PROBE_SIDE * model.config.backbone.patch_size
        with inference(device, precision):
            tokens = backbone.embed([torch.randn(3, side, side, device=device)])
            until, times = time.perf_counter() + SECONDS, 0
            while times < REPEATS or time.perf_counter() < until:
                start, times = time.perf_counter(), times + 1
                backbone.run(tokens, 0, 1)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                pace.observe(backbone.block_ops(tokens.packing.lengths[0]).macs, time.perf_counter() - start)
        return pace

    def seconds(self, macs: int) -> float:
        return macs * self._seconds_per_mac

    def observe(self, macs: int, seconds: float) -> None:
        """Update from the multiply-adds and seconds of a call of the model."""
        self._seconds_per_mac = min(self._seconds_per_mac, seconds / macs)


def dense_macs(model: ExitSegmenter, size: Size) -> int:
    """Return the dense multiply-adds of an image whose resized height and width are `size`, in its windows."""
    boxes = window_boxes(size, model.preprocessing.window, model.preprocessing.stride)
    sizes = Counter((bottom - top, right - left) for top, left, bottom, right in boxes)
    grid = model.backbone.patch_embed.grid
    return sum(n * dense_ops(model.backbone, model.decode_head, grid(*size)).macs for size, n in sizes.items())
