"""EVA-02 and the Perception Encoder have a position table and rotary positions, and norms where other ViTs have none.

EVA-02's release and timm name its parts differently, and each of them the large models otherwise than the small ones.
timm's `Eva` is the Perception Encoder, too. Rotary positions leave no trace in timm's weights: they are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.families.dinov3 import fused_biases
from tokenexit.conversion.rename import State, fuse, rename

FRONT = r"(?:backbone\.|visual\.|model\.)?"
_BLOCK = FRONT + r"blocks\.(\d+)\."
_OURS = r"backbone.blocks.\1."

_BODY = (
    (FRONT + r"(cls_token|pos_embed|(?:patch_embed|norm|norm_pre|fpn\d)\..+)", r"backbone.\1"),
    (_BLOCK + r"attn\.([qv])_bias", _OURS + r"attn.\2.bias"),
    (_BLOCK + r"attn\.([qkv])_proj\.(weight|bias)", _OURS + r"attn.\2.\3"),
    (_BLOCK + r"gamma_([12])", _OURS + r"ls\2.gamma"),
)
RELEASE = (
    (_BLOCK + r"attn\.(rope\.freqs_(?:cos|sin))", r"block_\1.\2"),  # one more copy of them in every block
    *_BODY,
    (_BLOCK + r"attn\.inner_attn_ln\.(.+)", _OURS + r"attn.norm.\2"),
    (_BLOCK + r"mlp\.ffn_ln\.(.+)", _OURS + r"mlp.norm.\2"),
    (_BLOCK + r"mlp\.w12\.(.+)", _OURS + r"mlp.fc1.\2"),
    (_BLOCK + r"mlp\.w3\.(.+)", _OURS + r"mlp.fc2.\2"),
    (_BLOCK + r"(.+)", _OURS + r"\2"),
)
TIMM = (*_BODY, (_BLOCK + r"(.+)", _OURS + r"\2"))


def from_eva02(state: Mapping[str, Tensor]) -> State:
    return fuse(_fused(rename(state, RELEASE)), ("mlp.w1", "mlp.w2"), "mlp.fc1")


def from_eva_timm(state: Mapping[str, Tensor]) -> State:
    return fuse(_fused(rename(state, TIMM)), ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc1")


def _fused(state: State) -> State:
    return fuse(fused_biases(state), ("attn.q", "attn.k", "attn.v"), "attn.qkv")
