"""The command predict."""

from __future__ import annotations

import sys
from pathlib import Path

from tokenexit.cli.options import (
    add_machine_options,
    add_method_options,
    add_window_options,
    calibrated_methods,
    command_parser,
    device_of,
    methods_of,
    positive,
    progress_bar,
    set_windows,
)

MAX_PIXELS = 7680 * 4320
"""Largest picture that `predict` takes; attention grows with the square of the pixels."""


def predict(arguments: list[str]) -> int:
    parser = command_parser(
        "predict", "Segment pictures: palette PNG masks at the pictures' size, overlays, exit maps."
    )
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|DIR", help="pictures, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument("--method", help="dense, dtop or dovit; the calibrated one if not given, else dtop")
    add_method_options(parser)
    add_window_options(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are refused")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    positive("--max-pixels", options.max_pixels)
    from tokenexit.calibration.drift import Monitor
    from tokenexit.calibration.saved import usual_of
    from tokenexit.predicting import predict_files
    from tokenexit.segmenter import ExitSegmenter

    named = None if options.method is None else methods_of([options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, device_of(options.device))
    set_windows(model, options)
    (method,) = named or calibrated_methods(model, options) or methods_of(["dtop"], options)
    monitor = Monitor(usual_of(model)) if named is None and model.calibration is not None else None
    failed = predict_files(
        model,
        options.images,
        options.out,
        method,
        precision=options.precision,
        max_pixels=options.max_pixels,
        monitor=monitor,
        progress=progress_bar("predicting"),
    )
    warning = None if monitor is None else monitor.warning()
    if warning is not None:
        print(f"tokenexit predict: {warning}", file=sys.stderr)
    for message in failed:
        print(f"tokenexit predict: {message}", file=sys.stderr)
    if not failed:
        print(f"masks, overlays and exit maps: {options.out}")
    return 1 if failed else 0
