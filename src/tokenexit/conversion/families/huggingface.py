"""Hugging Face transformers has ViT, DeiT and DINOv2 with and without registers, under two generations of names.

Query, key and value are separate there, and in the newer names also the two halves of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.rename import State, distillation_as_register, fuse, move_class_position, rename

_FRONT = r"(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?"
_LAYER = _FRONT + r"(?:encoder\.layer|layers)\.(\d+)\."
_BLOCK = r"backbone.blocks.\1."

BACKBONE = (
    (_FRONT + r"embeddings\.cls_token", "backbone.cls_token"),
    (_FRONT + r"embeddings\.distillation_token", "backbone.dist_token"),
    (_FRONT + r"embeddings\.register_tokens", "backbone.reg_token"),
    (_FRONT + r"embeddings\.position_embeddings", "backbone.pos_embed"),
    (_FRONT + r"embeddings\.patch_embeddings\.projection\.(.+)", r"backbone.patch_embed.proj.\1"),
    (_LAYER + r"(?:layernorm_before|norm1)\.(.+)", _BLOCK + r"norm1.\2"),
    (_LAYER + r"attention\.(?:attention\.query|q_proj)\.(.+)", _BLOCK + r"attn.q.\2"),
    (_LAYER + r"attention\.(?:attention\.key|k_proj)\.(.+)", _BLOCK + r"attn.k.\2"),
    (_LAYER + r"attention\.(?:attention\.value|v_proj)\.(.+)", _BLOCK + r"attn.v.\2"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)", _BLOCK + r"attn.proj.\2"),
    (_LAYER + r"layer_scale([12])\.lambda1", _BLOCK + r"ls\2.gamma"),
    (_LAYER + r"(?:layernorm_after|norm2)\.(.+)", _BLOCK + r"norm2.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.+)", _BLOCK + r"mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.+)", _BLOCK + r"mlp.fc2.\2"),
    (_LAYER + r"(mlp\.gate_proj|mlp\.up_proj)\.(.+)", _BLOCK + r"\2.\3"),
    (_LAYER + r"(.+)", _BLOCK + r"\2"),  # unknown parts of a block are refused when the backbone is loaded
    (_FRONT + r"layernorm\.(.+)", r"backbone.norm.\1"),
)


def from_huggingface(state: Mapping[str, Tensor]) -> State:
    renamed = rename(state, BACKBONE)
    renamed = fuse(renamed, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    renamed = fuse(renamed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")
    if "backbone.reg_token" in renamed:
        return move_class_position(renamed)
    return distillation_as_register(renamed)
