"""ALGM: adaptive local-then-global token merging (Norouzi, Orlova, de Geus, Dubbelman; CVPR 2024).

In block 1, between attention and MLP, every 2x2 window whose four tokens are alike becomes their mean. In block 5 (7 of
24) tokens are split into two alternating sets, and those of the first whose best cosine in the second is at least
`mean + std / block` of the image join it, in a mean weighted by cells. What is compared is the residual stream. The
head runs on merged tokens and its logits are copied to the cells.

Source: the official release (github.com/tue-mps/algm-segmenter). Where this differs from it, and why:

- every image merges its own number of tokens; the release takes the batch's lowest number in both stages and its mean
  threshold, so that one image of noise stops all others from merging;
- the second stage alternates in raster order; the release puts merged windows first, by falling similarity. Over
  synthetic scenes both merge equally many, equally alike;
- windows are cut from any grid, and incomplete ones stay; the release needs square grids of even sides;
- a similarity within 1e-6 below the second threshold is on it: of equal tokens the release merges all or none, as the
  mean is rounded.

The release has a switch for attention proportional to sizes and ignores it; there is none here. The paper's page speaks
of a local threshold that is found automatically; how could not be read, and the release takes a number: 0.88 for
ViT-S, 0.90 for Ti, 0.94 for B and 0.95 for L on ADE20K, 0.955 for S on Cityscapes, 0.88 for S on Pascal Context.
With register tokens, which are excluded like the class token, the alternation counts them; that is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.reducers.base import COSINES, Adjustable, Site, check_block, check_number
from tokenexit.reducers.matching import above_mean, alike_windows, bipartite, bipartite_ops, window_ops


@dataclass(frozen=True)
class ALGM(Adjustable):
    """Adaptive local-then-global merging.

    Attributes:
        threshold: mean cosine of a window's tokens from which on they merge; above 1 none do. `warmup` moves it alone:
            the second stage is relative and merges from the start.
        local_block: the block in which windows merge, 1 the first; None leaves the stage out.
        global_block: the block in which alike tokens merge wherever they are, 5 of 12 and 7 of 24 as published; None
            leaves the stage out.
        window: side of a window in cells.
        divisor: of the standard deviation in the second threshold; the number of the block, as published, if None.

    Raises:
        ConfigError: for a value out of range, and for a second stage that is not behind the first.
    """

    name: ClassVar[str] = "algm"
    title: ClassVar[str] = "ALGM"
    main_option: ClassVar[str] = "threshold"
    trials: ClassVar[tuple[Any, ...]] = COSINES
    idle: ClassVar[float] = 1.0

    threshold: float = 0.9
    local_block: int | None = 1
    global_block: int | None = 5
    window: int = 2
    divisor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1, 2, "above 1 no window merges")
        check_block("local_block", self.local_block)
        check_block("global_block", self.global_block)
        if self.window < 2:
            raise ConfigError(f"window must be at least 2, got {self.window}: it is a side in tokens.")
        if self.divisor is not None and not 0 < self.divisor < float("inf"):
            raise ConfigError(f"divisor must be above 0, got {self.divisor}: the larger, the more tokens merge.")
        if self.local_block is not None and self.global_block is not None and self.global_block <= self.local_block:
            raise ConfigError(
                f"global_block must be behind local_block {self.local_block}, got {self.global_block}: choose a later "
                "block."
            )

    def sites(self, depth: int) -> tuple[Site, ...]:
        return tuple(Site(block - 1, inside=True) for block in (self.local_block, self.global_block) if block)

    def _is_local(self, site: Site) -> bool:
        return self.local_block is not None and site.after == self.local_block - 1

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        patches = tokens.patches()
        if self._is_local(site):
            return tokens.merge(alike_windows(patches, self.window, self.threshold))
        best, partner = bipartite(patches.x, patches.packing, tokens.num_prefix)
        divisor = site.after + 1 if self.divisor is None else self.divisor
        joins = above_mean(best, patches.packing.image_index(), len(tokens.grids), divisor)
        return tokens.merge(torch.where(joins, partner, torch.arange(len(partner), device=partner.device)))

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        if self._is_local(site):
            return window_ops(grid, self.window, backbone.embed_dim) if live else Ops()
        return bipartite_ops(live, backbone.num_prefix_tokens, backbone.embed_dim)
