"""The command `data`: reads a dataset before anyone trains on it."""

from __future__ import annotations

from pathlib import Path

from tokenexit.cli.options import command_parser, completes
from tokenexit.cli.progress import progress_bar
from tokenexit.data.registry import DATASETS


def data(arguments: list[str]) -> int:
    parser = command_parser("data", "check: read a whole dataset and say what is in it and what is wrong with it.")
    parser.add_argument("action", choices=("check",), help="action on the dataset")
    parser.add_argument("name", choices=tuple(DATASETS), metavar="NAME", help=f"dataset: {', '.join(DATASETS)}")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    split = parser.add_argument("--split", nargs="+", help="parts of the dataset; all on disk if not given")
    completes(split, ("train", "val", "test"))
    parser.add_argument("--json", type=Path, help="file for the report as JSON")
    options = parser.parse_args(arguments)
    from tokenexit.data.check import run_data_check

    return run_data_check(
        options.name, options.data_root, options.split, progress=progress_bar("checking"), json_path=options.json
    )
