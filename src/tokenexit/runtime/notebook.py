"""A long experiment's results by name in one JSON file, so that a call that was interrupted goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.runtime.atomic import write_or_refuse
from tokenexit.runtime.schema import as_json, misfit, read_json, shown

T = TypeVar("T")


class _Content(TypedDict):
    settings: dict[str, Any]
    results: dict[str, Any]


class Notebook:
    """Results of one experiment, in a file whose settings are held to this call's.

    path: the file, made with the first result; None keeps results in memory alone. settings: what decides the results,
    as JSON. option: the option of the command that names the file, for sentences.

    Raises `ConfigError` where the file holds results of other settings, by the first key that differs, and
    `CheckpointError` where it is damaged or of another kind.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], option: str = "--out") -> None:
        self.path = path
        self.cure = f"choose another {option}, or delete it"
        self.settings: dict[str, Any] = as_json(settings)
        self.results: dict[str, Any] = {}
        if path is not None:
            self.results = self._read(path)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The result named `key`: the one in the file, or what `make` gives, which is in the file before this returns.

        A result comes back as JSON has it, the first time, too: tuples are lists, and NaN and infinities None.
        Raises `ConfigError` where the file cannot be written.
        """
        if key not in self.results:
            self.results[key] = as_json(make())
            self._write()
        found: T = self.results[key]
        return found

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = read_json(path, self.cure, nan_as_null=True)
        except FileNotFoundError:
            return {}
        if wrong := misfit("", content, _Content):
            raise CheckpointError(f"{path} holds no results to go on from ({wrong}): {self.cure}.")
        before, now = content["settings"], self.settings
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{path} was made with {key}={shown(before.get(key))}, not {shown(now.get(key))}: {self.cure}."
                )
        results: dict[str, Any] = content["results"]
        return results

    def _write(self) -> None:
        if self.path is None:
            return
        with write_or_refuse(self.path, self.cure) as unfinished:
            unfinished.write_text(json.dumps({"settings": self.settings, "results": self.results}, indent=1) + "\n")
