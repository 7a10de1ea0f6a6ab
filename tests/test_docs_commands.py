"""Commands in the documents work: each is taken by its parser, and those of the first page are run as they stand."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import fine
from tokenexit.cli import COMMANDS, main
from tokenexit.cli.method_options import method_options
from tokenexit.cli.options import CommandParser
from tokenexit.methods import DToP
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import TrainConfig
from tokenexit.training.parsing import parse_train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines that call the program, in code blocks of either kind; continued lines are joined, variables filled in."""
    text = page.read_text().replace("\\\n", " ")
    inside, found, variables = False, [], dict(re.findall(r'^([A-Z]+)="(.*)"$', text, re.MULTILINE))
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        call = (
            re.match(r"(?:    )?(?:torchrun .*-m )?(tokenexit .*)", line) if inside or line.startswith("    ") else None
        )
        if call:
            found.append(re.sub(r"\$([A-Z]+)", lambda name: variables.get(name[1], name[0]), call[1]))
    return found


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


class Taken(Exception):
    """A parser took its arguments; nothing is run."""


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}: {command[:60]}" for page, command in ALL])
def test_command__is_taken_by_its_parser(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *rest = shlex.split(command, comments=True)
    if name == "train":
        if "..." not in rest:
            parse_train(rest, lambda parser: parser.add_argument("--dry-run", action="store_true"))
        return
    parse = CommandParser.parse_args

    def parse_only(self: CommandParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Taken

    monkeypatch.setattr(CommandParser, "parse_args", parse_only)
    with pytest.raises(Taken):
        COMMANDS[name](rest)


def test_pages__have_commands() -> None:
    assert {"README.md", "getting-started.md", "your-own-vit.md", "calibration.md"} <= {page for page, _ in ALL}
    assert len(ALL) > 30


def test_pages__name_options_that_some_command_has() -> None:
    """In running text, where no parser reads them. Evidence, which also names options of benchmarks, is left out."""
    sources = "".join(path.read_text() for path in (ROOT / "src" / "tokenexit" / "cli").glob("*.py"))
    known = set(re.findall(r'"--([a-z][a-z-]*)"', sources)) | {"config", "no-gate"}
    known |= {"nnodes", "extra-index-url"}  # of torchrun and pip
    known |= {name.replace("_", "-") for name in method_options()}
    known |= {f.name.replace("_", "-") for f in fields(TrainConfig)}
    for page in (page for page in PAGES if page.parent.name != "evidence"):
        named = re.findall(r"`--([a-z][a-z_-]*)(?![\w.])", page.read_text())
        assert {name.replace("_", "-") for name in named} <= known, page


def test_getting_started__works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a model that trained for a few steps instead of minutes, and with fewer images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenexit.cli.quickstart.pace", lambda seconds, seed: (3, "fp32"))
    monkeypatch.setattr("tokenexit.cli.quickstart.TEST_IMAGES", 4)
    page = ROOT / "docs" / "guide" / "getting-started.md"
    for command in commands(page):
        _, name, *rest = shlex.split(command)
        rest = ["6" if before == "--limit" else word for before, word in zip(["", *rest], rest)]
        if name == "doctor":
            assert main([name, *rest]) in (0, 1)  # what it finds is the machine's
        elif name != "serve":  # which has tests of its own
            fine(capsys, name, *rest)
    assert (tmp_path / "runs/first/model/calibration.json").exists()
    assert len(list((tmp_path / "runs/first/masks").iterdir())) >= 3
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(example, "getting-started.md", "exec"), {})
    assert "torch.Size" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["your-own-vit.md", "your-own-data.md"])
def test_python__of_other_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tokenexit.calibration.latency.SIDES", (4, 6, 8))
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide" / page).read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), {"__name__": "example"})


def test_own_training_loop__learns_as_it_stands_and_leaves_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guide" / "own-training-loop.md"
    names: dict[str, Any] = {"__name__": "example"}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, page.name, "exec"), names)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 64 // 8 + 1
    assert losses[-2] < losses[0]
    model = ExitSegmenter.from_pretrained("runs/own")
    assert model.predict(names["data"][0].image, DToP(threshold=0.5)).labels.shape == (1, 64, 96)
