"""The architecture of a plain ViT, and presets by name: those of timm, DeiT-3, DINOv2, DINOv3, EVA-02 and others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from tokenexit.engine.rope import Pairing, PeriodPrecision, Places
from tokenexit.engine.window_policy import nested
from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import Between, Share, check_fields

Side = Annotated[int, Between(1, 1024)]
MlpKind = Literal["gelu", "gelu_tanh", "swiglu"]


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
