"""Numbers of images by the time that is left."""

from __future__ import annotations

import time

import pytest

from tokenexit.cli.allowance import Allowance, affordable


def test_affordable__is_all_where_time_is_enough_for_this_and_what_follows() -> None:
    assert affordable(80, 16, 4.0, forwards=400.0, later=80.0) == 80


def test_affordable__shrinks_all_phases_by_one_factor() -> None:
    assert affordable(80, 16, 4.0, forwards=200.0, later=80.0) == 40


@pytest.mark.parametrize("forwards", [0.0, 1.0, -50.0])
def test_affordable__is_never_less_than_the_fewest(forwards: float) -> None:
    assert affordable(80, 16, 4.0, forwards) == 16
    assert affordable(10, 16, 4.0, forwards) == 10
    assert affordable(80, 0, 4.0, forwards) == 0


def test_allowance__measures_speed_anew_before_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now, speeds = [100.0], iter([0.1, 1.0, 1.0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    allowance = Allowance(200.0, lambda: next(speeds))
    assert allowance.images(50, 5, each=4.0, later=200.0) == 50  # 1000 passes are left
    assert allowance.images(50, 5, each=4.0) == 25  # 100 are left since another program began
    now[0] = 300.0
    assert allowance.images(50, 5, each=4.0) == 5  # the time is over


def test_allowance__counts_the_time_that_measuring_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measure() -> float:
        now[0] += 60.0
        return 1.0

    assert Allowance(100.0, measure).images(100, 1, each=1.0) == 40
