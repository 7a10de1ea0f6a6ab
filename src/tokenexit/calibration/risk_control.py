"""Bounds on a mean loss from finitely many images: learn-then-test, conformal risk control, and a bootstrap.

A *path* of settings is fixed beforehand, from safe to daring. Fixed-sequence testing walks it: setting j is tested at
the full level `1 - confidence`, and the walk ends at the first that fails, so that the chance of ever accepting a
setting whose true risk is above the bound is at most `1 - confidence` (Bauer 1991; Angelopoulos et al., Learn then
Test, 2021, section 2.3). The losses must be of images that had no part in fixing the path.

Legend: n images, L a loss per image in [0, 1], risk = E[L], delta = 1 - confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.evaluation.intervals import class_counts, resampled_miou, weighted_miou

Array = npt.NDArray[np.float64]

LARGEST_BET, BETS = 0.999, 200
"""The largest bet, as a share of what one loss of 1 could take at once, and how many are compared."""


@lru_cache(maxsize=64)
def binomial_cdf(n: int, p: float) -> Array:
    """`P(Bin(n, p) <= k)` for k = 0..n."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + k * math.log(p) + (n - k) * math.log1p(-p)
    cdf: Array = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0)
    cdf.setflags(write=False)
    return cdf


def hoeffding_bentkus(mean: npt.ArrayLike, n: int, alpha: float) -> Array:
    """p-value of "risk > alpha" from the mean of n losses in [0, 1]; broadcasts over `mean`.

    The smaller of Hoeffding's `exp(-n h(min(mean, alpha), alpha))` and Bentkus' `e P(Bin(n, alpha) <= ceil(n mean))`
    (Bates et al., Distribution-Free, Risk-Controlling Prediction Sets, 2021, section 3.1).
    """
    mean = np.asarray(mean, dtype=np.float64)
    below = np.minimum(mean, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(below > 0, below * np.log(below / alpha), 0.0)
        h = first + np.where(below < 1, (1 - below) * np.log((1 - below) / (1 - alpha)), 0.0)
    bentkus = math.e * binomial_cdf(n, alpha)[np.minimum(np.ceil(n * mean).astype(np.int64), n)]
    p: Array = np.minimum(1.0, np.minimum(np.exp(-n * h), bentkus))
    return p


def binomial(exceeding: npt.ArrayLike, n: int, share: float) -> Array:
    """p-value of "more than `share` of all images exceed", from how many of n did: exact; broadcasts."""
    p: Array = np.asarray(binomial_cdf(n, share)[np.asarray(exceeding, dtype=np.int64)])
    return p


def fixed_sequence(count: int, passes: Callable[[int], bool]) -> int:
    """Number of the settings 0..count - 1 of a path that pass before the first that does not; lazy.

    passes: tests one setting at the full level, such as "its p-value is at most delta". Settings behind a failure are
    never looked at, which is what lets every test have the whole level.
    """
    return next((j for j in range(count) if not passes(j)), count)


def needed_images(alpha: float, confidence: float) -> int:
    """Images without which no test can pass: with no loss at all on n of them, `(1 - alpha)^n <= 1 - confidence`.

    The same for Hoeffding's bound at mean 0 and for the binomial test with nobody above.
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-alpha) - 1e-9)


def smallest_bound(mean: float, n: int, confidence: float) -> float:
    """The smallest bound that n losses in [0, 1] of this mean support, to four decimals rounded up; 1 if none does."""
    low, high = min(mean, 1.0), 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        passes = 0.0 < middle < 1.0 and hoeffding_bentkus(mean, n, middle) <= 1 - confidence
        low, high = (low, middle) if passes else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def best_bet(pilot: npt.ArrayLike, alpha: float) -> float:
    """Return the bet against "risk > alpha" that would have grown fastest on other losses in [0, 1].

    In `[0, 1 / (1 - alpha))`, so that no loss takes all. The less losses differ from each other, the higher it is.
    """
    losses = np.asarray(pilot, dtype=np.float64)
    bets = np.linspace(0.0, LARGEST_BET / (1 - alpha), BETS)
    growth = np.log1p(bets[:, None] * (alpha - losses)).mean(axis=1)
    return float(bets[growth.argmax()])


def betting(losses: npt.ArrayLike, alpha: float, bet: float) -> float:
    """p-value of "risk > alpha" from losses in [0, 1] on images that had no part in choosing the bet.

    The capital of one who bets against it, `prod(1 + bet (alpha - L))`, is expected to be at most 1 if it is true, so
    it exceeds 1 / p with a probability of at most p (Waudby-Smith and Ramdas, Estimating means of bounded random
    variables by betting, 2024, section 4). Where losses are small and alike, far fewer images are needed than by their
    mean alone.
    """
    growth = np.log1p(bet * (alpha - np.asarray(losses, dtype=np.float64))).sum()
    return float(min(1.0, math.exp(-min(growth, 700.0))))


def smallest_bound_by_betting(losses: npt.ArrayLike, pilot: npt.ArrayLike, confidence: float) -> float:
    """The smallest bound that losses in [0, 1] support with bets fixed on `pilot`, in steps of 0.0005; 1 if none does.

    All larger bounds are supported, too.
    """
    smallest = 1.0
    for alpha in np.arange(0.9995, 0.0, -0.0005):
        if betting(losses, float(alpha), best_bet(pilot, float(alpha))) > 1 - confidence:
            break
        smallest = float(alpha)
    return round(smallest, 4)


def controls_expectation(envelope_mean: float, n: int, alpha: float) -> bool:
    """Conformal risk control: `n / (n + 1) mean + 1 / (n + 1) <= alpha`, losses in [0, 1].

    envelope_mean: of each image's largest loss so far along the path, which makes losses monotone as the theorem asks
    (Angelopoulos et al., Conformal Risk Control, 2022, theorem 1). The last setting of the path that satisfies it has
    an expected loss of at most alpha on the next image, over the draw of the calibration images, too.
    """
    return (n * envelope_mean + 1.0) / (n + 1) <= alpha


def needed_images_in_expectation(alpha: float) -> int:
    """Images without which conformal risk control cannot pass, even with no loss at all: `1 / (n + 1) <= alpha`."""
    return math.ceil(1 / alpha - 1 - 1e-9)


def bootstrap_drop(
    dense: Tensor, dynamic: Tensor, confidence: float, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Drop of mIoU from dense to dynamic in points, with the ends of a percentile interval over resampled images.

    dense, dynamic: `(n, K, K)` counts per image, truth by row. The upper end is exceeded by a share `1 - confidence`
    of the draws, and so is the lower end undercut. An estimate: it has no guarantee at any number of images.
    """
    counts = [class_counts(confusion) for confusion in (dense, dynamic)]
    before, after = (resampled_miou(own, draws, seed) for own in counts)
    values = (before - after).nan_to_num()
    low, high = torch.quantile(values, torch.tensor([1 - confidence, confidence], dtype=torch.float64)).tolist()
    once = torch.ones(1, len(dense), dtype=torch.float64)
    before, after = (weighted_miou(once, own) for own in counts)
    return (before - after).nan_to_num().item(), low, high
