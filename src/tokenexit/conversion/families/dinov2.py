"""DINOv2's release names registers and gated MLP otherwise than timm, and has linear segmentation heads.

The released head files hold the head alone; the backbone is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.families.mmseg_heads import rename_heads
from tokenexit.conversion.rename import State, move_class_position, rename

_FRONT = r"(?:backbone\.)?"
_BLOCK = _FRONT + r"blocks\.(?:\d+\.)?(\d+)\."  # with blocks in chunks, as its training keeps them, chunk and block

BACKBONE = (
    (_FRONT + r"register_tokens", "backbone.reg_token"),
    (_FRONT + r"(cls_token|pos_embed|(?:patch_embed|norm)\..+)", r"backbone.\1"),
    (_BLOCK + r"mlp\.w12\.(.+)", r"backbone.blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.w3\.(.+)", r"backbone.blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"(.+)", r"backbone.blocks.\1.\2"),
)


def from_dinov2(state: Mapping[str, Tensor]) -> State:
    renamed = rename_heads(rename(state, BACKBONE))
    return move_class_position(renamed) if "backbone.reg_token" in renamed else renamed
