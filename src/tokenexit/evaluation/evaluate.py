"""Accuracy and cost of methods on a dataset, from true runs: counts first, ratios last.

Several processes share the images, and each ends with the figures of one that took them all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import is_unlabelled, mask_tensor
from tokenexit.engine.ops import GIGA
from tokenexit.errors import ConfigError, DataError
from tokenexit.evaluation.depths import stopped
from tokenexit.evaluation.intervals import class_counts
from tokenexit.evaluation.metrics import boundary_counts, boundary_iou, confusion_matrix, scores
from tokenexit.evaluation.results import Evaluation, Scaled
from tokenexit.inputs.labels import Labels
from tokenexit.methods import Dense, Method, MethodLike, Truncated, as_method
from tokenexit.methods.reference import (
    FrozenContext,
    LabelledExits,
    PrescribedExits,
    agreement_exits,
    patch_labels,
    random_counterpart,
    random_exits,
)
from tokenexit.outputs.ledger import with_frozen_keys
from tokenexit.outputs.windows import Segmentation, dense_macs, window_boxes
from tokenexit.runtime.distributed import all_or_none, gather, rank_and_size
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

ReferenceLine = Literal["random", "oracle", "context", "labels", "depths"]
ORACLES: dict[ReferenceLine, tuple[Method[Any], str]] = {
    "oracle": (PrescribedExits(), "agreement oracle"),
    "context": (FrozenContext(), "oracle in context"),
    "labels": (LabelledExits(), "greedy by labels"),
}
"""Reference lines that know answers: the method of each, and the name of its row."""


@dataclass(frozen=True)
class ImageFigures:
    """Figures of one image beside its part of the totals: see `Evaluation`."""

    gmacs: float
    dense_gmacs: float
    live: tuple[float, ...]
    latency_ms: float
    counts: Tensor


class Tally:
    """The running counts of one row of the table."""

    def __init__(self, method: Method[Any], label: str, num_classes: int, input_scale: float = 1.0) -> None:
        self.method, self.label, self.input_scale = method, label, input_scale
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = torch.zeros(2, num_classes, dtype=torch.int64)
        self.images: dict[int, ImageFigures] = {}

    def add(
        self,
        output: Segmentation,
        image: _EvaluatedImage,
        ignore_index: int,
        exits: Sequence[int],
        ms: float,
    ) -> None:
        """Count one image."""
        (label,) = output.labels
        classes = len(self.confusion)
        confusion = confusion_matrix(label.cpu(), image.truth, classes, ignore_index)
        self.confusion += confusion
        self.boundary += torch.stack(boundary_counts(label.cpu(), image.truth, classes, ignore_index))
        ledger = output.ledger
        live = tuple(after / ledger.tokens[0] for after in ledger.live_after(exits))
        dense = image.dense_macs / GIGA
        self.images[image.index] = ImageFigures(ledger.gmacs[0], dense, live, ms, class_counts(confusion))

    def merge(self, other: Tally) -> None:
        """Add the counts of other images."""
        self.confusion += other.confusion
        self.boundary += other.boundary
        self.images |= other.images

    def finish(self) -> Evaluation:
        images = [self.images[index] for index in sorted(self.images)]
        return Evaluation(
            self.method,
            self.label,
            scores(self.confusion),
            boundary_iou(*self.boundary),
            tuple(image.gmacs for image in images),
            tuple(image.dense_gmacs for image in images),
            tuple(image.live for image in images),
            tuple(image.latency_ms for image in images),
            self.confusion,
            self.input_scale,
            torch.stack([image.counts for image in images]),
        )


def evaluate(
    model: ExitSegmenter,
    data: SegmentationDataset,
    methods: MethodLike | Scaled | Sequence[MethodLike | Scaled],
    *,
    limit: int | None = None,
    precision: Precision = "fp32",
    references: bool | Collection[ReferenceLine] = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Evaluation]:
    """Run every method on every image, one image at a time and the methods in turn, so that their times compare.

    Time is that of the forward pass, from input tensor to grid logits, after one warm-up run of each method.

    Connected processes (torch.distributed) must all call it, with the same weights and buffers. They take the images in
    turn and all return the same: what one process returns, but for its times. They wait for each other after every
    image, so that what fails in one fails in all at once.

    Args:
        model: the segmenter, in evaluation mode.
        data: a dataset with the model's classes.
        methods: a method, its name or its specification, or a list with one for each row; `Scaled` gives a method
            smaller images.
        limit: number of images, the first ones; all if not given.
        precision: precision of the forward pass.
        references: reference lines behind the methods. "random": random exits at the counts of every DToP method;
            "oracle": the dense-pass agreement oracle at full size, not for models with grid heads; "context": the same
            exits where tokens that left stay keys and values, as they were, of those that go on, with the multiply-adds
            of that and without a time; "labels": a token leaves at the first exit whose head says its patch's label;
            "depths": a stop after each exit, and dense if it is no row, all from one dense pass and without a time.
            True stands for the first two.
        progress: wraps the loop over images.

    Returns:
        One `Evaluation` for each method, and then one for each reference line.

    Raises:
        ConfigError: if the classes differ, a method cannot run on the model, or there is no image or method.
        DataError: for images without labels.
    """
    if is_unlabelled(data):
        raise DataError("these images have no labels to measure mIoU with: name a dataset that has masks.")
    check_classes(model, data)
    if isinstance(methods, Method | Scaled | str | Mapping):
        methods = [methods]
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}: raise it.")
    count = len(data) if limit is None else min(limit, len(data))
    if count == 0 or not methods:
        raise ConfigError(
            f"evaluate needs at least one image and one method, got {count} and {len(methods)}: give one of each."
        )
    classes = model.config.num_classes
    lines = (("random", "oracle") if references else ()) if isinstance(references, bool) else tuple(references)
    rows = [
        _Row(row if isinstance(row, Scaled) else Scaled(as_method(row)), classes, "random" in lines) for row in methods
    ]
    scales = {row.tally.input_scale for row in rows}
    oracles = {line: Tally(method, label, classes) for line, (method, label) in ORACLES.items() if line in lines}
    depths = _depths(model) if "depths" in lines else []
    rank, processes = rank_and_size()
    with inference(model.device, precision):
        for first in (progress if rank == 0 else iter)(range(0, count, processes)):
            with all_or_none():
                if first + rank < count:
                    image = _EvaluatedImage.of(data, first + rank, model, scales)
                    _judge(model, image, rows, oracles, depths, precision, data.labels.ignore_index, warm_up=first == 0)
    at_random = [row.at_random for row in rows if row.at_random is not None]
    has_dense = any(row.tally.method == Dense() and row.tally.input_scale == 1.0 for row in rows)
    tallies = [*(row.tally for row in rows), *at_random, *oracles.values()]
    tallies += depths[:-1] if has_dense else depths
    mine, *others = gather(tallies)
    for other in others:
        for tally, more in zip(mine, other):
            tally.merge(more)
    return [tally.finish() for tally in mine]


def _judge(
    model: ExitSegmenter,
    image: _EvaluatedImage,
    rows: Sequence[_Row],
    oracles: Mapping[ReferenceLine, Tally],
    depths: Sequence[Tally],
    precision: Precision,
    ignore_index: int,
    warm_up: bool,
) -> None:
    """Run all rows on one image and count their predictions."""

    def run(tally: Tally, method: Method[Any]) -> Segmentation:
        output, ms = timed_forward(model, image.images[tally.input_scale], method, image.size, precision)
        tally.add(output, image, ignore_index, model.config.exits, ms)
        return output

    if warm_up:
        for row in rows:
            timed_forward(model, image.images[row.tally.input_scale], row.tally.method, (1, 1), precision)
    for row in rows:
        output = run(row.tally, row.tally.method)
        if row.at_random is not None and row.counterpart is not None:
            # Seeded by the image alone, so that no other row changes what is drawn.
            generator = torch.Generator().manual_seed(image.index)
            shuffled = [random_exits(exits, generator).flatten() for exits in output.windows.exit_index]
            run(row.at_random, replace(row.counterpart, exit_index=torch.cat(shuffled)))
    if "labels" in oracles:
        run(oracles["labels"], LabelledExits(labels=_labels_of_patches(model, image, ignore_index)))
    if not (depths or oracles.keys() & {"oracle", "context"}):
        return
    tensor = image.images[1.0].to(model.device)
    with inference(model.device, precision):
        dense = model.segment([tensor], targets=[image.size], with_records=True)
        for tally, output in zip(depths, stopped(model, dense) if depths else []):
            tally.add(output, image, ignore_index, model.config.exits, math.nan)
        if not oracles.keys() & {"oracle", "context"}:
            return
        exits = agreement_exits(dense.windows.exit_records, dense.windows.ledger.tokens)
    prescribed = PrescribedExits(exit_index=exits)
    alone = run(oracles["oracle"], prescribed) if "oracle" in oracles else None
    if "context" in oracles:
        with inference(model.device, precision):
            if alone is None:
                alone = model.segment([tensor], prescribed, targets=[image.size])
            output = model.segment([tensor], FrozenContext(exit_index=exits), targets=[image.size])
        ledger = with_frozen_keys(alone.windows.ledger, model.backbone)
        output = output.with_windows(replace(output.windows, ledger=ledger))
        oracles["context"].add(output, image, ignore_index, model.config.exits, math.nan)


def _labels_of_patches(model: ExitSegmenter, image: _EvaluatedImage, ignore_index: int) -> Tensor:
    """Return the label of each patch of all windows of an image at the model's own size, `(cells,)`."""
    size = (image.images[1.0].shape[1], image.images[1.0].shape[2])
    truth = image.truth
    if size != image.size:
        truth = F.interpolate(truth[None, None].double(), size, mode="nearest-exact")[0, 0].long()
    patch, preprocessing = model.config.backbone.patch_size, model.preprocessing
    boxes = window_boxes(size, preprocessing.window, preprocessing.stride)
    parts = [truth[top:bottom, left:right] for top, left, bottom, right in boxes]
    return torch.cat([patch_labels(part, patch, model.config.num_classes, ignore_index) for part in parts])


def _depths(model: ExitSegmenter) -> list[Tally]:
    """Make empty counts for a stop after each exit, and for none."""
    exits, classes = model.config.exits, model.config.num_classes
    stops = [
        Tally(Truncated(n), f"{Truncated.name} after={n} (block {block})", classes) for n, block in enumerate(exits, 1)
    ]
    return [*stops, Tally(Dense(), Dense.name, classes)]


@dataclass(frozen=True)
class _EvaluatedImage:
    """One image of the dataset: its tensors by input scale, its truth `(H, W)`, and the cost of dense at full size."""

    index: int
    images: Mapping[float, Tensor]
    truth: Tensor
    dense_macs: int

    @classmethod
    def of(
        cls, data: SegmentationDataset, index: int, model: ExitSegmenter, scales: Iterable[float]
    ) -> _EvaluatedImage:
        sample, preprocessing = data[index], model.preprocessing
        images = {scale: preprocessing.to_tensor(sample.image, scale) for scale in {1.0, *scales}}
        size = (images[1.0].shape[1], images[1.0].shape[2])
        macs = dense_macs(model.backbone, model.decode_head, size, preprocessing.window, preprocessing.stride)
        return cls(index, images, mask_tensor(sample.mask), macs)

    @property
    def size(self) -> tuple[int, int]:
        return self.truth.shape[0], self.truth.shape[1]


class _Row:
    """The counts of a method and, if asked for, those of random exits with the same numbers of tokens."""

    def __init__(self, row: Scaled, num_classes: int, references: bool) -> None:
        method, scale = row.method, row.input_scale
        self.tally = Tally(method, row.label, num_classes, scale)
        self.at_random: Tally | None = None
        self.counterpart = random_counterpart(method) if references else None
        if self.counterpart is not None:
            self.at_random = Tally(self.counterpart, f"random, counts of {row.label}", num_classes, scale)


def check_classes(model: ExitSegmenter, data: SegmentationDataset) -> None:
    """Reject what is no dataset, and a dataset with another number of classes."""
    labels = getattr(data, "labels", None)
    if not isinstance(labels, Labels) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ConfigError(
            f"data must be a dataset with labels, a length and samples, got a {type(data).__name__}: open one with "
            "tokenexit.data.registry.open_dataset."
        )
    if data.labels.num_classes != model.config.num_classes:
        raise ConfigError(
            f"the model predicts {model.config.num_classes} classes, the dataset has {data.labels.num_classes}: "
            "evaluate on the dataset it was trained on."
        )


def timed_forward(
    model: ExitSegmenter, image: Tensor, method: Method[Any], target: tuple[int, int], precision: Precision
) -> tuple[Segmentation, float]:
    """Run one forward pass on one image `(3, H, W)` and return its output and its milliseconds."""
    device = model.device
    image = image.to(device)
    _synchronize(device)
    start = time.perf_counter()
    with inference(device, precision):
        output = model.segment([image], method, targets=[target])
    _synchronize(device)
    return output, 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
