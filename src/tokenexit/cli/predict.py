"""The command `predict`: segments images and videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.chosen_methods import (
    asked_methods,
    chosen_methods,
    is_calibrated,
    merged,
    reducers_of,
    resized,
    say_if_uncalibrated,
)
from tokenexit.cli.method_options import add_merge_option, add_method_choice
from tokenexit.cli.options import (
    add_model_argument,
    add_running_options,
    check_counts,
    command_parser,
    open_model,
    report_once,
)
from tokenexit.cli.progress import progress_bar
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from tokenexit.calibration.drift import Monitor
    from tokenexit.methods import Method
    from tokenexit.prediction.predict_files import Predicted
    from tokenexit.segmenter import ExitSegmenter

MAX_PIXELS = 7680 * 4320
"""Largest image that `predict` opens."""
MAX_TOKENS = 32_768
"""As in `tokenexit.prediction.pipeline`, which would import torch."""

SAVE = ("masks", "overlays", "exits", "scores", "coco", "labelstudio", "video")
PATIENCE = timedelta(days=30)
"""Processes meet at the end, when the slowest has done its share."""


@report_once()
def predict(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    check_counts(options, "max_pixels", "max_tokens")
    if not 0.1 <= options.fps <= 1000.0:
        raise ConfigError(f"--fps {options.fps:g} is no rate of frames: give one from 0.1 to 1000.")
    asked = asked_methods(options.method, options)
    from tokenexit.runtime.distributed import all_or_none, process_group, rank_and_size

    with process_group(PATIENCE):
        with all_or_none():
            model = open_model(options)
            method, gate, monitor = _run_of(model, asked, options)
        done = _predicted(model, method, gate, monitor, options)
        first = rank_and_size()[0] == 0
    if first:
        warning = None if monitor is None else monitor.warning()
        if warning is not None:
            _say(warning)
        _print_end(done, options)
        if not done.failed:
            say_if_uncalibrated(model, asked)
    return 1 if done.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Segment images and videos: palette PNG masks at their size, overlays, exit maps, annotation formats of other "
        "tools. A second call goes on where the first one ended; torchrun shares the work among processes and "
        "machines.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="images, folders of them, @LIST with the path of one in each line; videos",
    )
    _add_output_options(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="largest number of pixels of an image")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        help="largest number of tokens of an image, or of a window of one; their time grows with the square",
    )
    parser.add_argument(
        "--gate",
        action=argparse.BooleanOptionalAction,
        help="no exits that do not pay on this machine at an image's size, see `tokenexit gate`; on unless "
        "thresholds are the calibration's",
    )
    parser.add_argument(
        "--input-scale",
        type=float,
        metavar="SCALE",
        help="factor on the images' sides before they are segmented; masks have the images' own size",
    )
    add_method_choice(parser)
    add_merge_option(parser)
    add_running_options(parser)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the results, or a .zip")
    group.add_argument(
        "--save", nargs="+", choices=SAVE, metavar="WHAT", default=list(SAVE[:3]), help=f"results: {', '.join(SAVE)}"
    )
    group.add_argument("--overwrite", action="store_true", help="new results in place of those that are there")
    group.add_argument("--fps", type=float, default=25.0, help="frames per second of a video made of a folder")
    group.add_argument(
        "--image-url", default="/data/local-files/?d=", help="address before an image's name in Label Studio's tasks"
    )


def _run_of(
    model: ExitSegmenter, asked: Sequence[dict[str, Any]] | None, options: argparse.Namespace
) -> tuple[Method[Any], bool, Monitor | None]:
    """The method, whether exits are closed where they do not pay, and what watches a calibrated run."""
    from tokenexit.calibration.drift import Monitor
    from tokenexit.calibration.store import reference_statistics_of

    (method,) = chosen_methods(model, asked)
    (by,) = reducers_of(options.merge)
    if by is not None:  # what was calibrated and timed without it is not what suits it
        if options.gate:
            raise ConfigError("--gate closes exits by times without merging: leave it or --merge out.")
        return resized(merged(model, method, by), options.input_scale), False, None
    calibrated = is_calibrated(model, method)
    gate = method.may_gate and not calibrated if options.gate is None else options.gate
    scaled = resized(method, options.input_scale)
    watched = scaled == method and calibrated and not gate and bool(model.config.exits)  # there are scores to watch
    return scaled, gate, Monitor(reference_statistics_of(model)) if watched else None


def _predicted(
    model: ExitSegmenter, method: Method[Any], gate: bool, monitor: Monitor | None, options: argparse.Namespace
) -> Predicted:
    from tokenexit.prediction.predict_files import predict_files

    return predict_files(
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


def _print_end(done: Predicted, options: argparse.Namespace) -> None:
    from tokenexit.prediction.outputs import OUTPUTS

    if done.skipped:
        print(f"already there and left as they are: {done.skipped} (--overwrite makes them again)")
    if done.failed:
        print(f"images segmented: {done.images}, failed: {len(done.failed)}")
        return
    *others, last = [OUTPUTS[name].title if name in OUTPUTS else "videos" for name in dict.fromkeys(options.save)]
    print(f"{', '.join(others)}{' and ' if others else ''}{last}: {_printable(options.out)}")


def _say(sentence: str) -> None:
    print(f"tokenexit predict: {_printable(sentence)}", file=sys.stderr, flush=True)


def _printable(text: str | Path) -> str:
    """Text on one line, in which bytes of file names that are no text, which stdout would refuse, are escapes."""
    return str(text).replace("\n", "\\n").encode(errors="backslashreplace").decode()
