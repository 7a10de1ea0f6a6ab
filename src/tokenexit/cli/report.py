"""The command report."""

from __future__ import annotations

import shlex
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
    in_windows,
    is_calibrated,
    machine_of,
    positive,
    progress_bar,
    set_windows,
)


def report(arguments: list[str]) -> int:
    parser = command_parser("report", "One HTML file: what a model reaches, what it costs, and on which images.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset, such as scenes, camvid, folder; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test", help="part of the dataset")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=method_names(),
        help="dtop, dovit, ...; the first is looked at closely; the calibrated one if not given",
    )
    add_method_options(parser, several=True)
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="*",
        default=[0.9, 0.8, 0.7],
        metavar="SCALE",
        help="dense on smaller images",
    )
    parser.add_argument(
        "--references",
        choices=("yes", "no"),
        default="yes",
        help="lines of random exits and of a stop after each exit: a run more for each DToP row, and one for all stops",
    )
    parser.add_argument("--examples", type=int, default=3, help="of the cheapest and of the dearest images")
    add_window_options(parser)
    add_machine_options(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file")
    options = parser.parse_args(arguments)
    positive("--limit", options.limit)
    positive("--examples", options.examples)
    from tokenexit.evaluation.results import Scaled
    from tokenexit.report.model_report import report_model
    from tokenexit.segmenter import ExitSegmenter

    asked = asked_methods(options.method, options)
    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
    set_windows(model, options)
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
