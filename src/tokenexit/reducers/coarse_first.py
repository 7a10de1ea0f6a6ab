"""Coarse first, fine where needed: windows of patches share a token until an exit has seen it, and then come apart.

Every whole window of 2x2 patches starts as one token, embedded as a supertoken is: of the image made smaller by means
of pixels, at the mean of its patches' positions. After some blocks the tokens that are still live are split into their
patches. Where an exit stands at the same place it comes first, so that a token it is sure of leaves with all cells of
its window, and only the others are looked at patch by patch.

A patch goes on with what its token has become, plus the difference between its own embedding and the one that stood in
its stead: it keeps what the blocks added to the residual stream. With rotary positions it then stands at its own place.

This is ours. The patches are projected at the start, with all others, so that what is held back needs no image later;
the ledger counts them there, and the windows beside them. The split itself has no products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Detail, Grid, Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.reducers.base import Reducer, Site, check_block
from tokenexit.reducers.supertokens import embedding_ops, share_windows


@dataclass(frozen=True)
class CoarseFirst(Reducer):
    """One token for each window of patches, until after some blocks those still live are split.

    Attributes:
        after: number of blocks before the split, at least 1 and fewer than the network has; that of the first exit lets
            whole windows leave there. Without an exit up to there all are split.
        side: side of windows in patches.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "coarse_first"
    title: ClassVar[str] = "Coarse first"
    main_option: ClassVar[str] = "after"
    splits: ClassVar[bool] = True

    after: int = 1
    side: int = 2

    def __post_init__(self) -> None:
        check_block("after", self.after)
        if self.side < 2:
            raise ConfigError(f"side must be at least 2, got {self.side}: it is that of windows, in patches.")

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        projected = backbone.project(images)
        fine = backbone.embed(images, projected)
        coarse = share_windows(fine, images, projected, backbone, (self.side,), self._all)
        patches = fine.patches()
        return replace(coarse, detail=Detail(patches.x - coarse.unmerged().patches().x, patches.phases))

    def _all(self, images: Sequence[int], pixels: Tensor, patches: Tensor) -> Mapping[int, Tensor]:
        whole = (patches.shape[2] // self.side) * (patches.shape[3] // self.side)
        return {self.side: torch.ones(len(images), whole, dtype=torch.bool, device=patches.device)}

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        return embedding_ops(grid, self.side, backbone)

    def sites(self, depth: int) -> tuple[Site, ...]:
        return (Site(self.after),)

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        return tokens.split()

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return Ops()
