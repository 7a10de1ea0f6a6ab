"""Architectures that are no plain ViTs are told by names of their weights, so that a refusal can say what they are.

A plain ViT has one grid of tokens from the first block to the last, absolute positions and global attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_F = r"(?:.*\.)?"

ARCHITECTURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a Swin Transformer, which attends in windows and merges patches between its stages",
        (
            _F
            + r"(?:(?:layers|stages)\.\d+\.blocks|features\.\d+)\.\d+\..*(?:relative_position_bias_table|logit_scale)",
        ),
    ),
    (
        "a SegFormer, which has four grids and shortens keys and values",
        (_F + r"(?:(?:attn|attention|self)\.(?:sr|sequence_reduction)|patch_embed(?:dings\.0|1)\.proj)\..+",),
    ),
    ("a ViT with windows and relative positions", (_F + r"rel_pos_[hw]",)),
    ("a ViT with relative positions", (_F + r"relative_position_bias_table",)),
    ("a hybrid, whose patches come from a convolutional network", (_F + r"patch_embed(?:dings)?\.backbone\..+",)),
    (
        "a ConvNeXt, which has convolutions in place of attention and four grids",
        (_F + r"stages\.\d+\.(?:blocks\.|layers\.)?\d+\.(?:conv_dw|dwconv|depthwise_conv)\.weight",),
    ),
    (
        "a U-Net, which has convolutions in place of attention and a grid for every level",
        (_F + r"(?:down\w*?|enc\w*?|contract\w*?)[._]?\d+\..+", _F + r"(?:up\w*?|dec\w*?|expan\w*?)[._]?\d+\..+"),
    ),
    (
        "a U-Net, which has convolutions in place of attention and a grid for every level",
        (_F + r"encoder\.(?:conv1|stages\.\d+|layer1)\..+", _F + r"decoder\.(?:blocks|stages|transpconvs)\.\d+\..+"),
    ),
    ("a ResNet, which has convolutions in place of attention and four grids", (_F + r"layer1\.0\.conv1\.weight",)),
)
"""What an architecture is, and patterns of names, each of which some entry matches as a whole; the particular first."""


def not_plain(names: Iterable[str]) -> str | None:
    """Return what these weights are instead of a plain ViT, None where nothing is known against it."""
    names = list(names)
    for title, patterns in ARCHITECTURES:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            return title
    return None
