"""The command evaluate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import (
    CALIBRATED,
    add_machine_options,
    add_window_options,
    asked_methods,
    chosen_methods,
    command_parser,
    dataset_of,
    existing_folder,
    in_windows,
    is_calibrated,
    machine_of,
    positive,
    progress_bar,
    report_once,
    say_if_uncalibrated,
    set_windows,
)
from tokenexit.errors import ConfigError


@report_once()
def evaluate(arguments: list[str]) -> int:
    parser = command_parser("evaluate", "Accuracy and compute of a model on a dataset; all methods share one table.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset, such as scenes, camvid, folder; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test", help="part of the dataset")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=(*method_names(), CALIBRATED),
        help="dense, dtop, dovit, paumer, fixed_ratio, truncated; one or several; the calibrated one if not given, "
        "else dense; calibrated names it beside others",
    )
    add_method_options(parser, several=True)
    parser.add_argument(
        "--gate", action="store_true", help="pass over exits that do not pay at an image's size, see `tokenexit gate`"
    )
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="multiply the images' sides, predict at their own size; of several, each is a row of every method",
    )
    add_window_options(parser)
    parser.add_argument(
        "--references", action="store_true", help="add random exits, the agreement oracle and a stop after each exit"
    )
    add_machine_options(parser)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    positive("--limit", options.limit)
    if options.json is not None and (
        options.json.is_dir() or not os.access(existing_folder(options.json.parent), os.W_OK)
    ):
        raise ConfigError(f"--json {options.json} cannot be written: name a file in a folder of yours.")
    from tokenexit.calibration.gating import gated_by_size
    from tokenexit.evaluation.evaluate import evaluate as run
    from tokenexit.evaluation.results import Scaled
    from tokenexit.report.evaluations import class_table, late_blocks_note, main_table, write_json
    from tokenexit.runtime.distributed import all_or_none, from_first, process_group, rank_and_size
    from tokenexit.segmenter import ExitSegmenter

    asked = asked_methods(options.method, options)
    with process_group():
        with all_or_none():
            model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
            set_windows(model, options)
            name, data = dataset_of(options)
            methods = chosen_methods(model, asked)
            notes = [CALIBRATED if is_calibrated(model, method) else "" for method in methods]
            if options.gate and rank_and_size()[0] == 0:
                methods = [gated_by_size(model, method, options.precision) for method in methods]
        methods = from_first(methods)
        named = list(zip(methods, notes))
        rows = [Scaled(method, scale, note) for scale in dict.fromkeys(options.input_scale) for method, note in named]
        results = run(
            model,
            data,
            rows,
            limit=options.limit,
            precision=options.precision,
            references=("random", "oracle", "depths") if options.references else (),
            progress=progress_bar("evaluating"),
        )
        if rank_and_size()[0] != 0:
            return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    images = f"{len(results[0].gmacs)} images of {name} ({options.split})"
    console.print(f"{images}{in_windows(model)}, {options.precision} on {model.device}")
    console.print(main_table(results).to_rich())
    note = late_blocks_note(model, results)
    if note is not None:
        console.print(note, soft_wrap=True)
    own = results[: len(rows)]  # reference lines are read by their totals
    console.print(class_table(own, data.labels.names).to_rich())
    if options.json is not None:
        about = {
            "model": str(options.model),
            "data": name,
            "split": options.split,
            "device": str(model.device),
            "precision": options.precision,
            "window": model.preprocessing.window,
            "stride": model.preprocessing.stride,
        }
        write_json(options.json, results, data.labels.names, about)
        print(f"figures: {options.json}")
    say_if_uncalibrated(model, asked)
    return 0
