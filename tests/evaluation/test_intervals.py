"""Intervals over images, against a bootstrap written out and against draws whose spread is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.evaluation.test_evaluate import CLASSES, Images
from tests.helpers import tiny_segmenter
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.evaluation.intervals import class_counts, miou_interval, resampled_miou
from tokenexit.evaluation.metrics import scores
from tokenexit.methods import Dense, DToP


def confusions(n: int, seed: int, right: float = 0.8) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (n, 200))
    answer = np.where(rng.random((n, 200)) < right, truth, rng.integers(0, 3, (n, 200)))
    pairs = np.stack([np.bincount(t * 3 + a, minlength=9) for t, a in zip(truth, answer)])
    return torch.from_numpy(pairs).view(n, 3, 3)


def test_resampled_miou__is_that_of_the_sums_of_drawn_images() -> None:
    matrices = confusions(7, 0)
    picks = torch.randint(7, (5, 7), generator=torch.Generator().manual_seed(3))
    expected = [scores(matrices[own].sum(0)).miou for own in picks]
    assert resampled_miou(class_counts(matrices), draws=5, seed=3).tolist() == pytest.approx(expected)


def test_miou_interval__is_as_wide_as_miou_varies_from_sample_to_sample() -> None:
    truth = [scores(confusions(40, seed).sum(0)).miou for seed in range(300)]
    low, high = miou_interval(class_counts(confusions(40, 1000))) or (0.0, 0.0)
    spread = np.percentile(truth, 97.5) - np.percentile(truth, 2.5)
    assert high - low == pytest.approx(spread, rel=0.3)
    assert low < scores(confusions(40, 1000).sum(0)).miou < high


def test_miou_interval__of_a_difference_is_paired() -> None:
    one = class_counts(confusions(40, 0))
    assert miou_interval(one, one) == (0.0, 0.0)
    worse = class_counts(confusions(40, 0, right=0.6))
    low, high = miou_interval(worse, one) or (0.0, 0.0)
    assert low < high < 0


def test_miou_interval__says_nothing_of_one_image() -> None:
    assert miou_interval(class_counts(confusions(1, 0))) is None


def test_evaluation__keeps_what_intervals_need_of_every_image() -> None:
    model = tiny_segmenter("fcn", num_classes=CLASSES)
    dense, dtop = evaluate(model, Images(), [Dense(), DToP(0.5)])
    assert dense.counts is not None
    assert torch.equal(dense.counts.sum(0), class_counts(dense.confusion))
    low, high = dense.miou_interval() or (0.0, 0.0)
    assert low <= dense.scores.miou <= high
    assert dtop.miou_interval(dense) is not None
    assert dense.to_dict(Images().labels.names)["mIoU_interval"] == (low, high)
