"""How many processors are idle now, from two readings of Linux's `/proc/stat`."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

WATCHED = 0.25
"""Seconds between the two readings: some 25 ticks of the clock that the kernel counts by."""
COUNTED = 8
"""Columns of a processor's line that are time of its own; those after them (guests) are parts of the first ones."""
IDLE = slice(3, 5)
"""Columns of idle time, and of idle time with a disk at work."""

Ticks = Mapping[int, tuple[int, ...]]
"""Time of each processor, by what it was spent on."""


def idle_processors(cpus: Collection[int], seconds: float = WATCHED, system: Path = Path("/")) -> float | None:
    """Sleep a moment, and return how many of these processors were idle meanwhile, with fractions.

    None where it is unknown: on other systems, and in containers that see processors under other numbers.

    Source: proc_stat(5).

    cpus: numbers of the processors. system: the folder that holds `proc`.
    """
    before = processor_ticks(system)
    if not set(cpus) <= before.keys():
        return None
    time.sleep(seconds)
    return idle_between(before, processor_ticks(system), cpus)


def idle_between(before: Ticks, after: Ticks, cpus: Collection[int]) -> float | None:
    """Return the sum of these processors' idle shares between two readings; None if one of them did not count on."""
    shares = [_idle_share(before[cpu], after.get(cpu, ())) for cpu in cpus]
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


def processor_ticks(system: Path) -> dict[int, tuple[int, ...]]:
    """Read the ticks of every processor; none where there is no `/proc/stat`."""
    try:
        lines = (system / "proc/stat").read_text().splitlines()
    except (OSError, ValueError):
        return {}
    words = [line.split() for line in lines if line.startswith("cpu")]
    return {int(name[3:]): tuple(map(int, ticks[:COUNTED])) for name, *ticks in words if name[3:].isdecimal()}


def _idle_share(before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
    spent = [end - start for start, end in zip(before, after)]
    if sum(spent) <= 0:
        return None
    return min(1.0, max(0.0, sum(spent[IDLE]) / sum(spent)))  # waiting for a disk may be counted backwards
