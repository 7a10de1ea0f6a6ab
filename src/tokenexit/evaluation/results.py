"""Results of an evaluation: the figures of one method on one dataset, and the label of its row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tokenexit.errors import ConfigError
from tokenexit.evaluation.intervals import miou_interval
from tokenexit.evaluation.metrics import Scores
from tokenexit.methods import Method, spec_of


@dataclass(frozen=True)
class Evaluation:
    """The accuracy and cost of one method on one dataset.

    Attributes:
        method: the method.
        label: the name of its row.
        scores: mIoU and other figures, in percent.
        boundary_iou: boundary IoU in percent.
        gmacs: giga multiply-adds of every image.
        dense_gmacs: the same of the model without exits on images of full size.
        live: share of all patch tokens still computed after each exit, `[image][exit]`.
        latency_ms: milliseconds of the forward pass of every image.
        confusion: `(K, K)` pixel counts, truth by row.
        input_scale: factor on the sides of the images.
        counts: `(n, 3, K)` of every image, see `class_counts`; None where only totals are known.
    """

    method: Method[Any]
    label: str
    scores: Scores
    boundary_iou: float
    gmacs: tuple[float, ...]
    dense_gmacs: tuple[float, ...]
    live: tuple[tuple[float, ...], ...]
    latency_ms: tuple[float, ...]
    confusion: Tensor
    input_scale: float = 1.0
    counts: Tensor | None = None

    def miou_interval(self, minus: Evaluation | None = None) -> tuple[float, float] | None:
        """Return the ends of the 95 % interval of mIoU over images, or of its difference to another row."""
        if self.counts is None or (minus is not None and minus.counts is None):
            return None
        return miou_interval(self.counts, None if minus is None else minus.counts)

    @property
    def gmacs_mean(self) -> float:
        """Giga multiply-adds, mean over images."""
        return float(np.mean(self.gmacs))

    @property
    def share_of_dense(self) -> float:
        """The ratio of multiply-adds to those of the dense model, both summed over all images."""
        return float(np.sum(self.gmacs) / np.sum(self.dense_gmacs))

    @property
    def live_mean(self) -> tuple[float, ...]:
        """The mean share of tokens live after each exit."""
        return tuple(np.mean(self.live, axis=0).tolist())

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return the figures for a JSON file."""
        return {
            "label": self.label,
            "method": spec_of(self.method, whole=True),
            "input_scale": self.input_scale,
            "images": len(self.gmacs),
            "mIoU": self.scores.miou,
            "mIoU_interval": self.miou_interval(),
            "aAcc": self.scores.aacc,
            "mAcc": self.scores.macc,
            "boundary_IoU": self.boundary_iou,
            "IoU": dict(zip(class_names, self.scores.iou)),
            "gmacs_mean": self.gmacs_mean,
            "gmacs_p5": float(np.percentile(self.gmacs, 5)),
            "gmacs_p95": float(np.percentile(self.gmacs, 95)),
            "dense_gmacs_mean": float(np.mean(self.dense_gmacs)),
            "share_of_dense": self.share_of_dense,
            "live_after_exit": list(self.live_mean),
            "latency_ms_median": float(np.median(self.latency_ms)),
        }


@dataclass(frozen=True)
class Scaled:
    """A method on images whose sides are multiplied by `input_scale`; its maps come back at the full size.

    Dense at a lower resolution is what early exits have to beat: it costs its user nothing. note: what the row's label
    adds in brackets, such as where thresholds are from.
    """

    method: Method[Any]
    input_scale: float = 1.0
    note: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.input_scale < math.inf:
            raise ConfigError(f"input_scale={self.input_scale} is no share of a side: give a number above 0.")

    @property
    def label(self) -> str:
        scale = f" @{self.input_scale:g}" if self.input_scale != 1.0 else ""
        return self.method.label + scale + (f" ({self.note})" if self.note else "")
