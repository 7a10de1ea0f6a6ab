"""Zero-TPrune: tokens that attention ranks low, or that resemble others, are dropped (Wang, Dedhia, Jha; CVPR 2024).

**Our reading**: no official code was in reach, and what is uncertain is said below. It needs no training. Behind the
attention of some blocks:

    I'  rank all tokens by one step of PageRank on the attention matrices
    S   sort by rank and cut in halves; of the lower half the tokens whose keys are most like one of the upper half go
    I   rank the tokens that are left by several steps, and drop the lowest until a share of those that came is left

*Weighted PageRank* of a head: `s <- A^T s` from equal ranks, for attention `A` with rows that sum to one. Ranks of
heads are joined as the root of their mean square; heads whose ranks vary too little or too much are left out.

From two sets of third-party notes that agree: the order of stages, the iteration, the root mean square, the bounds of
the variance, and its iterations, 30 to 50 in the first three blocks, 5 to 10 in the middle and 1 in the last three.
Read by us, as the notes leave it open:

- ranks have mean one: for ranks that sum to one the published bounds [0.01, 0.7] would leave out every head. If no head
  is within them, all count;
- stage I uses the attention among the tokens that are left, whose rows sum to one again;
- keys are compared with those of all heads side by side;
- all tokens start equal; for classification the class token starts higher. Prefix tokens take part and are never
  dropped;
- the published places and shares come from a search and are not known; tokens go before the block's MLP, not behind it;
- the paper classifies images. Here a dropped token's cells are answered by the one whose key was most like its own: in
  stage S that which made it go, in stage I of all that stay.

With `share_similar=0` PageRank alone decides: the ranks as a score, at the counts of any other method. The attention
matrix exists again, a head and an image at a time, and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.reducers.base import Adjustable, Site, check_number
from tokenexit.reducers.matching import nearest, unit

Number = TypeVar("Number", int, float)
LEAST_VARIANCE, MOST_VARIANCE = 0.01, 0.7
"""Bounds of the variance of a head's ranks, of mean one; outside them it says nothing, or one thing."""


@dataclass(frozen=True)
class ZeroTPrune(Adjustable):
    """Pruning by the attention graph.

    Attributes:
        keep: share of the patch tokens that come to a place and go on, rounded down, one at least; one share for all
            places or one for each.
        blocks: numbers of the blocks in which tokens are dropped, 1 the first.
        iterations: steps of PageRank in stage I, one number for all places or one for each.
        share_similar: share of the dropped tokens that stage S drops, to the nearest whole number.

    Raises:
        ConfigError: for a value out of range, and for numbers that do not belong together.
    """

    name: ClassVar[str] = "zerotprune"
    title: ClassVar[str] = "Zero-TPrune"
    main_option: ClassVar[str] = "keep"
    trials: ClassVar[tuple[Any, ...]] = ((0.95,), (0.9,), (0.8,), (0.7,), (0.6,), (0.5,))
    idle: ClassVar[float] = 1.0

    keep: tuple[float, ...] = (0.7,)
    blocks: tuple[int, ...] = (3, 6, 9)
    iterations: tuple[int, ...] = (30, 5, 5)
    share_similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.keep:
            check_number("keep", share, 0, 1, "1 drops nothing")
        check_number("share_similar", self.share_similar, 0, 1, "0 drops by rank alone")
        if any(n < 1 for n in self.blocks) or list(self.blocks) != sorted(set(self.blocks)):
            raise ConfigError(f"blocks must be increasing numbers of blocks, got {self.blocks}: write (3, 6, 9).")
        if any(n < 1 for n in self.iterations):
            raise ConfigError(f"iterations must be at least 1, got {self.iterations}: write (30, 5, 5).")
        for name in ("keep", "iterations"):
            if len(getattr(self, name)) not in (1, len(self.blocks)):
                raise ConfigError(
                    f"{name} must be one number or one for each of {len(self.blocks)} blocks, got "
                    f"{len(getattr(self, name))}: give as many."
                )

    def sites(self, depth: int) -> tuple[Site, ...]:
        return tuple(Site(block - 1, inside=True) for block in self.blocks)

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        assert qkv is not None, "the site lies inside a block"
        images = qkv.detach()[:, :2].float().split(tokens.packing.lengths)
        into = [self._into(site, q, k, tokens.num_prefix) for q, k in (image.unbind(1) for image in images)]
        first = [0, *accumulate(map(len, into))]
        target = torch.cat([torch.empty(0, dtype=torch.int64, device=qkv.device), *map(torch.add, into, first)])
        stays = target == torch.arange(len(target), device=target.device)
        return tokens.merge(target, stays.float())

    @torch.no_grad()
    def _into(self, site: Site, q: Tensor, k: Tensor, prefix: int) -> Tensor:
        """Return, for each patch of one image, the row of the patch that answers for it, `(P,)` int64.

        q, k: of all its tokens, `(prefix + P, N, H)` fp32.
        """
        own = torch.arange(len(q) - prefix, device=q.device)
        similar, going = self._counts(site, len(own))
        keys = unit(k[prefix:].flatten(1))

        # I' and S: of the lower half, those most like one of the upper half go.
        into = own
        if similar:
            lower, upper = page_rank(q, k, 1)[prefix:].argsort(stable=True).tensor_split([len(own) // 2])
            lower, upper = lower.sort().values, upper.sort().values
            alike, match = nearest(keys[lower], keys[upper])
            gone = alike.argsort(descending=True, stable=True)[:similar]
            into = into.index_copy(0, lower[gone], upper[match[gone]])

        # I: among those left the lowest go.
        left = torch.cat([torch.arange(prefix, device=q.device), prefix + own[into == own]])
        if len(left) - prefix == going:
            return into
        order = page_rank(q[left], k[left], _at(self.iterations, self.blocks, site))[prefix:].argsort(stable=True)
        gone, stay = (left[prefix:][rows] - prefix for rows in order.tensor_split([len(order) - going]))
        stay = stay.sort().values
        into = into.index_copy(0, gone, stay[nearest(keys[gone], keys[stay])[1]])
        return into[into]

    def _counts(self, site: Site, live: int) -> tuple[int, int]:
        """Return how many patches of so many stage S drops, and how many go on from the site."""
        going = max(min(live, 1), int(_at(self.keep, self.blocks, site) * live + 1e-9))
        return min(round(self.share_similar * (live - going)), live // 2), going

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        similar, going = self._counts(site, live)
        heads, width, prefix = backbone.num_heads, backbone.embed_dim, backbone.num_prefix_tokens
        left, macs = live - similar, 0
        if similar:
            macs += rank_macs(prefix + live, heads, width, 1) + (live // 2) * (live - live // 2) * width
        if left > going:
            steps = _at(self.iterations, self.blocks, site)
            macs += rank_macs(prefix + left, heads, width, steps) + (left - going) * going * width
        return Ops(macs=macs)


@torch.no_grad()
def page_rank(q: Tensor, k: Tensor, iterations: int) -> Tensor:
    """Return the rank of each token in the graph of attention, of mean one in each head: `(T, N, H)` to `(T,)` fp32.

    Ranks of heads are joined as the root of their mean square, without heads whose variance is out of bounds.
    """
    ranks = []
    with torch.autocast(q.device.type, enabled=False):
        for head in range(q.shape[1]):  # one matrix at a time
            attention = (q[:, head] @ k[:, head].T * q.shape[2] ** -0.5).softmax(-1)
            rank = torch.ones(len(q), 1, device=q.device)
            for _ in range(iterations):
                rank = attention.T @ rank
            ranks.append(rank[:, 0])
    by_head = torch.stack(ranks)
    variance = by_head.var(1, correction=0)
    counts = (variance >= LEAST_VARIANCE) & (variance <= MOST_VARIANCE)
    counts = counts | ~counts.any()
    joined: Tensor = ((by_head**2 * counts[:, None]).sum(0) / counts.sum()).sqrt()
    return joined


def _at(values: tuple[Number, ...], blocks: tuple[int, ...], site: Site) -> Number:
    """Return the value of a site's block, of one for all or one for each."""
    return values[0] if len(values) == 1 else values[blocks.index(site.after + 1)]


def rank_macs(tokens: int, heads: int, width: int, iterations: int) -> int:
    """Count `page_rank`: the attention matrices of all heads, and their products with the ranks."""
    return tokens * tokens * (width + heads * iterations)
