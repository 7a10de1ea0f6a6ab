"""ToMe: token merging (Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman; ICLR 2023, arXiv 2210.09461), for dense maps.

In every block, between attention and MLP: tokens are split into two alternating sets; each of the first set has an edge
to the most similar of the second, by the cosine of keys averaged over heads; the r most similar edges stay; what they
connect becomes its mean, weighted by cells; the sets are put together again.

Source: the paper. Where this differs from it, and why:

- r is a share of the image's cells, so that it means the same for images of any size;
- tokens stay merged to the end, and logits are copied to the cells, as ALGM has it; the paper classifies images;
- attention is proportional to sizes, as the paper's is without training, only where `proportional` asks for it: in the
  blocks, not in heads, which see merged tokens as they are. The paper, too, trains without it for some weights;
- with rotary positions keys are compared as attention compares them, rotated.

The rows "ToMe" of comparisons on Segmenter (Expedit) are another algorithm, which merges before and unmerges after
every attention and every MLP: `python -m benchmarks.sublayer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.reducers.base import Adjustable, Site, check_number
from tokenexit.reducers.matching import bipartite, bipartite_ops, most_alike


@dataclass(frozen=True)
class ToMe(Adjustable):
    """Token merging, the same number of tokens in every block.

    Attributes:
        ratio: share of an image's cells by which its tokens shrink in each block, rounded down; at most half of its
            tokens do.
        proportional: whether a token counts in the attention of blocks as many times as it stands for cells.

    Raises:
        ConfigError: for a ratio out of range.
    """

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"
    main_option: ClassVar[str] = "ratio"
    trials: ClassVar[tuple[Any, ...]] = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
    idle: ClassVar[float] = 0.0

    ratio: float = 0.02
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ratio", self.ratio, 0, 0.5, "0 merges nothing, 0.5 half of the tokens")

    def sites(self, depth: int) -> tuple[Site, ...]:
        weighs = self.proportional and self.ratio > 0  # else every token stands for itself
        return tuple(Site(n, inside=True, weighed=weighs and n > 0) for n in range(depth))

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        assert qkv is not None, "the site lies inside a block"
        patches, rows = tokens.patches(), tokens.patch_index()
        keys = qkv[:, 1].index_select(0, rows).float().mean(1)
        best, partner = bipartite(keys, patches.packing, tokens.num_prefix)
        count = torch.tensor([int(self.ratio * h * w + 1e-9) for h, w in tokens.grids], device=rows.device)
        joins = most_alike(best, patches.packing.image_index(), count)
        return tokens.merge(torch.where(joins, partner, torch.arange(len(partner), device=rows.device)))

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return bipartite_ops(live, backbone.num_prefix_tokens, backbone.embed_dim // backbone.num_heads)
