"""Temperatures: found again where they were put in, from labelled pixels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.calibration.test_cbt import Squares
from tests.helpers import tiny_segmenter
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.temperature import fit_temperature, likeliest_temperature
from tokenexit.errors import ConfigError, DataError


@given(st.floats(0.2, 5.0), st.integers(0, 9))
def test_likeliest_temperature__is_the_one_that_truth_was_drawn_with(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20_000, 4, generator=generator) * 2 * temperature
    truth = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    assert likeliest_temperature(logits, truth) == pytest.approx(temperature, rel=0.1)


@given(st.integers(0, 99))
def test_likeliest_temperature__has_the_least_cross_entropy_of_a_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, truth = torch.randn(50, 3, generator=generator) * 3, torch.randint(3, (50,), generator=generator)
    logits[range(25), truth[:25]] += 2.0
    found = likeliest_temperature(logits, truth)

    def loss(t: float) -> float:
        return F.cross_entropy(logits.double() / t, truth).item()

    assert all(loss(found) <= loss(t) + 1e-9 for t in torch.logspace(-1.3, 1.3, 60).tolist())


def test_likeliest_temperature__ends_at_its_limits() -> None:
    logits = torch.tensor([[0.3, 0.0], [0.0, 0.3]])
    assert likeliest_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1 / 20)
    assert likeliest_temperature(logits, torch.tensor([1, 0])) == pytest.approx(20)


def test_fit_temperature__undoes_a_head_that_was_made_too_sure() -> None:
    images = CalibrationSet(tiny_segmenter(), Squares(), (0, 1, 2))
    before = fit_temperature(images)
    head = images.model.exit_heads[1].classifier
    with torch.no_grad():
        head.weight.mul_(1.5)
        head.bias.mul_(1.5)
    after = fit_temperature(images)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(min(1.5 * before[1], 20), rel=1e-3)


def test_fit_temperature__refuses_images_without_truth_and_heads_without_softmax() -> None:
    with pytest.raises(DataError, match="no labels"):
        fit_temperature(CalibrationSet(tiny_segmenter(), Squares(void=True), (0, 1, 2)))
    with pytest.raises(ConfigError, match="no temperature"):
        fit_temperature(CalibrationSet(tiny_segmenter("atm"), Squares(), (0, 1, 2)))
