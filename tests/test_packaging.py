"""What the wheel holds beside the modules. It is built from a copy of the sources, without network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tokenexit.training.parsing import shipped_recipes


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, folder)
    shutil.copytree(repo_root / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1])


def test_wheel__holds_every_recipe(wheel: zipfile.ZipFile) -> None:
    shipped = {f"tokenexit/configs/{name}.yaml": path for name, path in shipped_recipes().items()}
    held = {name for name in wheel.namelist() if name.startswith("tokenexit/configs/")}
    assert held == shipped.keys()
    assert all(wheel.read(name) == path.read_bytes() for name, path in shipped.items())


def test_wheel__holds_styles_the_page_and_the_mark_of_types(wheel: zipfile.ZipFile, repo_root: Path) -> None:
    sources = repo_root / "src"
    kinds = {path for kind in ("*.css", "page.*", "py.typed") for path in sources.rglob(kind)}
    assert len(kinds) > 3
    assert {path.relative_to(sources).as_posix() for path in kinds} <= set(wheel.namelist())
