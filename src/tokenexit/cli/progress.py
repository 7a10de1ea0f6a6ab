"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

FIRST_LINE, LINES_APART = 2.0, 30.0
"""Seconds to the first line of progress where there is no terminal, and from each to the next."""


def progress_bar(title: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """Progress of one loop on stderr: a bar on a terminal, elsewhere a line now and then."""
    return progress_bars()(title)


def progress_bars() -> Callable[[str], Callable[[Iterable[T]], Iterable[T]]]:
    """The same for a command of many loops, by their titles: their lines keep one pace."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        return lambda title: lambda items: track(items, description=title, console=console)
    due = pace(time.monotonic)
    return lambda title: lambda items: progress_lines(title, items, due)


def progress_lines(title: str, items: Iterable[T], due: Callable[[], bool]) -> Iterator[T]:
    """Hands on `items` and says on stderr how many are done whenever a line is due."""
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if due():
            print(progress_line(title, done + 1, total, time.monotonic() - start), file=sys.stderr, flush=True)


def progress_line(title: str, done: int, total: int | None, seconds: float) -> str:
    """`evaluating: 12 of 100, 0:00:05 so far, 0:00:37 left`."""
    so_far = timedelta(seconds=round(seconds))
    if total is None:
        return f"{title}: {done} done, {so_far} so far"
    left = timedelta(seconds=round(seconds / done * (total - done)))
    return f"{title}: {done} of {total}, {so_far} so far, {left} left"


def pace(clock: Callable[[], float]) -> Callable[[], bool]:
    """Tells, each time it is asked, whether a line is due: the first after `FIRST_LINE` seconds, the next ones
    `LINES_APART`."""
    due_at = clock() + FIRST_LINE

    def due() -> bool:
        nonlocal due_at
        now = clock()
        if now < due_at:
            return False
        due_at = now + LINES_APART
        return True

    return due
