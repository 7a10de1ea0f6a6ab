"""The command `export`: one file for another runtime, or a folder of stages, exits included."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.chosen_methods import asked_methods, chosen_methods, say_if_uncalibrated
from tokenexit.cli.method_options import add_method_choice
from tokenexit.cli.options import (
    add_dataset_options,
    add_model_argument,
    add_threads_option,
    check_counts,
    command_parser,
    dataset_of,
    image_size,
    load_model,
    start_threads,
)
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tokenexit.exporting.export import Exported
    from tokenexit.methods import Method
    from tokenexit.segmenter import ExitSegmenter

IN_ADVANCE = ("int8-static", "int8-openvino")
"""Values of --quantize that take ranges of activations from images."""


def export(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    buckets = None if options.buckets is None else _buckets(options.buckets)
    size = None if options.image_size is None else image_size(options)
    asked = asked_methods(options.method, options)
    from tokenexit.exporting.export import export_model
    from tokenexit.exporting.pictures import compared_images
    from tokenexit.exporting.quantize import AGREEMENT, check_agreement

    agreement = AGREEMENT if options.agreement is None else options.agreement
    check_agreement(agreement)

    start_threads(options)
    model = load_model(options)
    (method,) = chosen_methods(model, asked)
    if options.format == "stages":
        return _stages(options, model, method, size, buckets)
    images = compared_images(model, options.images)
    if options.format == "compiled":
        print("compiling, which takes a minute or more", flush=True)
    made = export_model(model, method, images, options.out, options.format, _pad_rows(options))
    say_if_uncalibrated(model, asked)
    print(f"{made.path}: {made.path.stat().st_size / 1e6:.1f} MB\n{_compared(made)}")
    if options.quantize:
        _quantize(options, model, made.path, images, agreement)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Reject options that exclude each other."""
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file: name a folder.")
    if options.quantize and options.format != "onnx":
        raise ConfigError(f"--quantize is for --format onnx, got {options.format}: leave one of them out.")
    if options.quantize in IN_ADVANCE and options.images is None:
        raise ConfigError(f"--quantize {options.quantize} needs --images like those that the file will see: add them.")
    if not options.quantize and (options.data or options.data_root) is not None:
        raise ConfigError("--data is for the mIoU of an INT8 file beside the float one: add --quantize.")
    if options.agreement is not None and not options.quantize:
        raise ConfigError("--agreement is of an INT8 file with the float one: add --quantize int8.")
    if options.format == "stages" and options.pad_rows is not None:
        raise ConfigError("--pad-rows is for files of any number of tokens, and stages have buckets: leave it out.")
    if options.pad_rows is not None and options.pad_rows < 0:
        raise ConfigError(f"--pad-rows must be at least 0, got {options.pad_rows}: 32 is for OpenVINO, 0 for none.")
    if options.format != "stages":
        for name in ("image_size", "buckets", "bucket_count"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for --format stages: leave one of them out.")
    if options.buckets is not None and options.bucket_count is not None:
        raise ConfigError("--bucket-count is how many buckets are chosen, and --buckets gives them: leave one out.")
    check_counts(options, "image_size", "bucket_count")


def _pad_rows(options: argparse.Namespace) -> int | None:
    """Return the multiple to which rows are padded: as asked, else one for OpenVINO and none for others."""
    from tokenexit.exporting.openvino import PAD_ROWS

    if options.pad_rows is None and options.quantize == "int8-openvino":
        return PAD_ROWS
    return options.pad_rows or None


def _compared(made: Exported) -> str:
    """Say how what was written compares with the model."""
    few = f" but for at most {made.elsewhere:.1%} of an image's tokens, whose scores are equal to rounding"
    return (
        f"in {made.runs} runs beside the model exits were the same{few if made.elsewhere else ''}, logits within "
        f"{made.error:.1e} of exact ones (the model's own: {made.own_error:.1e}), and at least {made.same_pixels:.3%} "
        "of the pixels of the same class"
    )


def _stages(
    options: argparse.Namespace,
    model: ExitSegmenter,
    method: Method[Any],
    size: tuple[int, int] | None,
    buckets: list[list[int]] | None,
) -> int:
    """Write the folder of stages; say which buckets it has and what their padding costs."""
    from tokenexit.exporting.buckets import COUNT
    from tokenexit.exporting.pictures import compared_images, images_for_ranges
    from tokenexit.exporting.staged import export_stages

    if size is not None:
        model.preprocessing = replace(model.preprocessing, resize=size)
    images = compared_images(model, options.images)
    counted = [] if options.images is None else images_for_ranges(model, options.images)
    print("writing stages, each for every bucket, which takes a minute or more", flush=True)
    made = export_stages(
        model,
        method,
        images,
        options.out,
        counted=counted,
        buckets=buckets,
        bucket_count=options.bucket_count or COUNT,
    )
    held = "".join(
        f"buckets behind exit {n}: {', '.join(map(str, tokens))} patch tokens\n"
        for n, tokens in enumerate(made.buckets.tokens, start=1)
    )
    print(
        f"{made.compared.path}: {made.files} files, {made.megabytes:.1f} MB\n{held}padding adds "
        f"{made.buckets.waste:.1%} to the multiply-adds ({made.buckets.source})\n{_compared(made.compared)}"
    )
    return 0


def _buckets(text: str) -> list[list[int]]:
    """Read `600,300`, or one such list for each exit, `600,300/400,200`."""
    try:
        return [[int(number) for number in one.split(",")] for one in text.split("/")]
    except ValueError:
        raise ConfigError(
            f"--buckets {text} must be numbers of patch tokens: give 600,300, or for each exit 600,300/400,200."
        ) from None


def _quantize(
    options: argparse.Namespace, model: ExitSegmenter, path: Path, images: Sequence[Tensor], agreement: float
) -> None:
    """Write the INT8 file and say how it compares with the float one, by mIoU too if there are labelled images."""
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.exporting.pictures import images_for_ranges
    from tokenexit.exporting.quantize import Runtime, miou_of, quantize_int8

    data = None if options.data is None else dataset_of(options)[1]
    if data is not None:
        check_classes(model, data)
        if model.preprocessing.window is not None:
            raise ConfigError("--data needs a model that takes images whole, and this one takes windows: leave it out.")
    ranges = images_for_ranges(model, options.images) if options.quantize in IN_ADVANCE else []
    runtime: Runtime = "openvino" if options.quantize == "int8-openvino" else "onnxruntime"
    small = quantize_int8(path, images, agreement, ranges, runtime)
    (size, new_size), (ms, new_ms), (left, new_left) = small.megabytes, small.milliseconds, small.left
    print(
        f"{small.path}: {new_size:.1f} MB of {size:.1f}, {new_ms:.1f} ms an image of {ms:.1f}\n"
        f"{small.same_labels:.2%} of the labels and {small.same_exits:.2%} of the exits are the float file's; "
        f"{new_left:.1%} of the tokens leave, {left:.1%} in the float file"
    )
    if small.thresholds[0] != small.thresholds[1]:
        print("thresholds were moved, so that as many tokens leave at each exit as in the float file")
    if data is not None:
        float_miou, int8_miou = (miou_of(one, model.preprocessing, data) for one in (path, small.path))
        print(f"mIoU {int8_miou:.2f}, {float_miou:.2f} of the float file, on {len(data)} images")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "One file for another runtime, exits included: ONNX, a torch.export program, or compiled code; or stages "
        "of fixed shapes.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--format",
        choices=("onnx", "torch", "compiled", "stages"),
        default="onnx",
        help="format of the file; stages: a folder of ONNX files with fixed shapes, for runtimes that know no others",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    add_method_choice(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="images on which file and model are compared, three at most; drawn ones if not given",
    )
    parser.add_argument(
        "--pad-rows",
        type=int,
        metavar="N",
        help="pad live tokens to a multiple of N behind each exit, for runtimes that generate code for each number of "
        "rows; 0 for no padding (default: 32 with --quantize int8-openvino, else 0)",
    )
    _add_int8_options(parser)
    _add_stage_options(parser)
    add_dataset_options(parser, "val", "labelled images for the mIoU of an INT8 file beside the float one")
    add_threads_option(parser)
    return parser


def _add_int8_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=("int8", *IN_ADVANCE),
        help="model.int8.onnx beside the file: weights in INT8, exit heads in fp32; static: with ranges of activations "
        "from at most 32 of --images; openvino: model.int8.xml and .bin for OpenVINO, likewise",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="least share of labels, and of exits, in which the INT8 file must be the float one (default: 0.9)",
    )


def _add_stage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="size of images in stages: one side, or height and width; that of the model's images if not given",
    )
    parser.add_argument(
        "--buckets",
        metavar="TOKENS",
        help="numbers of patch tokens that stages hold, as 600,300, or for each exit 600,300/400,200; if not given, "
        "chosen for at most 32 of --images, else for the calibration's, else evenly",
    )
    parser.add_argument(
        "--bucket-count", type=int, metavar="N", help="number of buckets of each stage that are chosen (default: 4)"
    )
