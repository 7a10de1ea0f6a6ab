"""Idle processors, from readings of `/proc/stat` as Linux writes it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tokenexit.runtime.idle import idle_between, idle_processors, processor_ticks

HEAD = "cpu  30 0 0 300 0 0 0 0 0 0\n"


def write_stat(root: Path, *lines: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    text = HEAD + "".join(f"cpu{line}\n" for line in lines) + "intr 5 0 0\nctxt 7\ncpus 9\n"
    (root / "proc/stat").write_text(text)
    return root


def test_processor_ticks__are_those_of_each_processor_without_guests(tmp_path: Path) -> None:
    write_stat(tmp_path, "0 10 1 2 100 3 4 5 6 7 8", "11 20 0 0 200 0 0 0 0 0 0")
    assert processor_ticks(tmp_path) == {0: (10, 1, 2, 100, 3, 4, 5, 6), 11: (20, 0, 0, 200, 0, 0, 0, 0)}


def test_idle_processors__adds_the_idle_shares_of_the_usable_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One computes, one of low priority does, one waits for its disk, a fourth is idle and not ours."""
    start = "0 0 0 0 100 0 0 0 0 0 0", "1 0 0 0 100 0 0 0 0 0 0", "2 0 0 0 100 0 0 0 0 0 0", "3 0 0 0 100 0 0 0 0 0 0"
    end = "0 15 0 5 100 0 0 0 0 0 0", "1 0 15 0 105 0 0 0 0 0 0", "2 0 0 0 110 10 0 0 0 0 0", "3 0 0 0 120 0 0 0 0 0 0"
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        write_stat(tmp_path, *end)

    monkeypatch.setattr(time, "sleep", sleep)
    assert idle_processors({0, 1, 2}, 0.5, write_stat(tmp_path, *start)) == 0.0 + 0.25 + 1.0
    assert slept == [0.5]


def test_idle_processors__is_unknown_where_the_system_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited for nothing"))
    assert idle_processors({0}, system=tmp_path) is None
    other_numbers = write_stat(tmp_path, "0 0 0 0 100 0 0 0 0 0 0", "1 0 0 0 100 0 0 0 0 0 0")
    assert idle_processors({1, 40}, system=other_numbers) is None


@pytest.mark.parametrize("after", [{}, {0: (0, 0, 0, 100, 0)}, {0: (0, 0, 0, 90, 0)}])
def test_idle_between__is_unknown_where_a_processor_did_not_count_on(after: dict[int, tuple[int, ...]]) -> None:
    assert idle_between({0: (0, 0, 0, 100, 0)}, after, {0}) is None


def test_idle_between__of_a_disk_time_counted_backwards_is_a_share_all_the_same() -> None:
    assert idle_between({0: (0, 0, 0, 100, 20)}, {0: (10, 0, 0, 105, 10)}, [0]) == 0.0
