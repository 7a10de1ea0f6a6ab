"""The report of a trained model: what it says is what evaluation found, and it is one whole file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.calibration.test_cbt import Squares
from tests.cli.test_cli import fine, wrong
from tests.helpers import tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense, DToP
from tokenexit.report.evaluations import late_blocks_note
from tokenexit.report.model_report import report_model
from tokenexit.segmenter import ExitSegmenter

METHOD = DToP(threshold=(0.25, 0.26), keep_per_class=1)


class Tags(HTMLParser):
    """Counts tags, and keeps every address that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def cells(page: str, row: str) -> list[str]:
    """The texts of the first table row that begins with `row`."""
    found = re.search(rf'<tr><th scope="row"[^>]*>{re.escape(row)}</th>(.*?)</tr>', page)
    assert found, f"no row {row}"
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def test_report_model__says_what_evaluation_finds(tmp_path: Path) -> None:
    model, data = tiny_segmenter(), Squares()
    page = report_model(model, data, [METHOD, DToP(threshold=0.9)], tmp_path / "r.html", scales=[0.5]).read_text()
    dense, chosen, strict = evaluate(model, data, [Dense(), METHOD, DToP(threshold=0.9)])
    for result in (dense, chosen, strict):
        assert cells(page, result.label)[:2] == [f"{result.scores.miou:.2f}", f"{result.scores.aacc:.2f}"]
        assert f"{result.gmacs_mean:.3f}" in cells(page, result.label)
    assert cells(page, "dense @0.5")
    name = data.labels.names[0]
    before, after = dense.scores.iou[0], chosen.scores.iou[0]
    assert cells(page, name)[1:] == [f"{before:.1f}", f"{after:.1f}", f"{after - before:+.2f}"]
    assert f"takes {chosen.share_of_dense:.0%} of dense" in page


def test_report_model__shows_references_and_intervals_unless_they_are_left_out(tmp_path: Path) -> None:
    model, data = tiny_segmenter(), Squares()
    page = report_model(model, data, [METHOD], tmp_path / "r.html").read_text()
    dense, chosen, at_random, first, second = evaluate(model, data, [Dense(), METHOD], references=["random", "depths"])
    for result in (at_random, first, second):
        assert cells(page, result.label)[:2] == [f"{result.scores.miou:.2f}", f"{result.scores.aacc:.2f}"]
    low, high = chosen.miou_interval() or (0.0, 0.0)
    assert f"{low:.1f} to {high:.1f}" in cells(page, chosen.label)
    low, high = chosen.miou_interval(dense) or (0.0, 0.0)
    assert f"{low:+.2f} to {high:+.2f}" in cells(page, chosen.label)
    assert f"the difference is {low:+.2f} to {high:+.2f} (95 % over images)" in page
    assert "–" in cells(page, "dense")  # is not compared with itself
    assert 'class="tx-whisker"' in page
    assert "random exits" in page
    assert "stopped after an exit" in page
    bare = report_model(model, data, [METHOD], tmp_path / "bare.html", references=False).read_text()
    assert "random" not in bare
    assert "truncated" not in bare


def test_report_model__says_where_late_blocks_do_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_segmenter(), Squares()
    results = evaluate(model, data, [Dense()], references=["depths"])
    expected = late_blocks_note(model, results)
    page = report_model(model, data, [METHOD], tmp_path / "r.html").read_text()
    assert expected is not None  # weights drawn at random know no depth
    assert expected.split(":")[0] in page
    assert "truncated --after 2" in page
    monkeypatch.setattr("tokenexit.report.model_report.late_blocks_note", lambda *_: None)
    assert "not help this model" not in report_model(model, data, [METHOD], tmp_path / "r.html").read_text()


def test_report_model__names_the_largest_confusion(tmp_path: Path) -> None:
    model, data = tiny_segmenter(), Squares()
    page = report_model(model, data, [METHOD], tmp_path / "r.html").read_text()
    (_, chosen) = evaluate(model, data, [Dense(), METHOD])
    wrong_pixels = chosen.confusion.numpy() * (1 - np.eye(5, dtype=int))
    truth, taken = np.unravel_index(wrong_pixels.argmax(), wrong_pixels.shape)
    table = page[page.index("Largest confusions") :]
    first = re.findall(r'<th scope="row"[^>]*>(.*?)</th><td>(.*?)</td>', table)[0]
    assert first == (data.labels.names[truth], data.labels.names[taken])


def test_report_model__shows_the_images_of_least_and_of_most_compute(tmp_path: Path) -> None:
    model, data = tiny_segmenter(), Squares()
    page = report_model(model, data, [METHOD], tmp_path / "r.html", examples=1).read_text()
    (_, chosen) = evaluate(model, data, [Dense(), METHOD])
    shares = np.array(chosen.gmacs) / np.array(chosen.dense_gmacs)
    for title, share in (("Least compute", shares.min()), ("Most compute", shares.max())):
        ((place, *_),) = [re.findall(rf"{title}: (\d+)<", page)]
        assert shares[int(place)] == share
    tags = Tags(page)
    assert tags.count["img"] == 8
    assert tags.count["svg"] == 2
    assert all(address.startswith(("data:", "#")) for address in tags.addresses), "nothing is loaded from elsewhere"


def test_report_model__refuses_to_compare_dense_with_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="methods must name one beside dense, got none"):
        report_model(tiny_segmenter(), Squares(), [Dense()], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_report__is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels_of_scenes = ExitSegmenter("vit_tiny_patch16", 9, [1], embed_dim=32, num_heads=2, depth=2)
    labels_of_scenes.save_pretrained(tmp_path / "model")
    data = ("--data", "scenes", "--limit", 2, "--input-scale", "--examples", 1, "--method", "dtop")
    out = tmp_path / "deep" / "report.html"
    assert f"report: {out}" in fine(capsys, "report", tmp_path / "model", *data, "--out", out)
    assert "tokenexit report" in out.read_text()
    assert "truncated after=1 (block 1)" in out.read_text()
    fine(capsys, "report", tmp_path / "model", *data, "--references", "no", "--out", out)
    assert "truncated after=1" not in out.read_text()
    assert wrong(capsys, "report", tmp_path / "model", "--data", "scenes").startswith(
        "a report compares a method with dense, and this model is not calibrated: calibrate it, or name --method."
    )
    assert "must be at least 1" in wrong(capsys, "report", tmp_path / "model", *data, "--limit", 0)
