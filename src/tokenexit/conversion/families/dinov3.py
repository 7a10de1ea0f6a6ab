"""DINOv3 has rotary positions and no table; its release, timm and transformers name its parts differently.

Keys have no bias. The release keeps a mask over a fused one, timm and transformers keep those of queries and values
alone; zeros stand for it here. The release trains linear segmentation heads on the normed last block, and saves them
alone, or behind the backbone in one list.

Legend: C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tokenexit.conversion.families.mmseg_heads import rename_heads
from tokenexit.conversion.rename import State, fuse, rename

_FRONT = r"(?:backbone\.)?"
_BLOCK = _FRONT + r"blocks\.(?:\d+\.)?(\d+)\."  # with blocks in chunks, chunk and block
_OURS = r"backbone.blocks.\1."

RELEASE = (
    (_FRONT + r"storage_tokens", "backbone.reg_token"),
    (_FRONT + r"(cls_token|(?:patch_embed|norm)\..+)", r"backbone.\1"),
    (_BLOCK + r"mlp\.w3\.(.+)", _OURS + r"mlp.fc2.\2"),
    (_BLOCK + r"(.+)", _OURS + r"\2"),
)

_TIMM_FRONT = r"(?:backbone\.|model\.)?"
_TIMM_BLOCK = _TIMM_FRONT + r"blocks\.(\d+)\."

TIMM = (
    (_TIMM_FRONT + r"(cls_token|reg_token|(?:patch_embed|norm)\..+)", r"backbone.\1"),
    (_TIMM_BLOCK + r"gamma_([12])", _OURS + r"ls\2.gamma"),
    (_TIMM_BLOCK + r"attn\.([qv])_bias", _OURS + r"attn.\2.bias"),
    (_TIMM_BLOCK + r"(.+)", _OURS + r"\2"),
)

_HF_LAYER = r"(?:dinov3_vit\.)?(?:model\.)?(?:encoder\.)?layer\.(\d+)\."
_HF_FRONT = r"(?:dinov3_vit\.)?(?:model\.)?"

HUGGINGFACE = (
    (_HF_FRONT + r"embeddings\.cls_token", "backbone.cls_token"),
    (_HF_FRONT + r"embeddings\.register_tokens", "backbone.reg_token"),
    (_HF_FRONT + r"embeddings\.patch_embeddings\.(.+)", r"backbone.patch_embed.proj.\1"),
    (_HF_LAYER + r"attention\.([qkv])_proj\.(.+)", _OURS + r"attn.\2.\3"),
    (_HF_LAYER + r"attention\.o_proj\.(.+)", _OURS + r"attn.proj.\2"),
    (_HF_LAYER + r"layer_scale([12])\.lambda1", _OURS + r"ls\2.gamma"),
    (_HF_LAYER + r"mlp\.down_proj\.(.+)", _OURS + r"mlp.fc2.\2"),
    (_HF_LAYER + r"(.+)", _OURS + r"\2"),
    (_HF_FRONT + r"norm\.(.+)", r"backbone.norm.\1"),
)


HEAD_FRONT = r"(?:segmentation_model\.1\.|1\.)?"
HEAD = (
    (HEAD_FRONT + r"batchnorm_layer\.(.+)", r"decode_head.norm.\1"),
    (HEAD_FRONT + r"conv\.(weight|bias)", r"decode_head.classifier.\1"),
)


def from_dinov3_head(state: Mapping[str, Tensor]) -> State:
    renamed = rename(state, HEAD)
    weight = renamed["decode_head.classifier.weight"]
    return renamed | {"decode_head.classifier.weight": weight.flatten(1)}  # a convolution of kernel 1


def from_dinov3(state: Mapping[str, Tensor]) -> State:
    renamed = fuse(rename(rename_heads(state), RELEASE), ("mlp.w1", "mlp.w2"), "mlp.fc1")
    for name in [name for name in renamed if name.endswith(".attn.qkv.bias_mask")]:
        del renamed[name]
        bias = renamed[name.removesuffix("_mask")]
        renamed[name.removesuffix("_mask")] = _without_keys(bias)  # a mask that was never set is NaN
    return renamed


def from_dinov3_timm(state: Mapping[str, Tensor]) -> State:
    return fuse(fused_biases(rename(rename_heads(state), TIMM)), ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc1")


def from_dinov3_huggingface(state: Mapping[str, Tensor]) -> State:
    renamed = rename(state, HUGGINGFACE)
    renamed = fuse(fused_biases(renamed), ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    renamed = fuse(renamed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")
    only = rename(renamed, ((r"(backbone\.blocks\.\d+\.mlp\.)up_proj\.(.+)", r"\1fc1.\2"),))  # without gates
    registers = only.get("backbone.reg_token")
    return {k: v for k, v in only.items() if k != "backbone.reg_token" or (registers is not None and registers.numel())}


def fused_biases(state: Mapping[str, Tensor]) -> State:
    """Stack biases of queries and values with zeros for keys between, where keys have none of their own."""
    fused = dict(state)
    for name in state:
        match = re.fullmatch(r"(.*\.attn\.)q\.bias", name)
        if match and f"{match[1]}k.bias" not in state and f"{match[1]}v.bias" in state:
            q, v = fused.pop(name), fused.pop(f"{match[1]}v.bias")
            fused[f"{match[1]}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return fused


def _without_keys(bias: Tensor) -> Tensor:
    q, k, v = bias.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])
