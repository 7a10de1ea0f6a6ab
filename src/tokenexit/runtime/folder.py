"""Atomic changes of several files in a folder: killed at any moment, it holds all old files or all new ones.

New files are written to a folder of their own inside. Renaming that to `COMMITTED` is the one step that makes them
count; moving them to their names follows, and whoever reads meanwhile, or after a kill, finds them in `COMMITTED`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

UNFINISHED, COMMITTED = ".saving-", ".saved"


@contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for new files, which replace those of their names in `folder` if the block ends well.

    Makes `folder`, and removes what killed calls left there, so that one process at a time may write. Raises OSError as
    writing does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    unfinished = folder / f"{UNFINISHED}{token_hex(8)}"  # not by tempfile, whose folders are for one user alone
    unfinished.mkdir()
    try:
        yield unfinished
        files = list(unfinished.iterdir())
        if len(files) == 1:  # moves as one by itself
            os.replace(files[0], folder / files[0].name)
            unfinished.rmdir()
        else:
            os.rename(unfinished, folder / COMMITTED)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    settle(folder)


def settle(folder: Path) -> None:
    """Finish what a killed call had committed in `folder`, and remove what it had not."""
    committed = folder / COMMITTED
    if committed.is_dir():
        for path in sorted(committed.iterdir()):
            os.replace(path, folder / path.name)
        committed.rmdir()
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def current(folder: Path, name: str) -> Path:
    """Return the path of the current file of this name, moved yet or not; it need not exist."""
    committed = folder / COMMITTED / name
    return committed if committed.exists() else folder / name


def existing_folder(path: Path) -> Path:
    """Return the nearest folder above `path`, itself included, that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
