"""Options of methods on the command line: every field that a method declares with `option`, and nothing else.

Parsers, help and completion must not wait for torch, which the methods need. So the fields are read from the source of
`methods/`; where the methods are imported already, from the classes, which knows methods registered by others, too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

CALIBRATED = "calibrated"
"""The name of the method that a model was calibrated for, at the calibration's thresholds."""
REDUCERS = ("algm", "mpm", "tome", "g2tm", "supertokens", "zerotprune", "coarse_first")
"""The names of `tokenexit.reducers.REDUCERS`, which would import torch."""
NO_MERGING = "none"
CHOSEN = "auto"
"""The value of a reducer that `calibrate` chooses, in `--merge NAME:auto`."""
FOLDER = Path(__file__).parents[1] / "methods"
TYPES: dict[str, type] = {"int": int, "int | None": int, "float": float, "float | None": float}
"""Annotations that are one number on the command line; others are text such as `0.98/0.9/0.8`."""


@dataclass(frozen=True)
class MethodOption:
    """A field as the command line sees it. methods: names of those that have it. annotation: its type, as written."""

    name: str
    help: str
    annotation: str
    choices: tuple[str, ...]
    methods: tuple[str, ...]

    @property
    def is_flag(self) -> bool:
        return self.annotation == "bool"

    @property
    def is_text(self) -> bool:
        """Whether its value is given as text: one number, or one for each exit, or for each class of it."""
        return not self.is_flag and not self.choices and self.annotation not in TYPES


def method_options() -> dict[str, MethodOption]:
    """All options by name, in the order of the methods."""
    found: dict[str, MethodOption] = {}
    for method, declared in (_imported() or _written()).items():
        for option in declared:
            before = found.get(option.name)
            methods = (method,) if before is None else (*before.methods, method)
            own = option if before is None else before
            found[option.name] = MethodOption(own.name, own.help, own.annotation, own.choices, methods)
    return found


def method_names() -> tuple[str, ...]:
    """Names in the registry of methods."""
    return tuple(_imported() or _written())


def options_of(name: str) -> set[str]:
    """Names of a method's options."""
    return {option.name for option in method_options().values() if name in option.methods}


def threshold_method_names() -> tuple[str, ...]:
    """Names of the methods whose thresholds can be chosen."""
    return method_options()["threshold"].methods


def add_method_choice(parser: Any, default: str = f"{CALIBRATED} one, else dense", *, several: bool = False) -> None:
    """Add `--method` and the options of methods, for commands that run a model as it was calibrated by default.

    default: what runs if no method is named, for the help.
    """
    parser.add_argument(
        "--method",
        nargs="+" if several else None,
        metavar="NAME",
        choices=(*method_names(), CALIBRATED),
        help=f"{'methods, each a row of its own' if several else 'method'}: {', '.join(method_names())}, or "
        f"{CALIBRATED}, the model's own; the {default} if not given",
    )
    add_method_options(parser, several)


def add_merge_option(parser: Any, *, several: bool = False, chosen: bool = False) -> None:
    """Add `--merge`, what merges tokens beside the method's exits.

    several: each is a row of its own. chosen: whether the command chooses a value itself.
    """
    rows = ", none among them for a row without" if several else ""
    rows += f"; {CHOSEN} as a value is chosen with the thresholds" if chosen else ""
    parser.add_argument(
        "--merge",
        nargs="+" if several else None,
        default=None,
        metavar="NAME[:VALUE][,OPTION=VALUE]",
        help="merge tokens between exits, too, with algm:THRESHOLD, mpm, tome:RATIO, g2tm:THRESHOLD, "
        f"zerotprune:KEEP, supertokens:THRESHOLD,sizes=2/4 or coarse_first:BLOCK{rows}",
    )


def add_method_options(
    parser: Any, several: bool = False, without: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> None:
    """Add the options that select a method's parameters, all but those in `without`, which the command has itself.

    several: each threshold is a row of its own. only: methods that the command runs; all if None.
    """
    group = parser.add_argument_group("method options")
    run = method_names() if only is None else only
    for name, option in method_options().items():
        whose = [method for method in option.methods if method in run]
        if name in without or not whose:
            continue
        settings = _settings(option)
        settings["help"] += "" if len(whose) == len(run) else f"; {', '.join(whose)}"
        if name == "threshold" and several:
            settings["nargs"] = "+"
        group.add_argument(f"--{name.replace('_', '-')}", **settings)


def _settings(option: MethodOption) -> dict[str, Any]:
    """What a parser needs to know of an option."""
    settings: dict[str, Any] = {"default": None, "help": option.help}
    if option.is_flag:
        return settings | {"action": "store_true"}
    if option.choices:
        return settings | {"choices": option.choices}
    return settings | {"type": TYPES.get(option.annotation, str)}


# ------------------------------------------------------------------------------------------- from classes, or source


def _imported() -> dict[str, tuple[MethodOption, ...]] | None:
    """From the classes, if these are imported."""
    module = sys.modules.get("tokenexit.methods")
    registry = None if module is None else module.__dict__.get("METHODS")
    if registry is None:
        return None
    return {name: tuple(_of_class(kind)) for name, kind in registry.items()}


def _of_class(kind: type) -> Iterator[MethodOption]:
    for field in fields(kind):
        # A subclass that only sets another default leaves help and choices to its base.
        bases = [base.__dict__.get("__dataclass_fields__", {}).get(field.name) for base in kind.__mro__]
        declared = next((base for base in bases if base is not None and "help" in base.metadata), None)
        if declared is not None:
            help, choices = declared.metadata["help"], tuple(declared.metadata["choices"])
            yield MethodOption(field.name, help, str(declared.type), choices, ())


@cache
def _written() -> dict[str, tuple[MethodOption, ...]]:
    """From the source."""
    classes = {node.name: node for path in sorted(FOLDER.glob("*.py")) for node in _classes(path)}
    return {_name_of(classes[kind]): tuple(_inherited(kind, classes)) for kind in _registered()}


def _classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]


def _registered() -> list[str]:
    """Classes in the registry `METHODS` of `methods/__init__.py`."""
    tree = ast.parse((FOLDER / "__init__.py").read_text("utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METHODS"
    )
    assert isinstance(table, ast.DictComp)
    assert isinstance(table.generators[0].iter, ast.Tuple)
    return [item.id for item in table.generators[0].iter.elts if isinstance(item, ast.Name)]


def _name_of(node: ast.ClassDef) -> str:
    """Its `name: ClassVar[str] = "..."`."""
    (name,) = (f.value for f in _fields(node) if isinstance(f.target, ast.Name) and f.target.id == "name")
    assert name is not None
    return str(ast.literal_eval(name))


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]


def _inherited(kind: str, classes: dict[str, ast.ClassDef]) -> list[MethodOption]:
    """Options of a class behind those of its bases, as dataclasses order them."""
    node, found = classes[kind], dict[str, MethodOption]()
    for base in node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(named, ast.Name) and named.id in classes:
            found |= {option.name: option for option in _inherited(named.id, classes)}
    for statement in _fields(node):
        call = statement.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option":
            assert isinstance(statement.target, ast.Name)
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            help = ast.literal_eval(given["help"] if "help" in given else call.args[1])
            choices = ast.literal_eval(given["choices"]) if "choices" in given else ()
            name, annotation = statement.target.id, ast.unparse(statement.annotation)
            found[name] = MethodOption(name, help, annotation, tuple(choices), ())
    return list(found.values())
