"""Imports go downwards: a module knows only what stands before it in `ORDER`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokenexit

SOURCE = Path(tokenexit.__file__).parent
ORDER = [
    ("errors", "cost", "tokens", "upsampling", "writing"),
    ("runtime",),
    ("attention",),
    ("captured",),
    ("vit",),
    ("heads",),
    ("exits",),
    ("methods",),
    ("checkpoints",),
    ("ledger",),
    ("output",),
    ("outputs",),
    ("preprocessing",),
    ("windows",),
    ("card", "pipeline"),
    ("hub",),
    ("pretrained",),
    ("segmenter",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ENGINE = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).with_suffix("").parts[0] in RANK)


def imported(path):
    """Modules of this package that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "tokenexit":
                names = [f"tokenexit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1:] for name in names if name.split(".")[0] == "tokenexit")


def room(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_engine__knows_only_what_stands_before_it(path):
    own = room(path)
    for name in imported(path):
        assert name[0] in RANK, f"{path} knows {'.'.join(name)}, which is built on the engine"
        assert name[0] == own or RANK[name[0]] < RANK[own], f"{path} knows {'.'.join(name)}"


def test_engine__all_its_rooms_are_walked():
    assert {room(path) for path in ENGINE} == set(RANK)


def test_method_files__do_not_know_each_other_beyond_what_they_extend():
    for path in (SOURCE / "methods").glob("*.py"):
        known = {name[1] for name in imported(path) if name[0] == "methods" and len(name) > 1}
        if path.stem in ("dense", "dtop", "dovit"):
            assert known == {"base"}


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package__does_not_import_torch():
    run("import sys, tokenexit; assert 'torch' not in sys.modules, 'torch was imported'")


def test_importing_the_engine__needs_no_training_or_hub_library():
    heavy = ["accelerate", "torchmetrics", "jsonargparse", "rich", "huggingface_hub", "matplotlib"]
    heavy += ["transformers", "timm", "torchvision"]
    run(
        "import sys, tokenexit.segmenter\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )


def test_public_names__all_resolve():
    for name in tokenexit.__all__:
        assert getattr(tokenexit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Resnet'"):
        _ = tokenexit.Resnet
