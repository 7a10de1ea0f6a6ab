"""The attention-to-mask head of SegViT as DToP uses it: a learned query per class, no positions, any set of tokens.

Source: `PruneHead` of DToP's release.

Legend: P live patch tokens of the batch, B images, K classes, d width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.attention import packed_attention, segment_matmul
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Packing, Tokens
from tokenexit.heads.base import (
    Head,
    HeadOutput,
    ScoreKind,
    attention_heads,
    check_head_options,
    check_head_rate,
    init_linear,
)


class ATMHead(Head):
    """Class queries attend to tokens; the last cross-attention's scores are the mask logits.

    channels: d, half the backbone's width if not given. layers: decoder layers. num_heads: attention heads, 64
    channels each if not given. dropout: in self-attention, cross-attention and MLP, 0.1 as published.
    """

    kind: ScoreKind = "atm"  # type: ignore[misc]

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        channels: int | None = None,
        layers: int = 3,
        num_heads: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes)
        d = embed_dim // 2 if channels is None else channels
        check_head_options("atm", channels=d, layers=layers)
        check_head_rate("atm", "dropout", dropout)
        heads = attention_heads("atm", d, num_heads)
        self.input_proj = nn.Linear(embed_dim, d)
        self.input_norm = nn.LayerNorm(d)
        self.queries = nn.Embedding(num_classes, d)
        self.layers = nn.ModuleList(ATMLayer(d, heads, dropout) for _ in range(layers))
        self.presence = nn.Linear(d, 2)
        init_linear(self)

    def forward(self, tokens: Tokens) -> HeadOutput:
        images = len(tokens.grids)
        memory = self.input_norm(self.input_proj(tokens.x))  # (P, d)
        queries = self.queries.weight.expand(images, -1, -1)  # (B, K, d)
        logits = memory.new_empty(0)
        for layer in self.layers:
            last = layer is self.layers[-1]
            queries, logits = layer(queries, memory, tokens.packing, with_mask=last)
        return HeadOutput(logits, tokens.packing, self.presence(queries))

    def ops(self, tokens: int, grid: Grid) -> Ops:
        classes, d = self.queries.weight.shape
        layer = self.layers[0]
        assert isinstance(layer, ATMLayer)
        mask = ops.linear(tokens, d, classes)
        return (
            ops.linear(tokens, self.input_proj.in_features, d)
            + ops.layer_norm(tokens, d)
            + layer.ops(classes, tokens, d) * len(self.layers)
            # The fused kernel does not hand out its scores, so the last q k^T is taken a second time.
            + Ops(macs=mask.macs, repeated=mask.macs)
            + ops.linear(classes, d, 2)
        )


class ATMLayer(nn.Module):
    """The post-norm decoder layer applies self-attention, cross-attention and a ReLU MLP."""

    def __init__(self, d: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.self_qkv = nn.Linear(d, 3 * d)
        self.self_proj = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d)
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)
        self.norm3 = nn.LayerNorm(d)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor, packing: Packing, with_mask: bool) -> tuple[Tensor, Tensor]:
        """Turn queries `(B, K, d)` and memory `(P, d)` into new queries and, if asked, mask logits `(P, K)`."""
        queries = self.norm1(queries + self.drop(self._self_attention(queries)))
        q, k, v = self.q(queries), self.k(memory), self.v(memory)
        queries = self.norm2(queries + self.drop(self._cross_attention(q, k, v, packing)))
        queries = self.norm3(queries + self.drop(self.fc2(self.drop(F.relu(self.fc1(queries))))))
        return queries, self._mask_logits(q, k, packing) if with_mask else memory.new_empty(0)

    def _self_attention(self, queries: Tensor) -> Tensor:
        q, k, v = self.self_qkv(queries).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.self_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        images, classes, _ = q.shape
        packing_q = Packing.of([classes] * images, q.device)
        heads = (self.num_heads, -1)
        out = packed_attention(
            q.flatten(0, 1).unflatten(1, heads),
            k.unflatten(1, heads),
            v.unflatten(1, heads),
            packing_q,
            packing,
            self.dropout if self.training else 0.0,
        )
        return self.proj(out.flatten(1)).unflatten(0, (images, classes))  # type: ignore[no-any-return]

    def _mask_logits(self, q: Tensor, k: Tensor, packing: Packing) -> Tensor:
        """Take the mean over heads of the scaled q k^T. Summed over heads it is one full-width product."""
        head_dim = q.shape[-1] // self.num_heads
        return segment_matmul(k, q * (head_dim**-0.5 / self.num_heads), packing)

    def ops(self, classes: int, tokens: int, d: int) -> Ops:
        return (
            ops.linear(classes, d, 3 * d)
            + ops.attention(classes, classes, d)
            + ops.linear(classes, d, d)
            + ops.linear(classes, d, d)
            + 2 * ops.linear(tokens, d, d)
            + ops.attention(classes, tokens, d)
            + ops.linear(classes, d, d)
            + 2 * ops.linear(classes, d, 4 * d)
            + 3 * ops.layer_norm(classes, d)
        )
