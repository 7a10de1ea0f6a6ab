"""Batches of samples, in an order and with an augmentation that any run can repeat.

Everything here is a pure function of the seed and of where training stands. Training reads one endless line
of images: epoch 0 in its order, then epoch 1 in its order, and so on. Batch number `step` is the piece of
that line from `step * batch_size` on; process r of N takes the r-th of N equal parts of the piece. To resume
is to ask for the next step; nothing has to be saved but its number.

Legend: B samples of the batch; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from tokenexit.data.base import Mask, Sample, SegmentationDataset
from tokenexit.data.files import FileDataset
from tokenexit.data.photos import UnlabelledImages
from tokenexit.data.transforms import Transform
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels
from tokenexit.inputs.preprocessing import Preprocessing

# Two lines of random numbers grow from one seed: the order of images, and what happens to each image.
_ORDER, _AUGMENTATION = 0, 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of the sampler: image `index` in `epoch`."""

    epoch: int
    index: int


class Item(TypedDict):
    """One training image: image (3, H, W) float32 normalised, mask (H, W) int64 with void."""

    image: torch.Tensor
    mask: torch.Tensor
    name: str


class TrainingBatch(TypedDict):
    """A training batch: image (B, 3, H, W) float32, mask (B, H, W) int64, and B names."""

    image: torch.Tensor
    mask: torch.Tensor
    name: list[str]


class EvaluationBatch(TypedDict):
    """An evaluation batch: B images (3, H, W) and B masks (H, W), each of its own size, and B names."""

    image: list[torch.Tensor]
    mask: list[torch.Tensor]
    name: list[str]


class TrainingSet(Dataset[Item]):
    """The augmented images of a dataset: `transform`, then the mean and std of `preprocessing`, not its resize.

    Ask with a `Draw(epoch, index)`, as `ResumableSampler` does, or with a plain index, which means the epoch
    of `set_epoch`. The draw is the safer way: worker processes that live on between epochs do not hear of
    `set_epoch`.
    """

    def __init__(
        self, dataset: SegmentationDataset, transform: Transform, preprocessing: Preprocessing, seed: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.preprocessing = preprocessing
        self.seed = _checked("seed", seed, least=0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of plain indices."""
        self.epoch = _checked("epoch", epoch, least=0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> Item:
        epoch, index = (draw.epoch, draw.index) if isinstance(draw, Draw) else (self.epoch, draw)
        sample = self.transform(self.dataset[index], augmentation_rng(self.seed, epoch, index))
        return Item(image=self.preprocessing.normalise(sample.image), mask=mask_tensor(sample.mask), name=sample.name)


class EvaluationSet(Dataset[Item]):
    """The images of a dataset as users give them: image through `preprocessing.to_tensor`, mask in its own size."""

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing) -> None:
        self.dataset = dataset
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        sample = self.dataset[index]
        return Item(image=self.preprocessing.to_tensor(sample.image), mask=mask_tensor(sample.mask), name=sample.name)


class ResumableSampler(Sampler[list[Draw]]):
    """A batch sampler that can resume at any step, for `DataLoader(training_set, batch_sampler=..., collate_fn=...)`.

    length: images in the dataset.
    batch_size: images per step, over all processes; a multiple of `num_processes`.
    seed: of the order; usually that of the TrainingSet.
    start_step, stop_step: the steps whose batches are yielded, stop excluded; None never ends.
    rank, num_processes: this process and how many there are. Together they see the batches of a single one,
        so the loader needs no further sharding: do not hand it to `accelerator.prepare`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.length = _checked("dataset length", length, least=1)
        self.batch_size = _checked("batch_size", batch_size, least=1)
        self.seed = _checked("seed", seed, least=0)
        self.rank = _checked("rank", rank, least=0)
        self.num_processes = _checked("num_processes", num_processes, least=1)
        self.stop_step = None if stop_step is None else _checked("stop_step", stop_step, least=0)
        self.set_step(start_step)
        if rank >= num_processes:
            raise ConfigError(f"rank must be from 0 to {num_processes - 1}, got {rank}: count processes from 0.")
        if batch_size % num_processes:
            raise ConfigError(
                f"batch_size must be a multiple of the {num_processes} processes, got {batch_size}: choose another."
            )

    def set_step(self, step: int) -> None:
        """Set the step whose batch comes first in the next iteration."""
        self.start_step = _checked("step", step, least=0)

    def __len__(self) -> int:
        """Return the number of batches from `start_step` to `stop_step`; raises `TypeError` without the latter."""
        if self.stop_step is None:
            raise TypeError("a ResumableSampler without stop_step has no length")
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[Draw]:
        """Return this process's part of batch `step`."""
        local = self.batch_size // self.num_processes
        return step_draws(self.length, self.seed, step, self.batch_size)[self.rank * local : (self.rank + 1) * local]


class Cached:
    """A dataset that decodes each image once and keeps it, up to `max_bytes` in all.

    What no longer fits is decoded each time.
    Kept masks are read-only, so that a transform that writes into its input fails loudly instead of spoiling
    the cache. With worker processes call `preload` before they start: they then share one copy (where
    processes fork) instead of filling one each.
    """

    def __init__(self, dataset: SegmentationDataset, max_bytes: int = 2 * 1024**3) -> None:
        self.dataset = dataset
        self.max_bytes = max_bytes
        self._kept: dict[int, Sample] = {}
        self._bytes = 0

    @property
    def labels(self) -> Labels:
        return self.dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # -1 is the last one, and beyond the end is an IndexError
        if index in self._kept:
            return self._kept[index]
        sample = self.dataset[index]
        size = 3 * sample.image.width * sample.image.height + sample.mask.nbytes
        if self._bytes + size <= self.max_bytes:
            mask = sample.mask.view()
            mask.setflags(write=False)
            sample = self._kept[index] = Sample(sample.image, mask, sample.name)
            self._bytes += size
        return sample

    def preload(self) -> Cached:
        """Decode all images that fit, now."""
        for index in range(len(self)):
            self[index]
            if index not in self._kept:
                break
        return self


class Spread:
    """At most `count` samples of a dataset, evenly spread over it: neighbours in a folder are often alike."""

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        self.dataset = dataset
        self.count = min(_checked("count", count, least=1), len(dataset))

    @property
    def labels(self) -> Labels:
        return self.dataset.labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[range(self.count)[index] * len(self.dataset) // self.count]


# --------------------------------------------------------------------------------------------- pure functions


def epoch_order(length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order (length,) in which `epoch` visits 0 .. length - 1; equal arguments give equal orders."""
    return _generator(seed, _ORDER, epoch).permutation(length)


def step_draws(length: int, seed: int, step: int, batch_size: int) -> list[Draw]:
    """Return the images of batch `step`: batch_size of the endless line, from step * batch_size on.

    A batch may end one epoch and begin the next, so every batch is full and no image is left out.
    """
    first = step * batch_size
    return [
        Draw(position // length, int(_cached_order(length, seed, position // length)[position % length]))
        for position in range(first, first + batch_size)
    ]


def augmentation_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of the augmentation of image `index` in `epoch`."""
    return _generator(seed, _AUGMENTATION, epoch, index)


def collate_training(items: Sequence[Item]) -> TrainingBatch:
    """Collate B images of one size to one batch. Raises `DataError` where sizes differ."""
    sizes = {tuple(item["mask"].shape) for item in items}
    if len(sizes) > 1:
        raise DataError(
            f"training images of sizes {sorted(sizes)} cannot form one batch: let the transform end with Pad or Resize."
        )
    return TrainingBatch(
        image=torch.stack([item["image"] for item in items]),
        mask=torch.stack([item["mask"] for item in items]),
        name=[item["name"] for item in items],
    )


def collate_evaluation(items: Sequence[Item]) -> EvaluationBatch:
    """Collate B images, each of its own size, as lists."""
    return EvaluationBatch(
        image=[item["image"] for item in items],
        mask=[item["mask"] for item in items],
        name=[item["name"] for item in items],
    )


def note_of(dataset: SegmentationDataset) -> str:
    """Return a sentence on what was decided about a dataset without being asked; empty for most."""
    if isinstance(dataset, Cached | Spread):
        return note_of(dataset.dataset)
    return dataset.note if isinstance(dataset, FileDataset) else ""


def is_unlabelled(dataset: object) -> bool:
    """Return whether a dataset has images and no labels."""
    if isinstance(dataset, Cached | Spread):
        return is_unlabelled(dataset.dataset)
    return isinstance(dataset, UnlabelledImages)


def mask_tensor(mask: Mask) -> torch.Tensor:
    """Copy (H, W) integers to an (H, W) int64 tensor; `mask` may lie in a cache."""
    return torch.from_numpy(mask.astype(np.int64, order="C"))


@lru_cache(maxsize=4)
def _cached_order(length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    order = epoch_order(length, seed, epoch)
    order.setflags(write=False)
    return order


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _checked(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}: change it.")
    return value
