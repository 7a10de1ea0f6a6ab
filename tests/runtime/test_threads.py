"""Cores that are really there, from files of control groups as Linux writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenexit.runtime import threads
from tokenexit.runtime.threads import (
    Processors,
    ThreadChoice,
    choose_threads,
    cpu_quota,
    given_threads,
    pass_seconds,
    processors,
    thread_choice,
)

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def system(root: Path, mounts: str, groups: str, **limits: str) -> Path:
    """A folder as the system's root; limits: text of a file by its path below `/sys/fs/cgroup`."""
    files = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups}
    files |= {f"sys/fs/cgroup/{path}": text for path, text in limits.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_cpu_quota__of_version_2_is_that_of_the_own_group(tmp_path: Path) -> None:
    files = {"pod/app/cpu.max": "150000 100000\n", "pod/cpu.max": "max 100000\n", "other/cpu.max": "10000 100000\n"}
    assert cpu_quota(system(tmp_path, V2, "0::/pod/app\n", **files)) == 1.5


def test_cpu_quota__of_a_group_above_holds_too(tmp_path: Path) -> None:
    files = {"pod/app/cpu.max": "400000 100000\n", "pod/cpu.max": "50000 100000\n"}
    assert cpu_quota(system(tmp_path, V2, "0::/pod/app\n", **files)) == 0.5


def test_cpu_quota__of_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    assert cpu_quota(system(tmp_path, V2, "0::/\n", **{"cpu.max": "200000 100000\n"})) == 2.0
    assert cpu_quota(system(tmp_path, V2, "0::/../../elsewhere\n", **{"cpu.max": "200000 100000\n"})) == 2.0


def test_cpu_quota__of_version_1(tmp_path: Path) -> None:
    groups = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"
    folder = "cpu,cpuacct/docker/abc"
    files = {f"{folder}/cpu.cfs_quota_us": "250000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(system(tmp_path, V1.format(root="/"), groups, **files)) == 2.5
    (tmp_path / "sys/fs/cgroup" / folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path) is None


def test_cpu_quota__of_version_1_where_the_group_itself_is_mounted(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"}
    assert cpu_quota(system(tmp_path, V1.format(root="/docker/abc"), "2:cpu,cpuacct:/docker/abc\n", **files)) == 2.0


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense\n", "100000\n", "5 0\n"])
def test_cpu_quota__is_none_where_nothing_limits(tmp_path: Path, text: str) -> None:
    assert cpu_quota(system(tmp_path, V2 + "damaged line\n1 2 3 / / - x\n", "0::/\nx\n", **{"cpu.max": text})) is None
    assert cpu_quota(tmp_path / "another system") is None


def test_cpu_quota__reads_mount_points_with_spaces(tmp_path: Path) -> None:
    mounts = "31 23 0:28 / /sys/fs/cgroup/my\\040groups rw - cgroup2 cgroup2 rw\n"
    assert cpu_quota(system(tmp_path, mounts, "0::/\n", **{"my groups/cpu.max": "300000 100000\n"})) == 3.0


@pytest.mark.parametrize(
    ("found", "cores"),
    [
        (Processors(64, 64, None), 64),
        (Processors(64, 4, None), 4),
        (Processors(64, 64, 1.5), 2),
        (Processors(64, 64, 0.2), 1),
        (Processors(64, 2, 8.0), 2),
    ],
)
def test_cores__are_the_quota_rounded_up_and_no_more_than_usable(found: Processors, cores: int) -> None:
    assert found.cores == cores


def test_processors__are_those_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    assert processors() == Processors(16, 3, 1.5)
    assert str(processors()) == "16 logical CPUs, 3 of them usable by this process, a quota of 1.5"


def test_load__is_none_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert threads.load() is None
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 2.0, 1.0))
    assert threads.load() == 3.5


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers that torch was told to start, on a machine where it would start 8 of itself and 2 cores are there."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads, "processors", lambda: Processors(8, 8, 1.5))
    monkeypatch.setattr(threads, "idle_cores", lambda: 8.0)
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_choose_threads__takes_the_cores_that_are_there(chosen: list[int]) -> None:
    assert choose_threads() == 2
    assert chosen == [2]


def test_choose_threads__takes_no_more_than_torch_would(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: Processors(64, 64, None))
    assert choose_threads() == 8
    assert chosen == []


@pytest.mark.parametrize("name", threads.THREAD_VARIABLES)
def test_choose_threads__leaves_the_setting_of_the_environment(
    name: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "8")
    assert given_threads() == f"{name}=8"
    assert choose_threads() == 8
    assert chosen == []


def test_choose_threads__what_is_given_wins_over_all(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_threads(12) == 12
    assert chosen == [12]


class Machine:
    """One whose idle cores and times are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int, **seconds: float) -> None:
        """seconds: of a pass by the number of threads, as `t2=0.1`."""
        self.timed: list[tuple[int, ...]] = []
        self.seconds = {int(name[1:]): value for name, value in seconds.items()}
        monkeypatch.setattr(threads, "processors", lambda: Processors(cores, cores, None))
        monkeypatch.setattr(threads, "pass_seconds", self.time)

    def time(self, counts: tuple[int, ...]) -> dict[int, float]:
        self.timed.append(counts)
        return {count: self.seconds[count] for count in counts}


@pytest.mark.parametrize("idle", [None, 8.0, 7.5])
def test_thread_choice__of_a_quiet_machine_is_all_cores_and_nothing_is_timed(
    idle: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, 8)
    choice = thread_choice(8, idle)
    assert (choice.threads, choice.cores, choice.idle, choice.reason) == (8, 8, idle, "")
    assert machine.timed == []


def test_thread_choice__needs_no_more_idle_cores_than_torch_starts_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 64)
    assert thread_choice(4, 10.0).threads == 4
    assert machine.timed == []


def test_thread_choice__leaves_out_busy_cores_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 8, t8=0.2, t5=0.01)
    choice = thread_choice(8, 5.2)
    assert choice == ThreadChoice(5, 8, 5.2, {8: 0.2, 5: 0.01})
    assert machine.timed == [(8, 5)]


def test_thread_choice__keeps_all_threads_where_they_are_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where others have a low priority, or have ended since."""
    Machine(monkeypatch, 2, t2=0.0100, t1=0.0112)
    choice = thread_choice(2, 1.0)
    assert (choice.threads, choice.reason) == (2, "")


def test_thread_choice__takes_fewer_where_both_are_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 2, t2=0.0100, t1=0.0105)
    assert thread_choice(2, 1.0).threads == 1


@pytest.mark.parametrize("idle", [0.0, 0.4, 1.2])
def test_thread_choice__starts_one_thread_at_least(idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 2, t2=0.5, t1=0.02)
    assert thread_choice(2, idle).threads == 1


def test_thread_choice__says_why_there_are_fewer_than_cores() -> None:
    assert ThreadChoice(1, 2, 0.96, {2: 0.123, 1: 0.0205}).reason == (
        "torch starts 1 of 2 threads, as other programs leave 1.0 cores idle and fewer do as well or better (a small "
        "network's pass: 20.5 ms with 1, 123 ms with 2); --threads N says otherwise"
    )


def test_choose_threads__on_a_busy_machine_starts_fewer_and_says_so(
    chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    Machine(monkeypatch, 8, t8=0.2, t3=0.01)
    monkeypatch.setattr(threads, "idle_cores", lambda: 3.1)
    assert choose_threads(say=said.append) == 3
    assert chosen == [3]
    assert len(said) == 1
    assert said[0].startswith("torch starts 3 of 8 threads")
    assert choose_threads(8, say=said.append) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert choose_threads(say=said.append) == 8
    assert len(said) == 1


def test_choose_threads__on_a_quiet_machine_says_nothing(chosen: list[int]) -> None:
    said: list[str] = []
    choose_threads(say=said.append)
    assert said == []


def test_pass_seconds__times_every_number_and_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TIMED_STRETCH", 0.0)
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    seconds = pass_seconds((4, 2))
    assert told == [4, 2] * threads.TIMED_ROUNDS + [7]
    assert seconds.keys() == {4, 2}
    assert all(value > 0.0 for value in seconds.values())


def in_a_new_process(code: str, **environment: str) -> str:
    """What a process prints whose environment says nothing else of how threads wait."""
    clean = {name: value for name, value in os.environ.items() if name not in threads.WAIT_VARIABLES}
    program = f"import os\nfrom tokenexit.runtime.threads import shorten_waits\n{code}"
    return subprocess.check_output([sys.executable, "-c", program], text=True, env={**clean, **environment}).strip()


SAID = "print(shorten_waits(), [os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')])"


def test_shorten_waits__is_for_the_torch_that_is_imported_next() -> None:
    assert in_a_new_process(SAID) == f"True ['{threads.SPINS}', None]"


def test_shorten_waits__leaves_the_setting_of_the_environment() -> None:
    assert in_a_new_process(SAID, OMP_WAIT_POLICY="active") == "False [None, 'active']"
    assert in_a_new_process(SAID, GOMP_SPINCOUNT="7") == "False ['7', None]"


def test_shorten_waits__does_nothing_where_torch_has_read_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not threads.shorten_waits()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_commands__shorten_waits_before_torch_is_there() -> None:
    """Commands import torch when they run; nothing before may."""
    code = (
        "import sys\nfrom tokenexit import cli\n"
        "cli.COMMANDS['doctor'] = lambda arguments: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules) or 0\n"
        "cli.main(['doctor'])"
    )
    assert in_a_new_process(code) == f"{threads.SPINS} False"
