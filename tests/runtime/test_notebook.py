"""Results that are kept as they come."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.runtime.notebook import Notebook

SETTINGS = {"data": Path("somewhere"), "bounds": (0.1, 0.2), "limit": None}


def never() -> Any:
    raise AssertionError("it is there already")


def test_once__makes_a_result_once_and_finds_it_in_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.json"
    first = Notebook(path, SETTINGS).once("a", lambda: {"miou": 0.1 + 0.2, "sizes": (1, 2), "drop": math.nan})
    assert first == {"miou": 0.1 + 0.2, "sizes": [1, 2], "drop": None}
    again = Notebook(path, SETTINGS)
    assert again.once("a", never) == first
    assert again.once("b", lambda: None) is None
    assert Notebook(path, SETTINGS).once("b", never) is None
    assert list(json.loads(path.read_text())) == ["settings", "results"]


def test_once__keeps_what_was_there_when_the_next_result_fails(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    notes = Notebook(path, SETTINGS)
    notes.once("a", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        notes.once("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert json.loads(path.read_text())["results"] == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["notes.json"]


def test_notebook__goes_on_from_one_that_holds_nan(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"settings": {}, "results": {"a": {"error": NaN}}}')
    assert Notebook(tmp_path / "notes.json", {}).once("a", never) == {"error": None}


def test_once__without_a_file_keeps_results_in_memory() -> None:
    notes = Notebook(None, SETTINGS)
    assert notes.once("a", lambda: 3) == 3
    assert notes.once("a", never) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SETTINGS, "bounds": (0.1, 0.3)}, r"made with bounds=\[0\.1, 0\.2\], not \[0\.1, 0\.3\]"),
        ({**SETTINGS, "seed": 1}, "made with seed=None, not 1"),
    ],
)
def test_notebook__of_other_settings_is_refused_by_the_key_that_differs(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes.json"
    Notebook(path, SETTINGS).once("a", lambda: 1)
    with pytest.raises(ConfigError, match=rf"notes\.json was {words}: choose another --json, or delete it\.$"):
        Notebook(path, settings, "--json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "holds no results to go on from .it lacks 'results'."),
        ('{"settings": {}, "jobs": [], "rows": []}', "holds no results to go on from .it lacks 'results'."),
        ('{"settings": {}, "results": []}', "holds no results to go on from .results must be a mapping"),
        ("[]", "holds no results to go on from .it must be a mapping"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged .it nests deeper than 64 levels."),
    ],
)
def test_notebook__that_is_none_is_refused_in_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{words}.*: choose another --out, or delete it\.$"):
        Notebook(path, {})


def test_once__that_cannot_be_written_says_so(tmp_path: Path) -> None:
    notes = Notebook(tmp_path / "new" / "notes.json", SETTINGS)
    (tmp_path / "new").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\): choose another --out, or delete it\.$"):
        notes.once("a", lambda: 1)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Not a directory\)"):
        Notebook(tmp_path / "new" / "notes.json", SETTINGS)
