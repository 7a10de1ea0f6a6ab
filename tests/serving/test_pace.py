"""What an image costs: counted from its size and windows, in seconds of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")

from tests.serving.live import small_model
from tokenexit.methods import Dense, Resized
from tokenexit.serving.pace import Pace, dense_macs


@pytest.mark.parametrize("window", [None, (16, 16)])
@pytest.mark.parametrize("size", [(24, 33), (8, 50)])
def test_dense_macs__are_those_of_the_run(window: tuple[int, int] | None, size: tuple[int, int]) -> None:
    model = small_model()
    stride = None if window is None else (8, 12)
    model.preprocessing = replace(model.preprocessing, window=window, stride=stride)
    ran = model.segment([torch.zeros(3, *size)], Dense())
    assert dense_macs(model, size) == ran.ledger.macs[0]


@pytest.mark.parametrize("window", [None, (16, 16)])
@pytest.mark.parametrize("scale", [0.5, 0.7, 1.6])
def test_dense_macs__of_a_method_that_resizes_are_those_of_its_run(
    window: tuple[int, int] | None, scale: float
) -> None:
    model = small_model()
    model.preprocessing = replace(model.preprocessing, window=window, stride=window)
    ran = model.segment([torch.zeros(3, 24, 33)], Resized(Dense(), scale))
    assert dense_macs(model, (24, 33), scale) == ran.ledger.macs[0]


def test_pace__keeps_the_best_that_was_seen() -> None:
    pace = Pace(2e-9)
    pace.observe(1_000_000, 0.5)  # a busy moment
    assert pace.seconds(1_000_000_000) == pytest.approx(2.0)
    pace.observe(1_000_000_000, 1.0)
    assert pace.seconds(1_000_000_000) == pytest.approx(1.0)


def test_pace__is_measured_on_this_machine() -> None:
    model = small_model()
    assert 0 < Pace.measured(model, "fp32").seconds(dense_macs(model, (128, 192))) < 60
