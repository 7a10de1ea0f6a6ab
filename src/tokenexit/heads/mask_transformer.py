"""Segmenter's mask transformer: class embeddings join the tokens for a few blocks, and masks are inner products."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.engine import ops
from tokenexit.engine.attention import segment_matmul
from tokenexit.engine.block import Block
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.heads.base import Head, HeadOutput, attention_heads, check_head_options, check_head_rate, init_linear


class MaskTransformerHead(Head):
    """The head works on any set of tokens, since its attention has no positions.

    channels: width, the backbone's if not given. layers: 2 as published. num_heads: 64 channels each if not given.
    drop_path: probability in training to drop the MLP branch of the last layer, for each image by itself and linear
        over the layers from 0; off if not given, 0.1 in mmsegmentation (`decode_heads/segmenter_mask_head.py`).
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        channels: int | None = None,
        layers: int = 2,
        num_heads: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        d = embed_dim if channels is None else channels
        check_head_options("mask_transformer", channels=d, layers=layers)
        check_head_rate("mask_transformer", "drop_path", drop_path)
        heads = attention_heads("mask_transformer", d, num_heads)
        self.proj = nn.Linear(embed_dim, d)
        self.queries = nn.Embedding(num_classes, d)
        rates = [drop_path * i / max(layers - 1, 1) for i in range(layers)]
        self.blocks = nn.ModuleList(
            Block(d, heads, 4 * d, norm_eps=1e-5, drop_path=rate, drop_path_attention=False) for rate in rates
        )
        self.norm = nn.LayerNorm(d)
        self.patch_proj = nn.Linear(d, d, bias=False)
        self.class_proj = nn.Linear(d, d, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        init_linear(self)

    def forward(self, tokens: Tokens) -> HeadOutput:
        joined = self._join(tokens)
        x = joined.x
        for block in self.blocks:
            x = block(x, joined.packing)
        x = self.norm(x)
        classes = self.queries.num_embeddings
        queries = self.class_proj(x.index_select(0, joined.prefix_index())).unflatten(0, (-1, classes))
        patches = self.patch_proj(x.index_select(0, joined.patch_index()))
        # Lower precision is not enough for the unit length that the inner product relies on.
        queries = F.normalize(queries.float(), dim=-1)
        patches = F.normalize(patches.float(), dim=-1)
        masks = segment_matmul(patches, queries, tokens.packing).to(x.dtype)
        return HeadOutput(self.mask_norm(masks), tokens.packing)

    def _join(self, tokens: Tokens) -> Tokens:
        """Puts the class embeddings in front of every image, as prefix tokens."""
        x = self.proj(tokens.x)
        queries = self.queries.weight.to(x.dtype)
        classes, minus_one = queries.shape[0], tokens.position.new_full((queries.shape[0],), -1)
        lengths = tokens.packing.lengths
        rows = [part for image in x.split(lengths) for part in (queries, image)]
        position = [part for image in tokens.position.split(lengths) for part in (minus_one, image)]
        packing = tokens.packing.behind(classes)
        x, where = torch.cat(rows), torch.cat(position)  # these blocks have no rotary positions
        return replace(tokens, x=x, position=where, packing=packing, num_prefix=classes, phases=None)

    def ops(self, tokens: int, grid: Grid) -> Ops:
        classes, d = self.queries.weight.shape
        block = self.blocks[0]
        assert isinstance(block, Block)
        return (
            ops.linear(tokens, self.proj.in_features, d)
            + block.ops(tokens + classes) * len(self.blocks)
            + ops.layer_norm(tokens + classes, d)
            + ops.linear(tokens + classes, d, d)
            + ops.linear(tokens, d, classes)
            + ops.layer_norm(tokens, classes)
        )
