"""Where results go: a folder, or a zip that is a folder until all is done."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import parse_json
from tokenexit.writing import whole


class Place:
    """Files by their names below `out`, each whole or not there.

    A zip's files gather in the folder `NAME.zip.parts`, which the next call goes on with if one is killed.
    Methods raise `ConfigError` for a place that cannot be read or written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.is_zip = out.suffix.lower() == ".zip"
        self.folder = out.with_name(f"{out.name}.parts") if self.is_zip else out

    @property
    def is_packed(self) -> bool:
        """Whether all there is is a zip."""
        return self.is_zip and self.out.exists() and not self.folder.exists()

    def files(self) -> set[str]:
        """All that is there."""
        if self.is_packed:
            with self._archive() as archive:
                return set(archive.namelist())
        found = os.walk(self.folder)
        return {os.path.relpath(os.path.join(path, file), self.folder) for path, _, names in found for file in names}

    def read(self, file: str) -> Any:
        """The content of a JSON file, None if it is not there or damaged."""
        try:
            if not self.is_packed:
                return parse_json((self.folder / file).read_bytes())
            with self._archive() as archive:
                return parse_json(archive.read(file))
        except (OSError, ValueError, KeyError):
            return None

    def open(self) -> None:
        """Make the folder; a zip that is there is unpacked, so that what comes is added."""
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
        """Of a file, in a folder that is there."""
        path = self.folder / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None
        return path

    def write(self, file: str, text: str) -> None:
        try:
            with whole(self.path(file)) as unfinished:
                unfinished.write_text(text)
        except OSError as error:
            raise self.unwritable(error) from None

    def forget(self, files: Iterable[str]) -> None:
        """Remove what is to be made again."""
        try:
            for file in files:
                (self.folder / file).unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None

    def close(self) -> None:
        """Pack the folder into the zip, if it is to be one. What killed calls left half-written stays out of it."""
        if not self.is_zip or not self.folder.exists():
            return
        try:
            with whole(self.out) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
                for file in sorted(self.files()):
                    if not Path(file).name.startswith("."):
                        pictures = file.endswith((".png", ".jpg", ".mp4"))  # compressed already
                        kind = zipfile.ZIP_STORED if pictures else zipfile.ZIP_DEFLATED
                        archive.write(self.folder / file, file, kind)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> ConfigError:
        reason = error.strerror or str(error)
        return ConfigError(f"results cannot be written to {self.out} ({reason}): choose another folder.")

    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.out)
        except (OSError, zipfile.BadZipFile):
            raise ConfigError(f"{self.out} is no zip that can be read: remove it, or choose another name.") from None
