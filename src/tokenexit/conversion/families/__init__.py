"""A table of sources says how weights of each are recognised and renamed, and what names and shapes do not tell.

A source's rename function is pure. It gives timm's names under `backbone.`, ours under `decode_head.` and
`exit_heads.N.`; what it does not know keeps its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenexit.conversion.families.dinov2 import from_dinov2
from tokenexit.conversion.families.dinov3 import (
    HEAD_FRONT,
    from_dinov3,
    from_dinov3_head,
    from_dinov3_huggingface,
    from_dinov3_timm,
)
from tokenexit.conversion.families.eomt import are_differences, from_eomt, from_eomt_huggingface
from tokenexit.conversion.families.eva import FRONT, from_eva02, from_eva_timm
from tokenexit.conversion.families.huggingface import from_huggingface
from tokenexit.conversion.families.mmseg import from_mmseg
from tokenexit.conversion.families.not_plain import not_plain
from tokenexit.conversion.families.segmenter import from_segmenter
from tokenexit.conversion.families.timm import from_timm
from tokenexit.conversion.rename import State
from tokenexit.errors import CheckpointError, ConfigError

Colour = tuple[float, float, float]
Normalisation = tuple[Colour, Colour]
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SATELLITE: Normalisation = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
"""Mean and std of DINOv3's models of satellite images."""


@dataclass(frozen=True)
class Source:
    """A source is a family of weights.

    Attributes:
        title: its name for people.
        rename: turns names of the file into names of tokenexit.
        signatures: patterns of names, each of which some entry matches as a whole.
        settings: fields of `ViTConfig` that the source fixes in its code, given the renamed weights.
        normalisation: mean and std it was trained with, given the renamed weights.
        exits: number of blocks before each auxiliary head, by (depth, number of heads), as published.
        atm_heads: number of attention heads of ATM decoders, by (width, classes), as published.
        lacks: patterns of names that no entry matches.
        assumes: those of its settings that no name and no shape shows, to be reported.
        window: side in pixels of the square windows, evenly spread over an image of that shortest side, in which the
            model is evaluated, given the renamed weights; None for images taken whole.
        differences: whether renamed weights are differences from those of a backbone, which they are to be added to.
    """

    title: str
    rename: Callable[[Mapping[str, Tensor]], State]
    signatures: tuple[str, ...]
    settings: Callable[[State], dict[str, Any]]
    normalisation: Callable[[State], Normalisation] = lambda _: IMAGENET
    exits: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    atm_heads: Mapping[tuple[int, int], int] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    window: Callable[[State], int | None] = lambda _: None
    differences: Callable[[State], bool] = lambda _: False

    def matches(self, names: Iterable[str]) -> bool:
        """Return whether names of entries are those of this source."""
        names = list(names)

        def some(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in names)

        return all(map(some, self.signatures)) and not any(map(some, self.lacks))


def _timm(state: State) -> dict[str, Any]:
    if "backbone.norm_pre.weight" in state:
        raise CheckpointError(
            "a ViT of timm that has a norm before its first block is CLIP's, whose activation no name tells: take "
            "another model."
        )
    return {"norm_eps": 1e-6, "pos_embed_antialias": True}


def _dinov2(state: State) -> dict[str, Any]:
    registers = "backbone.reg_token" in state
    return {"norm_eps": 1e-6, "pos_embed_antialias": registers, "pos_embed_offset": 0.0 if registers else 0.1}


def _dinov3(state: State) -> dict[str, Any]:
    dim = state["backbone.patch_embed.proj.weight"].shape[0]
    biases = [value for name, value in state.items() if name.endswith(".attn.qkv.bias")]
    return {
        "norm_eps": 1e-5,
        "rope": "half",
        "k_bias": any(bool(bias.chunk(3)[1].any()) for bias in biases),
        "num_heads": 32 if dim == 4096 else max(dim // 64, 1),
    }


def _eomt(state: State) -> dict[str, Any]:
    return {"norm_eps": 1e-6, "pos_embed_antialias": True} if "backbone.pos_embed" in state else _dinov3(state)


def _eomt_window(state: State) -> int | None:
    """Return the side that the release trains at, which its table has; its network takes no other."""
    if "backbone.pos_embed" not in state:
        return None
    return math.isqrt(state["backbone.pos_embed"].shape[1]) * state["backbone.patch_embed.proj.weight"].shape[-1]


def _dinov3_normalisation(state: State) -> Normalisation:
    """Return the satellite model's where it is known by what the release leaves in it: of ViT-L, that one alone."""
    width = state["backbone.patch_embed.proj.weight"].shape[0]
    return SATELLITE if width == 1024 and "local_cls_norm.weight" in state else IMAGENET


def _eva02(state: State) -> dict[str, Any]:
    wide, back = (state[f"backbone.blocks.0.mlp.{name}.weight"] for name in ("fc1", "fc2"))
    if wide.shape[0] != 2 * back.shape[1]:
        raise CheckpointError("an EVA without gates in its MLP is of another generation than EVA-02: take an EVA-02.")
    pretrained = {"final_norm": False} if "mask_token" in state else {}  # it norms the target of pre-training
    rope = {"rope": "interleaved", "rope_theta": 10000.0, "rope_reference": 16.0}
    return {"norm_eps": 1e-6, "k_bias": False, "pos_embed_antialias": True} | rope | pretrained


def _eva02_normalisation(state: State) -> Normalisation:
    """Return ImageNet's for the release's segmenters, which are known by the pyramid behind their backbone."""
    return IMAGENET if any(name.startswith("backbone.fpn") for name in state) else CLIP


def _perception(state: State) -> dict[str, Any]:
    """Return the settings of a Perception Encoder, whose reference grid is that of its table."""
    table, class_token = state["backbone.pos_embed"], "backbone.cls_token" in state
    dim = table.shape[2]
    return {
        "norm_eps": 1e-5,
        "num_heads": 16 if dim == 1536 else max(dim // 64, 1),
        "pos_embed_antialias": True,
        "rope": "interleaved",
        "rope_theta": 10000.0,
        "rope_reference": float(math.isqrt(table.shape[1] - class_token)),
        "rope_offset": 1.0 if class_token else 0.0,  # the gigantic models have neither
        "rope_column_first": True,
    }


def _siglip(state: State) -> dict[str, Any]:
    tanh = tuple(state["backbone.patch_embed.proj.weight"].shape) == (1152, 3, 16, 16)
    return {"norm_eps": 1e-6, "pos_embed_antialias": True, "mlp": "gelu_tanh" if tanh else "gelu"}


_PERCEPTION = (r"norm_pre\.weight", r"blocks\.0\.attn\.qkv\.bias", "pos_embed")
_ROPE = ("rope", "rope_theta", "rope_reference")


def _huggingface(state: State) -> dict[str, Any]:
    # DINOv2 is the one with LayerScale.
    eps = 1e-6 if "backbone.blocks.0.ls1.gamma" in state else 1e-12
    return {
        "norm_eps": eps,
        "pos_embed_antialias": "backbone.reg_token" in state and "backbone.blocks.0.ls1.gamma" in state,
    }


def _mmseg(state: State) -> dict[str, Any]:
    setr = "decode_head.input_norm.weight" in state and "decode_head.queries.weight" not in state
    mode = "bilinear" if setr else "bicubic"
    return {"norm_eps": 1e-6, "pos_embed_mode": mode, "pos_embed_antialias": False}


def _dtop(state: State) -> dict[str, Any]:
    return {"class_token": False, "norm_eps": 1e-6, "pos_embed_mode": "bicubic", "pos_embed_antialias": False}


def _segmenter(state: State) -> dict[str, Any]:
    return {"norm_eps": 1e-5, "pos_embed_mode": "bilinear", "pos_embed_antialias": False}


def _classes(state: State) -> int:
    """Count the queries of a mask transformer or ATM head, 0 for other heads."""
    queries = state.get("decode_head.queries.weight")
    return 0 if queries is None else queries.shape[0]


def _mmseg_normalisation(state: State) -> Normalisation:
    return HALF if _classes(state) else IMAGENET


def _dovit_normalisation(state: State) -> Normalisation:
    return HALF if _classes(state) == 150 else IMAGENET  # Segmenter on ADE20K


def _dtop_normalisation(state: State) -> Normalisation:
    return HALF if state["backbone.pos_embed"].shape[2] == 1024 else IMAGENET  # ViT-L


def _segmenter_normalisation(state: State) -> Normalisation:
    return IMAGENET if "backbone.reg_token" in state else HALF  # DeiT has the distillation token


_MMSEG_LAYER = r"(?:backbone\.)?layers\.0\.attn\.attn\.in_proj_weight"

SOURCES: dict[str, Source] = {
    "eomt": Source(
        "EoMT",
        from_eomt,
        (r"(?:network\.)?q\.weight", r"(?:network\.)?class_head\.weight", r"(?:network\.)?upscale\.0\.conv1\.weight"),
        _eomt,
        window=_eomt_window,
        differences=are_differences,
    ),
    "eomt_huggingface": Source(
        "EoMT in Hugging Face transformers",
        from_eomt_huggingface,
        (r"query\.weight", r"class_predictor\.weight", r"upscale_block\.block\.0\.conv1\.weight"),
        _eomt,
        differences=are_differences,
    ),
    "huggingface": Source(
        "Hugging Face transformers",
        from_huggingface,
        (r".*embeddings\.patch_embeddings\.projection\.weight",),
        _huggingface,
    ),
    "dinov3": Source(
        "DINOv3",
        from_dinov3,
        (r"(?:backbone\.)?storage_tokens", r"(?:backbone\.)?blocks\.(?:\d+\.)?0\.ls1\.gamma"),
        _dinov3,
        _dinov3_normalisation,
    ),
    "dinov3_timm": Source(
        "DINOv3 in timm",
        from_dinov3_timm,
        tuple(r"(?:backbone\.|model\.)?" + name for name in ("cls_token", "reg_token", r"blocks\.0\.gamma_1")),
        _dinov3,
        lacks=(r"(?:backbone\.|model\.)?pos_embed",),
    ),
    "dinov3_huggingface": Source(
        "DINOv3 in Hugging Face transformers",
        from_dinov3_huggingface,
        (r".*embeddings\.patch_embeddings\.weight", r".*layer\.0\.attention\.q_proj\.weight"),
        _dinov3,
        lacks=(r".*embeddings\.position_embeddings.*",),
    ),
    "dinov3_head": Source(
        "DINOv3's linear head",
        from_dinov3_head,
        (HEAD_FRONT + r"batchnorm_layer\.weight", HEAD_FRONT + r"conv\.weight"),
        _dinov3,
        _dinov3_normalisation,
    ),
    "eva02": Source(
        "EVA-02",
        from_eva02,
        tuple(FRONT + name for name in (r"blocks\.0\.attn\.q_bias", r"blocks\.0\.mlp\.w3\.weight", "pos_embed")),
        _eva02,
        _eva02_normalisation,
        assumes=_ROPE,
    ),
    "eva02_timm": Source(
        "EVA-02 in timm",
        from_eva_timm,
        (
            FRONT + r"blocks\.0\.attn\.(?:q_bias|q_proj\.weight)",
            FRONT + r"blocks\.0\.mlp\.(?:fc1|fc1_g)\.weight",
            FRONT + "pos_embed",
        ),
        _eva02,
        _eva02_normalisation,
        assumes=_ROPE,
    ),
    "pe_core": Source(
        "Perception Encoder",
        from_eva_timm,
        tuple(FRONT + name for name in (*_PERCEPTION, r"attn_pool\..+")),
        _perception,
        lambda _: HALF,
        assumes=(*_ROPE, "rope_offset", "rope_column_first"),
    ),
    "pe_spatial": Source(
        "Perception Encoder, spatial",
        from_eva_timm,
        tuple(FRONT + name for name in _PERCEPTION),
        _perception,
        lambda _: HALF,
        lacks=(FRONT + r"norm\.weight",),  # which CLIP has
        assumes=(*_ROPE, "rope_offset", "rope_column_first"),
    ),
    "siglip": Source(
        "SigLIP",
        from_timm,
        (FRONT + r"patch_embed\.proj\.bias", FRONT + r"blocks\.0\.attn\.qkv\.bias", FRONT + r"attn_pool\.latent"),
        _siglip,
        lambda _: HALF,
        lacks=(FRONT + "cls_token", FRONT + r"norm_pre\.weight"),
        assumes=("mlp",),
    ),
    "dovit": Source(
        "DoViT",
        from_mmseg,
        (r"(?:backbone\.)?layers\.0\.attn\.qkv\.weight",),
        _mmseg,
        _dovit_normalisation,
        {(12, 3): (2, 5, 8), (24, 3): (6, 12, 18)},
    ),
    "dtop": Source(
        "DToP",
        from_mmseg,
        (_MMSEG_LAYER, r"decode_head\.input_proj\.weight", r"decode_head\.class_embed\.weight"),
        _dtop,
        _dtop_normalisation,
        {(12, 2): (6, 8), (24, 2): (8, 16)},
        # config/prune/*.py: ViT-B and ViT-L on ADE20K, ViT-L on Pascal Context 59 and on COCO-Stuff-10K
        {(384, 150): 6, (512, 150): 8, (512, 59): 16, (512, 171): 16},
    ),
    "segvit": Source(
        "SegViT",
        from_mmseg,
        (_MMSEG_LAYER, r"decode_head\.input_proj_1\.weight"),
        _dtop,
        _dtop_normalisation,
    ),
    "mmseg": Source(
        "mmsegmentation",
        from_mmseg,
        (_MMSEG_LAYER,),
        _mmseg,
        _mmseg_normalisation,
        # SETR of mmsegmentation; the ViT-B and ViT-S baselines of DoViT's release.
        {(24, 3): (10, 15, 20), (12, 3): (3, 6, 9)},
    ),
    "segmenter": Source(
        "Segmenter",
        from_segmenter,
        (r"encoder\.patch_embed\.proj\.weight",),
        _segmenter,
        _segmenter_normalisation,
    ),
    "dinov2_head": Source(
        "DINOv2's linear heads",
        from_dinov2,
        (r"decode_head\.bn\.weight",),
        _dinov2,
    ),
    "dinov2": Source(
        "DINOv2",
        from_dinov2,
        (
            r"(?:backbone\.)?patch_embed\.proj\.weight",
            r"(?:backbone\.)?(?:mask_token|register_tokens|blocks\..*mlp\.w12\.weight)",
            r".*blocks\.0\..*ls1\.gamma",
        ),
        _dinov2,
    ),
    "timm": Source(
        "timm",
        from_timm,
        (r"(?:backbone\.|model\.)?patch_embed\.proj\.weight", r"(?:backbone\.|model\.)?blocks\.0\..+"),
        _timm,
    ),
}
"""All sources by name, in the order in which they are tried: the more particular one comes first."""


def detect(names: Iterable[str]) -> str | None:
    """Return the name of the source whose names these are, or None."""
    names = list(names)
    return next((kind for kind, source in SOURCES.items() if source.matches(names)), None)


def source_named(kind: str) -> Source:
    """Return the source of this name. Raises `ConfigError` for an unknown one."""
    if kind not in SOURCES:
        raise ConfigError(f"kind '{kind}' is unknown: choose auto or one of {', '.join(SOURCES)}.")
    return SOURCES[kind]


__all__ = ["HALF", "IMAGENET", "SATELLITE", "SOURCES", "Normalisation", "Source", "detect", "not_plain", "source_named"]
