"""The command `sweep`: curves of mIoU against compute."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.chosen_methods import merged, methods_of, reducers_of
from tokenexit.cli.method_options import add_merge_option, add_method_options, method_names, threshold_method_names
from tokenexit.cli.options import (
    add_data_options,
    add_keep_option,
    add_model_argument,
    add_running_options,
    check_counts,
    command_parser,
    completes,
    dataset_of,
    in_windows,
    open_model,
)
from tokenexit.cli.progress import progress_bars

if TYPE_CHECKING:
    from tokenexit.calibration.calibration_set import CalibrationSet


def sweep(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    check_counts(options, "limit", "tune_limit", "points")
    by_hand = [m for m in methods_of(options.method, options) if m.thresholds is not None] if options.threshold else []
    options.threshold = None
    methods, reducers = methods_of(options.method, options), reducers_of(options.merge)
    from tokenexit.report.sweep import sweep as run
    from tokenexit.runtime.precision import inference

    shown, tune, about = _image_sets(options)
    methods, by_hand = ([merged(shown.model, m, by) for by in reducers for m in own] for own in (methods, by_hand))
    with inference(shown.model.device, options.precision):
        rows = run(
            shown,
            tune,
            methods,
            by_hand,
            options.input_scale,
            options.out,
            about,
            points=options.points,
            average=options.keep,
            full_range=options.full_range,
            say=print,
        )
    print(f"{len(rows)} points: {options.out / 'sweep.png'}, sweep.csv and sweep.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sweep", "Curves of mIoU against GMACs: methods, one checkpoint, many thresholds.")
    add_model_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder for sweep.json, .csv and .png")
    add_data_options(parser, "test")
    tune = parser.add_argument(
        "--tune-split", default="val", help="part of the dataset that thresholds are chosen on, without labels"
    )
    completes(tune, ("train", "val", "test"))
    parser.add_argument(
        "--tune-limit", type=int, help="number of images of that part, drawn at random; all if not given"
    )
    _add_curve_options(parser)
    names = method_names()
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME",
        choices=names,
        default=list(threshold_method_names()[:2]),
        help=f"methods, each a curve: {', '.join(names)}",
    )
    add_method_options(parser, several=True)
    add_merge_option(parser, several=True)
    add_running_options(parser)
    return parser


def _add_curve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, default=8, help="number of points on every method's curve")
    parser.add_argument(
        "--full-range", action="store_true", help="points where agreement with dense has fallen off, too"
    )
    add_keep_option(parser)
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="*",
        default=[0.5, 0.625, 0.75, 0.875],
        metavar="SCALE",
        help="factors on the images' sides of a dense curve",
    )


def _image_sets(options: argparse.Namespace) -> tuple[CalibrationSet, CalibrationSet, dict[str, Any]]:
    """Images to evaluate on, images to choose thresholds on, and where both are from."""
    from tokenexit.calibration.calibration_set import CalibrationSet, drawn
    from tokenexit.evaluation.evaluate import check_classes

    model = open_model(options)
    name, data = dataset_of(options)
    _, tune = dataset_of(argparse.Namespace(**{**vars(options), "split": options.tune_split}))
    check_classes(model, data)
    count = len(data) if options.limit is None else min(options.limit, len(data))
    progress = progress_bars()
    about = {"data": name, "split": options.split, "tune_split": options.tune_split, "windows": in_windows(model)}
    return (
        CalibrationSet(model, data, tuple(range(count)), options.precision, progress),
        CalibrationSet(model, tune, drawn(len(tune), options.tune_limit, 0), options.precision, progress),
        about,
    )
