"""A transformer block over packed tokens: attention within each image, and an MLP.

Parameters carry timm's names. Legend: T live tokens of the batch, B images, C channels, N heads, H channels per head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenexit.engine import ops
from tokenexit.engine.attention import MaskedRows, masked_attention, packed_attention
from tokenexit.engine.ops import Ops
from tokenexit.engine.rope import Pairing, rotate
from tokenexit.engine.tokens import FrozenTokens, Packing, join_packed
from tokenexit.engine.vit_config import MlpKind


class KeysUnbiased(nn.Linear):
    """The projection to queries, keys and values whose bias leaves out the keys, whatever stands in their third."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.effective_bias())

    def effective_bias(self) -> Tensor:
        """Return the bias with zeros for the keys, `(3 C,)`."""
        q, k, v = self.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])


class Attention(nn.Module):
    """Multi-head self-attention over packed tokens, fused qkv."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        k_bias: bool = True,
        rope: Pairing | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.rope = num_heads, rope
        linear = nn.Linear if k_bias or not qkv_bias else KeysUnbiased
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, norm_eps)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, x: Tensor, phases: Tensor | None) -> Tensor:
        """Return the keys, rotated by `phases (T, 2 H)` if given, and values of `x (T, C)`: `(T, 2 C)`."""
        dim = x.shape[1]
        if isinstance(self.qkv, nn.Linear):
            bias = self.qkv.effective_bias() if isinstance(self.qkv, KeysUnbiased) else self.qkv.bias
            both = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        else:  # quantised, as one product
            both = self.qkv(x)[:, dim:]
        return both if phases is None else self.rotate(both, phases)

    def rotate(self, parts: Tensor, phases: Tensor) -> Tensor:
        """Rotate by the phases `(T, 2 H)` of their tokens all but the values, which come last.

        parts: queries, keys and values `(T, 3 C)`, or keys and values `(T, 2 C)`.
        """
        assert self.rope is not None
        *turning, values = parts.split(self.proj.in_features, dim=1)
        turned = [rotate(part.unflatten(1, (self.num_heads, -1)), phases, self.rope).flatten(1) for part in turning]
        return torch.cat([*turned, values], dim=1)

    def attend(
        self,
        qkv: Tensor,
        packing: Packing,
        masked: MaskedRows | None = None,
        weight: Tensor | None = None,
        frozen: tuple[Tensor, Packing] | None = None,
    ) -> Tensor:
        """Attend with `(T, 3 C)`; returns `(T, C)`, before the last projection; `masked` rows see some keys only.

        weight: of each token as a key, where none is masked. frozen: keys and values `(F, 2 C)` of tokens that are seen
        and do not see, with their packing, where none is masked; each counts once.
        """
        q_TNH, k_TNH, v_TNH = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if frozen is not None:
            return self._attend_beside(q_TNH, k_TNH, v_TNH, packing, weight, *frozen)
        if masked is not None:
            return masked_attention(q_TNH, k_TNH, v_TNH, packing, masked).flatten(1)
        return packed_attention(q_TNH, k_TNH, v_TNH, packing, packing, weight=weight).flatten(1)

    def _attend_beside(
        self,
        q_TNH: Tensor,
        k_TNH: Tensor,
        v_TNH: Tensor,
        packing: Packing,
        weight: Tensor | None,
        frozen: Tensor,
        packing_f: Packing,
    ) -> Tensor:
        """Attend to the tokens themselves and to frozen ones of their image."""
        own = torch.stack([k_TNH, v_TNH], dim=1)
        both, keys = join_packed(own, frozen.unflatten(1, (2, self.num_heads, -1)), packing, packing_f)
        k_TNH, v_TNH = both.unbind(1)
        if weight is not None:
            weight, _ = join_packed(weight, weight.new_ones(len(frozen)), packing, packing_f)
        return packed_attention(q_TNH, k_TNH, v_TNH, packing, keys, weight=weight).flatten(1)


class Mlp(nn.Module):
    """Two linear layers with GELU between, exact or by its tanh approximation."""

    def __init__(self, dim: int, hidden: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    """The gated MLP of DINOv2 giant: `fc2(silu(a) * b)` with `a, b = fc1(x)`; EVA-02 may norm what enters `fc2`."""

    def __init__(self, dim: int, hidden: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden // 2, norm_eps)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.silu(gate) * value))  # type: ignore[no-any-return]


def _mlp(kind: MlpKind, dim: int, hidden: int, sub_norm_eps: float | None) -> Mlp | SwiGlu:
    if kind == "swiglu":
        return SwiGlu(dim, hidden, sub_norm_eps)
    return Mlp(dim, hidden, "tanh" if kind == "gelu_tanh" else "none")


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def drop_path(probability: float, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Draw factors of stochastic depth on packed tokens, `(T, 1)`: one draw per image (Huang et al., 2016)."""
    keep = torch.rand(len(packing.lengths), device=packing.offsets.device) >= probability
    factor = keep.to(dtype) / (1.0 - probability)
    return factor.index_select(0, packing.image_index())[:, None]


def run_block(block: nn.Module, again: bool, x: Tensor, *rest: Any) -> Tensor:
    """Run a block on `x (T, C)` and further arguments; `again` computes it a second time in the backward pass."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, x, *rest, use_reentrant=False)  # type: ignore[no-any-return]
    return block(x, *rest)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens.

    `before` and `after` attention, rows are independent: neither part knows the packing, and both can be compiled for
    any number of rows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        mlp: MlpKind = "gelu",
        sub_norm: bool = False,
        qkv_bias: bool = True,
        k_bias: bool = True,
        attn_norm: bool = False,
        rope: Pairing | None = None,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        drop_path_attention: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.mlp_hidden = dim, mlp_hidden
        self.drop_path, self.drop_path_attention = drop_path, drop_path_attention
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, k_bias, rope, norm_eps if attn_norm else None)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = _mlp(mlp, dim, mlp_hidden, norm_eps if sub_norm else None)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        phases: Tensor | None = None,
        masked: MaskedRows | None = None,
        weight: Tensor | None = None,
        frozen: FrozenTokens | None = None,
    ) -> Tensor:
        """Run the block on packed tokens: `(T, C)` to `(T, C)`, with `phases (T, 2 H)` if positions are rotary.

        masked: rows that see some keys only. weight: `(T,)` of tokens as keys. frozen: tokens that are seen and do not
        see. See `Tokens`.
        """
        attended = self.attn.attend(self.before(x, phases), packing, masked, weight, self.seen(frozen))
        if not (self.training and self.drop_path > 0.0):
            return self.after(x, attended)
        first = drop_path(self.drop_path, packing, attended.dtype) if self.drop_path_attention else None
        return self.after(x, attended, first, drop_path(self.drop_path, packing, attended.dtype))

    def padded(self, x: Tensor, visible: Tensor, phases: Tensor | None = None) -> Tensor:
        """Run the block in evaluation on `(B, L, C)`, where keys are seen if `visible (B, 1, 1, L)`.

        phases: `(B, L, 2 H)` if positions are rotary.
        """
        rows = x.flatten(0, 1)
        qkv = (
            self.before(rows, None if phases is None else phases.flatten(0, 1))
            .unflatten(0, x.shape[:2])
            .unflatten(2, (3, self.attn.num_heads, -1))
        )
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, N, L, H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out = self.after(rows, attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return out.view_as(x)

    def before(self, x: Tensor, phases: Tensor | None = None) -> Tensor:
        """Compute queries, keys and values, rotated by `phases (T, 2 H)` if given: `(T, C)` to `(T, 3 C)`."""
        qkv: Tensor = self.attn.qkv(self.norm1(x))
        return qkv if phases is None else self.attn.rotate(qkv, phases)

    def seen(self, frozen: FrozenTokens | None) -> tuple[Tensor, Packing] | None:
        """Return the keys and values `(F, 2 C)` of frozen tokens, with their packing; None for none."""
        if frozen is None:
            return None
        return self.attn.keys_values(self.norm1(frozen.x), frozen.phases), frozen.packing

    def after(self, x: Tensor, attended: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        """Add the residual branches of attention and MLP, each times its factors `(T, 1)` of stochastic depth."""
        return self.feed(self.mix(x, attended, first), second)

    def mix(self, x: Tensor, attended: Tensor, factor: Tensor | None = None) -> Tensor:
        """Add the residual branch of attention."""
        branch = self.ls1(self.attn.proj(self.attn.norm(attended)))
        return x + (branch if factor is None else branch * factor)  # type: ignore[no-any-return]

    def feed(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Add the residual branch of the MLP."""
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if factor is None else branch * factor)  # type: ignore[no-any-return]

    def ops(self, tokens: int, fed: int | None = None) -> Ops:
        """Count the work on one image with this many tokens, prefix included.

        fed: tokens in the MLP, where some were merged before it; as many if not given.
        """
        gated = isinstance(self.mlp, SwiGlu)
        fed = tokens if fed is None else fed
        return (
            ops.layer_norm(tokens, self.dim + _width(self.attn.norm))
            + ops.layer_norm(fed, self.dim + (_width(self.mlp.norm) if isinstance(self.mlp, SwiGlu) else 0))
            + ops.linear(tokens, self.dim, 3 * self.dim)
            + ops.attention(tokens, tokens, self.dim)
            + ops.linear(tokens, self.dim, self.dim)
            + ops.linear(fed, self.dim, self.mlp_hidden)
            + ops.linear(fed, self.mlp_hidden // 2 if gated else self.mlp_hidden, self.dim)
        )

    def frozen_ops(self, tokens: int, frozen: int) -> Ops:
        """Count what so many tokens add to `ops` on one image that are keys and values alone."""
        return (
            ops.layer_norm(frozen, self.dim)
            + ops.linear(frozen, self.dim, 2 * self.dim)
            + ops.attention(tokens, frozen, self.dim)
        )


def _width(norm: nn.Module) -> int:
    """Return the channels that a norm inside a branch works on, 0 for none."""
    return norm.normalized_shape[0] if isinstance(norm, nn.LayerNorm) else 0
