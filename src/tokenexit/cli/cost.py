"""The command `cost`: multiply-adds of a model, without weights."""

from __future__ import annotations

import argparse
import json

from tokenexit.cli.options import add_image_size, check_counts, command_parser, image_size
from tokenexit.errors import ConfigError

BACKBONES = (
    *("vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "vit_large_patch16"),
    *("deit3_small_patch16", "deit3_base_patch16", "deit3_large_patch16"),
    *("dinov2_small_patch14", "dinov2_base_patch14", "dinov2_large_patch14", "dinov2_giant_patch14"),
    *("dinov2_small_patch14_reg4", "dinov2_base_patch14_reg4", "dinov2_large_patch14_reg4"),
    "dinov2_giant_patch14_reg4",
    *("dinov3_vits16", "dinov3_vits16plus", "dinov3_vitb16", "dinov3_vitl16", "dinov3_vitl16plus"),
    *("dinov3_vith16plus", "dinov3_vit7b16"),
    *("eva02_tiny_patch14", "eva02_small_patch14", "eva02_base_patch14", "eva02_large_patch14"),
    *("pe_spatial_tiny_patch16", "pe_spatial_small_patch16", "pe_spatial_base_patch16", "pe_spatial_large_patch14"),
    *("pe_core_base_patch16", "pe_core_large_patch14", "siglip2_so400m_patch16"),
)
"""The names of `tokenexit.engine.vit_config.PRESETS`, which would import torch."""
HEADS = ("linear", "fcn", "setr_naive", "setr_pup", "atm", "mask_transformer", "dinov2_linear", "eomt", "cropr")
"""The names of `tokenexit.heads.HEADS`, likewise."""


def cost(arguments: list[str]) -> int:
    parser = command_parser("cost", "Multiply-adds of a dense model on one image, without weights.")
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        metavar="NAME",
        default=BACKBONES[0],
        help=f"backbone preset: {', '.join(BACKBONES)}",
    )
    ends = tuple(name for name in HEADS if name != "cropr")  # which is for exits alone
    parser.add_argument("--head", choices=ends, metavar="NAME", default="fcn", help=f"decode head: {', '.join(ends)}")
    parser.add_argument("--num-classes", type=int, default=150, help="number of classes")
    add_image_size(parser)
    parser.add_argument(
        "--convention",
        choices=("tokenexit", "dtop"),
        default="tokenexit",
        help="counting rules; dtop: as in that paper, without class token, LayerNorm 5 and upsampling 4 per element",
    )
    parser.add_argument("--merge", help=argparse.SUPPRESS)  # refused with the reason
    parser.add_argument("--json", action="store_true", help="output as JSON")
    options = parser.parse_args(arguments)
    check_counts(options, "num_classes")
    if options.merge is not None:
        raise ConfigError("what --merge saves follows from images, and cost sees none: measure it with evaluate.")
    size = image_size(options)
    from tokenexit.outputs.ledger import dense_gmacs

    figures = dense_gmacs(options.backbone, options.head, options.num_classes, size, options.convention)
    print(json.dumps(figures) if options.json else "\n".join(f"{name:12} {value}" for name, value in figures.items()))
    return 0
