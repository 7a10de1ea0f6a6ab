"""What the documents say of the code is true of the code."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def test_names(repo_root: Path) -> set[str]:
    texts = (path.read_text() for path in (repo_root / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def methods_page(repo_root: Path) -> tuple[str, str]:
    """The page of methods: what stands before the tables of tests, and these."""
    before, _, tests = (
        (repo_root / "docs" / "reference" / "methods.md").read_text().partition("\n## Where each is tested")
    )
    assert tests
    return before, tests


def rows(text: str) -> list[list[str]]:
    """Cells of every table row, those of headings left out."""
    lines = [line for line in text.splitlines() if re.match(r"\| (?!item |---)", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_methods_page__has_a_row_for_every_fact_of_both_methods(methods_page: tuple[str, str]) -> None:
    sections = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", methods_page[0], re.MULTILINE | re.DOTALL))
    assert len(rows(sections["DToP"])) >= 21
    assert len(rows(sections["DoViT"])) >= 18
    assert all(len(row) == 5 and row[1] for row in rows(methods_page[0])), "a row without its source"


def test_methods_page__shows_the_algorithm_before_its_options(methods_page: tuple[str, str]) -> None:
    for method in ("DToP", "DoViT"):
        section = methods_page[0].partition(f"\n## {method}\n")[2].partition("\n## ")[0]
        assert 0 < section.index("    at an exit:") < section.index("| item |")


def test_methods_page__names_tests_that_exist(methods_page: tuple[str, str], test_names: set[str]) -> None:
    tested = {row[0]: re.findall(r"`(test_\w+)`", row[-1]) for row in rows(methods_page[1])}
    assert list(tested) == [row[0] for row in rows(methods_page[0])]
    for item, tests in tested.items():
        assert tests, f"no test named for {item}"
        assert set(tests) <= test_names


def test_methods_page__names_code_that_exists(repo_root: Path, methods_page: tuple[str, str]) -> None:
    source = repo_root / "src" / "tokenexit"
    for row in rows(methods_page[0]):
        code = re.findall(r"`([^`]+)`", row[-1])
        files = [word for word in code if word.endswith(".py")]
        assert files, f"no file named for {row[0]}"
        texts = [(source / file).read_text() for file in files]
        for name in set(code) - set(files):
            assert any(re.search(rf"(def|class) {name.split('.')[-1]}\b", text) for text in texts), name


def test_pages__cite_no_paragraphs_of_texts_that_are_not_here(repo_root: Path) -> None:
    for page in (*repo_root.glob("*.md"), *(repo_root / "docs").rglob("*.md")):
        found = re.findall(r"(?<![\w.])[a-zA-Z]\.\d+(?![\w.])", page.read_text())
        assert found == [], page


def test_architecture_page__names_rooms_that_exist(repo_root: Path) -> None:
    page = (repo_root / "docs" / "architecture.md").read_text()
    for line in page.splitlines():
        if line.startswith("| `") and not line.startswith("| `DToP"):
            for room in re.findall(r"`([\w/]+(?:\.py|/))`", line.split("|")[1]):
                assert (repo_root / "src" / "tokenexit" / room).exists(), room


def test_api_page__names_what_exists_and_all_that_the_package_offers(repo_root: Path) -> None:
    import tokenexit

    text = (repo_root / "docs" / "reference" / "api.md").read_text()
    named = re.findall(r"`(tokenexit(?:\.\w+)+)`", text)
    assert len(named) > 30
    for name in named:
        assert pkgutil.resolve_name(name) is not None
    offered = {f"tokenexit.{name}" for name in tokenexit.__all__ if not name.startswith("__")}
    assert offered <= set(named)


def test_pages__link_to_pages_that_exist(repo_root: Path) -> None:
    for page in (*repo_root.glob("*.md"), *(repo_root / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme__leads_to_the_loop_and_to_every_decision_in_two_hops(repo_root: Path) -> None:
    section = (repo_root / "README.md").read_text().partition("\n## Map of the code\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\d\. .+", section, re.MULTILINE)
    assert len(lines) == 8
    for line, name in zip(lines, ("run_tokens", "decide", "decide")):
        (file,) = re.findall(r"\]\(([\w/.]+)\)", line)
        assert f"`{name}`" in line
        assert re.search(rf"def {name}\b", (repo_root / file).read_text())


def test_own_data_page__names_the_datasets_that_there_are(repo_root: Path) -> None:
    from tokenexit.data.registry import DATASETS

    text = (repo_root / "docs" / "guide" / "your-own-data.md").read_text()
    section = text.partition("## Known datasets")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(DATASETS)


def test_pages__name_no_dataset_that_there_is_not(repo_root: Path) -> None:
    from tokenexit.data.registry import DATASETS

    for page in (repo_root / "README.md", *(repo_root / "docs").rglob("*.md")):
        named = re.findall(r"--data(?:\.name)? (\w+)|data check (\w+)", page.read_text())
        assert {name for found in named for name in found if name and name.islower()} <= set(DATASETS), page
