"""Dense passes of a model at several sizes, from which plans are predicted.

Legend: E places where the model has exits, n images, N tokens of a dense pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, Reference, TrueRun, mean_error, true_run
from tokenexit.calibration.clock import Clock
from tokenexit.calibration.dense_pass import DensePass, MacTable
from tokenexit.calibration.targets import Average
from tokenexit.evaluation.metrics import scores
from tokenexit.inputs.preprocessing import resized_size
from tokenexit.methods import Dense, Method, ThresholdMethod
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.windows import window_boxes
from tokenexit.segmenter import ExitSegmenter

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35)
"""Factors on the side that plans choose from; a dense pass is made at each, four full ones in all."""
LARGER = (1.25, 1.1)
"""Others where labels judge: that a larger image is better than the dense model's own size, agreement cannot see."""
SEARCH_TOKENS = 20_000
"""Tokens on which places are searched; paths of thresholds are built on more."""


class PriceTable(Protocol):
    """What images cost from their live counts, over the dense model at full size: multiply-adds, or time."""

    def at_exits(self, numbers: Sequence[int], last_exit: int | None) -> PriceTable: ...

    def first(self, images: int) -> PriceTable: ...

    def share(self, live: Tensor) -> float: ...


@dataclass(frozen=True)
class Searched:
    """The first images of a dense pass, on which places are searched: their prices, and losses `(E + 1, N)`."""

    dense: DensePass
    prices: PriceTable
    losses: Tensor


class Survey:
    """Dense passes of a model at several sizes, and what can be predicted from them.

    Args:
        calibration_set: a model that has exits at all places to choose from, and images.
        method: a method with thresholds: what exits do.
        average: the unit in which a loss is judged, "pixels" or "classes".
        scales: factors on the images' sides; `SIZES` if not given, with labels `LARGER` ones, too.
        labels: judge by the masks of the images, and not by the dense model.
        dense: the model whose dense answers are wanted, if it is another than the one that has exits.
    """

    def __init__(
        self,
        calibration_set: CalibrationSet,
        method: ThresholdMethod[Any],
        average: Average,
        scales: Sequence[float] | None = None,
        labels: bool = False,
        dense: ExitSegmenter | None = None,
    ) -> None:
        self.images, self.method, self.average = calibration_set, method, average
        self.model, self.labels = calibration_set.model, labels
        judged_by = calibration_set if dense is None else replace(calibration_set, model=dense)
        maps, answers, self.sizes = _wanted(judged_by, labels)
        self.reference = Reference(answers, calibration_set.data.labels.ignore_index if labels else None)
        scales = scales or ((*LARGER, *SIZES) if labels else SIZES)
        self.passes = {scale: DensePass.of(calibration_set, method, scale, maps) for scale in scales}
        self.full_grids = tuple(self.model.backbone.patch_embed.grid(*size) for size in self.sizes)
        self.costs = {
            scale: MacTable(self.model, method, one.grids, self.full_grids) for scale, one in self.passes.items()
        }
        self.clock: Clock | None = None
        self.prices: Mapping[float, PriceTable] = self.costs
        self._searched: dict[float, Searched] = {}

    def by_the_clock(self) -> Survey:
        """Return the same, in which the price of a plan is its time on this machine.

        Raises:
            ConfigError: for a model that takes windows.
        """
        other = copy(self)
        other.clock = Clock.of(self.images, self.method, {scale: one.grids for scale, one in self.passes.items()})
        other.prices, other._searched = other.clock.tables, {}
        other.__dict__.pop("static_prices", None)  # those of multiply-adds
        return other

    def searched(self, scale: float) -> Searched:
        """Return what is searched at a size, made once: about `SEARCH_TOKENS` tokens."""
        if scale not in self._searched:
            images = max(1, round(len(self.full_grids) * min(1.0, SEARCH_TOKENS / len(self.passes[scale].image))))
            dense = self.passes[scale].first(images)
            self._searched[scale] = Searched(dense, self.prices[scale].first(images), dense.losses(self.average))
        return self._searched[scale]

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(self.passes)

    @cached_property
    def dense_loss(self) -> float:
        """Loss of the dense model at full size, by a true run; 0 where it is the judge."""
        if not self.labels:
            return 0.0
        images = replace(self.images, model=self.model.with_exits(()))
        return self.loss_of(true_run(images, Dense(), self.reference, "dense"))

    def may_stop(self, n: int) -> bool:
        """Return whether all tokens may stop at place `n`: its head answers at the resolution of the decode head. The
        last place is the end."""
        if n == len(self.blocks) - 1:
            return True
        head, end = self.model.view().exit_heads[n], self.model.decode_head
        return (head.scale, head.upscale) == (end.scale, end.upscale)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks before each place, and the network's depth."""
        return (*self.model.config.exits, self.model.config.backbone.depth)

    @cached_property
    def static_losses(self) -> dict[float, list[float]]:
        """Loss of all tokens stopping at each place, and at the end, by size."""
        return {scale: one.losses(self.average).sum(1).tolist() for scale, one in self.passes.items()}

    @cached_property
    def static_costs(self) -> dict[float, list[float]]:
        """Multiply-adds of all tokens stopping at each place, and at the end, over dense ones at full size, by size."""
        return self._static(self.costs)

    @cached_property
    def static_prices(self) -> dict[float, list[float]]:
        """The same in the unit that plans are priced in, multiply-adds or time."""
        return self.static_costs if self.clock is None else self._static(self.prices)

    def _static(self, tables: Mapping[float, PriceTable]) -> dict[float, list[float]]:
        numbers = range(len(self.blocks) - 1)
        return {scale: [self._static_price(tables, scale, n) for n in (*numbers, None)] for scale in self.passes}

    def _static_price(self, tables: Mapping[float, PriceTable], scale: float, number: int | None) -> float:
        """Price of a stop at one place, or of none."""
        table = tables[scale].at_exits([] if number is None else [number], None if number is None else 0)
        cells = torch.tensor([h * w for h, w in self.passes[scale].grids])
        rest = [] if number is None else [torch.zeros_like(cells)]
        return table.share(torch.stack([cells, *rest], dim=1))

    def price_of(
        self, images: CalibrationSet, method: Method[Any], run: TrueRun, scale: float, numbers: Sequence[int]
    ) -> float:
        """Price of a true run over dense at full size: its multiply-adds, or its time, for which it is timed.

        images: those of the run, with a model that has the places `numbers` alone. scale: factor on their sides.
        """
        if self.clock is None:
            return run.mac_ratio
        return self.clock.share_of(images, method, run, self.clock.tables[scale].at_exits(numbers, method.last_exit))

    def loss_of(self, run: TrueRun) -> float:
        """Loss of a true run: the share of pixels that are not as they should be, or one less mIoU."""
        if self.average == "pixels":
            return mean_error(run, "pixels")
        return 1.0 - scores(run.confusion.long().sum(0)).miou / 100.0


def _wanted(calibration_set: CalibrationSet, labels: bool) -> tuple[list[Tensor], list[Tensor], list[Size]]:
    """Return the maps that windows are compared with, those of images, and the windows' height and width in pixels, as
    the network sees them at full size."""
    preprocessing, ignore = calibration_set.model.preprocessing, calibration_set.data.labels.ignore_index
    of_windows: list[Tensor] = []
    of_images: list[Tensor] = []
    sizes: list[Size] = []
    for _, masks, output in calibration_set.forward(Dense(), "dense"):
        sizes += output.windows.sizes
        answers = masks if labels else [one.cpu() for one in output.labels]
        of_images += answers
        if not labels:
            of_windows += [one.cpu().short() for one in output.windows.labels]
            continue
        for mask in masks:
            size = resized_size((mask.shape[0], mask.shape[1]), preprocessing.resize)
            truth = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].short()
            truth = torch.where(truth == ignore, -1, truth).short()
            boxes = window_boxes(size, preprocessing.window, preprocessing.stride)
            of_windows += [truth[top:bottom, left:right] for top, left, bottom, right in boxes]
    return of_windows, of_images, sizes
