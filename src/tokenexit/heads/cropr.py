"""Cropr's exit head: queries that learn the task from tokens, and whose sum scores them (Bergner et al., CVPR 2025)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens, cell_packing
from tokenexit.heads.base import Head, HeadOutput, check_head_options, init_linear


class CroprHead(Head):
    """The head scores tokens by one inner product, and has a map of classes for its loss alone.

    One query for each patch of a training crop attends to the tokens, with neither projection nor norm; an MLP, a
    LayerNorm and a linear layer make its class. Queries and what they attend to learn nothing to the backbone: the
    input is detached. The map of another grid is resized; that is ours, the release trains at one size.

    rows, columns: grid of the queries, that of the patches of a training crop; 32 x 32 as published, for 512 pixels.
    """

    needs_grid = True  # it answers for the whole grid, whatever tokens it sees

    def __init__(self, embed_dim: int, num_classes: int, rows: int = 32, columns: int = 32) -> None:
        super().__init__(num_classes)
        check_head_options("cropr", rows=rows, columns=columns)
        self.rows, self.columns = rows, columns
        self.queries = nn.Embedding(rows * columns, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.classifier = nn.Linear(embed_dim, num_classes)
        init_linear(self)

    def score(self, x: Tensor) -> Tensor:
        """Return the sum over queries of inner products, fp32 under any autocast: `(P, C)` to `(P,)`."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.detach().float() @ self.queries.weight.detach().float().sum(0)[:, None])[:, 0]

    def score_ops(self, tokens: int) -> Ops:
        """Count `score`; the sum of the queries is known before."""
        return ops.linear(tokens, self.queries.embedding_dim, 1)

    def forward(self, tokens: Tokens) -> HeadOutput:
        queries = self.queries.weight * self.queries.embedding_dim**-0.5
        images = tokens.x.detach().split(tokens.packing.lengths)
        x = torch.stack([(queries.to(image.dtype) @ image.T).softmax(-1) @ image for image in images])  # (B, M, C)
        x = x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))
        maps = self.classifier(self.norm(x)).transpose(1, 2).unflatten(2, (self.rows, self.columns))
        rows = [self._on_grid(one, grid) for one, grid in zip(maps, tokens.grids)]
        return HeadOutput(torch.cat(rows), cell_packing(tokens))

    def _on_grid(self, logits: Tensor, grid: Grid) -> Tensor:
        """Return a map `(K, rows, columns)` at the cells of a grid, `(h w, K)`."""
        if grid != (self.rows, self.columns):
            logits = F.interpolate(logits[None], grid, mode="bilinear", align_corners=False)[0]
        return logits.flatten(1).T

    def ops(self, tokens: int, grid: Grid) -> Ops:
        number, dim = self.queries.weight.shape
        return (
            ops.attention(number, tokens, dim)
            + ops.layer_norm(number, 2 * dim)
            + ops.linear(number, dim, 4 * dim) * 2
            + ops.linear(number, dim, self.num_classes)
        )
