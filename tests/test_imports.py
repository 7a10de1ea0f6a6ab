"""Imports go downwards: a room knows only rooms on lower floors of the table in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenexit

SOURCE = Path(tokenexit.__file__).parent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"


def floors(page: str) -> dict[str, int]:
    """Every room of the table under "Rooms" and the floor it stands on."""
    (section,) = re.findall(r"^## Rooms\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`[^|]*`) \| (\d+) \|", section, re.MULTILINE)
    return {name: int(floor) for rooms, floor in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", rooms)}


FLOOR = floors(PAGE.read_text())


def module(path: Path) -> tuple[str, ...]:
    """`("engine", "vit")`; a package is its folder, and the package itself `("__init__",)`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


MODULES = {module(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of this package that a file imports anywhere, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "tokenexit":
                while parts and tuple(parts) not in MODULES:  # what the module holds
                    parts.pop()
                yield tuple(parts) or ("__init__",)


def in_a_circle(known: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Modules that know themselves through others, or only know such."""
    left = dict(known)
    while free := [name for name, names in left.items() if not names & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_table__names_every_room_and_no_other() -> None:
    assert set(FLOOR) == {name[0] for name in MODULES}


@pytest.mark.parametrize("name", MODULES, ids=".".join)
def test_module__knows_only_rooms_on_lower_floors(name: tuple[str, ...]) -> None:
    for other in imported(MODULES[name]):
        assert other[0] == name[0] or FLOOR[other[0]] < FLOOR[name[0]], f"{MODULES[name]} knows {'.'.join(other)}"


@pytest.mark.parametrize("room", FLOOR)
def test_room__has_no_circle_inside(room: str) -> None:
    known = {
        name: {other for other in imported(path) if other[0] == room and other != name}
        for name, path in MODULES.items()
        if name[0] == room
    }
    assert not in_a_circle(known)


def test_circles_are_found() -> None:
    a, b, c = ("a",), ("b",), ("c",)
    assert in_a_circle({a: {b}, b: {c}, c: set()}) == []
    assert in_a_circle({a: {b}, b: {a}, c: set()}) == [a, b]


def test_method_files__do_not_know_each_other_beyond_what_they_extend() -> None:
    for name in ("dense", "dtop", "dovit"):
        known = {other[1] for other in imported(SOURCE / "methods" / f"{name}.py") if other[0] == "methods"}
        assert known <= {"base", "selection", "thresholded"}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package__does_not_import_torch() -> None:
    run("import sys, tokenexit; assert 'torch' not in sys.modules, 'torch was imported'")


def test_importing_the_command_line__does_not_import_torch() -> None:
    run("import sys, tokenexit.cli; assert 'torch' not in sys.modules, 'torch was imported'")


def test_importing_the_engine__needs_no_training_or_hub_library() -> None:
    heavy = ["accelerate", "torchmetrics", "jsonargparse", "rich", "huggingface_hub", "matplotlib"]
    heavy += ["transformers", "timm", "torchvision"]
    run(
        "import sys, tokenexit.segmenter\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )


def test_public_names__all_resolve() -> None:
    for name in tokenexit.__all__:
        assert getattr(tokenexit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Resnet'"):
        _ = tokenexit.Resnet
