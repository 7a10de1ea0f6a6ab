"""The site shows every page and every public name; `make docs` checks links, anchors and references while it builds."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenexit


@pytest.fixture(scope="module")
def site(repo_root: Path) -> dict[str, Any]:
    """The settings in mkdocs.yml."""
    settings: dict[str, Any] = yaml.safe_load((repo_root / "mkdocs.yml").read_text())
    return settings


@pytest.fixture(scope="module")
def hooks(repo_root: Path, site: dict[str, Any]) -> dict[str, Any]:
    (path,) = site["hooks"]
    return runpy.run_path(str(repo_root / path))


def leaves(nav: Any) -> list[str]:
    """Pages of the navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav if isinstance(nav, list) else nav.values()) for page in leaves(part)]


def test_navigation__has_every_page_once(repo_root: Path, site: dict[str, Any], hooks: dict[str, Any]) -> None:
    docs = repo_root / "docs"
    written = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    assert sorted(leaves(site["nav"])) == sorted(written | set(hooks["PAGES"].values()))


def test_site__is_built_strictly(site: dict[str, Any]) -> None:
    assert site["strict"]
    assert {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}.items() <= site["validation"][
        "links"
    ].items()


def test_api_pages__have_every_public_name_and_none_that_is_not_there(repo_root: Path) -> None:
    pages = (repo_root / "docs" / "reference" / "code").glob("*.md")
    named = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(named) == len(set(named))
    assert {f"tokenexit.{name}" for name in tokenexit.__all__ if not name.startswith("__")} <= set(named)
    for name in named:
        assert pkgutil.resolve_name(name).__doc__, name


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/guide/faq.md)", "[a](guide/faq.md)"),
        ("![a](docs/images/scene.png)", "![a](images/scene.png)"),
        ("[a](docs/guide/faq.md#b)", "[a](guide/faq.md#b)"),
        ("[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("[a](src/tokenexit/segmenter.py)", "[a](../src/tokenexit/segmenter.py)"),
        ("[a](https://example.org/docs/x.md)", "[a](https://example.org/docs/x.md)"),
        ("[a](#b)", "[a](#b)"),
    ],
)
def test_for_site__has_links_as_from_the_docs_folder(link: str, expected: str, hooks: dict[str, Any]) -> None:
    assert hooks["for_site"](link) == expected
