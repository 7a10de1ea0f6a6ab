"""The command `report`: one HTML file of what a model reaches and costs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tokenexit.cli.chosen_methods import asked_methods, chosen_methods, is_calibrated
from tokenexit.cli.method_options import CALIBRATED, add_method_choice
from tokenexit.cli.options import (
    add_data_options,
    add_model_argument,
    add_running_options,
    check_counts,
    command_parser,
    dataset_of,
    in_windows,
    open_model,
)
from tokenexit.cli.progress import progress_bar


def report(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    check_counts(options, "limit", "examples")
    asked = asked_methods(options.method, options)
    from tokenexit.evaluation.results import Scaled
    from tokenexit.report.model_report import report_model

    model = open_model(options)
    name, data = dataset_of(options)
    methods = chosen_methods(model, asked, "a report compares a method with dense")
    path = report_model(
        model,
        data,
        [Scaled(method, note=CALIBRATED if is_calibrated(model, method) else "") for method in methods],
        options.out,
        scales=options.input_scale,
        references=options.references == "yes",
        limit=options.limit,
        examples=options.examples,
        precision=options.precision,
        what=f"{name} ({options.split}){in_windows(model)}",
        command=shlex.join(["tokenexit", "report", *arguments]),
        progress=progress_bar("evaluating"),
    )
    print(f"report: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("report", "One HTML file: what a model reaches, what it costs, and on which images.")
    add_model_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="HTML file")
    add_data_options(parser, "test")
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="*",
        default=[0.9, 0.8, 0.7],
        metavar="SCALE",
        help="factors on the images' sides of dense rows",
    )
    parser.add_argument(
        "--references",
        choices=("yes", "no"),
        default="yes",
        help="lines of random exits and of a stop after each exit: a run more for each DToP row, and one for all stops",
    )
    parser.add_argument(
        "--examples", type=int, default=3, help="number of images shown of the cheapest, and of the dearest"
    )
    add_method_choice(parser, "calibrated one", several=True)
    add_running_options(parser)
    return parser
