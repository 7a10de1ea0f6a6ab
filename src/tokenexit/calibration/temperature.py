"""Temperature scaling (Guo et al., *On Calibration of Modern Neural Networks*, 2017), one number for each exit head.

A head that is too sure of itself says 0.99 where it is right nine times of ten. Its logits are divided by the
temperature that makes the truth of calibration images likeliest: no class changes, scores come to mean what they say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, recorded_windows
from tokenexit.engine.tokens import unpack_grids
from tokenexit.errors import ConfigError, DataError
from tokenexit.evaluation.evaluate import check_classes
from tokenexit.outputs.segmentation import resize_maps

PIXELS_PER_IMAGE = 2000
HOTTEST = 20.0
STEPS = 60
"""Halvings of the search: log T is found to 1e-15 of its range, which is more than enough."""


def fit_temperature(calibration_set: CalibrationSet, seed: int = 0) -> tuple[float, ...]:
    """Temperature of each exit's softmax, fitted to labelled images in a dense pass.

    seed: of the pixels that are drawn, up to 2,000 of each image. Raises `ConfigError` for ATM exit heads, whose scores
    are no softmax, and `DataError` for images without labels.
    """
    check_classes(calibration_set.model, calibration_set.data)
    if any(head.kind == "atm" for head in calibration_set.model.view().exit_heads):
        raise ConfigError("scores of ATM heads are no softmax and have no temperature: leave --fit-temperature out.")
    samples = [_joined(exit) for exit in _sampled(calibration_set, seed)]
    return tuple(round(likeliest_temperature(logits, truth), 4) for logits, truth in samples)


def likeliest_temperature(logits: Tensor, truth: Tensor) -> float:
    """T in [1 / 20, 20] with the least mean cross-entropy of `logits / T`.

    logits: `(n, K)`; truth: `(n,)` classes. The cross-entropy is convex in 1 / T, so its slope is followed to zero.
    """
    logits = logits.double()
    logits = logits - logits.mean(dim=1, keepdim=True)
    own = logits.gather(1, truth[:, None]).squeeze(1)

    def slope(cold: float) -> float:
        """Derivative by 1 / T: the mean logit that the head expects, less the one of the truth."""
        return float(((logits * cold).softmax(dim=1) * logits).sum(dim=1).sub(own).mean())

    low, high = -math.log(HOTTEST), math.log(HOTTEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def _sampled(calibration_set: CalibrationSet, seed: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For each exit and image, logits `(n, K)` and truth `(n,)` of the pixels that were drawn."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in calibration_set.model.config.exits]
    for output, truth in recorded_windows(calibration_set, "temperatures"):
        own = truth.flatten()
        drawn = torch.randperm(len(own), generator=generator)[:PIXELS_PER_IMAGE]
        drawn = drawn[own[drawn] != calibration_set.data.labels.ignore_index]
        for exit, record in zip(found, output.exit_records):
            assert record.logits is not None, "exits are recorded"
            ((_, maps),) = unpack_grids(record.logits.float(), [output.grid(0)], record.scale)
            maps = resize_maps(maps, output.grid(0), output.patch_size, record.upscale, output.sizes[0])
            exit.append((maps[0].flatten(1).cpu()[:, drawn].T, own[drawn]))
    return found


def _joined(exit: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the logits and the truth of all images. Raises `DataError` where no pixel has a label."""
    logits, truth = (torch.cat(parts) for parts in zip(*exit))
    if not len(truth):
        raise DataError("these images have no labels: a temperature is fitted to the truth.")
    return logits, truth
