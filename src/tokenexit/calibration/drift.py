"""Are these images like those of the calibration? Histograms of scores, image by image.

Thresholds and guarantees hold for images exchangeable with the calibration's. A histogram per image of how sure each
exit head was shows a good part of what breaks that: weather, blur, noise, another city. The unit is the image. An
image is *unusual* if its histograms are farther from the calibration's mean than those of 95 % of the calibration
images; of N exchangeable images about 5 % are, so a binomial test says when there are too many. Images can also
be unlike together and none of them for itself, so the mean over many is compared, too.

It sees changes in scores, not in errors: a model that is sure and wrong goes unnoticed.

Legend: n images, E exits, bins of uncertainty = 1 - score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenexit.heads import Head, HeadOutput, class_scores
from tokenexit.segmenter import ExitSegmenter

EDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Inner edges of the bins of uncertainty, finer where models are sure."""
SHARE_WITHIN = 0.95
ALARM = 1e-3
"""A warning is given if what was seen has at most this probability."""
LEAST_IMAGES = 20
"""Before a mean over images is compared, here and in the calibration."""
RARE = 0.03
"""Bins with a smaller share are too skewed to be tested; what goes to them is missed elsewhere."""
FAR = 0.05
"""Total variation of a mean that is worth a warning, however sure it is."""


@dataclass(frozen=True)
class Histograms:
    """counts: `(n, E, bins)` int64, how many tokens of each image an exit head was so sure of."""

    counts: Tensor

    def shares(self) -> Tensor:
        """`(n, E, bins)` fp64; zeros at exits that saw no token."""
        counts = self.counts.double()
        return counts / counts.sum(dim=2, keepdim=True).clamp(min=1)


class RecordedScores:
    """Histograms of the scores of the exit heads while they were recorded, call by call."""

    def __init__(self, num_exits: int) -> None:
        self.calls: list[list[Tensor]] = [[] for _ in range(num_exits)]

    def histograms(self, windows: Sequence[int]) -> Histograms:
        """Histograms of all images seen so far, in their order; zeros for heads that were not run, as by Dense.

        windows: into how many windows each image was cut, 1 for those taken whole.
        """
        image = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(windows))
        counts = torch.zeros(len(windows), len(self.calls), len(EDGES) + 1, dtype=torch.int64)
        for n, calls in enumerate(self.calls):
            if calls:
                counts[:, n].index_add_(0, image, torch.cat(calls).cpu())
        return Histograms(counts)


@contextmanager
def hook_scores(model: ExitSegmenter) -> Iterator[RecordedScores]:
    """Record the scores of the exit heads in every call within the block, which must run in one thread.

    Methods differ in what they show a head, live tokens or all, so histograms compare only within one method.
    """
    heads = [head for head in model.exit_heads if isinstance(head, Head)]
    seen = RecordedScores(len(heads))

    def recorder(n: int) -> Any:
        def record(head: Head, args: tuple[Any, ...], out: HeadOutput) -> None:
            seen.calls[n].append(_histogram(head, out))

        return record

    handles = [head.register_forward_hook(recorder(n)) for n, head in enumerate(heads)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _histogram(head: Head, out: HeadOutput) -> Tensor:
    """`(B, bins)` counts of one run of a head."""
    image = out.packing.image_index()
    if len(out.logits) != len(image):  # a finer grid: several rows per token, image after image
        image = torch.repeat_interleave(image, len(out.logits) // max(1, len(image)))
    uncertainty = 1.0 - class_scores(head.kind, out.logits, out.presence, image).amax(dim=-1)
    bins = len(EDGES) + 1
    found = torch.bucketize(uncertainty, torch.tensor(EDGES, device=uncertainty.device))
    counts = torch.bincount(image * bins + found, minlength=len(out.packing.lengths) * bins)
    return counts.view(-1, bins)


def distances(histograms: Histograms, mean: Tensor) -> Tensor:
    """Distance of each image from the mean `(E, bins)`: the largest total variation over exits, `(n,)` in [0, 1].

    Exits that saw no token of the image, or none in the calibration, say nothing.
    """
    shares = histograms.shares()
    apart = 0.5 * (shares - mean).abs().sum(dim=2)
    empty = (shares.sum(dim=2) == 0) | (mean.sum(dim=1) == 0)
    return apart.masked_fill(empty, 0.0).amax(dim=1)


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the scores on the calibration images.

    mean: `(E, bins)` shares. limit: the distance from it that 95 % of them keep. deviation: `(E, bins)`, standard
    deviation over images. images: `(E,)`, of how many images each exit saw tokens.
    """

    mean: Tensor
    limit: float
    deviation: Tensor
    images: Tensor

    @classmethod
    def of(cls, histograms: Histograms) -> ReferenceStatistics:
        shares = histograms.shares()
        there = shares.sum(dim=2) > 0
        images = there.sum(dim=0)
        mean = shares.sum(dim=0) / images.clamp(min=1)[:, None]
        squares = ((shares - mean).square() * there[:, :, None]).sum(dim=0)
        deviation = (squares / (images - 1).clamp(min=1)[:, None]).sqrt()
        return cls(mean, torch.quantile(distances(histograms, mean), SHARE_WITHIN).item(), deviation, images)

    def to_dict(self) -> dict[str, Any]:
        mean, deviation = ([[round(x, 5) for x in row] for row in t.tolist()] for t in (self.mean, self.deviation))
        return {
            "edges_of_doubt": list(EDGES),
            "mean": mean,
            "deviation": deviation,
            "images": self.images.tolist(),
            "limit": round(self.limit, 5),
            "share_within": SHARE_WITHIN,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReferenceStatistics:
        mean, deviation = (torch.tensor(values[name], dtype=torch.float64) for name in ("mean", "deviation"))
        images = torch.tensor(values["images"], dtype=torch.int64)
        shape = (len(images), len(EDGES) + 1)
        if list(values["edges_of_doubt"]) != list(EDGES) or not mean.shape == deviation.shape == shape:
            raise ValueError("score histograms with other bins")
        return cls(mean, float(values["limit"]), deviation, images)


class Monitor:
    """Counts unusual images as they come, and adds up the histograms of all of them.

    shares: `(E, bins)` sum over images. seen: `(E,)`, of how many images each exit saw tokens.
    """

    def __init__(self, reference: ReferenceStatistics) -> None:
        self.reference_statistics = reference
        self.images = 0
        self.unusual = 0
        self.shares = torch.zeros_like(reference.mean)
        self.seen = torch.zeros_like(reference.images)

    def add(self, histograms: Histograms) -> None:
        far = distances(histograms, self.reference_statistics.mean) > self.reference_statistics.limit
        self.images += len(far)
        self.unusual += int(far.sum())
        shares = histograms.shares()
        self.shares += shares.sum(dim=0)
        self.seen += (shares.sum(dim=2) > 0).sum(dim=0)

    def join(self, others: Iterable[Monitor]) -> None:
        """Take over what others saw, too."""
        for other in others:
            self.images += other.images
            self.unusual += other.unusual
            self.shares += other.shares
            self.seen += other.seen

    @property
    def apart(self) -> float:
        """Total variation between the mean of these images and the calibration's, at the exit where it is largest;
        0 where it is no more than chance: a z-test in every bin, for all bins and exits at once."""
        reference = self.reference_statistics
        known = (self.seen >= LEAST_IMAGES) & (reference.images >= LEAST_IMAGES)
        if not known.any():
            return 0.0
        seen, images = self.seen[known, None].double(), reference.images[known, None].double()
        difference = self.shares[known] / seen - reference.mean[known]
        z = difference.abs() / (reference.deviation[known] * (1 / seen + 1 / images).sqrt())
        z[reference.mean[known] < RARE] = 0.0
        p = torch.special.erfc(z / 2**0.5).amin(dim=1) * z.numel()
        return float((0.5 * difference.abs().sum(dim=1)).where(p <= ALARM, 0.0).amax())

    @property
    def p_value(self) -> float:
        """Probability of so many unusual images or more among images like the calibration's."""
        from tokenexit.calibration.risk_control import binomial_cdf

        if self.unusual == 0:
            return 1.0
        # P(X >= k) for X ~ Bin(N, 1 - p) is P(N - X <= N - k), and N - X ~ Bin(N, p), where p is SHARE_WITHIN.
        return float(binomial_cdf(self.images, SHARE_WITHIN)[self.images - self.unusual])

    def warning(self) -> str | None:
        """One sentence, if the images are unlike the calibration's; else None."""
        if self.p_value <= ALARM:
            said = (
                f"{self.unusual} of {self.images} images have scores unlike the calibration's, of which about "
                f"{(1 - SHARE_WITHIN) * self.images:.1f} would be"
            )
        elif self.apart > FAR:
            said = (
                f"the scores of these {self.images} images are on average unlike the calibration's, by "
                f"{self.apart:.0%} of the tokens"
            )
        else:
            return None
        return f"{said}: its budget and its bounds may not hold here, so calibrate on images like these."
