"""Small commands around a model: cost, gate, convert, data and doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import (
    add_machine_options,
    asked_methods,
    chosen_methods,
    command_parser,
    machine_of,
    positive,
    progress_bar,
)
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
    size = _size(options.image_size)
    from tokenexit.ledger import dense_gmacs

    figures = dense_gmacs(options.backbone, options.head, options.num_classes, size, options.convention)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:12} {value}")
    return 0


def gate(arguments: list[str]) -> int:
    parser = command_parser("gate", "Which exits of a model pay on this machine at a size, and why; measured once.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="one side, or height and width")
    parser.add_argument("--method", choices=method_names(), help="the calibrated one if not given")
    add_method_options(parser)
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    size = _size(options.image_size)
    from tokenexit.gating import gate as run
    from tokenexit.segmenter import ExitSegmenter

    asked = asked_methods(options.method and [options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
    (method,) = chosen_methods(model, asked, "dense has no exits to close")
    model.check(method)
    found = run(model, method, model.backbone.patch_embed.grid(*size), options.precision)
    for reason in found.reasons:
        print(reason)
    print(
        f"expected for the blocks and open exits: {found.expected_ms:.1f} ms; with all exits open {found.open_ms:.1f}, "
        f"with none {found.dense_ms:.1f}"
    )
    return 0


def _size(sides: list[int]) -> tuple[int, int]:
    for side in sides:
        positive("--image-size", side)
    if len(sides) > 2:
        raise ConfigError(f"--image-size has {len(sides)} numbers: give one side, or height and width.")
    return sides[0], sides[-1]


def convert(arguments: list[str]) -> int:
    parser = command_parser(
        "convert", "Weights of another library to a model folder, or a backbone to a .safetensors file."
    )
    parser.add_argument("source", help="weight file, folder with one, or hf-hub:OWNER/NAME")
    parser.add_argument("destination", type=Path, help="model folder, or .safetensors file where there are no heads")
    parser.add_argument("--kind", default="auto", help="where the weights come from; auto tells by their names")
    parser.add_argument("--backbone", help="backbone weights, for DINOv2's released linear heads")
    parser.add_argument("--backbone-only", action="store_true", help="leave the heads out")
    parser.add_argument("--exits", type=int, nargs="*", help="after how many blocks auxiliary heads stand")
    parser.add_argument(
        "--head-options",
        nargs="+",
        metavar="NAME=VALUE",
        help="options of the heads that the weights do not say, such as num_heads=16 for DToP on Pascal Context",
    )
    options = parser.parse_args(arguments)
    head_options = _named_values("--head-options", options.head_options or [])
    from tokenexit.converting import convert as run

    report = run(
        options.source,
        options.destination,
        kind=options.kind,
        backbone=options.backbone,
        backbone_only=options.backbone_only,
        exits=options.exits,
        head_options=head_options,
    )
    print(report.summary())
    return 0


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


def data(arguments: list[str]) -> int:
    parser = command_parser("data", "check: read a whole dataset and say what is in it and what is wrong with it.")
    parser.add_argument("action", choices=("check",))
    parser.add_argument("name", help="dataset, such as camvid, ade20k, cityscapes, folder")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", nargs="+", help="these splits only; all on disk if not given")
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    options = parser.parse_args(arguments)
    from tokenexit.data.check import run_data_check

    return run_data_check(
        options.name, options.data_root, options.split, progress=progress_bar("checking"), json_path=options.json
    )


def doctor(arguments: list[str]) -> int:
    command_parser("doctor", "Versions, devices, attention path and precision on this machine.").parse_args(arguments)
    from tokenexit.doctor import diagnose, format_findings

    findings = diagnose()
    print(format_findings(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0
