"""Heads of mmsegmentation and of code built on it: SETR, FCN, linear, Segmenter, ATM, DINOv2 linear.

A head is recognised by the names of its entries. Entries that tokenexit's head lacks keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.rename import State, Table, prefixed, rename, under

CLASSIFIER = (r"conv_seg\.(.+)", r"classifier.\1")
LAYER = (
    (r"layers\.(\d+)\.(?:ln|norm)([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.attn\.(qkv|proj)\.(.+)", r"blocks.\1.attn.\2.\3"),  # DoViT
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"blocks.\1.mlp.fc2.\2"),
)
"""A transformer layer, the same in backbone and Segmenter head."""

SETR: Table = (
    (r"norm\.(.+)", r"input_norm.\1"),
    (r"up_convs\.(\d+)\.0\.conv\.(weight)", r"convs.\1.\2"),
    (r"up_convs\.(\d+)\.0\.bn\.(.+)", r"norms.\1.\2"),
    CLASSIFIER,
)
SETR_NAIVE: Table = (
    (r"norm\.(.+)", r"input_norm.\1"),
    (r"up_convs\.0\.0\.conv\.(weight)", r"proj.\1"),
    (r"up_convs\.0\.0\.bn\.(.+)", r"norm.\1"),
    CLASSIFIER,
)
FCN: Table = ((r"convs\.0\.conv\.(weight)", r"proj.\1"), (r"convs\.0\.bn\.(.+)", r"norm.\1"), CLASSIFIER)
DINOV2: Table = ((r"bn\.(.+)", r"norm.\1"), CLASSIFIER)
MASK_TRANSFORMER: Table = (
    (r"dec_proj\.(.+)", r"proj.\1"),
    (r"cls_emb", "queries.weight"),
    (r"classes_proj\.(.+)", r"class_proj.\1"),
    (r"decoder_norm\.(.+)", r"norm.\1"),
    *LAYER,
)
ATM: Table = (
    (r"input_proj(?:_1)?\.(.+)", r"input_proj.\1"),
    (r"proj_norm(?:_1)?\.(.+)", r"input_norm.\1"),
    (r"q\.weight", "queries.weight"),
    (r"class_embed\.(.+)", r"presence.\1"),
    (r"decoder(?:_1)?\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)", r"layers.\1.self_qkv.\2"),
    (r"decoder(?:_1)?\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"layers.\1.self_proj.\2"),
    (r"decoder(?:_1)?\.layers\.(\d+)\.multihead_attn\.(q|k|v|proj)\.(.+)", r"layers.\1.\2.\3"),
    (r"decoder(?:_1)?\.layers\.(\d+)\.linear([12])\.(.+)", r"layers.\1.fc\2.\3"),
    (r"decoder(?:_1)?\.layers\.(\d+)\.norm([123])\.(.+)", r"layers.\1.norm\2.\3"),
)


def rename_heads(state: Mapping[str, Tensor]) -> State:
    """Rename `decode_head.` and `auxiliary_head.N.` to our `decode_head.` and `exit_heads.N.`."""
    heads: dict[str, State] = {}
    renamed: State = {}
    for key, value in state.items():
        match = re.fullmatch(r"(decode_head|(?:backbone\.)?auxiliary_head(?:\.(\d+))?)\.(.+)", key)
        if match is None:
            renamed[key] = value
            continue
        target = "decode_head." if match[1] == "decode_head" else f"exit_heads.{match[2] or 0}."
        heads.setdefault(target, {})[match[3]] = value
    for target, head in heads.items():
        renamed |= prefixed(rename_head(head), target)
    return renamed


def rename_head(head: Mapping[str, Tensor]) -> State:
    """Rename one head, whose names come without their prefix. 1x1 convolutions become linear layers."""
    if "q.weight" in head:
        return rename(head, ATM)
    if "cls_emb" in head:
        # The framework gives every head a `conv_seg`; this one never calls it.
        renamed = rename(head, MASK_TRANSFORMER)
        return renamed | {"queries.weight": renamed["queries.weight"].flatten(0, -2)}
    if "up_convs.0.0.conv.weight" in head:
        naive = _is_1x1(head["up_convs.0.0.conv.weight"]) and not under(head, "up_convs.1.")
        return _flattened(rename(head, SETR_NAIVE)) if naive else rename(head, SETR)
    if "bn.weight" in head:
        return _flattened(rename(head, DINOV2))
    if "convs.0.conv.weight" in head:
        return _flattened(rename(head, FCN))
    return _flattened(rename(head, (CLASSIFIER,)))


def _is_1x1(weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1)


def _flattened(head: State) -> State:
    return {key: value.flatten(1) if value.ndim == 4 and _is_1x1(value) else value for key, value in head.items()}
