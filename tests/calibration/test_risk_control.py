"""Bounds on synthetic losses whose true mean is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenexit.calibration import risk_control as g

DRAWS = 2000


def noise(delta: float, draws: int = DRAWS) -> float:
    """Four standard deviations of a share of draws."""
    return 4 * math.sqrt(delta * (1 - delta) / draws)


def losses_of_mean(kind: str, mean: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Losses in [0, 1] with this mean: rare ones of 1, and skewed ones."""
    if kind == "bernoulli":
        return (rng.random(shape) < mean).astype(float)
    return rng.beta(0.3, 0.3 * (1 - mean) / mean, shape)


@pytest.mark.parametrize(("n", "p"), list(itertools.product((1, 7, 40), (0.02, 0.5))))
def test_binomial_cdf__equals_the_sum_of_its_terms(n: int, p: float) -> None:
    terms = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert g.binomial_cdf(n, p) == pytest.approx(np.cumsum(terms), abs=1e-12)


@pytest.mark.parametrize(("kind", "alpha", "n"), list(itertools.product(("bernoulli", "beta"), (0.02, 0.1), (50, 400))))
def test_hoeffding_bentkus__is_a_valid_p_value_at_the_edge_of_the_hypothesis(kind: str, alpha: float, n: int) -> None:
    means = losses_of_mean(kind, alpha, (DRAWS, n), np.random.default_rng(0)).mean(1)
    p = g.hoeffding_bentkus(means, n, alpha)
    for delta in (0.05, 0.1, 0.3):
        assert (p <= delta).mean() <= delta + noise(delta)


def test_hoeffding_bentkus__rejects_what_is_far_below_and_never_what_is_above() -> None:
    assert g.hoeffding_bentkus(0.0, 299, 0.01) <= 0.05 < g.hoeffding_bentkus(0.0, 298, 0.01)
    assert g.hoeffding_bentkus(0.011, 1000, 0.01) > 0.5
    assert (g.hoeffding_bentkus([0.01, 0.5, 1.0], 100, 0.005) == 1.0).all()


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 300), st.floats(0.005, 0.6))
def test_hoeffding_bentkus__grows_with_the_mean(a: float, b: float, n: int, alpha: float) -> None:
    low, high = sorted((a, b))
    p_low, p_high = g.hoeffding_bentkus([low, high], n, alpha)
    assert 0.0 <= p_low <= p_high + 1e-12 <= 1.0 + 1e-12


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_binomial__is_valid_and_nearly_exact(share: float) -> None:
    n, delta = 200, 0.1
    above = np.random.default_rng(1).binomial(n, share, DRAWS * 5)
    rejected = (g.binomial(above, n, share) <= delta).mean()
    assert 0.3 * delta <= rejected <= delta + noise(delta, DRAWS * 5)


def test_fixed_sequence__stops_at_the_first_failure_and_looks_no_further() -> None:
    looked = []

    def passes(j: int) -> bool:
        looked.append(j)
        return (0.01, 0.1, 0.2, 0.0)[j] <= 0.1

    assert g.fixed_sequence(4, passes) == 2
    assert looked == [0, 1, 2]
    assert g.fixed_sequence(4, lambda j: j != 1) == 1
    assert g.fixed_sequence(3, lambda j: True) == 3
    assert g.fixed_sequence(0, lambda j: False) == 0


@pytest.mark.parametrize("shape", ["straight", "steps", "not monotone"])
def test_fixed_sequence__violates_the_bound_no_more_often_than_guaranteed(shape: str) -> None:
    """The whole procedure: a path of ten settings whose risks cross the bound; what is chosen is judged by its risk."""
    alpha, delta, n = 0.05, 0.1, 300
    risks = {
        "straight": np.linspace(0.01, 0.1, 10),
        "steps": np.repeat([0.02, 0.0501, 0.09], [3, 4, 3]),
        "not monotone": np.array([0.01, 0.03, 0.06, 0.02, 0.051, 0.04, 0.08, 0.1, 0.02, 0.3]),
    }[shape]
    rng = np.random.default_rng(2)
    means = np.stack([losses_of_mean("bernoulli", risk, (DRAWS, n), rng).mean(1) for risk in risks], 1)
    p_values = g.hoeffding_bentkus(means, n, alpha)
    passed = [g.fixed_sequence(len(p), lambda j, p=p: p[j] <= delta) for p in p_values]  # type: ignore[misc]
    chosen = np.array([0.0, *risks])[passed]
    assert (chosen > alpha).mean() <= delta + noise(delta)
    assert np.mean(np.array(passed) > 0) > 0.5  # it does choose


@pytest.mark.parametrize(("alpha", "confidence"), list(itertools.product((0.01, 0.02, 0.05, 0.3), (0.9, 0.95))))
def test_needed_images__is_the_first_number_that_can_pass(alpha: float, confidence: float) -> None:
    n, delta = g.needed_images(alpha, confidence), 1 - confidence
    assert g.hoeffding_bentkus(0.0, n, alpha) <= delta + 1e-12
    assert g.binomial(0, n, alpha) <= delta + 1e-12
    assert g.hoeffding_bentkus(0.0, n - 1, alpha) > delta


def test_needed_images__is_about_300_for_one_percent_at_95() -> None:
    assert g.needed_images(0.01, 0.95) == 299


@pytest.mark.parametrize(("mean", "n"), list(itertools.product((0.0, 0.013, 0.4), (60, 900))))
def test_smallest_bound__passes_and_a_smaller_one_does_not(mean: float, n: int) -> None:
    bound = g.smallest_bound(mean, n, 0.9)
    assert g.hoeffding_bentkus(mean, n, bound) <= 0.1
    assert g.hoeffding_bentkus(mean, n, bound - 2e-4) > 0.1


@pytest.mark.parametrize("alpha", [0.02, 0.1])
@pytest.mark.parametrize("shape", ["rare", "spread", "alike"])
def test_betting__accepts_a_false_bound_no_more_often_than_its_level(shape: str, alpha: float) -> None:
    generator = np.random.default_rng(0)
    accepted = 0
    for _ in range(600):
        if shape == "rare":  # all or nothing
            test, pilot = ((generator.random(n) < alpha).astype(float) for n in (80, 40))
        elif shape == "spread":
            test, pilot = (generator.beta(0.3, 0.3 * (1 - alpha) / alpha, n) for n in (80, 40))
        else:
            test, pilot = (generator.uniform(0.9 * alpha, 1.1 * alpha, n) for n in (80, 40))
        accepted += g.betting(test, alpha, g.best_bet(pilot, alpha)) <= 0.1
    assert accepted / 600 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 600)


def test_betting__needs_far_fewer_images_than_the_mean_where_losses_are_alike() -> None:
    losses = np.full(180, 0.015)
    assert g.betting(losses, 0.03, g.best_bet(losses, 0.03)) < 0.1
    assert g.hoeffding_bentkus(0.015, 180, 0.03) > 0.1


def test_betting__is_one_minus_the_geometric_mean_at_the_largest_bet() -> None:
    """All that is bet at once: the capital is prod((1 - L) / (1 - alpha))."""
    losses = np.array([0.01, 0.02, 0.0])
    capital = np.prod((1 - losses) / (1 - 0.05))
    assert g.betting(losses, 0.05, 1 / (1 - 0.05)) == pytest.approx(1 / capital)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
def test_smallest_bound_by_betting__passes_as_do_all_above_it(losses: list[float], pilot: list[float]) -> None:
    bound = g.smallest_bound_by_betting(losses, pilot, 0.9)
    for alpha in np.arange(bound, 1.0, 0.05):
        if alpha < 1.0 and bound < 1.0:
            assert g.betting(losses, float(alpha), g.best_bet(pilot, float(alpha))) <= 0.1 + 1e-9


def test_conformal_risk_control__keeps_the_expected_loss_of_the_next_image() -> None:
    """Monotone losses: image u loses once the setting passes it; the choice is judged on one more image, on average."""
    alpha, n, settings = 0.1, 60, np.linspace(0, 0.4, 41)
    rng = np.random.default_rng(3)
    nearness = rng.random((DRAWS * 4, n + 1))
    losses = nearness[:, :, None] < settings  # (draws, images, settings)
    chosen = [sum(1 for m in means if g.controls_expectation(m, n, alpha)) - 1 for means in losses[:, :n].mean(1)]
    assert min(chosen) >= 0
    last = losses[np.arange(len(chosen)), n, chosen].mean()
    assert last <= alpha + noise(alpha, DRAWS * 4)
    assert last >= alpha - 2 / (n + 1) - 0.01 - noise(alpha, DRAWS * 4)  # and not by refusing everything


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
def test_needed_images_in_expectation__is_the_first_number_that_can_pass(alpha: float) -> None:
    n = g.needed_images_in_expectation(alpha)
    assert g.controls_expectation(0.0, n, alpha + 1e-12)
    assert not g.controls_expectation(0.0, n - 1, alpha)


def test_bootstrap_drop__is_the_drop_of_miou_within_its_interval() -> None:
    truth = torch.randint(0, 3, (40, 50))
    dense = torch.where(torch.rand(40, 50) < 0.1, 0, truth)
    worse = torch.where(torch.rand(40, 50) < 0.2, 0, dense)

    def confusion(prediction: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.bincount(t * 3 + p, minlength=9).view(3, 3) for t, p in zip(truth, prediction)])

    def miou(prediction: torch.Tensor) -> float:
        ious = [((truth == c) & (prediction == c)).sum() / ((truth == c) | (prediction == c)).sum() for c in range(3)]
        return 100 * float(sum(ious)) / 3

    drop, low, high = g.bootstrap_drop(confusion(dense), confusion(worse), 0.9)
    assert drop == pytest.approx(miou(dense) - miou(worse), abs=1e-3)
    assert low < drop < high < low + 10
    assert g.bootstrap_drop(confusion(dense), confusion(dense), 0.9) == (0.0, 0.0, 0.0)
