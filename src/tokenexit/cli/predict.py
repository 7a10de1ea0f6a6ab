"""The command predict."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path

from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import (
    add_machine_options,
    add_window_options,
    asked_methods,
    chosen_methods,
    command_parser,
    is_calibrated,
    machine_of,
    positive,
    progress_bar,
    report_once,
    say_if_uncalibrated,
    set_windows,
)
from tokenexit.errors import ConfigError

MAX_PIXELS = 7680 * 4320
"""Largest image that `predict` opens."""
MAX_TOKENS = 32_768
"""As in `tokenexit.prediction.pipeline`, which would import torch."""

SAVE = ("masks", "overlays", "exits", "scores", "coco", "labelstudio", "video")
PATIENCE = timedelta(days=30)
"""Processes meet at the end, when the slowest has done its share."""


@report_once()
def predict(arguments: list[str]) -> int:
    parser = command_parser(
        "predict",
        "Segment images and videos: palette PNG masks at their size, overlays, exit maps, annotation formats of other "
        "tools. A second call goes on where the first one ended; torchrun shares the work among processes and "
        "machines.",
    )
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="images, folders of them, @LIST with the path of one in each line; videos",
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the results, or a .zip")
    parser.add_argument(
        "--save", nargs="+", choices=SAVE, metavar="WHAT", default=list(SAVE[:3]), help=f"of {', '.join(SAVE)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="files that are there are made again")
    parser.add_argument("--method", choices=method_names(), help="the calibrated one if not given, else dense")
    add_method_options(parser)
    parser.add_argument(
        "--gate",
        action=argparse.BooleanOptionalAction,
        help="pass over exits that do not pay on this machine at an image's size, see `tokenexit gate`; on unless "
        "thresholds are the calibration's",
    )
    add_window_options(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="largest image that is taken")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        help="most tokens that an image, or a window of one, may have; their time grows with the square",
    )
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of a video made of a folder")
    parser.add_argument(
        "--image-url", default="/data/local-files/?d=", help="address before an image's name in Label Studio's tasks"
    )
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    positive("--max-pixels", options.max_pixels)
    positive("--max-tokens", options.max_tokens)
    if not 0.1 <= options.fps <= 1000.0:
        raise ConfigError(f"--fps {options.fps:g} is no rate of frames: give one from 0.1 to 1000.")
    from tokenexit.calibration.drift import Monitor
    from tokenexit.calibration.store import reference_statistics_of
    from tokenexit.prediction.outputs import OUTPUTS
    from tokenexit.prediction.predict_files import predict_files
    from tokenexit.runtime.distributed import all_or_none, process_group, rank_and_size
    from tokenexit.segmenter import ExitSegmenter

    asked = asked_methods(options.method and [options.method], options)
    with process_group(PATIENCE):
        with all_or_none():
            model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
            set_windows(model, options)
            (method,) = chosen_methods(model, asked)
            calibrated = is_calibrated(model, method)
            gate = method.may_gate and not calibrated if options.gate is None else options.gate
            monitor = Monitor(reference_statistics_of(model)) if calibrated and not gate else None
        done = predict_files(
            model,
            options.images,
            options.out,
            method,
            save=options.save,
            overwrite=options.overwrite,
            precision=options.precision,
            max_pixels=options.max_pixels,
            max_tokens=options.max_tokens,
            fps=options.fps,
            image_url=options.image_url,
            gate=gate,
            monitor=monitor,
            progress=progress_bar("predicting"),
            say=_say,
        )
        first = rank_and_size()[0] == 0
    status = 1 if done.failed else 0
    if not first:
        return status
    warning = None if monitor is None else monitor.warning()
    if warning is not None:
        _say(warning)
    if done.skipped:
        print(f"already there and left as they are: {done.skipped} (--overwrite makes them again)")
    if done.failed:
        print(f"images segmented: {done.images}, failed: {len(done.failed)}")
    else:
        *others, last = [OUTPUTS[name].title if name in OUTPUTS else "videos" for name in dict.fromkeys(options.save)]
        say_if_uncalibrated(model, asked)
        print(f"{', '.join(others)}{' and ' if others else ''}{last}: {_printable(options.out)}")
    return status


def _say(sentence: str) -> None:
    print(f"tokenexit predict: {_printable(sentence)}", file=sys.stderr, flush=True)


def _printable(text: str | Path) -> str:
    """Text on one line, in which bytes of file names that are no text, which stdout would refuse, are escapes."""
    return str(text).replace("\n", "\\n").encode(errors="backslashreplace").decode()
