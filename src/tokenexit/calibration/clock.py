"""Time as the price of a plan: what plans take on this machine, in place of multiply-adds.

The model of `latency` is put together from parts timed alone, on noise. Here the dense model is timed on real images at
every size, which says by what factor each size is off; a plan that is run is timed beside the dense model, in turn, so
that what else the machine does falls out of the ratio.

Legend: n images, E exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, TrueRun
from tokenexit.calibration.latency import Latency, check_timed, latency_on_this_machine, timed_in_turn
from tokenexit.engine.tokens import Grid
from tokenexit.methods import Dense, Method, Resized, ThresholdMethod
from tokenexit.methods.thresholded import blocks_of_live_tokens
from tokenexit.segmenter import ExitSegmenter

TIMED_IMAGES = 8


@dataclass(frozen=True)
class TimeTable:
    """Milliseconds of images from their live counts, as `MacTable` has their multiply-adds.

    Attributes:
        latency: the model of time, for the exits of this table.
        exits: number of blocks before each exit.
        depth: number of blocks.
        last_exit: the exit at which the network ends, if there is one.
        dense: `(n,)` modelled milliseconds of the dense model on each image at its full size.
        factor: what the model's ratio to dense is to be multiplied with at this size.
    """

    latency: Latency
    exits: tuple[int, ...]
    depth: int
    last_exit: int | None
    dense: Tensor
    factor: float = 1.0

    def at_exits(self, numbers: Sequence[int], last_exit: int | None) -> TimeTable:
        """The same with some of the exits, in order; `last_exit` is the one of these at which the network ends."""
        latency = replace(self.latency, exits=tuple(self.latency.exits[n] for n in numbers))
        return replace(self, latency=latency, exits=tuple(self.exits[n] for n in numbers), last_exit=last_exit)

    def first(self, images: int) -> TimeTable:
        """The same for the first so many images."""
        return replace(self, dense=self.dense[:images])

    def share(self, live: Tensor) -> float:
        """`(n, E + 1)` live counts to time over the dense model's, both summed over images."""
        return self.factor * (self.ms(live).sum() / self.dense.sum()).item()

    def ms(self, live: Tensor) -> Tensor:
        """`(n, E + 1)` live counts to `(n,)` milliseconds, as the model has them."""
        return self.latency.ms(live, self.exits, self.depth, self.last_exit)


@dataclass(frozen=True)
class Clock:
    """The dense model's time on some images, and tables for plans at each size.

    Attributes:
        dense_ms: mean milliseconds of the dense model, an image at a time.
        tables: for each factor on the images' sides the table of all places.
    """

    dense_ms: float
    tables: Mapping[float, TimeTable]

    @classmethod
    def of(cls, images: CalibrationSet, method: ThresholdMethod[Any], grids: Mapping[float, Sequence[Grid]]) -> Clock:
        """Time a model with exits at all places, and its dense run at every size.

        grids: for each factor on the images' sides the patches of each image, 1 among them.

        Raises:
            ConfigError: for a model that takes windows.
        """
        model = images.model
        check_timed(model)
        latency = latency_on_this_machine(model, method, images.precision)
        exits, depth = model.config.exits, blocks_of_live_tokens(method, model.view())
        plain = replace(latency, exits=())
        modelled = {scale: plain.ms(_cells(own)[:, None], (), depth) for scale, own in grids.items()}
        full = TimeTable(latency, exits, depth, method.last_exit, modelled[1.0])
        bare = model.with_exits(())
        runs = [(bare, Dense() if scale == 1.0 else Resized(Dense(), scale)) for scale in grids]
        times = dict(zip(grids, map(sum, timed_in_turn(images, runs, TIMED_IMAGES, "timing sizes"))))
        some = images.spread(TIMED_IMAGES)
        modelled_some = {scale: own[some].sum().item() for scale, own in modelled.items()}
        off = {scale: times[scale] / modelled_some[scale] for scale in grids}
        tables = {scale: replace(full, factor=off[scale] / off[1.0]) for scale in grids}
        return cls(off[1.0] * modelled[1.0].mean().item(), tables)

    def share_of(self, images: CalibrationSet, method: Method[Any], run: TrueRun, table: TimeTable) -> float:
        """Return a method's time over the dense model's: timed on a few images, and carried over to all by the model.

        images: those of `run`, with the model that the method runs on. table: that of the method's exits, at its size.
        """
        bare: ExitSegmenter = images.model.with_exits(())
        dense, own = map(sum, timed_in_turn(images, [(bare, Dense()), (images.model, method)], TIMED_IMAGES))
        some = torch.tensor(images.spread(TIMED_IMAGES))
        live = torch.cat([run.tokens[:, None], run.live], dim=1)
        part = replace(table, dense=table.dense[some]).share(live[some])
        return own / dense * table.share(live) / part


def _cells(grids: Sequence[Grid]) -> Tensor:
    return torch.tensor([height * width for height, width in grids])
