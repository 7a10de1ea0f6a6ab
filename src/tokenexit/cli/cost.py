"""The command `cost`: multiply-adds of a model, without weights."""

from __future__ import annotations

import json

from tokenexit.cli.options import command_parser, positive
from tokenexit.errors import ConfigError


def cost(arguments: list[str]) -> int:
    parser = command_parser("cost", "Multiply-adds of a dense model on one image, without weights.")
    parser.add_argument("--backbone", default="vit_tiny_patch16", help="a preset, such as vit_base_patch16")
    parser.add_argument("--head", default="fcn", help="decode head")
    parser.add_argument("--num-classes", type=int, default=150, help="classes to predict")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="one side, or height and width")
    parser.add_argument(
        "--convention",
        choices=("tokenexit", "dtop"),
        default="tokenexit",
        help="dtop: as that paper counts, without class token, LayerNorm 5 and upsampling 4 per element",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    positive("--num-classes", options.num_classes)
    size = image_size(options.image_size)
    from tokenexit.outputs.ledger import dense_gmacs

    figures = dense_gmacs(options.backbone, options.head, options.num_classes, size, options.convention)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:12} {value}")
    return 0


def image_size(sides: list[int]) -> tuple[int, int]:
    for side in sides:
        positive("--image-size", side)
    if len(sides) > 2:
        raise ConfigError(f"--image-size has {len(sides)} numbers: give one side, or height and width.")
    return sides[0], sides[-1]
