"""Several processes that work together: who takes which image, what they exchange, and how they fail together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

from torch import Tensor, distributed

from tokenexit.errors import ConfigError, TokenExitError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process, from 0, and the number of processes; (0, 1) where there is one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank; all must call it, and all get the same.

    Raises `ConfigError` if one of them has ended.
    """
    _, count = rank_and_size()
    if count == 1:
        return [value]
    values: list[T] = [value] * count
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:  # the connection to a process broke
        raise _ended() from None
    return values


def _ended() -> ConfigError:
    return ConfigError("another process of this run has ended: its own message says why.")


def from_first(value: T) -> T:
    """Return the value of the first process; all must call it."""
    rank, count = rank_and_size()
    if count == 1:
        return value
    values = [value if rank == 0 else None]
    try:
        distributed.broadcast_object_list(values)
    except RuntimeError:
        raise _ended() from None
    return cast(T, values[0])


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; all must call it."""
    _, count = rank_and_size()
    if count == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / count


@contextmanager
def all_or_none() -> Iterator[None]:
    """Run a block that succeeds in all processes or in none.

    A `TokenExitError` in one process is raised in all of them: that of the first process that has one.
    """
    error: TokenExitError | None = None
    try:
        yield
    except TokenExitError as mine:
        error = mine
    failed = [each for each in gather(error) if each is not None]
    if failed:
        raise failed[0]


@contextmanager
def process_group(patience: timedelta | None = None) -> Iterator[None]:
    """Connect with the other processes that torchrun started, if there are others; leave them at the end.

    patience: how long one waits for the others, torch's half an hour if not given.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    try:
        distributed.init_process_group("gloo", timeout=patience)  # counts are gathered, and those lie on the host
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the processes do not find each other ({reason}): start them with torchrun.") from None
    try:
        yield
    finally:
        distributed.destroy_process_group()
