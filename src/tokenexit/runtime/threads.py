"""How many cores this process really has, and how many threads torch shall start on them.

A container's quota and a process's affinity may leave fewer cores than the machine has. Threads beyond them do not
share the work: those that run wait for those that do not. So do threads on a core that another program keeps busy.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tokenexit.runtime.idle import idle_processors

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user says how many threads torch starts."""
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Environment variables by which a user says how threads of GNU's OpenMP wait for each other."""
SPINS = 10_000
"""Rounds that a thread waits awake for the others, some tenths of a millisecond: longer than the pauses between the
operations of a network, and shorter than the turns that the system gives programs on a core."""
MARGIN = 1.1
"""Time with fewer threads, over that with all, up to which fewer are taken on a busy machine."""
TIMED_ROUNDS, TIMED_STRETCH = 3, 0.1
"""How often each number of threads is timed, and for how many seconds at a time."""


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


@dataclass(frozen=True)
class ThreadChoice:
    """How many threads torch shall start, and why.

    Attributes:
        threads: the number.
        cores: the number on a quiet machine: one for each core, but no more than torch would start by itself.
        idle: how many of the usable processors were idle a moment ago; None if unknown.
        seconds: time of a small network's pass by the number of threads; empty where others leave enough cores idle.
    """

    threads: int
    cores: int
    idle: float | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def timed(self) -> str:
        """What was timed, in words."""
        return ", ".join(f"{1e3 * seconds:.3g} ms with {count}" for count, seconds in sorted(self.seconds.items()))

    @property
    def reason(self) -> str:
        """One sentence on why there are fewer threads than cores; empty if there are not."""
        if self.threads == self.cores:
            return ""
        return (
            f"torch starts {self.threads} of {self.cores} threads, as other programs leave {self.idle:.1f} cores idle "
            f"and fewer do as well or better (a small network's pass: {self.timed}); --threads N says otherwise"
        )


def processors() -> Processors:
    """Read affinity and quota of this process."""
    return Processors(os.cpu_count() or 1, len(usable_processors()), cpu_quota())


def usable_processors() -> frozenset[int]:
    """Return the numbers of the processors that this process may run on (affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def idle_cores() -> float | None:
    """Sleep a moment, and return how many of the usable processors were idle meanwhile; None if unknown."""
    return idle_processors(usable_processors())


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


def shorten_waits() -> bool:
    """Let threads that wait for others fall asleep after some tenths of a millisecond; True if they will.

    By default a thread of GNU's OpenMP, which torch has on Linux, waits awake for some ten milliseconds after every
    operation. Where another program shares a core, a thread so uses up its turn by waiting, and has to queue when there
    is work: a training step of the quickstart on two cores took five times as long as on one. The command line calls
    this at its start; programs of your own may, before they import torch, which reads the setting once. Does nothing
    after that, nor where the environment has its own (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`).

    Source: libgomp's manual, `GOMP_SPINCOUNT`.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAIT_VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True


def choose_threads(given: int | None = None, say: Callable[[str], None] = lambda line: None) -> int:
    """Set torch's number of threads for this process, and return it.

    The command line calls this; importing the package changes nothing.

    Args:
        given: the number that was asked for, which wins. Without it the environment's setting stays
            (`OMP_NUM_THREADS`, `MKL_NUM_THREADS`), and without that `thread_choice` chooses.
        say: shows why there are fewer threads than cores, if there are.
    """
    import torch

    now = torch.get_num_threads()
    if given is None and not given_threads():
        choice = thread_choice(now, idle_cores() if now > 1 else None)
        given = choice.threads
        if choice.reason:
            say(choice.reason)
    wanted = given or now
    if wanted != now:
        torch.set_num_threads(wanted)
    return wanted


def thread_choice(most: int, idle: float | None) -> ThreadChoice:
    """Choose a number of threads from the cores that are there, and from those that are idle now.

    One for each core, and nothing is timed, if enough cores are idle. Otherwise that number and the number of idle
    cores are timed, and the latter is taken unless it is slower by a tenth: threads wait for each other after every
    operation, so one thread on a core that another program keeps busy can hold up all.

    most: number of threads that torch would start by itself, which is never exceeded. idle: number of usable cores
    that are idle, as `idle_cores` returns it.
    """
    cores = min(most, processors().cores)
    fewer = cores if idle is None else max(1, math.floor(idle + 0.5))
    if fewer >= cores:
        return ThreadChoice(cores, cores, idle)
    seconds = pass_seconds((cores, fewer))
    return ThreadChoice(fewer if seconds[fewer] < MARGIN * seconds[cores] else cores, cores, idle, seconds)


def pass_seconds(counts: Sequence[int]) -> dict[int, float]:
    """Return the seconds of a small network's pass with each of these numbers of threads, timed by turns.

    Leaves torch's number as it was.
    """
    import torch

    now, totals, passes = torch.get_num_threads(), dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0)
    x, up, down = torch.ones(1024, 128), torch.zeros(128, 512), torch.zeros(512, 128)

    def run() -> None:
        y = x
        for _ in range(4):
            y = torch.nn.functional.gelu(y @ up) @ down

    try:
        for _ in range(TIMED_ROUNDS):
            for count in counts:
                torch.set_num_threads(count)
                run()  # starts the threads
                start, spent = time.perf_counter(), 0.0
                while spent <= TIMED_STRETCH:
                    run()
                    passes[count] += 1
                    spent = time.perf_counter() - start
                totals[count] += spent
    finally:
        torch.set_num_threads(now)
    return {count: totals[count] / passes[count] for count in counts}


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
