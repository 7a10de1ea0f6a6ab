"""The plain Vision Transformer over packed tokens.

Parameters carry timm's names, so that timm weights load as they are. The backbone knows no heads and no methods: it
embeds images, and runs a span of blocks over whatever tokens are live.

Legend: T live tokens of the batch, B images, C channels, N heads, H channels per head, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from types import MethodType
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenexit.engine import ops
from tokenexit.engine.attention import MaskedRows, masked_attention, packed_attention
from tokenexit.engine.cuda_graphs import STEP, CapturedBlocks, Record, cuda_graphs
from tokenexit.engine.ops import Ops
from tokenexit.engine.rope import Pairing, PeriodPrecision, Places, rope_periods, rope_phases, rotate
from tokenexit.engine.tokens import Grid, Packing, Tokens, group_equal
from tokenexit.engine.window_policy import WindowPolicy, nested
from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import Between, Share, check_fields

Side = Annotated[int, Between(1, 1024)]
MlpKind = Literal["gelu", "gelu_tanh", "swiglu"]
Projected = list[tuple[list[int], Tensor]]
"""Projected patches of images: the indices of those of one size, and their maps `(b, C, h, w)`."""


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a plain ViT. Defaults are timm's `vit_*_patch16_224`.

    Every field is checked for its type and bounds, which leave room beyond any published ViT.

    Attributes:
        embed_dim: width C of the tokens, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        patch_size: side of a square patch in pixels.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        mlp: "gelu", "gelu_tanh" (SigLIP 2), or "swiglu" (DINOv2 giant, EVA-02; `mlp_ratio` then counts both gates).
        sub_norm: LayerNorm before the MLP's last layer (EVA-02 B and L), with "swiglu" alone.
        qkv_bias: biases in the projection to queries, keys and values.
        k_bias: off, that of keys stays zero (DINOv3). It would cancel in the softmax, but for rotary positions.
        attn_norm: LayerNorm before the last projection of attention (the CLIP towers of EVA-02).
        layer_scale: start value of LayerScale (timm's `init_values`), None without it (DeiT-3, DINOv2 have it).
        class_token: a class token in front of the patches; DoViT needs one, DToP runs without.
        num_registers: number of register tokens (timm's `reg_tokens`).
        norm_pre: LayerNorm before the first block; patches then have no bias (Perception Encoder).
        final_norm: LayerNorm after the last block, before the decode head.
        norm_eps: epsilon of all LayerNorms.
        rope: rotary positions in every block, None without them (DINOv3 has "half"): which channels of a head make a
            pair, "half" (j and j + H / 2) or "interleaved" (2 j and 2 j + 1).
        rope_theta: longest period of theirs, over the shortest.
        rope_reference: None for centres of patches in [-1, 1], of which the shortest period is one half of the side
            (DINOv3); else the side of a grid to which each axis is stretched, with a patch as radian (EVA-02: 16).
        rope_offset: with a reference, number of patches before the first (Perception Encoder: 1).
        rope_column_first: the first half of each head's angles is the column's, not the row's (Perception Encoder).
        rope_periods: "bf16" rounds the periods as the files of DINOv3's release do, which its own code then reads;
            timm and transformers compute them in fp32.
        rope_rescale: in training, coordinates of each call are multiplied by one factor, log-uniform between the
            inverse of this and this; 1 for none (DINOv3 was trained with 2).
        pos_embed: a learned position table; DINOv3 has rotary positions alone.
        pos_embed_grid: rows and columns of the position table.
        pos_embed_prefix: whether the table's first row belongs to the class token (timm's `no_embed_class=False`).
        pos_embed_mode: interpolation to another grid, "bicubic" or "bilinear" (SETR).
        pos_embed_antialias: antialiasing in it, as timm does.
        pos_embed_offset: added to the target size; 0.1 in DINOv2 without registers.
        drop_path: probability of dropping a residual branch at the last block, linear over the depth from 0.
        drop_path_attention: drop attention branches too; the releases of DToP and DoViT drop MLP branches alone, as
            mmsegmentation does.
        window_policy: sides in patches of the windows of which a small network says whether they may share a token, see
            `WindowPolicy`; none without it.

    Raises:
        ConfigError: for a field outside its type or bounds, and for fields that contradict each other.
    """

    embed_dim: Annotated[int, Between(1, 8192)] = 192
    depth: Annotated[int, Between(1, 128)] = 12
    num_heads: Annotated[int, Between(1, 512)] = 3
    patch_size: Annotated[int, Between(1, 256)] = 16
    mlp_ratio: Annotated[float, Between(0, 64)] = 4.0
    mlp: MlpKind = "gelu"
    sub_norm: bool = False
    qkv_bias: bool = True
    k_bias: bool = True
    attn_norm: bool = False
    layer_scale: float | None = None
    class_token: bool = True
    num_registers: Annotated[int, Between(0, 1024)] = 0
    norm_pre: bool = False
    final_norm: bool = True
    norm_eps: Annotated[float, Between(0, 1)] = 1e-6
    rope: Pairing | None = None
    rope_theta: Annotated[float, Between(1, 1e6)] = 100.0
    rope_periods: PeriodPrecision = "fp32"
    rope_reference: Annotated[float, Between(1, 65535)] | None = None
    rope_offset: Annotated[float, Between(0, 65535)] = 0.0
    rope_column_first: bool = False
    rope_rescale: Annotated[float, Between(1, 1000)] = 1.0
    pos_embed: bool = True
    pos_embed_grid: tuple[Side, Side] = (14, 14)
    pos_embed_prefix: bool = True
    pos_embed_mode: Literal["bicubic", "bilinear"] = "bicubic"
    pos_embed_antialias: bool = True
    pos_embed_offset: Share = 0.0
    drop_path: Share = 0.0
    drop_path_attention: bool = True
    window_policy: tuple[Side, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "pos_embed_grid", tuple(self.pos_embed_grid))
        object.__setattr__(self, "window_policy", tuple(self.window_policy))
        if not nested(self.window_policy):
            raise ConfigError(
                f"window_policy must be sides of windows that nest, got {self.window_policy}: write (2, 4)."
            )
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim must be a multiple of num_heads={self.num_heads}, got {self.embed_dim}: change either."
            )
        if self.rope is not None and self.head_dim % 4:
            raise ConfigError(
                f"rope turns pairs of channels on two axes, and heads have {self.head_dim} channels: choose num_heads "
                "so that each has a multiple of 4."
            )
        if self.rope is None and not self.pos_embed:
            raise ConfigError("pos_embed=False leaves tokens without a place: set rope, or leave the table on.")
        if self.rope_offset and self.rope_reference is None:
            raise ConfigError(
                f"rope_offset={self.rope_offset} moves patches of a reference grid: set rope_reference, or leave it 0."
            )
        if self.sub_norm and self.mlp != "swiglu":
            raise ConfigError(f"sub_norm stands behind a gate, and mlp is '{self.mlp}': set mlp to swiglu.")
        for name in ("mlp_ratio", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}: leave it at its default.")
        if self.mlp_hidden < 2:
            raise ConfigError(
                f"mlp_ratio={self.mlp_ratio} leaves an MLP of {self.mlp_hidden} channels beside embed_dim="
                f"{self.embed_dim}: raise it."
            )
        if self.drop_path == 1.0:
            raise ConfigError(f"drop_path must be in [0, 1), got {self.drop_path}: choose a value such as 0.1.")

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens in front of the patches of each image."""
        return int(self.class_token) + self.num_registers

    @property
    def head_dim(self) -> int:
        """Number of channels per attention head."""
        return self.embed_dim // self.num_heads

    @property
    def places(self) -> Places:
        """Coordinates of rotary positions."""
        return Places(self.rope_reference, self.rope_offset, self.rope_column_first)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON holds them; the sides of a policy only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "window_policy" or value}


_TINY = ViTConfig()
_SMALL = ViTConfig(embed_dim=384, num_heads=6)
_BASE = ViTConfig(embed_dim=768, num_heads=12)
_LARGE = ViTConfig(embed_dim=1024, num_heads=16, depth=24)


def _deit3(size: ViTConfig) -> ViTConfig:
    return replace(size, layer_scale=1e-6, pos_embed_prefix=False)


def _dinov2(size: ViTConfig) -> ViTConfig:
    return replace(
        size,
        patch_size=14,
        layer_scale=1e-5,
        pos_embed_grid=(37, 37),
        pos_embed_antialias=False,
        pos_embed_offset=0.1,
    )


def _dinov2_reg(size: ViTConfig) -> ViTConfig:
    return replace(
        _dinov2(size),
        num_registers=4,
        pos_embed_prefix=False,
        pos_embed_antialias=True,
        pos_embed_offset=0.0,
    )


def _dinov3(size: ViTConfig, **changes: Any) -> ViTConfig:
    return replace(
        size,
        layer_scale=1e-5,
        num_registers=4,
        norm_eps=1e-5,
        k_bias=False,
        rope="half",
        pos_embed=False,
        **changes,
    )


def _eva02(size: ViTConfig, hidden: int, **changes: Any) -> ViTConfig:
    """Return EVA-02 at 224 px; `hidden` of each gate."""
    return replace(
        size,
        patch_size=14,
        mlp="swiglu",
        mlp_ratio=2 * hidden / size.embed_dim,
        k_bias=False,
        final_norm=False,
        rope="interleaved",
        rope_theta=10000.0,
        rope_reference=16.0,
        pos_embed_grid=(16, 16),
        **changes,
    )


def _pe(size: ViTConfig, side: int, **changes: Any) -> ViTConfig:
    """Return a Perception Encoder (Bolya et al., 2025), whose table and reference grid have this side."""
    return replace(
        size,
        norm_pre=True,
        norm_eps=1e-5,
        rope="interleaved",
        rope_theta=10000.0,
        rope_reference=float(side),
        rope_offset=1.0,
        rope_column_first=True,
        pos_embed_grid=(side, side),
        **changes,
    )


_GATED: dict[str, Any] = {"mlp": "swiglu", "mlp_ratio": 8.0}
_HUGE = ViTConfig(embed_dim=1280, num_heads=20, depth=32)
_7B = ViTConfig(embed_dim=4096, num_heads=32, depth=40, qkv_bias=False)
_SO400M = ViTConfig(
    embed_dim=1152,
    num_heads=16,
    depth=27,
    mlp="gelu_tanh",
    mlp_ratio=3.7362,
    class_token=False,
    pos_embed_prefix=False,
    pos_embed_grid=(16, 16),
)
_GIANT = ViTConfig(embed_dim=1536, num_heads=24, depth=40, mlp="swiglu", mlp_ratio=2.66667 * 2)

PRESETS: dict[str, ViTConfig] = {
    "vit_tiny_patch16": _TINY,
    "vit_small_patch16": _SMALL,
    "vit_base_patch16": _BASE,
    "vit_large_patch16": _LARGE,
    "deit3_small_patch16": _deit3(_SMALL),
    "deit3_base_patch16": _deit3(_BASE),
    "deit3_large_patch16": _deit3(_LARGE),
    "dinov2_small_patch14": _dinov2(_SMALL),
    "dinov2_base_patch14": _dinov2(_BASE),
    "dinov2_large_patch14": _dinov2(_LARGE),
    "dinov2_giant_patch14": _dinov2(_GIANT),
    "dinov2_small_patch14_reg4": _dinov2_reg(_SMALL),
    "dinov2_base_patch14_reg4": _dinov2_reg(_BASE),
    "dinov2_large_patch14_reg4": _dinov2_reg(_LARGE),
    "dinov2_giant_patch14_reg4": _dinov2_reg(_GIANT),
    "dinov3_vits16": _dinov3(_SMALL),
    "dinov3_vits16plus": _dinov3(_SMALL, **_GATED),
    "dinov3_vitb16": _dinov3(_BASE),
    "dinov3_vitl16": _dinov3(_LARGE),
    "dinov3_vitl16plus": _dinov3(_LARGE, **_GATED),
    "dinov3_vith16plus": _dinov3(_HUGE, **_GATED),
    "dinov3_vit7b16": _dinov3(_7B, mlp="swiglu", mlp_ratio=4.0),
    "eva02_tiny_patch14": _eva02(_TINY, 512),
    "eva02_small_patch14": _eva02(_SMALL, 1024),
    "eva02_base_patch14": _eva02(_BASE, 2048, sub_norm=True),
    "eva02_large_patch14": _eva02(_LARGE, 2730, sub_norm=True),
    "pe_spatial_tiny_patch16": _pe(_TINY, 32, final_norm=False),
    "pe_spatial_small_patch16": _pe(_SMALL, 32, final_norm=False),
    "pe_spatial_base_patch16": _pe(_BASE, 32, final_norm=False),
    "pe_spatial_large_patch14": _pe(_LARGE, 32, final_norm=False, patch_size=14),
    "pe_core_base_patch16": _pe(_BASE, 14),
    "pe_core_large_patch14": _pe(_LARGE, 24, patch_size=14),
    "siglip2_so400m_patch16": _SO400M,
}


def vit_config(backbone: str | ViTConfig, **changes: Any) -> ViTConfig:
    """Return a preset by name with some fields changed: `vit_config("vit_tiny_patch16", class_token=False)`."""
    if isinstance(backbone, str):
        if backbone not in PRESETS:
            raise ConfigError(f"backbone '{backbone}' is unknown: choose one of {', '.join(PRESETS)}.")
        backbone = PRESETS[backbone]
    known = {f.name for f in fields(ViTConfig)}
    for name in changes:
        if name not in known:
            raise ConfigError(f"a backbone has no option '{name}': see ViTConfig.")
    return replace(backbone, **changes)


def resize_pos_embed(
    table: Tensor,
    old: Grid,
    new: Grid,
    mode: str = "bicubic",
    antialias: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """Resize the patch rows `(1, h w, C)` of a position table from grid `old` to grid `new`.

    offset: DINOv2 scales by `(new + offset) / old` instead of `new / old`, against rounding in its own code.
    """
    if old == new:
        return table
    maps = table.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    if offset:
        scale = [(n + offset) / o for n, o in zip(new, old)]
        maps = F.interpolate(maps, scale_factor=scale, mode=mode, antialias=antialias, align_corners=False)
        if maps.shape[2:] != torch.Size(new):
            raise ConfigError(
                f"pos_embed_offset={offset} gives a {tuple(maps.shape[2:])} table for a {new} grid: "
                "use an offset below 1."
            )
    else:
        maps = F.interpolate(maps, size=new, mode=mode, antialias=antialias, align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(table.dtype)


class PatchEmbed(nn.Module):
    """Projection of non-overlapping patches to vectors.

    Images that are no multiple of the patch are padded right and below with zeros (the mean colour after
    normalisation).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=not config.norm_pre)

    def grid(self, height: int, width: int) -> Grid:
        """Return (rows, columns) of patches of an image of this size in pixels."""
        p = self.patch_size
        return (height + p - 1) // p, (width + p - 1) // p  # graphs divide towards zero: no negative numbers

    def forward(self, images: Tensor) -> Tensor:
        """Embed images `(B, 3, H, W)` as `(B, C, h, w)`."""
        height, width = images.shape[2:]
        h, w = self.grid(height, width)
        images = F.pad(images, (0, w * self.patch_size - width, 0, h * self.patch_size - height))
        return self.proj(images)  # type: ignore[no-any-return]


class KeysUnbiased(nn.Linear):
    """The projection to queries, keys and values whose bias leaves out the keys, whatever stands in their third."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([q, torch.zeros_like(k), v]))


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

    def rotate(self, qkv: Tensor, phases: Tensor) -> Tensor:
        """Rotate queries and keys `(T, 3 C)` by the phases `(T, 2 H)` of their tokens."""
        assert self.rope is not None
        q, k, v = qkv.chunk(3, dim=1)
        q, k = (rotate(part.unflatten(1, (self.num_heads, -1)), phases, self.rope).flatten(1) for part in (q, k))
        return torch.cat([q, k, v], dim=1)

    def attend(
        self, qkv: Tensor, packing: Packing, masked: MaskedRows | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Attend with `(T, 3 C)`; returns `(T, C)`, before the last projection; `masked` rows see some keys only.

        weight: of each token as a key, where none is masked.
        """
        q_TNH, k_TNH, v_TNH = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        if masked is not None:
            return masked_attention(q_TNH, k_TNH, v_TNH, packing, masked).flatten(1)
        return packed_attention(q_TNH, k_TNH, v_TNH, packing, packing, weight=weight).flatten(1)


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
    ) -> Tensor:
        """Run the block on packed tokens: `(T, C)` to `(T, C)`, with `phases (T, 2 H)` if positions are rotary.

        masked: rows that see some keys only. weight: `(T,)` of tokens as keys, see `Tokens`.
        """
        attended = self.attn.attend(self.before(x, phases), packing, masked, weight)
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


class ViT(nn.Module):
    """The backbone: `embed` turns images into tokens, `run` applies a span of blocks, `norm` ends it if configured."""

    pos_embed: nn.Parameter
    """The position table `(1, prefix rows + h w, C)`; None where the configuration has none."""
    window_policy: WindowPolicy | None
    """The network that chooses windows for `Supertokens`, which learns apart from the rest; None without one."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, (rows, columns) = config.embed_dim, config.pos_embed_grid
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim))
        table = torch.empty(1, rows * columns + self.pos_embed_prefix, dim) if config.pos_embed else None
        self.register_parameter("pos_embed", None if table is None else nn.Parameter(table))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                config.mlp_hidden,
                mlp=config.mlp,
                sub_norm=config.sub_norm,
                qkv_bias=config.qkv_bias,
                k_bias=config.k_bias,
                attn_norm=config.attn_norm,
                rope=config.rope,
                layer_scale=config.layer_scale,
                norm_eps=config.norm_eps,
                drop_path=config.drop_path * i / max(config.depth - 1, 1),
                drop_path_attention=config.drop_path_attention,
            )
            for i in range(config.depth)
        )
        self.norm_pre = nn.LayerNorm(dim, config.norm_eps) if config.norm_pre else nn.Identity()
        self.norm = nn.LayerNorm(dim, config.norm_eps) if config.final_norm else nn.Identity()
        policy = WindowPolicy(config.patch_size, config.window_policy) if config.window_policy else None
        self.register_module("window_policy", None if policy is None else policy.requires_grad_(False))
        self.grad_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.captured: CapturedBlocks | None = None
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embed.proj.weight.device

    @property
    def pos_embed_prefix(self) -> int:
        """Number of rows of the position table in front of the patch rows: one if the class token has its own."""
        return int(self.config.pos_embed and self.config.pos_embed_prefix and self.config.class_token)

    def reset_parameters(self) -> None:
        """Draw weights and embeddings from a truncated normal of 0.02 and set biases to zero, as timm does."""
        for name, parameter in self.named_parameters():
            if name.startswith("window_policy."):
                continue  # convolutions keep their own start
            if name.endswith(("cls_token", "reg_token", "pos_embed")) or parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def project(self, images: Sequence[Tensor]) -> Projected:
        """Project the patches of images `(3, H, W)`, those of one size together."""
        shapes = [(image.shape[1], image.shape[2]) for image in images]
        groups = group_equal(shapes)
        return [(members, self.patch_embed(torch.stack([images[i] for i in members]))) for members in groups]

    def embed(self, images: Sequence[Tensor], projected: Projected | None = None) -> Tokens:
        """Turn images `(3, H, W)` of any sizes into packed tokens: patches, positions, prefix tokens in front.

        Images of one size are embedded together. projected: their patches, of `project`, if they are known.
        """
        grids = tuple(self.patch_embed.grid(image.shape[1], image.shape[2]) for image in images)
        rows: list[Tensor] = [torch.empty(0)] * len(images)
        for members, batch in self.project(images) if projected is None else projected:
            embedded = self._embed_grid(batch)
            for i, image in zip(members, embedded):
                rows[i] = image
        prefix = self.config.num_prefix_tokens
        cells = [h * w for h, w in grids]
        packing, x = Packing.of([prefix + n for n in cells], rows[0].device), torch.cat(rows)
        return Tokens(x, _positions(cells, prefix, x.device), packing, grids, prefix, self._phases(grids, x))

    def embed_windows(self, images: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        """Embed windows of `side x side` patches as one patch each: of images made smaller, by means of pixels.

        Their positions are means, too, of rows of the table or of coordinates. Windows are cut from the upper left, and
        those that a grid cuts off are left out, so there must be a whole one.

        images: `(b, 3, H, W)`. Returns features `(b, h // side, w // side, C)` and phases `(h // side, w // side, 2 H)`
        if positions are rotary. Raises `ConfigError` in training with `rope_rescale`, which is drawn for patches.
        """
        if self.training and self.config.rope is not None and self.config.rope_rescale > 1.0:
            raise ConfigError("windows of patches know no drawn scale of rotary positions: set rope_rescale to 1.")
        p, config = self.config.patch_size, self.config
        grid = self.patch_embed.grid(images.shape[2], images.shape[3])
        rows, columns = grid[0] // side, grid[1] // side
        whole = (0, columns * side * p - images.shape[3], 0, rows * side * p - images.shape[2])  # negative ones cut
        x = self.patch_embed(F.avg_pool2d(F.pad(images, whole), side))  # (b, C, rows, columns)
        table = self._table(grid)
        if table is not None:
            x = x + F.avg_pool2d(table.unflatten(1, grid).permute(0, 3, 1, 2), side)
        phases = None
        if config.rope is not None:
            prefix, periods = config.num_prefix_tokens, self._periods(x)
            phases = rope_phases(grid, prefix, periods, config.rope, config.places, side)[prefix:]
            phases = phases.unflatten(0, (rows, columns))
        return self.norm_pre(x.permute(0, 2, 3, 1)), phases

    def with_window_policy(self, policy: WindowPolicy) -> ViT:
        """Return this backbone with a network that chooses windows; weights are shared."""
        backbone = copy(self)
        backbone._modules = {**self._modules, "window_policy": policy.requires_grad_(False)}
        backbone.config = replace(self.config, window_policy=policy.sides)
        return backbone

    def _periods(self, x: Tensor) -> Tensor:
        """Return the periods of rotary positions, in fp32 at least."""
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return rope_periods(self.config.head_dim, self.config.rope_theta, self.config.rope_periods, like)

    def _phases(self, grids: Sequence[Grid], x: Tensor) -> Tensor | None:
        """Compute the phases of all tokens of images with these grids, in fp32 at least; None without rotary ones."""
        config = self.config
        if config.rope is None:
            return None
        periods = self._periods(x)
        if self.training and config.rope_rescale > 1.0:
            periods = periods / config.rope_rescale ** (2 * torch.rand((), device=x.device) - 1)
        images: list[Tensor] = [periods] * len(grids)
        for members in group_equal(grids):
            table = rope_phases(grids[members[0]], config.num_prefix_tokens, periods, config.rope, config.places)
            for i in members:
                images[i] = table
        return torch.cat(images)

    def _embed_grid(self, patches: Tensor) -> Tensor:
        """Turn patches `(b, C, h, w)` into `(b, prefix + h w, C)` with positions added."""
        config, prefix_rows = self.config, self.pos_embed_prefix
        table = self._table((patches.shape[2], patches.shape[3]))
        x = patches.flatten(2).transpose(1, 2)
        if table is not None:
            x = x + table
        prefix = []
        if config.class_token:
            with_place = table is not None and prefix_rows > 0
            prefix.append(self.cls_token + self.pos_embed[:, :prefix_rows] if with_place else self.cls_token)
        if config.num_registers:
            prefix.append(self.reg_token)
        joined = torch.cat([*(p.to(x.dtype).expand(x.shape[0], -1, -1) for p in prefix), x], dim=1)
        return self.norm_pre(joined)  # type: ignore[no-any-return]

    def _table(self, grid: Grid) -> Tensor | None:
        """Return the rows of the position table for the patches of a grid, `(1, h w, C)`; None without a table."""
        table: Tensor | None = self.pos_embed
        if table is None:
            return None
        config = self.config
        return resize_pos_embed(
            table[:, self.pos_embed_prefix :],
            config.pos_embed_grid,
            grid,
            config.pos_embed_mode,
            config.pos_embed_antialias,
            config.pos_embed_offset,
        )

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` (inclusive) to `stop` (exclusive) on the live tokens."""
        x, phases, weight = tokens.x, tokens.phases, tokens.weight
        captured = None if torch.is_grad_enabled() or weight is not None else self.captured
        if captured is not None and captured.fits(tokens.packing):
            return tokens.with_x(captured.run(x, tokens.packing, start, stop, phases))
        for block in self.blocks[start:stop]:
            x = run_block(block, self.grad_checkpointing, x, tokens.packing, phases, None, weight)
        return tokens.with_x(x)

    def attend(self, tokens: Tokens, n: int, weighed: bool = False) -> tuple[Tokens, Tensor]:
        """Run block `n` up to its MLP. Returns its queries, keys, values, too: `(T, 3, N, H)`.

        With `feed` it draws stochastic depth as the whole block does. Activations of both are kept in training.

        weighed: a token counts as a key once for each cell that it stands for.
        """
        block = self.blocks[n]
        assert isinstance(block, Block)
        qkv = block.before(tokens.x, tokens.phases)
        weight = tokens.weights_by_size() if weighed else tokens.weight
        attended = block.attn.attend(qkv, tokens.packing, weight=weight)
        drops = block.training and block.drop_path > 0.0 and block.drop_path_attention
        factor = drop_path(block.drop_path, tokens.packing, attended.dtype) if drops else None
        mixed = block.mix(tokens.x, attended, factor)
        return tokens.with_x(mixed), qkv.unflatten(1, (3, block.attn.num_heads, -1))

    def feed(self, tokens: Tokens, n: int) -> Tokens:
        """Run the MLP of block `n`, behind `attend`."""
        block = self.blocks[n]
        assert isinstance(block, Block)
        drops = block.training and block.drop_path > 0.0
        factor = drop_path(block.drop_path, tokens.packing, tokens.x.dtype) if drops else None
        return tokens.with_x(block.feed(tokens.x, factor))

    def compile_blocks(self, **options: Any) -> None:
        """Compile what lies around attention in each block: two graphs for all blocks and any number of live tokens.

        On CUDA this fuses norms, activations and residuals and saves launches; on the CPUs that were measured it is as
        fast as without (docs/evidence/performance.md). The first call takes long, and needs a C++ compiler on CPU.

        Args:
            **options: keyword arguments of torch.compile.
        """
        before = torch.compile(Block.before, dynamic=True, **options)
        after = torch.compile(Block.after, dynamic=True, **options)
        for block in self.blocks:
            for name, function in (("before", before), ("after", after)):
                setattr(block, name, MethodType(function, block))

    def capture_blocks(self, step: int = STEP, record: Record | None = None) -> None:
        """Replay spans of blocks as CUDA graphs, which saves the launches of small batches.

        Weights must not change afterwards, and calls must not overlap. Tokens with weights as keys run without graphs.

        Args:
            step: number of tokens between two padded lengths; a graph is recorded at the first use of each.
            record: another recorder, for tests.

        Raises:
            ConfigError: without CUDA.
        """
        device = self.device
        if record is None and device.type != "cuda":
            raise ConfigError(f"capture_blocks needs CUDA and the model is on {device}: move it there.")
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        self.captured = CapturedBlocks(blocks, cuda_graphs(device) if record is None else record, step)

    def embed_ops(self, grid: Grid) -> Ops:
        """Count the work of the patch embedding on one image, and of the norm before the first block."""
        config = self.config
        embedded = ops.conv2d(*grid, 3, config.embed_dim, config.patch_size)
        if not config.norm_pre:
            return embedded
        return embedded + ops.layer_norm(config.num_prefix_tokens + grid[0] * grid[1], config.embed_dim)

    def block_ops(self, tokens: int, fed: int | None = None) -> Ops:
        """Count the work of any one block (all are alike) on one image, see `Block.ops`."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.ops(tokens, fed)

    def frozen_ops(self, tokens: int, frozen: int) -> Ops:
        """Count what tokens that are keys and values alone add to `block_ops` of one block, see `Block.frozen_ops`."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.frozen_ops(tokens, frozen)

    def norm_ops(self, tokens: int) -> Ops:
        """Count the final LayerNorm on this many tokens."""
        return ops.layer_norm(tokens, self.config.embed_dim) if self.config.final_norm else Ops()


def _positions(cells: Sequence[int], prefix: int, device: torch.device) -> Tensor:
    """Return the canvas row of every packed token, -1 for prefix tokens."""
    parts, start = [], 0
    for n in cells:
        parts += [torch.full((prefix,), -1), torch.arange(start, start + n)]
        start += n
    return torch.cat(parts).to(device, non_blocking=True)
