"""The command `evaluate`: accuracy and compute of a model on a dataset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.chosen_methods import (
    asked_methods,
    chosen_methods,
    is_calibrated,
    merged,
    reducers_of,
    say_if_uncalibrated,
)
from tokenexit.cli.method_options import CALIBRATED, add_merge_option, add_method_choice
from tokenexit.cli.options import (
    add_data_options,
    add_model_argument,
    add_running_options,
    check_counts,
    command_parser,
    dataset_of,
    in_windows,
    open_model,
    report_once,
)
from tokenexit.cli.progress import progress_bar
from tokenexit.errors import ConfigError
from tokenexit.runtime.folder import existing_folder

if TYPE_CHECKING:
    from tokenexit.evaluation.results import Evaluation, Scaled
    from tokenexit.inputs.labels import Labels
    from tokenexit.methods import Method
    from tokenexit.segmenter import ExitSegmenter


@report_once()
def evaluate(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    asked, reducers = asked_methods(options.method, options), reducers_of(options.merge)
    from tokenexit.evaluation.evaluate import evaluate as run
    from tokenexit.runtime.distributed import all_or_none, from_first, process_group, rank_and_size

    with process_group():
        first = rank_and_size()[0] == 0
        with all_or_none():
            model = open_model(options)
            name, data = dataset_of(options)
            methods, notes = _methods(model, asked, options, measures=first)
            methods = [merged(model, method, by) for by in reducers for method in methods]
            notes *= len(reducers)
        rows = _rows(from_first(methods), notes, options.input_scale)
        results = run(
            model,
            data,
            rows,
            limit=options.limit,
            precision=options.precision,
            references=("random", "oracle", "context", "labels", "depths") if options.references else (),
            progress=progress_bar("evaluating"),
        )
    if first:
        _print_tables(model, name, data.labels, results, len(rows), options)
        if options.json is not None:
            _write(model, name, data.labels, results, options)
        say_if_uncalibrated(model, asked)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", "Accuracy and compute of a model on a dataset; all methods share one table.")
    add_model_argument(parser)
    parser.add_argument("--json", type=Path, help="file for all figures as JSON")
    add_data_options(parser, "test")
    parser.add_argument(
        "--gate",
        action="store_true",
        help="no exits that do not pay on this machine at an image's size, see `tokenexit gate`",
    )
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="factors on the images' sides, each a row of every method; predictions are compared at full size",
    )
    parser.add_argument(
        "--references",
        action="store_true",
        help="rows of random exits, an agreement oracle, the same with frozen tokens as context, a greedy rule that "
        "sees labels, and a stop after each exit",
    )
    add_method_choice(parser, several=True)
    add_merge_option(parser, several=True)
    add_running_options(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    check_counts(options, "limit")
    if options.merge is not None and (options.references or options.gate):
        which = "references are rows" if options.references else "gate closes exits by times"
        raise ConfigError(f"--{which} without merged tokens: leave it or --merge out.")
    path = options.json
    if path is not None and (path.is_dir() or not os.access(existing_folder(path.parent), os.W_OK)):
        raise ConfigError(f"--json {path} cannot be written: name a file in a folder of yours.")


def _methods(
    model: ExitSegmenter, asked: Sequence[dict[str, Any]] | None, options: argparse.Namespace, measures: bool
) -> tuple[list[Method[Any]], list[str]]:
    """Methods, and a note beside each one's name.

    measures: whether this process measures which exits pay, if that is asked for.
    """
    from tokenexit.calibration.gating import gated_by_size

    methods = chosen_methods(model, asked)
    notes = [CALIBRATED if is_calibrated(model, method) else "" for method in methods]
    if options.gate and measures:
        methods = [gated_by_size(model, method, options.precision) for method in methods]
    return methods, notes


def _rows(methods: Sequence[Method[Any]], notes: Sequence[str], scales: Sequence[float]) -> list[Scaled]:
    from tokenexit.evaluation.results import Scaled

    named = list(zip(methods, notes))
    return [Scaled(method, scale, note) for scale in dict.fromkeys(scales) for method, note in named]


def _print_tables(
    model: ExitSegmenter,
    name: str,
    labels: Labels,
    results: Sequence[Evaluation],
    rows: int,
    options: argparse.Namespace,
) -> None:
    """Print all results, and classes of the first `rows`: reference lines are read by their totals."""
    from rich.console import Console

    from tokenexit.report.evaluations import class_table, late_blocks_note, main_table

    console = Console(width=None if sys.stdout.isatty() else 180)
    images = f"{len(results[0].gmacs)} images of {name} ({options.split})"
    console.print(f"{images}{in_windows(model)}, {options.precision} on {model.device}")
    console.print(main_table(results).to_rich())
    note = late_blocks_note(model, results)
    if note is not None:
        console.print(note, soft_wrap=True)
    console.print(class_table(results[:rows], labels.names).to_rich())


def _write(
    model: ExitSegmenter, name: str, labels: Labels, results: Sequence[Evaluation], options: argparse.Namespace
) -> None:
    from tokenexit.report.evaluations import write_json

    about = {
        "model": str(options.model),
        "data": name,
        "split": options.split,
        "device": str(model.device),
        "precision": options.precision,
        "window": model.preprocessing.window,
        "stride": model.preprocessing.stride,
    }
    write_json(options.json, results, labels.names, about)
    print(f"figures: {options.json}")
