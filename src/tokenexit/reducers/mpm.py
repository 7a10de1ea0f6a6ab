"""MPM: mutual pair merging (Ravé, Rasti, Rousseau; CVPR Findings 2026, arXiv 2604.05718).

Before blocks 3 and 6 two tokens that are each other's nearest, by the cosine of the blocks' inputs, become their mean.
There is no parameter and no training, and at most half of the tokens go at each place.

No code was published. The idea is the abstract's; the places, the metric and the plain mean are of third-party notes,
which do not mention weights for tokens that were merged before. The paper copies features to the cells before the
head; here the head runs on merged tokens and its logits are copied, so that exits work, too. Heads that look at one
token at a time give the same.

It saves most where least is redundant: of noise a quarter of the tokens go, of many equal tokens one pair, as ties go
to the lowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.reducers.base import Reducer, Site
from tokenexit.reducers.matching import mutual_neighbours


@dataclass(frozen=True)
class MPM(Reducer):
    """Mutual pair merging.

    Attributes:
        after: numbers of blocks before each place, (2, 5) as published; none merge nothing.

    Raises:
        ConfigError: for places that do not increase.
    """

    name: ClassVar[str] = "mpm"
    title: ClassVar[str] = "MPM"
    main_option: ClassVar[str] = "after"

    after: tuple[int, ...] = (2, 5)

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.after) or list(self.after) != sorted(set(self.after)):
            raise ConfigError(f"after must be increasing numbers of blocks, got {self.after}: write (2, 5).")

    def sites(self, depth: int) -> tuple[Site, ...]:
        return tuple(map(Site, self.after))

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        patches = tokens.patches()
        into = mutual_neighbours(patches.x, patches.packing)
        return tokens.merge(into, torch.ones_like(into))

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return Ops(macs=live * live * backbone.embed_dim if live > 1 else 0)
