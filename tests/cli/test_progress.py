"""Progress where there is no terminal: lines, now and then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tokenexit.cli import progress
from tokenexit.cli.progress import pace, progress_bar, progress_bars, progress_line

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only entry, which stands still until a test moves it on."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def every(seconds: float, count: int, clock: list[float]) -> Iterator[int]:
    """Work on `count` things that take so long."""
    for k in range(count):
        yield k
        clock[0] += seconds


def test_progress_bar__says_a_line_within_seconds_and_then_now_and_then(clock: list[float], capsys: Captured) -> None:
    done = []
    for k in progress_bar("evaluating")(range(100)):
        clock[0] += 1.0
        done.append(k)
    assert done == list(range(100))
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 2 of 100, 0:00:02 so far, 0:01:38 left",
        "evaluating: 32 of 100, 0:00:32 so far, 0:01:08 left",
        "evaluating: 62 of 100, 0:01:02 so far, 0:00:38 left",
        "evaluating: 92 of 100, 0:01:32 so far, 0:00:08 left",
    ]


def test_progress_bar__says_nothing_of_what_is_done_at_once(clock: list[float], capsys: Captured) -> None:
    assert list(progress_bar("checking")(range(1000))) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_progress_bars__keep_one_pace_over_many_short_loops(clock: list[float], capsys: Captured) -> None:
    bars = progress_bars()
    for n in range(10):
        for _ in bars(f"pass {n}")(range(3)):
            clock[0] += 1.5
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["pass 0: 2 of 3", "pass 7: 1 of 3"]


def test_progress_line__has_no_end_where_nobody_knows_it() -> None:
    assert progress_line("dense", 7, None, 65.0) == "dense: 7 done, 0:01:05 so far"


def test_pace__is_due_first_after_seconds() -> None:
    times = iter([0.0, 1.0, 2.0, 3.0, 31.0, 32.0])
    due = pace(lambda: next(times))
    assert [due() for _ in range(5)] == [False, True, False, False, True]
