"""Read JSON and YAML within limits, and hold values to types and bounds before anything is built of them.

A schema is an annotation, so it stands where the value is declared: in a dataclass, a constructor, or a `TypedDict` for
a file. Numbers have bounds as `Annotated[int, Between(1, 64)]`; without them whole numbers stay below 2^31, and all
numbers are finite. `True` is no number, and 4.0 is no whole number.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from tokenexit.errors import CheckpointError, ConfigError

LARGEST_FILE = 16 * 2**20
"""Largest JSON file in bytes; the longest that are written, records of long trainings, have a tenth of it."""
LARGEST_YAML = 2 * 2**20
"""Largest YAML file in bytes, which takes seconds to parse; one that lists 65,535 classes has half of it."""
MOST_VALUES = 10**6
"""Largest number of values of a YAML file once its aliases are written out."""
DEEPEST = 64
"""Largest depth of nested lists and mappings."""
LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Between:
    """The bounds of a number, both inclusive."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}" if math.isfinite(self.high) else f"of at least {self.low:g}"


Share = Annotated[float, Between(0, 1)]


# ------------------------------------------------------------------------------------------------------ reading JSON


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: paths as text, NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path, cure: str, nan_as_null: bool = False) -> Any:
    """Return the content of a JSON file; nan_as_null as in `parse_json`.

    Raises `CheckpointError` in one sentence that ends with `cure`, and `FileNotFoundError` where there is no file.
    """
    try:
        return parse_json(read_bytes(path), nan_as_null)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except ValueError as error:
        raise damaged(path, error, cure) from None


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file. Raises OSError, and `ValueError` for one too long, a device or a pipe."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MB")
    return content


def damaged(path: Path | str, reason: Exception | str, cure: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({str(reason).rstrip('.')}): {cure}.")


def parse_json(data: bytes, nan_as_null: bool = False) -> Any:
    """Return the value in UTF-8 JSON. nan_as_null: read NaN and infinities, which are no JSON, as null.

    Raises `ValueError` in a few words: too long, too deep, other encodings, a key given twice, no JSON.
    """

    def number(text: str) -> float | None:
        value = float(text)
        if not math.isfinite(value) and not nan_as_null:
            raise ValueError(f"{text[:30]} is no number of JSON")
        return value if math.isfinite(value) else None

    if len(data) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MB")
    too_deep = f"it nests deeper than {DEEPEST} levels"
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_constant=number, parse_float=number, parse_int=_integer, object_pairs_hook=_mapping
        )
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    if _deeper_than(value, DEEPEST):
        raise ValueError(too_deep)
    return value


def parse_yaml(data: bytes, loader: Any = None) -> Any:
    """The value in UTF-8 YAML; loader: one of plain YAML and more, in place of `yaml.SafeLoader`.

    Raises `ValueError` in a few words: too long, too deep, too many aliases, other encodings, no YAML.
    """
    import yaml

    if len(data) > LARGEST_YAML:
        raise ValueError(f"it has more than {LARGEST_YAML >> 20} MB")
    try:
        value = yaml.load(data.decode("utf-8-sig"), Loader=loader or yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or 'damaged'}{where}") from None
    except Exception as error:  # the parser raises what its constructors of dates and numbers do, too
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if _deeper_than(value, DEEPEST):
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
    if _count(value, {}) > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values there are, each as often as it is named; known: counts of lists and mappings by identity."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count(inner, known) for inner in _items(value))
    return known[id(value)]


def _integer(text: str) -> int:
    if len(text) > 30:  # Python refuses those of more than 4300 digits in words about itself
        raise ValueError("it holds a number of more than 30 digits")
    return int(text)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} is given twice")
        values[name] = value
    return values


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(levels):
        inner = (v for outer in layer for v in _items(outer))
        layer = list({id(v): v for v in inner if isinstance(v, dict | list | tuple)}.values())  # aliases once
    return bool(layer)


def _items(values: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return values.values() if isinstance(values, dict) else values


# --------------------------------------------------------------------------------------------------- types and bounds


def check(name: str, value: Any, kind: Any) -> None:
    """Raise `ConfigError` where `value` does not fit the annotation `kind`."""
    if wrong := misfit(name, value, kind):
        raise ConfigError(f"{wrong}.")


def check_fields(value: Any) -> None:
    """Raise `ConfigError` where a field of a dataclass does not hold what its annotation says."""
    for name, kind in hints(cast(Hashable, type(value))).items():
        check(name, getattr(value, name), kind)


def check_keys(what: str, values: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a value that is no mapping, has keys not in `known`, or lacks one of `needed`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is {shown(values)}: give a mapping with the keys {', '.join(known)}.")
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ConfigError(f"{what} holds the unknown key {shown(unknown[0])}: the keys are {', '.join(known)}.")
    missing = [key for key in needed if key not in values]
    if missing:
        raise ConfigError(f"{what} lacks the key {missing[0]!r}: add it.")


@lru_cache(maxsize=64)
def hints(declared: Any) -> dict[str, Any]:
    """Return the annotations of a class, with their bounds."""
    return get_type_hints(declared, include_extras=True)


def misfit(name: str, value: Any, kind: Any) -> str | None:
    """Say what does not fit, or return None; for a file, a `TypedDict`, the first value that does not fit."""
    if is_typeddict(kind) and isinstance(value, Mapping):
        missing = sorted(kind.__required_keys__ - value.keys())
        if missing:
            return f"{name or 'it'} lacks {missing[0]!r}"
        inner = ((key, wanted) for key, wanted in hints(kind).items() if key in value)
        found = (misfit(f"{name}.{key}".lstrip("."), value[key], wanted) for key, wanted in inner)
        return next((wrong for wrong in found if wrong), None)
    if fits(value, kind):
        return None
    size = ", which is too large" if isinstance(value, int) and not _is_small(value) else ""
    return f"{name or 'it'} must be {in_words(kind)}, got {shown(value)}{size}"


def fits(value: Any, kind: Any) -> bool:
    """Return whether `value` fits the annotation `kind`; lists count as tuples, whole numbers as numbers."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        bounds = [bound for bound in inner[1:] if isinstance(bound, Between)]
        return fits(value, inner[0]) and all(bound.low <= value <= bound.high for bound in bounds)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if kind in (None, NoneType):
        return value is None
    if kind in (int, float):
        return isinstance(value, kind | int) and not isinstance(value, bool) and _is_small(value)
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if is_typeddict(kind):
        return isinstance(value, Mapping) and misfit("", value, kind) is None
    return isinstance(value, origin or kind)


def _is_small(value: float) -> bool:
    return abs(value) <= LARGEST_INT if isinstance(value, int) else math.isfinite(value)


def in_words(kind: Any) -> str:
    """Describe an annotation in words: "a whole number from 1 to 64"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([in_words(inner[0]), *(str(bound) for bound in inner[1:])])
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}, each {in_words(inner[0])}"
    if origin in (tuple, list, Sequence):
        return "a list" if inner[0] is Any else f"a list, each {in_words(inner[0])}"
    if origin in (dict, Mapping) or is_typeddict(kind):
        return "a mapping"
    simple = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "None"}
    return simple.get(kind) or f"a {getattr(origin or kind, '__name__', kind)}"


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return "a number of more than 30 digits" if abs(x) >= 10**30 else repr(x)


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 60, 60


def shown(value: Any) -> str:
    """Write any value for a message: short and on one line."""
    return " ".join(_short.repr(value).split())
