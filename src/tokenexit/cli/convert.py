"""The command `convert`: weights of other libraries to a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenexit.cli.options import command_parser
from tokenexit.errors import ConfigError

KINDS = (
    *("auto", "eomt", "eomt_huggingface", "huggingface", "dinov3", "dinov3_timm", "dinov3_huggingface", "dinov3_head"),
    *(
        "eva02",
        "eva02_timm",
        "pe_core",
        "pe_spatial",
        "siglip",
        "dovit",
        "dtop",
        "segvit",
        "mmseg",
        "segmenter",
        "dinov2_head",
        "dinov2",
    ),
    "timm",
)
"""auto, and the names of `tokenexit.conversion.families.SOURCES`, which would import torch."""


def convert(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    backbone_options = _named_values("--backbone-options", options.backbone_options or [])
    head_options = _named_values("--head-options", options.head_options or [])
    from tokenexit.conversion.convert import convert as run

    report = run(
        options.source,
        options.destination,
        kind=options.kind,
        backbone=options.backbone,
        backbone_only=options.backbone_only,
        exits=options.exits,
        options=backbone_options,
        head_options=head_options,
    )
    print(report.summary())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "convert", "Weights of another library to a model folder, or a backbone to a .safetensors file."
    )
    parser.add_argument("source", help="weight file, folder with one, or hf-hub:OWNER/NAME")
    parser.add_argument("destination", type=Path, help="model folder, or .safetensors file where there are no heads")
    parser.add_argument(
        "--kind", choices=KINDS, default="auto", help="source of the weights; auto: told by their names"
    )
    parser.add_argument(
        "--backbone",
        help="file of backbone weights, for linear heads of DINOv2 and DINOv3, and for EoMT's differences from DINOv3",
    )
    parser.add_argument("--backbone-only", action="store_true", help="the backbone without the heads")
    parser.add_argument("--exits", type=int, nargs="*", help="numbers of blocks after which auxiliary heads stand")
    parser.add_argument(
        "--backbone-options",
        nargs="+",
        metavar="NAME=VALUE",
        help="fields of ViTConfig that the weights do not say, such as rope_reference=14",
    )
    parser.add_argument(
        "--head-options",
        nargs="+",
        metavar="NAME=VALUE",
        help="options of the heads that the weights do not say, such as num_heads=16 for DToP on Pascal Context",
    )
    return parser


def _named_values(option: str, given: list[str]) -> dict[str, Any]:
    """`["num_heads=16"]` to `{"num_heads": 16}`, values as in YAML."""
    import yaml

    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not (name.strip() and equals and value.strip()):
            raise ConfigError(f"{option} {text} does not fit: write NAME=VALUE, such as num_heads=16.")
    return values
