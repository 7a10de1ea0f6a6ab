"""What can be said of an adapted model, measured on photos that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, true_run
from tokenexit.calibration.latency import timed_in_turn
from tokenexit.calibration.risk_control import smallest_bound_by_betting
from tokenexit.evaluation.intervals import CONFIDENCE, DRAWS
from tokenexit.methods import Dense, Method
from tokenexit.outputs.ledger import dense_ops
from tokenexit.outputs.windows import window_boxes
from tokenexit.segmenter import ExitSegmenter

TIMED_PHOTOS = 24


@dataclass(frozen=True)
class Measured:
    """Figures on test photos.

    Attributes:
        photos: number of photos.
        mac_ratio: multiply-adds over dense ones, both summed over photos.
        disagreement: share of pixels unlike the dense model's, the mean over photos.
        disagreement_interval: 95 % interval of it over photos of the kind (bootstrap).
        bound: the smallest bound on the expected share that these photos support.
        confidence: the confidence of that bound.
        speedup: dense milliseconds over those of the plan, the median over photos, one at a time and in turn.
        dense_ms: median milliseconds of dense.
        ms: median milliseconds of the plan.
        agreement_by_class: share of a class's pixels, as the dense model sees it, that stay; None for one not there.
        tokens: mean number of patches of a photo at full size.
        head_share: share of dense multiply-adds that the decode head takes.
    """

    photos: int
    mac_ratio: float
    disagreement: float
    disagreement_interval: tuple[float, float]
    bound: float
    confidence: float
    speedup: float
    dense_ms: float
    ms: float
    agreement_by_class: tuple[float | None, ...]
    tokens: float
    head_share: float

    def sentence(self) -> str:
        """Say in one sentence what was measured."""
        low, high = (100 * (1 - end) for end in self.disagreement_interval[::-1])
        return (
            f"{self.mac_ratio:.0%} of dense multiply-adds, {1 - self.disagreement:.1%} of pixels as before "
            f"[{low:.1f}, {high:.1f}], {self.speedup:.1f}x as fast here; at most {100 * self.bound:.3g} % unlike dense "
            f"with confidence {self.confidence:g}"
        )

    def weakest_class(self, names: Sequence[str]) -> tuple[str, float]:
        """Return the class of which the least stays, and how much."""
        shares = [(share, name) for share, name in zip(self.agreement_by_class, names) if share is not None]
        share, name = min(shares)
        return name, share

    def to_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers only, as JSON holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def measure(
    tested_on: CalibrationSet, method: Method[Any], dense: ExitSegmenter, pilot: Tensor, confidence: float
) -> Measured:
    """Run a method on every photo, compare it with the dense answers of `dense`, and time both on some.

    pilot: `(n,)` losses on other photos, on which the bet of the bound is fixed.
    """
    reference = dense_reference(replace(tested_on, model=dense))
    run = true_run(tested_on, method, reference, "testing")
    losses = error(run.confusion, "pixels")
    draws = torch.randint(len(losses), (DRAWS, len(losses)), generator=torch.Generator().manual_seed(0))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(losses[draws].mean(1), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    mean = losses.mean().item()
    counts = run.confusion.long().sum(0)
    of_class = counts.sum(1)
    runs = [(tested_on.model, Dense()), (tested_on.model, method)]
    dense_ms, ms = timed_in_turn(tested_on, runs, TIMED_PHOTOS)
    tokens, head_share = _sizes(tested_on)
    return Measured(
        photos=len(tested_on),
        mac_ratio=run.mac_ratio,
        disagreement=mean,
        disagreement_interval=(low, high),
        bound=smallest_bound_by_betting(losses.numpy(), pilot.numpy(), confidence),
        confidence=confidence,
        speedup=median(a / b for a, b in zip(dense_ms, ms)),
        dense_ms=median(dense_ms),
        ms=median(ms),
        agreement_by_class=tuple(
            None if total == 0 else right / total for right, total in zip(counts.diagonal().tolist(), of_class.tolist())
        ),
        tokens=tokens,
        head_share=head_share,
    )


def _sizes(tested_on: CalibrationSet) -> tuple[float, float]:
    """Mean number of tokens of a photo, in all its windows, and the decode head's share of dense multiply-adds."""
    model, preprocessing = tested_on.model, tested_on.model.preprocessing
    photos = tested_on.part(tested_on.spread(TIMED_PHOTOS))
    grids = [
        model.backbone.patch_embed.grid(bottom - top, right - left)
        for _, images, _ in photos.batches()
        for image in images
        for top, left, bottom, right in window_boxes(
            (image.shape[1], image.shape[2]), preprocessing.window, preprocessing.stride
        )
    ]
    heads = sum(model.decode_head.ops(h * w, (h, w)).macs for h, w in grids)
    whole = sum(dense_ops(model.backbone, model.decode_head, grid).macs for grid in grids)
    return sum(h * w for h, w in grids) / len(photos), heads / whole
