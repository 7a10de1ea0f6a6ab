"""A stage adapter maps the features of tokens that stopped at one exit to where the decode head looks for them.

Ours; DoViT's decode head reads features of several depths through one final norm, and was taught on those of the last
block alone.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops


class StageAdapter(nn.Module):
    """The adapter of an exit is a norm and a linear layer beside an identity: `y + W y + b` with `y = norm(x)`.

    It begins as the final norm alone, bit for bit in any precision: the norm is a copy, W and b are zero. Weight decay
    draws it back to there.

    Args:
        norm: final norm of the backbone, an identity where it has none.
        embed_dim: width C of the features.
    """

    def __init__(self, norm: nn.Module, embed_dim: int) -> None:
        super().__init__()
        self.norm = deepcopy(norm)
        self.linear = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features before the final norm, `(P, C)`, to `(P, C)`."""
        normed: Tensor = self.norm(x)
        return normed + self.linear(normed)  # type: ignore[no-any-return]

    def ops(self, tokens: int) -> Ops:
        """Count the work on so many tokens."""
        width = self.linear.in_features
        norm = ops.layer_norm(tokens, width) if isinstance(self.norm, nn.LayerNorm) else Ops()
        return norm + ops.linear(tokens, width, width)
