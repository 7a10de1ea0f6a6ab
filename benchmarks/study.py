"""What studies have in common: a parser for a model and its data, a notebook that goes on, and a bar of progress."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenexit.calibration.calibration_set import Progress
from tokenexit.errors import TokenExitError
from tokenexit.runtime.notebook import Notebook


def model_and_data_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that takes a saved model and a split of a dataset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", required=True, help="name of the dataset")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test")
    return parser


def open_notebook(path: Path | None, settings: Mapping[str, Any], option: str) -> Notebook:
    """The notebook of a study; one of other settings ends the program with a sentence."""
    try:
        return Notebook(path, settings, option)
    except TokenExitError as error:
        raise SystemExit(str(error)) from None


def bar(title: str) -> Progress:
    from rich.console import Console
    from rich.progress import track

    return lambda items: track(items, description=title, console=Console(stderr=True))
