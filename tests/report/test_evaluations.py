"""Evaluations on a terminal and in a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tokenexit.errors import ConfigError
from tokenexit.evaluation.metrics import scores
from tokenexit.evaluation.results import Evaluation
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.report.evaluations import class_table, main_table, write_json
from tokenexit.report.tables import Table
from tokenexit.version import __version__

NAMES = ("sky", "road", "car")


def result(method: Method[Any], label: str, exits: int = 3) -> Evaluation:
    """Three classes of which the last is in no image; four images."""
    confusion = torch.tensor([[60, 10, 0], [20, 110, 0], [0, 0, 0]])
    gmacs, live = (10.125, 11.0, 12.0, 13.5), tuple((0.62, 0.414, 0.3)[:exits] for _ in range(4))
    return Evaluation(
        method, label, scores(confusion), 51.5, gmacs, (20.0,) * 4, live, (4.0, 5.0, 6.0, 99.0), confusion
    )


def results() -> list[Evaluation]:
    return [
        result(Dense(), "dense"),
        result(DToP(), "dtop 0.98/0.9/0.8 keep_per_class=3"),
        result(DoViT(), "random, counts of dtop 0.98/0.9/0.8 keep_per_class=3"),
    ]


def on_terminal(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table.to_rich())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_the_table_shows_accuracy_compute_live_tokens_and_time() -> None:
    table = main_table(results())
    row = dict(zip((column.name for column in table.columns), table.texts()[1]))
    assert row == {
        "method": "dtop 0.98/0.9/0.8 keep_per_class=3",
        "mIoU": "72.62",
        "aAcc": "85.00",
        "mAcc": "85.16",
        "boundary IoU": "51.50",
        "GMACs": "11.656",
        "of dense": "58%",
        "live, %": "62/41/30",
        "ms": "5.5",
    }


def test_times_can_be_left_out_and_the_spread_of_costs_added() -> None:
    table = main_table(results(), latency=False, spread=True)
    assert [column.name for column in table.columns][-2:] == ["live, %", "5 to 95 %"]
    assert table.texts()[0][-1] == "10.256 to 13.275"


def test_models_without_exits_have_a_table_too() -> None:
    assert main_table([result(Dense(), "dense", exits=0)]).texts()[0][7] == ""


@pytest.mark.parametrize("width", [100, 120])
def test_long_labels_wrap_between_words_and_no_figure_is_broken(width: int) -> None:
    lines = on_terminal(main_table(results()), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for row in main_table(results()).texts():
        for cell in row[1:]:
            assert cell in text
    for word in ("0.98/0.9/0.8", "keep_per_class=3", "random,", "counts"):
        assert word in text, word
    assert sum("│" in line for line in lines) <= 8  # three rows of at most three lines


def test_every_class_has_a_row_and_every_method_a_column() -> None:
    table = class_table(results()[:2], NAMES)
    assert [column.name for column in table.columns] == ["class", "dense", "dtop 0.98/0.9/0.8 keep_per_class=3"]
    assert table.texts() == [["sky", "66.7", "66.7"], ["road", "78.6", "78.6"], ["car", "–", "–"]]


def test_the_file_holds_all_figures_and_what_they_were_measured_with(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    write_json(path, results(), NAMES, {"data": "camvid"})
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["about"]["data"] == "camvid"
    assert content["about"]["tokenexit"] == __version__
    assert content["about"]["torch"] == torch.__version__
    assert [r["label"] for r in content["results"]] == [r.label for r in results()]
    first = content["results"][0]
    assert first["mIoU"] == pytest.approx(72.62, abs=0.01)
    assert first["IoU"] == {"sky": pytest.approx(200 / 3), "road": pytest.approx(1100 / 14), "car": None}
    assert first["share_of_dense"] == pytest.approx(46.625 / 80)
    assert first["latency_ms_median"] == 5.5
    assert first["live_after_exit"] == pytest.approx([0.62, 0.414, 0.3])
    assert content["results"][1]["method"]["threshold"] == 0.95


def test_a_file_that_stands_there_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, results(), NAMES, {"odd": object()})
    assert path.read_text() == "old"
    write_json(path, results(), NAMES, {})
    assert json.loads(path.read_text())["results"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be written \(.*\): choose another file\.$"):
            write_json(path, results(), NAMES, {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
