"""timm has ViT, DeiT, DeiT-3, DINO, MAE, DINOv2 with and without registers. Its names are tokenexit's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenexit.conversion.rename import State, distillation_as_register, rename

BACKBONE = (
    (
        r"(?:backbone\.|model\.)?((?:cls_token|reg_token|dist_token|pos_embed)|(?:patch_embed|blocks|norm|norm_pre)\..+)",
        r"backbone.\1",
    ),
)


def from_timm(state: Mapping[str, Tensor]) -> State:
    return distillation_as_register(rename(state, BACKBONE))
