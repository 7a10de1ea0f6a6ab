"""Atomic writes: a file or folder is there whole or not at all, with the permissions that the user's umask grants."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

from tokenexit.errors import ConfigError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is moved there if the block ends well and removed if it does not.

    The temporary name keeps the suffix, which tells Pillow the format. The file ends with the permissions of any new
    file in its folder, also where it replaces another one or the block puts a file of its own in place of the
    temporary one, as safetensors does. Raises OSError as writing does.
    """
    unfinished = _new_file(path.parent, path.suffix)
    permissions = S_IMODE(unfinished.stat().st_mode)  # the kernel applied the umask; reading it would change it
    try:
        yield unfinished
        unfinished.chmod(permissions)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, mark: str) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place if the block ends well and is removed if it does not.

    mark: a file that every such folder holds; one without it is somebody else's and not replaced. A call that is killed
    while it replaces an older folder may leave that under a hidden name, but never a mixture.

    Raises `ConfigError` where `path` is anything else than such a folder or an empty one, and OSError as writing does.
    """
    if path.exists() and not (path.is_dir() and ((path / mark).exists() or not any(path.iterdir()))):
        raise ConfigError(f"{path} is there, and is no folder with {mark}: move it, or name another folder.")
    unfinished = path.with_name(f".{secrets.token_hex(6)}")
    unfinished.mkdir()
    try:
        yield unfinished
        older = unfinished.with_suffix(".older")
        if path.exists():
            os.rename(path, older)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(older, ignore_errors=True)


@contextmanager
def write_or_refuse(path: Path, cure: str) -> Iterator[Path]:
    """`atomic_write` in a folder that is made where it lacks. Raises `ConfigError`, in one sentence that ends with
    `cure`, where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): {cure}.") from None


def _new_file(folder: Path, suffix: str) -> Path:
    """Make an empty hidden file of a name that nobody has. `tempfile` makes them for the user alone, whatever the
    umask."""
    while True:
        path = folder / f".{secrets.token_hex(6)}{suffix}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return path
