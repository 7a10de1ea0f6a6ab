"""Later code says what the recorded code said, bit for bit, wherever the same kernels compute it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comparison.adapter import known_methods
from tests.comparison.cases import METHODS, entries
from tests.comparison.record import REFERENCE, differences, kernels, record_entry, summary, write

ENTRIES = dict(entries())


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """The entries of the committed record, if bits can be compared with it."""
    content = json.loads(REFERENCE.read_text())
    here, there = kernels(), content["kernels"]
    if here != there:
        pytest.skip(
            f"{REFERENCE.name} was made with {there}, here are {here}, and other kernels give other bits: write a "
            "record of your own with `python -m tests.comparison.record --out FILE` in a checkout of the commit that "
            "added tests/comparison, and compare with `--against FILE`"
        )
    entries: dict[str, Any] = content["entries"]
    return entries


@pytest.mark.parametrize("name", ENTRIES)
def test_code__says_bit_for_bit_what_was_recorded(name: str, recorded: dict[str, Any]) -> None:
    assert differences(record_entry(ENTRIES[name]), recorded[name]) == []


def test_record__has_all_entries_and_no_others() -> None:
    assert list(json.loads(REFERENCE.read_text())["entries"]) == list(ENTRIES)


def test_record__has_every_registered_method_of_its_time() -> None:
    compared = {case.spec["name"] for case in METHODS.values()}
    assert compared == {"dense", "dtop", "dovit", "paumer", "fixed_ratio", "truncated"}
    assert compared <= known_methods()


def test_differences__say_what_is_other_and_how_far() -> None:
    value = torch.arange(6.0)
    other = value.clone()
    other[2] = torch.nextafter(other[2], torch.tensor(9.0))
    then = {"a": summary(value), "b": summary(value), "c": summary(value), "gone": summary(1)}
    now = {"a": summary(value), "b": summary(other), "c": summary(value[:5]), "new": summary(1)}
    lines = differences(now, then)
    assert [line.partition(":")[0] for line in lines] == ["new", "gone", "b", "c"]
    assert "other bits" in lines[2]
    assert "6 numbers before, 5 now" in lines[3]
    assert differences(then, then) == []


def test_summary__sees_bits_types_shapes_and_structure() -> None:
    a = torch.zeros(4)
    different = [a, -a, a.half(), a.view(2, 2), [a], [[a]], [a, a], None, (None, a)]
    assert len({summary(value)[0] for value in different}) == len(different)


def test_write__is_read_back(tmp_path: Path) -> None:
    content = {"kernels": {"torch": "x"}, "entries": {"a / b": {"c": summary(torch.ones(3))}, "d": {"e": summary(2)}}}
    write(tmp_path / "record.json", content)
    assert json.loads((tmp_path / "record.json").read_text()) == content
