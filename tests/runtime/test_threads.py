"""Cores that are really there, from files of control groups as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tokenexit.runtime import threads
from tokenexit.runtime.threads import Processors, choose_threads, cpu_quota, given_threads, processors

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
