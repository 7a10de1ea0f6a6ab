"""The command `export`: one file for another runtime, exits included."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenexit.cli.chosen_methods import asked_methods, chosen_methods, say_if_uncalibrated
from tokenexit.cli.method_options import add_method_choice
from tokenexit.cli.options import add_model_argument, add_threads_option, command_parser, load_model, start_threads
from tokenexit.errors import ConfigError


def export(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file: name a folder.")
    if options.quantize and options.format != "onnx":
        raise ConfigError(f"--quantize is for --format onnx, got {options.format}: leave one of them out.")
    if options.agreement is not None and not options.quantize:
        raise ConfigError("--agreement is of an INT8 file with the float one: add --quantize int8.")
    asked = asked_methods(options.method, options)
    from tokenexit.exporting.export import export_model
    from tokenexit.exporting.pictures import compared_images
    from tokenexit.exporting.quantize import AGREEMENT, check_agreement, quantize_int8

    agreement = AGREEMENT if options.agreement is None else options.agreement
    check_agreement(agreement)

    start_threads(options)
    model = load_model(options)
    (method,) = chosen_methods(model, asked)
    images = compared_images(model, options.images)
    made = export_model(model, method, images, options.out, options.format)
    say_if_uncalibrated(model, asked)
    few = f" but for at most {made.elsewhere:.1%} of an image's tokens, whose scores are equal to rounding"
    other = few if made.elsewhere else ""
    print(
        f"{made.path}: {made.path.stat().st_size / 1e6:.1f} MB\nin {made.runs} runs beside the model exits were the "
        f"same{other}, logits within {made.error:.1e} of exact ones (the model's own: {made.own_error:.1e}), and at "
        f"least {made.same_pixels:.3%} of the pixels of the same class"
    )
    if options.quantize:
        small = quantize_int8(made.path, images, agreement)
        (size, new_size), (ms, new_ms), (left, new_left) = small.megabytes, small.milliseconds, small.left
        print(
            f"{small.path}: {new_size:.1f} MB of {size:.1f}, {new_ms:.1f} ms an image of {ms:.1f}\n"
            f"{small.same_labels:.2%} of the labels and {small.same_exits:.2%} of the exits are the float file's; "
            f"{new_left:.1%} of the tokens leave, {left:.1%} in the float file"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", "One file for another runtime, exits included: ONNX, or a torch.export program.")
    add_model_argument(parser)
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="format of the file")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.onnx or model.pt2")
    add_method_choice(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="images on which file and model are compared, three at most; drawn ones if not given",
    )
    parser.add_argument(
        "--quantize", choices=("int8",), help="model.int8.onnx beside the file: weights in INT8, exit heads in fp32"
    )
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="least share of labels, and of exits, in which the INT8 file must be the float one (default: 0.9)",
    )
    add_threads_option(parser)
    return parser
