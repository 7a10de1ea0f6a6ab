"""Backbones of mmsegmentation (0.x and 1.x) and of code built on it, DToP's and DoViT's releases included.

DToP adds nothing to the backbone's names, and its heads are ATM heads. DoViT has a fused qkv and keeps the auxiliary
heads inside the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.families.mmseg_heads import LAYER, rename_heads
from tokenexit.conversion.rename import State, rename

_FRONT = r"(?:backbone\.)?"

BACKBONE = (
    (_FRONT + r"(cls_token|pos_embed)", r"backbone.\1"),
    (_FRONT + r"patch_embed\.(?:projection|proj)\.(.+)", r"backbone.patch_embed.proj.\1"),
    (_FRONT + r"(?:ln|norm)1\.(.+)", r"backbone.norm.\1"),
    *((_FRONT + pattern, "backbone." + form) for pattern, form in LAYER),
    (_FRONT + r"layers\.(.+)", r"backbone.blocks.\1"),  # unknown parts are refused when the backbone is loaded
)


def from_mmseg(state: Mapping[str, Tensor]) -> State:
    return rename(rename_heads(state), BACKBONE)
