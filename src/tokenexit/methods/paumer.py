"""PAUMER: Patch Pausing Transformer for Semantic Segmentation.

Source: Courdier, Sivaprasad, Fleuret, BMVC 2022, arXiv 2311.00586. Known from its abstract: computation is paused for
patches that need no more of it before the final decoder; the criterion is the entropy of predictions made from
intermediate activations; one trained network serves many run-time budgets by changing the pausing parameters at
inference.

Our reading, as its full text was not at hand: paused patches keep the features they were paused with and are put back
in place for the decoder; nothing stands in for them in the blocks between, so that this is DoViT's flow with another
score and without its blend; a patch is paused where its entropy over `log K` is below 1 minus the threshold. The
abstract does not say how it was trained: here as any method, with exits on, and with several thresholds if several
methods are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenexit.methods.base import Thresholds
from tokenexit.methods.dovit import DoViT
from tokenexit.methods.selection import Score


@dataclass(frozen=True)
class PAUMER(DoViT):
    """PAUMER pauses patches of low entropy: DoViT with these defaults.

    Attributes:
        threshold: one minus the entropy, as a share of its maximum, above which a patch is paused; the default of 0.95
            is not the paper's.
        blend_weight: 0, nothing stands in for paused patches.
        score: "entropy".
    """

    name: ClassVar[str] = "paumer"
    title: ClassVar[str] = "PAUMER"
    offered: ClassVar[bool] = False  # beside DoViT it shows little that is new

    threshold: Thresholds = 0.95
    blend_weight: float = 0.0
    score: Score = "entropy"
