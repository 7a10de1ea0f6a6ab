"""The store of results: a folder, or a zip file that is a folder until all is done."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any

from tokenexit.errors import ConfigError, DataError
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.schema import parse_json


class OutputFolder:
    """The result files below `out`, each written whole or not at all.

    A zip's files gather in the folder `NAME.zip.parts`, which the next call goes on with if one is killed.
    Methods raise `ConfigError` for an `out` that cannot be read or written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.is_zip = out.suffix.lower() == ".zip"
        self.folder = out.with_name(f"{out.name}.parts") if self.is_zip else out

    @property
    def is_packed(self) -> bool:
        """Whether a zip holds all results, and no folder is being filled."""
        return self.is_zip and self.out.exists() and not self.folder.exists()

    def files(self) -> set[str]:
        """List the names of all files."""
        if self.is_packed:
            with self._archive() as archive:
                return set(archive.namelist())
        found = os.walk(self.folder)
        return {os.path.relpath(os.path.join(path, file), self.folder) for path, _, names in found for file in names}

    def read(self, file: str) -> Any:
        """Read a JSON file; None if it is not there or damaged. Raises `ConfigError` for a damaged zip."""
        try:
            if not self.is_packed:
                return parse_json((self.folder / file).read_bytes())
            with self._archive() as archive:
                content = archive.read(file)
            return parse_json(content)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError):
            return None

    def open(self) -> None:
        """Make the folder and unpack a zip that is there, so that new files are added to its own."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if self.is_packed:
                with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".") as unfinished:
                    with self._archive() as archive:
                        archive.extractall(Path(unfinished) / "all")
                    os.rename(Path(unfinished) / "all", self.folder)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None

    def path(self, file: str) -> Path:
        """Return the path of a file, whose folder is made. Raises `DataError` for a name that is too long."""
        path = self.folder / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                path.lstat()  # says whether the name is too long before other files of the image are written
        except OSError as error:
            if error.errno == ENAMETOOLONG:
                raise DataError(
                    f"{file} is too long a name for a file of {self.out}: shorten the name of the image or video."
                ) from None
            raise self.unwritable(error) from None
        return path

    def write(self, file: str, text: str) -> None:
        try:
            with atomic_write(self.path(file)) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise self.unwritable(error) from None

    def forget(self, files: Iterable[str]) -> None:
        """Remove files that are to be made again."""
        try:
            for file in files:
                (self.folder / file).unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None

    def close(self) -> None:
        """Pack the folder into the zip, if `out` is one, without the half-written files of killed calls."""
        if not self.is_zip or not self.folder.exists():
            return
        try:
            with atomic_write(self.out) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
                for file in sorted(self.files()):
                    if not Path(file).name.startswith("."):
                        is_compressed = file.endswith((".png", ".jpg", ".mp4"))
                        kind = zipfile.ZIP_STORED if is_compressed else zipfile.ZIP_DEFLATED
                        archive.write(self.folder / file, file, kind)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> ConfigError:
        reason = error.strerror or str(error)
        return ConfigError(f"results cannot be written to {self.out} ({reason}): choose another folder.")

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        unreadable = ConfigError(f"{self.out} is no zip that can be read: remove it, or choose another name.")
        try:
            archive = zipfile.ZipFile(self.out)
        except Exception:  # readers of damaged zips raise nearly everything, here and below
            raise unreadable from None
        with archive:
            try:
                yield archive
            except (OSError, KeyError):  # a full disk, a file that is not in it
                raise
            except Exception:
                raise unreadable from None
