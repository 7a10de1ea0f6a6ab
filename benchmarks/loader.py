"""Measure images per second of the training loader: decoding, augmentation, batches, with different numbers of workers.

    python -m benchmarks.loader --data camvid --data-root DIR --crop 352 352 --workers 0 1 2 --json loader.json

Nothing else runs meanwhile, so a figure is what the loader can give, not what a training takes. With --step-seconds,
the time of one training step, the last column says how many batches come in that time: below 1 training waits.
The table is Markdown; the first batches, in which workers start, are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Cached, ResumableSampler, TrainingSet, collate_training
from tokenexit.data.registry import open_dataset
from tokenexit.data.transforms import training_transform
from tokenexit.errors import ConfigError, TokenExitError
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.report.tables import Column, Table


@dataclass(frozen=True)
class Pace:
    """What one number of workers gives. start_seconds: until the first batch is there."""

    workers: int
    images_per_second: float
    seconds_per_batch: float
    start_seconds: float


def measure(
    data: SegmentationDataset, crop: tuple[int, int], batch_size: int, workers: int, batches: int, seed: int = 0
) -> Pace:
    """The pace of `batches` batches, after a few that are not timed."""
    ahead = 2 * workers + 1  # what workers may have prepared before the clock starts
    loader = DataLoader(
        TrainingSet(data, training_transform(crop, data.labels.ignore_index), Preprocessing(), seed),
        batch_sampler=ResumableSampler(len(data), batch_size, seed, stop_step=ahead + batches),
        collate_fn=collate_training,
        num_workers=workers,
    )
    began = time.perf_counter()
    stream = iter(loader)
    next(stream)
    first = time.perf_counter()
    for _ in range(ahead - 1):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = (time.perf_counter() - start) / batches
    return Pace(workers, batch_size / seconds, seconds, first - began)


def to_table(paces: Sequence[Pace], caption: str, step_seconds: float | None = None) -> Table:
    columns = [
        Column("workers", align="right"),
        Column("images/s", "{:.1f}", "right"),
        Column("ms per batch", "{:.1f}", "right"),
        Column("s to the first batch", "{:.2f}", "right"),
    ]
    rows = [[p.workers, p.images_per_second, 1e3 * p.seconds_per_batch, p.start_seconds] for p in paces]
    if step_seconds is not None:
        columns.append(Column("batches per step", "{:.2f}", "right"))
        rows = [[*row, step_seconds / p.seconds_per_batch] for row, p in zip(rows, paces)]
    return Table(columns, rows, caption)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="name of the dataset")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--crop", type=int, nargs=2, default=[352, 352], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20, help="timed batches for each number of workers")
    parser.add_argument("--cache", action="store_true", help="cache of decoded images in memory, filled before")
    parser.add_argument("--step-seconds", type=float, help="time of one training step with this batch size")
    parser.add_argument("--json", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    try:
        if options.batches < 1 or min(options.workers) < 0:
            raise ConfigError("--batches must be at least 1, and --workers at least 0.")
        data: SegmentationDataset = open_dataset(options.data, options.data_root, options.split)
        if options.cache:
            data = Cached(data).preload()
        crop = (options.crop[0], options.crop[1])
        paces = [measure(data, crop, options.batch_size, workers, options.batches) for workers in options.workers]
    except TokenExitError as error:
        print(f"loader: {error}", file=sys.stderr)
        return 2
    about: dict[str, Any] = {
        "data": options.data,
        "split": options.split,
        "crop": list(crop),
        "batch_size": options.batch_size,
        "batches": options.batches,
        "cache": options.cache,
        "step_seconds": options.step_seconds,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    caption = f"{options.data}, crop {crop[0]}x{crop[1]}, batches of {options.batch_size}, {about['cores']} cores"
    caption += ", images in memory" if options.cache else ""
    print(to_table(paces, caption, options.step_seconds).to_markdown())
    if options.json is not None:
        options.json.write_text(
            json.dumps({"about": about, "paces": [asdict(pace) for pace in paces]}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
