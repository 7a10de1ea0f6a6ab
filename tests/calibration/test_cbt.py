"""Class-based thresholds: the authors' steps, pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.heads.test_eomt import eomt
from tests.helpers import tiny_segmenter
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.cbt import cbt_thresholds, class_means, thresholds_by_gap
from tokenexit.data.base import Sample
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.methods import Dense, DToP


class Squares:
    """Images of two sizes whose truth shows classes 0 to 3 and void, never class 4."""

    def __init__(self, void: bool = False) -> None:
        self.labels: Labels = default_labels(5)
        self.void = void

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng(index)
        size = ((12, 16), (9, 14))[index % 2]
        mask = rng.choice([0, 1, 2, 3, self.labels.ignore_index], size)
        if self.void:
            mask[:] = self.labels.ignore_index
        return Sample(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), mask, str(index))


def bench(head: str = "fcn", void: bool = False) -> CalibrationSet:
    return CalibrationSet(eomt() if head == "eomt" else tiny_segmenter(head), Squares(void), (0, 1, 2))


@pytest.mark.parametrize("head", ["fcn", "setr_naive", "atm", "eomt"])
def test_class_means__are_means_over_the_pixels_of_a_class(head: str) -> None:
    """The end of the network against what a dense output says of every pixel."""
    images = bench(head)
    model = images.model
    sums, pixels = torch.zeros(5, 5).double(), torch.zeros(5)
    for index in range(3):
        sample = images.data[index]
        with torch.no_grad():
            out = model([model.preprocessing.to_tensor(sample.image)], Dense())
        probabilities = out.logits[0].double() if head in ("atm", "eomt") else out.logits[0].double().softmax(0)
        for i, j in np.ndindex(*sample.mask.shape):
            if sample.mask[i, j] != images.data.labels.ignore_index:
                sums[sample.mask[i, j]] += probabilities[:, i, j]
                pixels[sample.mask[i, j]] += 1
    means = class_means(images)
    assert means.shape == (3, 5, 5)
    assert torch.allclose(means[-1, :4], sums[:4] / pixels[:4, None], atol=1e-5)
    assert means[:, 4].isnan().all()
    assert not means[:, :4].isnan().any()
    assert not torch.allclose(means[0, :4], means[1, :4], atol=1e-3), "exits differ"


def test_class_means__of_images_in_windows_are_of_all_their_windows() -> None:
    images = bench()
    images.model.preprocessing = replace(images.model.preprocessing, window=(8, 8), stride=(4, 8))
    in_windows = class_means(images)
    assert torch.isfinite(in_windows[:, :4]).all()
    assert not torch.allclose(in_windows[:, :4], class_means(bench())[:, :4], atol=1e-4)


def test_thresholds_by_gap__map_the_widest_gap_to_alpha_and_the_narrowest_to_beta() -> None:
    nan = float("nan")
    means = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.3, 0.4, 0.3, 0.0], [0.2, 0.2, 0.6, 0.0], [nan] * 4])  # 0.8, 0.1, 0.4
    expected = (0.8, 1.0, 1.0 - 0.2 * 3 / 7, 1.0)
    assert thresholds_by_gap(means, 0.8, 1.0) == pytest.approx(expected, abs=1e-5)


def test_thresholds_by_gap__of_classes_alike_are_all_beta() -> None:
    assert thresholds_by_gap(torch.full((3, 3), 1 / 3), 0.5, 0.9) == (0.9, 0.9, 0.9)
    assert thresholds_by_gap(torch.ones(1, 1), 0.5, 0.9) == (0.9,)


def test_cbt_thresholds__are_the_same_at_all_exits_and_run() -> None:
    images = bench()
    thresholds = cbt_thresholds(images, 0.3, 0.6)
    assert thresholds == (thresholds_by_gap(class_means(images).mean(0), 0.3, 0.6),) * 2
    assert min(thresholds[0]) == 0.3
    assert max(thresholds[0]) == thresholds[0][4] == 0.6, "a class never seen is held longest"
    with torch.no_grad():
        out = images.model([torch.randn(3, 16, 16)], DToP(thresholds, keep_per_class=0))
    assert (out.exit_index[0] < 2).any()


def test_cbt_thresholds__refuse_a_range_that_is_none_and_images_without_truth() -> None:
    with pytest.raises(ConfigError, match=r"alpha=0.9 and beta=0.8 are no range in \[0, 1\]"):
        cbt_thresholds(bench(), 0.9, 0.8)
    with pytest.raises(DataError, match=r"no labels: CBT needs the truth"):
        cbt_thresholds(bench(void=True))
