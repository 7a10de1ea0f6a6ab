"""Training logs: rows in log.csv at intervals, and events for TensorBoard if asked for.

A run that goes on drops the rows after its checkpoint, so that a log reads as if nobody had stopped.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tokenexit.errors import ConfigError
from tokenexit.runtime.atomic import atomic_write
from tokenexit.training.config import TrainConfig

LOG_FILE, EVENTS = "log.csv", "events"
LOG_ROWS = 1000
"""Approximate number of rows of a run; shorter runs have one for every step."""


class Row(NamedTuple):
    """One row of the log.

    loss: mean since the row before. lr: rate of the backbone. miou: in percent, where the model was validated."""

    step: int
    loss: float
    lr: float
    miou: float | None = None


COLUMNS = ("step", "loss", "lr", "mIoU")
Write = Callable[[Row], None]


def is_row(step: int, steps: int) -> bool:
    """Return whether a row is due after this step of so many."""
    return step % math.ceil(steps / LOG_ROWS) == 0 or step == steps


@contextmanager
def open_log(config: TrainConfig, out: Path, done: int) -> Iterator[Write]:
    """Open the log and return a function that takes every row.

    done: steps of the run that are done; rows of later ones are dropped.

    Raises `ConfigError` where the files cannot be written, or TensorBoard is not there."""
    if config.log == "csv":
        yield CsvLog(out / LOG_FILE, done)
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"log=tensorboard cannot be loaded ({error}): pip install tensorboard.") from None
    to_csv = CsvLog(out / LOG_FILE, done)
    with SummaryWriter(str(out / EVENTS), purge_step=done + 1) as events:

        def write(row: Row) -> None:
            to_csv(row)
            for name, value in zip(COLUMNS[1:], row[1:]):
                if value is not None:
                    events.add_scalar(name, value, row.step)
            events.flush()

        yield write


class CsvLog:
    """A log that appends rows to a CSV file; at the first one it drops older rows of steps after `done`.

    A run that ends in its first step leaves no file."""

    def __init__(self, path: Path, done: int) -> None:
        self.path, self.done, self.begun = path, done, False

    def __call__(self, row: Row) -> None:
        try:
            if not self.begun:
                rows = [COLUMNS, *_rows_until(self.path, self.done)]
                target = atomic_write(self.path) if len(rows) > 1 else nullcontext(self.path)
                with target as path, path.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
                self.begun = True
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerow(_cells(row))
        except (OSError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{self.path} cannot be written ({reason}): free disk space; the same command then goes on from the "
                "last checkpoint."
            ) from None


def _cells(row: Row) -> tuple[Any, ...]:
    loss, lr, miou = (value if value is None else f"{value:.6g}" for value in row[1:])
    return row.step, loss, lr, miou


def _rows_until(path: Path, done: int) -> Iterator[list[str]]:
    """Read the rows of the first steps; a row that a kill cut short is left out with all that follow."""
    if not done or not path.is_file():
        return
    with path.open(newline="", errors="replace") as file:
        for row in list(csv.reader(file))[1:]:
            if len(row) != len(COLUMNS) or not row[0].isdigit() or int(row[0]) > done:
                return
            yield row
