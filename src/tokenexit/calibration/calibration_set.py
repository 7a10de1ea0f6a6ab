"""True runs of a method on calibration images: what they cost, and how far labels are from a reference.

Legend: n images, E exits, K classes, H x W pixels of an image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.calibration.drift import Histograms, hook_scores
from tokenexit.data.base import SegmentationDataset
from tokenexit.errors import DataError
from tokenexit.methods import Dense, Method
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.outputs.windows import Segmentation, window_boxes
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

BATCH_PIXELS = 1 << 18
"""Small images are run together, up to so many pixels; what an image gives does not depend on it."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def drawn(count: int, limit: int | None, seed: int) -> tuple[int, ...]:
    """Draw `limit` of `count` images at random, in order, or take all: neighbours in a drive are much alike."""
    if limit is None or limit >= count:
        return tuple(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:limit].tolist()))


@dataclass(frozen=True)
class CalibrationSet:
    """A model and the images it is run on.

    Attributes:
        model: the segmenter, in evaluation mode.
        data: the dataset; masks are read only where a target needs labels.
        indices: images of the dataset that are used.
        precision: precision of the forward pass.
        progress: wraps each loop over images, given its title.
    """

    model: ExitSegmenter
    data: SegmentationDataset
    indices: Sequence[int]
    precision: Precision = "fp32"
    progress: Callable[[str], Progress] = lambda title: iter

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, indices: Sequence[int]) -> CalibrationSet:
        """The same on some of the images; `indices` count within this set."""
        return CalibrationSet(
            self.model, self.data, tuple(self.indices[i] for i in indices), self.precision, self.progress
        )

    def spread(self, count: int) -> list[int]:
        """Indices within this set of at most `count` images, evenly spaced."""
        return torch.linspace(0, len(self) - 1, min(len(self), count)).round().long().tolist()

    def batches(self) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Yield indices within this set, images and masks `(H, W)`, several at once where images are small."""
        indices: list[int] = []
        images: list[Tensor] = []
        masks: list[Tensor] = []
        for position, index in enumerate(self.indices):
            sample = self.data[index]
            image = self.model.preprocessing.to_tensor(sample.image).to(self.model.device)
            if images and sum(i[0].numel() for i in (*images, image)) > BATCH_PIXELS:
                yield indices, images, masks
                indices, images, masks = [], [], []
            indices.append(position)
            images.append(image)
            masks.append(torch.from_numpy(sample.mask.astype(np.int64)))
        if images:
            yield indices, images, masks

    def forward(self, method: Method[Any], title: str) -> Iterator[tuple[list[int], list[Tensor], Segmentation]]:
        """Run a method on all images, batch by batch: indices, masks and the output at the masks' sizes."""
        for indices, images, masks in self.progress(title)(self.batches()):
            with inference(self.model.device, self.precision):
                output = self.model.segment(images, method, targets=[(m.shape[0], m.shape[1]) for m in masks])
            yield indices, masks, output


def recorded_windows(calibration_set: CalibrationSet, title: str) -> Iterator[tuple[SegmentationOutput, Tensor]]:
    """Run the dense model on every window of every image, one by one, and record its exits.

    Yields the output of a window and its truth `(h, w)`: masks are taken at the size that the network sees.
    """
    model, preprocessing = calibration_set.model, calibration_set.model.preprocessing
    for _, images, masks in calibration_set.progress(title)(calibration_set.batches()):
        for image, mask in zip(images, masks):
            size = (image.shape[1], image.shape[2])
            truth = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
            for top, left, bottom, right in window_boxes(size, preprocessing.window, preprocessing.stride):
                with inference(model.device, calibration_set.precision):
                    output = model([image[:, top:bottom, left:right]], Dense(), with_records=True)
                yield output, truth[top:bottom, left:right]


class Reference:
    """Label maps that predictions are compared with, kept compressed: dense predictions, or the truth."""

    def __init__(self, maps: Iterable[Tensor], ignore_index: int | None = None) -> None:
        self._maps: list[tuple[bytes, tuple[int, ...]]] = []
        for labels in maps:
            values = labels.to("cpu").numpy().astype(np.int16)
            self._maps.append((zlib.compress(values.tobytes(), 1), values.shape))
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self._maps)

    def part(self, positions: Sequence[int]) -> Reference:
        """The maps of some of the images, in their order."""
        some = Reference((), self.ignore_index)
        some._maps = [self._maps[position] for position in positions]
        return some

    def __getitem__(self, position: int) -> Tensor:
        packed, shape = self._maps[position]
        return torch.from_numpy(np.frombuffer(zlib.decompress(packed), np.int16).reshape(shape).astype(np.int64))


@dataclass(frozen=True)
class TrueRun:
    """One method on n images.

    macs, dense_macs: `(n,)` int64 multiply-adds. tokens: `(n,)` patches, live: `(n, E)` of them after each exit.
    confusion: `(n, K, K)` int32 pixels, reference by row, prediction by column. histograms: scores at the exits.
    """

    macs: Tensor
    dense_macs: Tensor
    tokens: Tensor
    live: Tensor
    confusion: Tensor
    histograms: Histograms

    @property
    def mac_ratio(self) -> float:
        """Multiply-adds over dense ones, both summed over all images."""
        return self.macs.sum().item() / self.dense_macs.sum().item()

    @property
    def mac_ratio_error(self) -> float:
        """Standard error of `mac_ratio` over images, by the delta method for a ratio of sums."""
        n, ratio = len(self.macs), self.mac_ratio
        if n < 2:
            return float("nan")
        rest = self.macs.double() - ratio * self.dense_macs.double()
        return float(rest.std() / self.dense_macs.double().mean() / n**0.5)


def true_run(
    calibration_set: CalibrationSet, method: Method[Any], reference: Reference, title: str = "running"
) -> TrueRun:
    """Run a method on every image and compare its labels with the reference's."""
    classes = calibration_set.model.config.num_classes
    exits = calibration_set.model.config.exits
    macs: list[int] = []
    dense: list[int] = []
    tokens: list[int] = []
    windows: list[int] = []
    live, confusion = [], []
    with hook_scores(calibration_set.model) as seen:
        for positions, _, output in calibration_set.forward(method, title):
            ledger = output.ledger
            windows += output.window_counts
            macs += ledger.macs
            dense += ledger.dense_macs
            tokens += ledger.tokens
            live += [ledger.live_after(exits, image) for image in range(len(ledger.live))]
            for position, labels in zip(positions, output.labels):
                confusion.append(_confusion(reference[position], labels.cpu(), classes, reference.ignore_index))
    histograms = seen.histograms(windows)
    return TrueRun(
        torch.tensor(macs),
        torch.tensor(dense),
        torch.tensor(tokens),
        torch.tensor(live),
        torch.stack(confusion),
        histograms,
    )


def dense_reference(calibration_set: CalibrationSet) -> Reference:
    """Labels of the dense model."""
    return Reference(labels for _, _, output in calibration_set.forward(Dense(), "dense") for labels in output.labels)


def truth_reference(calibration_set: CalibrationSet) -> Reference:
    """Labels of the dataset."""
    return Reference(
        (mask for _, _, masks in calibration_set.batches() for mask in masks), calibration_set.data.labels.ignore_index
    )


def labelled(calibration_set: CalibrationSet) -> CalibrationSet:
    """Keep the images of which some pixel has a label: others would count as images on which nothing is lost.

    Raises `DataError` if there is none.
    """
    ignore = calibration_set.data.labels.ignore_index
    positions = [
        p
        for some, _, masks in calibration_set.batches()
        for p, mask in zip(some, masks)
        if bool((mask != ignore).any())
    ]
    if not positions:
        raise DataError("these images have no labels: ask for --max-disagreement or a budget, which need none.")
    return calibration_set.part(positions)


def _confusion(reference: Tensor, labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """`(K, K)` int32 counts of one image, reference by row."""
    if reference.shape != labels.shape:
        raise DataError(f"maps of {tuple(reference.shape)} and {tuple(labels.shape)} pixels cannot be compared.")
    if ignore_index is not None:
        counted = reference != ignore_index
        reference, labels = reference[counted], labels[counted]
    pairs = torch.bincount((reference * classes + labels).flatten(), minlength=classes * classes)
    return pairs.view(classes, classes).int()


def error(confusion: Tensor, average: str) -> Tensor:
    """Share of pixels unlike the reference, per image: `(n, K, K)` to `(n,)` fp64; 0 for images without pixels.

    average: "pixels" pools them; "classes" takes the mean over the classes that the reference has in the image, so
    that small ones count as much as large ones.
    """
    counts = confusion.double()
    right, total = counts.diagonal(dim1=1, dim2=2), counts.sum(dim=2)
    if average == "pixels":
        return 1.0 - _ratio(right.sum(1), total.sum(1))
    wrong = torch.where(total > 0, (total - right) / total.clamp(min=1), 0.0)
    return wrong.sum(1) / (total > 0).sum(1).clamp(min=1)


def mean_error(run: TrueRun, average: str) -> float:
    """Mean of `error` over the images of a run."""
    return error(run.confusion, average).mean().item()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)
