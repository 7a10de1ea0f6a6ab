"""How many cores this process really has, and how many threads torch shall start on them.

A container's quota and a process's affinity may leave fewer cores than the machine has. Threads beyond them do not
share the work: those that run wait for those that do not.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user says how many threads torch starts."""


@dataclass(frozen=True)
class Processors:
    """What of a machine's processors a process may use.

    Attributes:
        logical: number of logical processors of the machine.
        usable: number of them that the process may run on (affinity).
        quota: seconds of processor time that its container may use in a second; None if nothing limits it.
    """

    logical: int
    usable: int
    quota: float | None

    @property
    def cores(self) -> int:
        """Number of cores that are really there: the quota rounded up, no more than are usable, at least 1."""
        return max(1, self.usable if self.quota is None else min(self.usable, math.ceil(self.quota)))

    def __str__(self) -> str:
        quota = "" if self.quota is None else f", a quota of {self.quota:g}"
        return f"{self.logical} logical CPUs, {self.usable} of them usable by this process{quota}"


def processors() -> Processors:
    """Read affinity and quota of this process."""
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return Processors(logical, usable, cpu_quota())


def load() -> float | None:
    """Return how many programs ran or waited for a processor of the machine, the mean of a minute; None if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # another system, or one that does not say
        return None


def cpu_quota(system: Path = Path("/")) -> float | None:
    """Return the seconds of processor time that this process's control groups allow in a second; None without a limit.

    Source: control groups of Linux, version 2 (`cpu.max`) and 1 (`cpu.cfs_quota_us`, `cpu.cfs_period_us`). A group is
    held by its own limit and by those of all groups above it, so the smallest counts.

    system: the folder that holds `proc` and what `proc/self/mountinfo` names.
    """
    limits = (_limit(folder) for start, top in _groups(system) for folder in _upwards(start, top))
    return min((limit for limit in limits if limit is not None), default=None)


def given_threads(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the setting of the environment that says how many threads to start, `"OMP_NUM_THREADS=4"`, or None."""
    return next((f"{name}={environment[name]}" for name in THREAD_VARIABLES if environment.get(name)), None)


def choose_threads(given: int | None = None) -> int:
    """Set torch's number of threads for this process, and return it.

    given: the number that was asked for, which wins. Without it the environment's setting stays (`OMP_NUM_THREADS`,
    `MKL_NUM_THREADS`), and without that torch starts no more threads than there are cores, nor more than it would by
    itself. The command line calls this; importing the package changes nothing.
    """
    import torch

    now = torch.get_num_threads()
    wanted = given or (now if given_threads() else min(now, processors().cores))
    if wanted != now:
        torch.set_num_threads(wanted)
    return wanted


def _groups(system: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of every control group of this process that may limit its time, and where its hierarchy is mounted."""
    memberships = [line.split(":", 2) for line in _lines(system / "proc/self/cgroup") if line.count(":") >= 2]
    for root, mounted, kind, options in _mounts(system):
        for _, controllers, path in memberships:
            names = controllers.split(",")
            if (kind == "cgroup2" and controllers == "") or (kind == "cgroup" and "cpu" in names and "cpu" in options):
                top = system / mounted.lstrip("/")
                yield top / _below(path, root), top


def _mounts(system: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Root, mount point, file system and options of every mount, see proc(5)."""
    for line in _lines(system / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        words, kind = mount.split(), filesystem.split()
        if len(words) >= 5 and len(kind) >= 2:
            yield _unescaped(words[3]), _unescaped(words[4]), kind[0], kind[-1].split(",")


def _below(path: str, root: str) -> PurePosixPath:
    """A group's path inside what is mounted; the mount itself where the group lies outside, as a container sees it."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(root):
        return PurePosixPath(".")
    return group.relative_to(root)


def _upwards(start: Path, top: Path) -> Iterator[Path]:
    """`start` and the folders above it, to `top`."""
    yield start
    while start != top:
        start = start.parent
        yield start


def _limit(group: Path) -> float | None:
    """The limit of one control group alone, of either version."""
    words = " ".join(_lines(group / "cpu.max")).split()  # "150000 100000", or "max 100000"
    if not words:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]  # -1 is no limit
    try:
        quota, period = map(int, words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):  # not there, as on other systems, or not for us
        return []


def _unescaped(word: str) -> str:
    r"""A path as `mountinfo` writes it, with `\040` for a space."""
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word)
