"""The network that chooses windows for `Supertokens` is fitted to labels: does a window hold one class?

Labels are CTS's (Lu, de Geus, Dubbelman; CVPR 2023; release): a window is of one class where all its pixels have one
label, the ignored one among them; those of one class beside ignored pixels in the outermost rows and columns of
windows, which borders of masks cause, are left out. CTS's are also AdamW with a weight decay of 1e-3, and
cross-entropy. Ours are the network, the learning rate and the number of steps, as it starts from random weights; and
images are cropped and mirrored, where CTS makes them one size. The dense model stays as it is.

Legend: b images of one size, W whole windows of one side, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.data.base import SegmentationDataset
from tokenexit.engine.window_policy import WindowPolicy, nested
from tokenexit.errors import ConfigError
from tokenexit.segmenter import ExitSegmenter

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 2000, 8, 2e-3, 1e-3
CROP = 32
"""Side of a crop in patches, for images larger than that."""
THRESHOLD = 0.95
"""Probability at which a fitted network is judged: the default of `Supertokens`."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class WindowFigures:
    """What a network says of windows of one side, on images that it was not fitted on; shares of the counted windows.

    Attributes:
        side: of the windows, in patches.
        windows: number of counted windows.
        one_class: share that holds one class.
        shared: share that the network lets share a token at `THRESHOLD`.
        right: share of those that holds one class; NaN where there are none.
    """

    side: int
    windows: int
    one_class: float
    shared: float
    right: float

    def __str__(self) -> str:
        said = f"windows of {self.side} x {self.side} patches: {self.one_class:.1%} hold one class, {self.shared:.1%} "
        return (
            said + f"share a token at {THRESHOLD:g}" + ("" if math.isnan(self.right) else f", {self.right:.1%} rightly")
        )


def fit_window_policy(
    model: ExitSegmenter,
    data: SegmentationDataset,
    *,
    sides: Sequence[int] = (2, 4),
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: Progress = iter,
) -> ExitSegmenter:
    """Fit a network to labels, and return the model with it; the model's own weights are shared and stay as they are.

    Args:
        model: a trained model, whose patches and preprocessing are taken.
        data: images with masks.
        sides: of windows in patches, each a multiple of the one before.
        steps: number of optimiser steps.
        batch: number of images of a step.
        learning_rate: at the start; it falls to 0 as half a cosine.
        seed: of the network, the order of images, crops and mirroring.
        progress: wraps the loop over steps.

    Returns:
        The model with the network, not calibrated, as thresholds would belong to the one before.

    Raises:
        ConfigError: for sides that do not nest, for numbers below 1, and for images smaller than the smallest window.
    """
    sides = tuple(sides)
    if not sides or not nested(sides):
        raise ConfigError(f"sides must be sides of windows that nest, got {sides}: write 2 4, or 2 4 8.")
    if min(steps, batch) < 1 or not 0.0 < learning_rate < math.inf:
        raise ConfigError("steps, batch and learning_rate must be above 0: leave them at their defaults.")
    if len(data) == 0:
        raise ConfigError("there are no images to fit a network on: give some.")
    patch, ignored = model.config.backbone.patch_size, data.labels.ignore_index
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = WindowPolicy(patch, sides).to(model.device).train()
    optimizer = torch.optim.AdamW(policy.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    rng, order = np.random.default_rng(seed), _endless(len(data), seed)
    for step in progress(range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        losses = []
        for _ in range(batch):
            pixels, mask = _cropped(*_seen(model, data, next(order)), patch, rng)
            losses += list(window_losses(policy, pixels, mask, patch, ignored))
        if not losses:
            raise ConfigError(f"no image holds a window of {sides[0]} x {sides[0]} patches: fit on larger ones.")
        torch.stack(losses).mean().backward()
        optimizer.step()
    return model.with_window_policy(policy.eval())


def window_losses(policy: WindowPolicy, pixels: Tensor, mask: Tensor, patch: int, ignored: int) -> Iterator[Tensor]:
    """Yield the cross-entropy of the counted windows of one image, the mean over those of each side that has some.

    pixels: `(3, h p, w p)`. mask: `(h p, w p)` int64.
    """
    for side, logit in policy(pixels[None], max(policy.sides)).items():
        one_class, counted = window_labels(mask, side * patch, ignored)
        if counted.any():
            yield F.binary_cross_entropy_with_logits(logit[0][counted], one_class[counted].to(logit.dtype))


def window_labels(mask: Tensor, pixels: int, ignored: int) -> tuple[Tensor, Tensor]:
    """Return which whole windows of a mask `(H, W)` hold one label, and which count: both `(W,)` bool, in raster order.

    pixels: side of a window. ignored: the label of pixels that may be anything, which counts as a label of its own.
    """
    rows, columns = mask.shape[0] // pixels, mask.shape[1] // pixels
    cut = mask[: rows * pixels, : columns * pixels].unflatten(0, (rows, pixels)).unflatten(2, (columns, pixels))
    windows = cut.permute(0, 2, 1, 3).flatten(2)  # (rows, columns, pixels^2)
    one_class = windows.amin(2) == windows.amax(2)
    void = windows == ignored
    low = windows.masked_fill(void, torch.iinfo(torch.int64).max).amin(2)
    high = windows.masked_fill(void, -1).amax(2)
    beside_void = void.any(2) & ~void.all(2) & (low == high)
    outermost = torch.ones_like(one_class)
    outermost[1:-1, 1:-1] = False
    return one_class.flatten(), ~(beside_void & outermost).flatten()


@torch.no_grad()
def judge_window_policy(
    model: ExitSegmenter, data: SegmentationDataset, progress: Progress = iter
) -> tuple[WindowFigures, ...]:
    """Return what the network of a model says of the windows of whole images, side by side."""
    policy, patch = model.backbone.window_policy, model.config.backbone.patch_size
    assert policy is not None, "of a model that has one"
    counts = {side: torch.zeros(4, dtype=torch.int64) for side in policy.sides}
    for index in progress(range(len(data))):
        pixels, mask = _seen(model, data, index)
        pixels, mask = (t[..., : t.shape[-2] // patch * patch, : t.shape[-1] // patch * patch] for t in (pixels, mask))
        for side, logit in policy(pixels[None], max(policy.sides)).items():
            one_class, counted = window_labels(mask, side * patch, data.labels.ignore_index)
            shares = (logit[0].sigmoid() >= THRESHOLD) & counted
            found = (counted, counted & one_class, shares, shares & one_class)
            counts[side] += torch.stack([one.sum() for one in found]).cpu()
    figures = []
    for side, count in counts.items():
        windows, one, shared, right = count.tolist()
        most = max(windows, 1)
        figures.append(WindowFigures(side, windows, one / most, shared / most, right / shared if shared else math.nan))
    return tuple(figures)


def _seen(model: ExitSegmenter, data: SegmentationDataset, index: int) -> tuple[Tensor, Tensor]:
    """Return an image as the network sees it, `(3, H, W)`, and its mask `(H, W)` int64 at that size."""
    sample = data[index]
    image = model.preprocessing.to_tensor(sample.image).to(model.device)
    mask = torch.from_numpy(sample.mask.astype(np.int64)).to(model.device)
    resized = F.interpolate(mask[None, None].float(), image.shape[1:], mode="nearest-exact")
    return image, resized[0, 0].long()


def _cropped(image: Tensor, mask: Tensor, patch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut an image and its mask to whole patches, at most `CROP` a side, at any pixel; mirror half of them."""
    height, width = (min(side // patch, CROP) * patch for side in mask.shape)
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(mask.shape, (height, width)))
    image, mask = (t[..., top : top + height, left : left + width] for t in (image, mask))
    return (image.flip(-1), mask.flip(-1)) if rng.random() < 0.5 else (image, mask)


def _endless(count: int, seed: int) -> Iterator[int]:
    """Yield indices of images, all of them in a new order again and again."""
    rng = np.random.default_rng([seed, count])
    while True:
        yield from rng.permutation(count).tolist()
