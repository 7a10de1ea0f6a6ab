import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.runtime.schema import (
    Between,
    check,
    check_fields,
    check_keys,
    fits,
    misfit,
    parse_json,
    parse_yaml,
    read_json,
    shown,
)

Small = Annotated[int, Between(1, 8)]


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (3, int, True),
        (3.0, int, False),
        (True, int, False),
        (2**31, int, False),
        (-(2**31), int, False),
        (3, float, True),
        (0.5, float, True),
        (True, float, False),
        (float("inf"), float, False),
        (float("nan"), float, False),
        ("3", float, False),
        (8, Small, True),
        (9, Small, False),
        (0, Small, False),
        (None, Small | None, True),
        ("x", Small | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (True, Literal[1], False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ((1, 2, 3), tuple[int, ...], True),
        ([1, "2"], list[int], False),
        ("12", Sequence[str], False),
        ([[0.5], 1], Sequence[float | Sequence[float]], True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ([], dict[str, Any], False),
        (object(), Any, True),
    ],
)
def test_fits__takes_what_the_annotation_says_and_nothing_else(value, kind, right):
    assert fits(value, kind) is right
    if right:
        check("x", value, kind)
    else:
        with pytest.raises(ConfigError, match=r"^x must be .*, got .*\.$"):
            check("x", value, kind)


class Inner(TypedDict, total=False):
    share: Annotated[float, Between(0, 1)]


class File(TypedDict):
    name: str
    inner: Inner


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "a", "inner": {}}, None),
        ({"name": "a", "inner": {"share": 1, "more": object()}, "more": 3}, None),
        ({"name": "a"}, "it lacks 'inner'"),
        ({"name": 3, "inner": {}}, "name must be a text, got 3"),
        ({"name": "a", "inner": []}, "inner must be a mapping, got []"),
        ({"name": "a", "inner": {"share": 2}}, "inner.share must be a number from 0 to 1, got 2"),
        ([], "it must be a mapping, got []"),
        ({"name": 2**40, "inner": {}}, "name must be a text, got 1099511627776, which is too large"),
    ],
)
def test_misfit__names_the_first_value_of_a_file_that_does_not_fit(value, words):
    assert misfit("", value, File) == words


@dataclass(frozen=True)
class Options:
    side: Small = 4
    kind: Literal["a", "b"] = "a"


def test_check_fields__holds_a_dataclass_to_its_annotations():
    check_fields(Options())
    with pytest.raises(ConfigError, match=r"^side must be a whole number from 1 to 8, got 9\.$"):
        check_fields(Options(side=9))
    with pytest.raises(ConfigError, match=r"^kind must be one of a, b, got 'c'\.$"):
        check_fields(Options(kind="c"))  # type: ignore[arg-type]


def test_check_keys__refuses_unknown_and_missing_ones_by_name():
    check_keys("x", {"a": 1}, known=("a", "b"), needed=("a",))
    for values, words in (([], "give a mapping"), ({"c": 1}, "unknown key 'c'"), ({"b": 1}, "lacks the key 'a'")):
        with pytest.raises(ConfigError, match=words):
            check_keys("x", values, known=("a", "b"), needed=("a",))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "nests deeper than 64 levels"),
        (b'{"a":' * 100_000, "nests deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nests deeper than 64 levels"),
        (b" " * (16 * 2**20 + 1), "more than 16 MB"),
        (b"\xff\xfe[]", "no UTF-8 text"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is no number"),
        (b"9" * 5000, "a number of more than 30 digits"),
        (b"{", "line 1"),
        (b"", "line 1"),
    ],
)
def test_parse_json__says_in_a_few_words_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(data)
    assert len(str(caught.value)) < 120


def test_parse_json__reads_what_json_writes():
    value = {"a": [1, -2.5, None, True, "ä"], "b": {"c": []}}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"[" * 64 + b"]" * 64) is not None


DOUBLED = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
"""2^40 values in 40 lines."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000, "it nests too deeply"),
        ("[" * 65 + "]" * 65, "it nests deeper than 64 levels"),
        ("&a [*a]", "it nests deeper than 64 levels"),
        (DOUBLED, "its aliases stand for more than 1,000,000 values"),
        ("#" * (2 * 2**20 + 1), "it has more than 2 MB"),
        ("a: [1\nb: {", "in line 2"),
        ("day: 2026-13-45", "month must be in"),
        ("a: !!python/object:os.system []", "could not determine a constructor"),
    ],
)
def test_parse_yaml__says_in_a_few_words_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_yaml(text.encode())
    assert "\n" not in str(caught.value)


def test_parse_yaml__reads_plain_values_and_aliases():
    assert parse_yaml("\ufeffa: &x [1, 2.5, yes]\nb: *x\n".encode()) == {"a": [1, 2.5, True], "b": [1, 2.5, True]}
    with pytest.raises(ValueError, match="no UTF-8 text"):
        parse_yaml(b"\xff\xfe\x00")


def test_parse_json__takes_numbers_that_are_none_as_null_where_asked():
    assert parse_json(b"[NaN, 1e999, 1.5]", nan_as_null=True) == [None, None, 1.5]


def test_read_json__ends_in_one_sentence_with_the_cure(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError):
        read_json(path, "save it again")
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"a\.json is damaged \(.*\): save it again\.$"):
        read_json(path, "save it again")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"a\.json is damaged \(it is no file\)"):
        read_json(path, "save it again")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_read_json__does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="it is no file"):
        read_json(tmp_path / "a.json", "delete it")


def test_shown__is_short_and_on_one_line_whatever_it_is():
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for value in ("x\n" * 1000, [[1] * 1000] * 1000, 10**5000, {"a": {"b": {"c": {"d": {}}}}}, cyclic, [10**5000]):
        assert len(shown(value)) < 250
        assert "\n" not in shown(value)
