"""The command predict."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

from tokenexit.cli.options import (
    add_machine_options,
    add_method_options,
    add_window_options,
    calibrated_methods,
    command_parser,
    machine_of,
    methods_of,
    one_voice,
    positive,
    progress_bar,
    set_windows,
)
from tokenexit.errors import ConfigError

MAX_PIXELS = 7680 * 4320
"""Largest picture that `predict` takes; attention grows with the square of the pixels."""

SAVE = ("masks", "overlays", "exits", "scores", "coco", "labelstudio", "video")
PATIENCE = timedelta(days=30)
"""Processes meet at the end, when the slowest has done its share."""


@one_voice()
def predict(arguments: list[str]) -> int:
    parser = command_parser(
        "predict",
        "Segment pictures and videos: palette PNG masks at their size, overlays, exit maps, layouts of others. A "
        "second call goes on where the first one ended; torchrun shares the work among processes and machines.",
    )
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="pictures, folders of them, @LIST with the path of one in each line; videos",
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the results, or a .zip")
    parser.add_argument(
        "--save", nargs="+", choices=SAVE, metavar="WHAT", default=list(SAVE[:3]), help=f"of {', '.join(SAVE)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="make again what is there already")
    parser.add_argument("--method", help="dense, dtop or dovit; the calibrated one if not given, else dtop")
    add_method_options(parser)
    parser.add_argument(
        "--gate",
        action=argparse.BooleanOptionalAction,
        help="pass over exits that do not pay on this machine at a picture's size, see `tokenexit gate`; on unless "
        "thresholds are the calibration's",
    )
    add_window_options(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are refused")
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of a video made of a folder")
    parser.add_argument(
        "--image-url", default="/data/local-files/?d=", help="what Label Studio has before a picture's name"
    )
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    positive("--max-pixels", options.max_pixels)
    if not 0.1 <= options.fps <= 1000.0:
        raise ConfigError(f"--fps {options.fps:g} is no rate of frames: give one from 0.1 to 1000.")
    from tokenexit.calibration.drift import Monitor
    from tokenexit.calibration.saved import usual_of
    from tokenexit.evaluation.processes import joined, place, together
    from tokenexit.formats.outputs import OUTPUTS
    from tokenexit.gating import has_gates
    from tokenexit.predicting import predict_files
    from tokenexit.segmenter import ExitSegmenter

    named = None if options.method is None else methods_of([options.method], options)
    with joined(PATIENCE):
        with together():
            model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
            set_windows(model, options)
            (method,) = named or calibrated_methods(model, options) or methods_of(["dtop"], options)
            calibrated = named is None and model.calibration is not None
            gate = has_gates(method) and not calibrated if options.gate is None else options.gate
            monitor = Monitor(usual_of(model)) if calibrated and not gate else None
        done = predict_files(
            model,
            options.images,
            options.out,
            method,
            save=options.save,
            overwrite=options.overwrite,
            precision=options.precision,
            max_pixels=options.max_pixels,
            fps=options.fps,
            image_url=options.image_url,
            gate=gate,
            monitor=monitor,
            progress=progress_bar("predicting"),
        )
        first = place()[0] == 0
    status = 1 if done.failed else 0
    if not first:
        return status
    warning = None if monitor is None else monitor.warning()
    for message in (*([] if warning is None else [warning]), *done.failed):
        print(f"tokenexit predict: {message}", file=sys.stderr)
    if done.skipped:
        print(f"already there and left as they are: {done.skipped} (--overwrite makes them again)")
    if done.failed:
        print(f"pictures segmented: {done.pictures}, failed: {len(done.failed)}")
    else:
        *others, last = [OUTPUTS[name].title if name in OUTPUTS else "videos" for name in dict.fromkeys(options.save)]
        print(f"{', '.join(others)}{' and ' if others else ''}{last}: {options.out}")
    return status
