"""Share what studies of calibration have in common: a notebook that goes on, and a bar of progress."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenexit.calibration.calibration_set import Progress
from tokenexit.errors import TokenExitError
from tokenexit.runtime.notebook import Notebook


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
