"""Parse command line and YAML to a `TrainConfig`, with errors in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import parse_yaml, read_bytes
from tokenexit.training.config import TrainConfig, flat

USAGE = "tokenexit train [--config FILE] [--KEY VALUE ...]"
SEE_HELP = "see tokenexit train --help"
RECIPES = Path(__file__).parents[1] / "configs"
"""Folder of the shipped recipes; the path below it, without the suffix, is a recipe's name."""


def parse_train(arguments: Sequence[str], add_options: Callable[[Any], None]) -> tuple[TrainConfig, Any]:
    """Return the run that command line and YAML describe, and all options by name.

    add_options: adds options that are no fields of `TrainConfig`. Raises `ConfigError`; `--help` and `--print_config`
    end the program.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="tokenexit train",
        usage=USAGE,
        description="Train or fine-tune a model as a YAML says. Options are the keys of the YAML, nested ones after a "
        "dot, and win over it. Dots and underscores may be written as dashes, as in all other commands: --data.root or "
        "--data-root, --batch_size or --batch-size.",
        exit_on_error=False,
    )
    help = "YAML of the run, or name of a shipped recipe, such as dtop/ade20k_base"
    parser.add_argument("--config", action="config", help=help)
    parser.add_class_arguments(TrainConfig, nested_key=None, instantiate=True)
    add_options(parser)
    keys = config_keys()
    arguments = [_as_key(argument, keys) for argument in arguments]
    arguments = _with_files(arguments)
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(in_plain_words(str(error), keys)) from None
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    values = build(options)
    return TrainConfig(**{f.name: getattr(values, f.name) for f in fields(TrainConfig)}), options


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name, such as `dtop/ade20k_base`."""
    files = sorted(RECIPES.rglob("*.yaml"))
    return {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in files}


def recipe_file(given: str) -> Path:
    """Return the file that `--config` names: an existing file, else the shipped recipe of this name.

    Raises `ConfigError`, with the nearest names, where it is neither.
    """
    path, name, recipes = Path(given), given.removesuffix(".yaml"), shipped_recipes()
    if not path.is_file() and name in recipes:
        return recipes[name]
    if path.exists():
        return path
    near = difflib.get_close_matches(name, recipes, 3)
    if near:
        raise ConfigError(f"--config {given} is neither a file nor a shipped recipe: did you mean {_either(near)}?")
    return path


def config_keys() -> dict[str, Any]:
    """Return every dotted key of a run with its type."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(TrainConfig).items():
        inner = {f"{name}.{key}": value for key, value in get_type_hints(kind).items()} if is_dataclass(kind) else {}
        keys |= inner or {name: kind}
    return keys


def in_plain_words(message: str, keys: dict[str, Any]) -> str:
    """Put what the parser has to say into one sentence."""
    key, value = _found(r'Parser key "([^"]+)"', message), _found(r"(?:Got value|Given value): (.*)", message)
    if key in keys and value is not None:
        return f"{key}: {value.strip()} does not fit, give {_expected(keys[key], flat(TrainConfig())[key])}."
    if any(name.startswith(f"{key}.") for name in keys):
        return f"{key}: one value does not fit, give a mapping, or the keys below it as --{key}.KEY VALUE."
    group, unknown = _found(r"Group '([^']+)'", message), _found(r"ption '([^']+)'", message)
    if unknown is not None:
        return _unknown(f"{group}.{unknown}" if group else unknown, keys)
    unrecognized = _found(r"unrecognized arguments: (\S+)", message)
    if unrecognized is not None and unrecognized.startswith("--"):
        return _unknown(unrecognized.removeprefix("--").partition("=")[0], keys)
    if unrecognized is not None:
        return f"{unrecognized} stands alone: write options as --KEY VALUE, {SEE_HELP}."
    choice = re.search(r"argument (--\S+): invalid choice: '?([^']*)'? \(choose from (.*)\)", message)
    if choice is not None:
        words = choice[3].replace("'", "")
        return f"{choice[1]} {choice[2]} is unknown: choose one of {words}."
    return f"{' '.join(message.split()).rstrip('.')}: {SEE_HELP}."


def _unknown(key: str, keys: dict[str, Any]) -> str:
    known = {name.rpartition(".")[2]: name for name in keys}  # `lr` alone means optim.lr
    near = difflib.get_close_matches(key, keys, 1) or [
        known[name] for name in difflib.get_close_matches(key.rpartition(".")[2], known, 1)
    ]
    return f"{key} is no key of a run: " + (f"did you mean {near[0]}?" if near else f"{SEE_HELP}.")


def _either(names: Sequence[str]) -> str:
    """Join names as `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _expected(kind: Any, example: Any) -> str:
    """Describe what a value of this type looks like."""
    simple = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if kind in simple:
        return simple[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        null = ["null"] if type(None) in inner else []
        return " or ".join([*(_expected(a, example) for a in inner if a is not type(None)), *null])
    if origin in (tuple, list):
        count = f" of {len(inner)} numbers" if origin is tuple else ""
        return f"a list{count}" + (f" such as [{', '.join(map(str, example))}]" if example else "")
    if origin is dict:
        return "a mapping such as {drop_path: 0.1}"
    return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])


def _as_key(argument: str, keys: dict[str, Any]) -> str:
    """Rewrite `--batch-size` as `--batch_size`, and `--data-root` as `--data.root`: all but letters may be a dash."""
    name, equals, value = argument.partition("=")
    written = {_dashed(key): key for key in keys}
    key = written.get(_dashed(name.removeprefix("--"))) if name.startswith("--") else None
    return argument if key is None else f"--{key}{equals}{value}"


def _dashed(key: str) -> str:
    return key.replace(".", "-").replace("_", "-")


def _with_files(arguments: Sequence[str]) -> list[str]:
    """Replace names of recipes by their files, and reject files that cannot be read as a mapping, before the parser
    says so in its words."""
    replaced = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, given = argument.partition("=")
        if option != "--config" or (not equals and i + 1 == len(arguments)):
            continue
        file = recipe_file(given if equals else arguments[i + 1])
        _check_file(file)
        if equals:
            replaced[i] = f"--config={file}"
        else:
            replaced[i + 1] = str(file)
    return replaced


def _check_file(path: Path) -> None:
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {path} cannot be read ({reason}): give a YAML file.") from None
    try:
        content = parse_yaml(data)
    except ValueError as error:
        raise ConfigError(f"--config {path} is no YAML ({error}): correct it.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds no keys: write one 'key: value' a line, such as 'steps: 1000'.")


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None
