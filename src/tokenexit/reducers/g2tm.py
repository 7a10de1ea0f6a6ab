"""G2TM: graph-guided token merging (Bercy, Poreba, Szczepanski, Bouchafa; VISAPP 2026).

Once, in block 2 between attention and MLP: tokens of cells that touch at a side are connected where their cosine is
strictly above the threshold, and every connected group becomes its mean. A whole sky is one token then; a chain of
small steps joins unlike ends, too, which is the method's known weakness.

Source: the official release. Where this differs from it: a batch of several images drops what it merges (the release
masks it there, and saves nothing); attention proportional to sizes, off by default in the release, is not offered. The
release reaches its thresholds, 0.88 on ADE20K and 0.95 on Cityscapes, by a curriculum in training: from 0.95 in steps
of 0.01 every 10 epochs after the 64th. `warmup` is a line from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.reducers.base import COSINES, Adjustable, Site, check_block, check_number
from tokenexit.reducers.matching import components


@dataclass(frozen=True)
class G2TM(Adjustable):
    """Graph-guided merging.

    Attributes:
        threshold: cosine of neighbours above which, strictly, they are connected; 1 and more connects none.
        block: the block in which groups merge, 1 the first; 2 as published.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "g2tm"
    title: ClassVar[str] = "G2TM"
    main_option: ClassVar[str] = "threshold"
    trials: ClassVar[tuple[Any, ...]] = COSINES
    idle: ClassVar[float] = 1.0

    threshold: float = 0.95
    block: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1, 2, "above 1 nothing merges")
        check_block("block", self.block)

    def sites(self, depth: int) -> tuple[Site, ...]:
        return (Site(self.block - 1, inside=True),)

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        into = components(tokens.patches(), self.threshold)
        return tokens.merge(into, torch.ones_like(into))

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return Ops(macs=2 * live * backbone.embed_dim)
