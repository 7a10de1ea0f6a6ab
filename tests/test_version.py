"""The version stands in one place, and everything that speaks of it reads it there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import tokenexit
from tokenexit.version import __version__


def test_version__is_read_by_the_package_and_by_its_metadata(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tokenexit.version.__version__"}
    assert tokenexit.__version__ == __version__


def test_version__is_that_of_the_newest_entry_of_the_changelog(repo_root: Path) -> None:
    entries = re.findall(r"^## \[(.+?)\]", (repo_root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert __version__ in entries


def test_version__is_that_of_the_citation(repo_root: Path) -> None:
    assert f"\nversion: {__version__}\n" in (repo_root / "CITATION.cff").read_text()
