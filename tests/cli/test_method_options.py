"""Options of methods: declared once, on the field, and known to every command from there."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from tokenexit.cli import method_options as module
from tokenexit.cli.method_options import (
    MethodOption,
    add_method_options,
    method_names,
    method_options,
    options_of,
    threshold_method_names,
)
from tokenexit.methods import METHODS, DToP


def test_options__are_the_same_from_the_source_and_from_the_classes() -> None:
    written, imported = module._written(), module._imported()
    assert imported is not None
    assert list(written) == list(imported) == list(METHODS)

    def by_name(options: tuple[MethodOption, ...]) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {option.name: (option.help, option.choices) for option in options}

    for name in written:
        assert by_name(written[name]) == by_name(imported[name])


def test_options__need_no_torch() -> None:
    code = (
        "import sys; from tokenexit.cli.method_options import method_options; "
        "assert 'keep_per_class' in method_options(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_options__every_one_has_help_that_is_a_noun_phrase() -> None:
    for option in method_options().values():
        assert option.help
        assert not option.help.startswith(("of ", "what ", "how ", "whether "))
        assert not option.help.endswith(".")


def test_add_method_options__takes_what_the_fields_take_and_refuses_other_words() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_method_options(parser, several=True, without=("cap",))
    options = parser.parse_args(["--threshold", "0.9", "0.98/0.9", "--keep-per-class", "3", "--score", "margin"])
    assert (options.threshold, options.keep_per_class, options.score) == (["0.9", "0.98/0.9"], 3, "margin")
    assert (options.stop, parser.parse_args(["--stop", "2"]).stop) == (None, 2)
    assert options.boundary_guard is None
    assert not hasattr(options, "cap")
    with pytest.raises(argparse.ArgumentError, match="probability"):
        parser.parse_args(["--score", "loudness"])


def test_threshold_method_names__are_those_that_calibrate() -> None:
    assert threshold_method_names() == tuple(name for name, kind in METHODS.items() if kind.calibrates)


def test_options_of__are_the_fields_of_the_method() -> None:
    from dataclasses import fields

    for name, kind in METHODS.items():
        assert options_of(name) == {field.name for field in fields(kind)}


def test_method_names__are_those_of_the_registry() -> None:
    assert method_names() == tuple(METHODS)
    assert DToP.name in method_names()
