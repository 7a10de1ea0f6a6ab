"""The shape of the command line: short functions, help in noun phrases, lists that are those of the library."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tokenexit.cli
from tokenexit.cli import COMMANDS
from tokenexit.cli.convert import KINDS
from tokenexit.cli.cost import BACKBONES, HEADS
from tokenexit.cli.options import CommandParser

FILES = sorted(Path(tokenexit.cli.__file__).parent.glob("*.py"))
LINES = 40
"""Every body, from its first statement after the docstring to its last, is shorter."""


class Made(Exception):
    """A parser was made and nothing else is wanted of the command."""


def bodies(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = 1 if ast.get_docstring(node) is not None else 0
            if len(node.body) > start:
                yield f"{path.name}: {node.name}", (node.body[-1].end_lineno or 0) - node.body[start].lineno + 1


def test_bodies__of_all_functions_are_short() -> None:
    found = dict(length for path in FILES for length in bodies(path))
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines >= LINES} == {}


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    made: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, *_: Any) -> None:
        made.append(self)
        raise Made

    monkeypatch.setattr(CommandParser, "parse_args", keep)
    with pytest.raises(Made):
        COMMANDS[command]([])
    return made[0]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help__of_every_option_is_a_noun_phrase(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in parser_of(command, monkeypatch)._actions:
        if "--help" in action.option_strings:
            continue
        said = action.help or ""
        assert said, action.dest
        assert not said.endswith("."), said
        # What begins so is half a sentence: of what, whether what, how much of what.
        first = said.split()[0].lower()
        words = {"of", "what", "how", "whether", "that", "which", "to", "after", "when", "with", "by", "leave", "add"}
        assert first not in words | {"make", "write", "print", "say", "take", "go", "pass", "so", "multiply"}, said


def test_lists__are_those_of_the_library() -> None:
    from tokenexit.conversion.families import SOURCES
    from tokenexit.engine.vit_config import PRESETS
    from tokenexit.heads import HEADS as REGISTERED

    assert ("auto", *SOURCES) == KINDS
    assert tuple(PRESETS) == BACKBONES
    assert tuple(REGISTERED) == HEADS
