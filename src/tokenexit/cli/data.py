"""The command `data`: reads a dataset before anyone trains on it."""

from __future__ import annotations

from pathlib import Path

from tokenexit.cli.options import command_parser, progress_bar


def data(arguments: list[str]) -> int:
    parser = command_parser("data", "check: read a whole dataset and say what is in it and what is wrong with it.")
    parser.add_argument("action", choices=("check",))
    parser.add_argument("name", help="dataset, such as camvid, ade20k, cityscapes, folder")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", nargs="+", help="these splits only; all on disk if not given")
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    options = parser.parse_args(arguments)
    from tokenexit.data.check import run_data_check

    return run_data_check(
        options.name, options.data_root, options.split, progress=progress_bar("checking"), json_path=options.json
    )
