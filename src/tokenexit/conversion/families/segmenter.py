"""Segmenter's release has timm's names under `encoder.`, a mask transformer or a linear layer under `decoder.`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.rename import State, distillation_as_register, rename

TABLE = (
    (r"encoder\.((?:cls_token|dist_token|pos_embed)|(?:patch_embed|blocks|norm)\..+)", r"backbone.\1"),
    (r"decoder\.head\.(.+)", r"decode_head.classifier.\1"),
    (r"decoder\.cls_emb", "decode_head.queries.weight"),
    (r"decoder\.proj_dec\.(.+)", r"decode_head.proj.\1"),
    (r"decoder\.proj_patch", "decode_head.patch_proj.weight"),
    (r"decoder\.proj_classes", "decode_head.class_proj.weight"),
    (r"decoder\.decoder_norm\.(.+)", r"decode_head.norm.\1"),
    (r"decoder\.(.+)", r"decode_head.\1"),
)


def from_segmenter(state: Mapping[str, Tensor]) -> State:
    renamed = rename(state, TABLE)
    for name in ("decode_head.patch_proj.weight", "decode_head.class_proj.weight"):
        if name in renamed:  # applied there as `x @ proj`, a linear layer's weight is the transpose
            renamed[name] = renamed[name].mT.contiguous()
    if "decode_head.queries.weight" in renamed:
        renamed["decode_head.queries.weight"] = renamed["decode_head.queries.weight"].flatten(0, -2)
    return distillation_as_register(renamed)
