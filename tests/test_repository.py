"""What surrounds the package holds: the contributor's guide, continuous integration, templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml


def test_contributing__names_files_and_names_that_exist(repo_root: Path) -> None:
    recipes = (repo_root / "CONTRIBUTING.md").read_text().partition("## Recipes")[2]
    for section in recipes.split("\n### ")[1:]:
        words = re.findall(r"`([^`]+)`", section)
        files = [word for word in words if re.fullmatch(r"[\w./]+(?:\.py|\.md|/)", word)]
        paths = [repo_root / ("" if word.startswith(("tests/", "docs/")) else "src/tokenexit") / word for word in files]
        assert paths, section
        assert [str(path) for path in paths if not path.exists()] == []
        texts = [path.read_text() for path in paths if path.is_file()]
        names = [word for word in words if re.fullmatch(r"_?[A-Za-z]\w+", word)]
        assert [name for name in names if not any(re.search(rf"\b{name}\b", text) for text in texts)] == []


def test_contributing__has_six_recipes(repo_root: Path) -> None:
    titles = re.findall(r"^### To add an? (.+)$", (repo_root / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert titles == ["head", "dataset", "backbone", "method", "command", "output format"]


def test_workflow__calls_make_test_on_every_version_the_package_names(repo_root: Path) -> None:
    workflow = yaml.safe_load((repo_root / ".github" / "workflows" / "test.yml").read_text())
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    assert any(step.get("run", "").startswith("make test ") for step in job["steps"])


@pytest.mark.parametrize(
    "path", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml", ".pre-commit-config.yaml"]
)
def test_forms__are_yaml_with_what_their_readers_want(path: str, repo_root: Path) -> None:
    content: dict[str, Any] = yaml.safe_load((repo_root / path).read_text())
    if path.startswith(".github"):
        assert {"name", "description", "body"} <= content.keys()
        assert all({"type", "id", "attributes"} <= field.keys() for field in content["body"])
    else:
        hooks = [hook["id"] for repo in content["repos"] for hook in repo["hooks"]]
        assert hooks == ["ruff", "ruff-format", "mypy"]


def test_citation__is_of_this_package(repo_root: Path) -> None:
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text())
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
    assert citation["title"].startswith(f"{project['name']}:")
    assert all({"title", "authors", "type"} <= reference.keys() for reference in citation["references"])
