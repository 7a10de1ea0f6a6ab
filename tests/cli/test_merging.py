"""`--merge` beside thresholds: chosen with it, or said to be chosen without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.tiny import silent, tiny_run, write_dataset
from tokenexit.calibration import planner
from tokenexit.cli import main
from tokenexit.methods import build_method
from tokenexit.reducers import Supertokens
from tokenexit.training.loop import train

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PRICES", (0.0,))
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 12)
    monkeypatch.setattr("tokenexit.cli.progress.FIRST_LINE", 1e9)  # a busy machine says how far it is


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model; nobody writes into it."""
    out = tmp_path_factory.mktemp("run") / "model"
    train(tiny_run(data, out, steps=3), say=silent, progress=False)
    return out


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "model")
    return tmp_path / "model"


def said(capsys: Captured, *arguments: object, status: int = 0) -> str:
    """What a command says on stderr."""
    assert main(list(map(str, arguments))) == status
    return capsys.readouterr().err


CALIBRATE = ("--budget", "0.9", "--method", "dtop", "--keep-per-class", "1", "--device", "cpu")
EVALUATE = ("--limit", "1", "--device", "cpu", "--json")


def test_thresholds_chosen_without_merging__say_so_beside_it(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    said(capsys, "calibrate", model, *CALIBRATE)
    warning = "were calibrated without merging, and run beside mpm after=1: scores and costs differ, calibrate with"
    for words in (("--method", "calibrated"), ("--method", "dtop"), ()):
        told = said(capsys, "evaluate", model, *words, "--merge", "mpm:1", *EVALUATE, tmp_path / "e.json")
        assert warning in told
        assert told.count("\n") == 1
    out = ("--out", tmp_path / "p")
    assert warning in said(capsys, "predict", model, data / "images" / "test", *out, "--merge", "mpm:1")
    for others in (("--method", "dtop", "--threshold", "0.6", "--merge", "mpm:1"), ("--merge", "none")):
        assert said(capsys, "evaluate", model, *others, *EVALUATE, tmp_path / "e.json") == ""


def test_thresholds_chosen_with_merging__are_the_models_method_and_its_name_alone_says_so(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    said(capsys, "calibrate", model, *CALIBRATE, "--merge", "mpm:1")
    spec = json.loads((model / "calibration.json").read_text())["method"]
    assert spec["name"] == "reduced"
    assert spec["by"] == {"name": "mpm", "after": [1]}
    assert spec["method"]["keep_per_class"] == 1
    for words in (("--method", "calibrated"), ()):
        assert said(capsys, "evaluate", model, *words, *EVALUATE, tmp_path / "e.json") == ""
        (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
        assert row["method"]["name"] == "reduced"
        assert "calibrated" in row["label"]
    told = said(capsys, "evaluate", model, "--method", "dtop", *EVALUATE, tmp_path / "e.json")
    assert "thresholds of dtop were calibrated with merging, and dtop runs with its defaults: name --method" in told
    out = ("--out", tmp_path / "p")
    said(capsys, "predict", model, data / "images" / "test", *out)
    assert json.loads((tmp_path / "p" / "predictions.json").read_text())["method"]["name"] == "reduced"
    twice = said(capsys, "predict", model, data / "images" / "test", *out, "--merge", "mpm:1", status=2)
    assert "one reducer works at a time" in twice


def test_predict__draws_groups_of_merged_tokens_in_exit_maps(
    trained: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    words = ("--method", "dtop", "--threshold", "1", "--save", "exits", "--device", "cpu")
    merging = {"a": (), "b": ("--merge", "supertokens:0.5,sizes=2"), "c": ("--merge", "coarse_first:1")}
    for name, merge in merging.items():
        said(capsys, "predict", trained, data / "images" / "test", "--out", tmp_path / name, *words, *merge)
    plain, lined, split = (next((tmp_path / name).glob("p0*.png")).read_bytes() for name in merging)
    assert plain != lined
    assert split not in (plain, lined)  # nobody has left and all have come apart: each patch is outlined


def test_sweep__has_a_curve_with_merging_and_one_without(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the plot extra")
    words = ("--method", "dtop", "--keep-per-class", "1", "--points", "2", "--input-scale", "--full-range")
    said(capsys, "sweep", model, *words, "--merge", "none", "mpm:1", "--out", tmp_path / "s", "--device", "cpu")
    results = json.loads((tmp_path / "s" / "sweep.json").read_text())["results"]
    series = {row["series"] for key, row in results.items() if key.startswith("row")}
    assert series == {"dense", "dtop, thresholds chosen", "dtop + mpm after=1, thresholds chosen"}


def test_calibrate__chooses_the_amount_of_merging_with_the_thresholds(
    model: Path, data: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supertokens, "trials", (0.9, -1.0))
    budget = ("--budget", "0.6", *CALIBRATE[2:])
    assert main(list(map(str, ("calibrate", model, *budget, "--merge", "supertokens:auto,sizes=2")))) == 0
    told = capsys.readouterr().out
    assert "supertokens: trying threshold " in told
    assert "no merging: " in told
    content = json.loads((model / "calibration.json").read_text())
    tried = content["reached"]["merging_tried"]
    assert all(one["by"] is None or one["by"]["sizes"] == [2] for one in tried)  # its other options stay
    assert len(tried) > 1
    kept = content["method"].get("by") if content["method"]["name"] == "reduced" else None
    assert kept == tried[0]["by"]
    assert not (model / ".calibrating.json").exists()
    assert said(capsys, "evaluate", model, *EVALUATE, tmp_path / "e.json") == ""
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert build_method(row["method"]) == build_method(content["method"])


def test_policy__fits_a_network_that_supertokens_follow(
    trained: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "with_net"
    words = ("policy", trained, "--out", out, "--sizes", "2", "--steps", "2", "--batch", "1", "--device", "cpu")
    assert main(list(map(str, words))) == 0
    told = capsys.readouterr().out
    assert "windows of 2 x 2 patches: " in told
    assert "--merge supertokens:0.95,policy=net" in told
    by = ("--merge", "supertokens:0,sizes=2,policy=net")
    said(capsys, "evaluate", out, "--method", "dense", *by, *EVALUATE, tmp_path / "e.json")
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert row["label"] == "dense + supertokens threshold=0.0 sizes=2 policy=net"
    assert row["gmacs_mean"] < row["dense_gmacs_mean"]
    lacking = said(capsys, "evaluate", trained, "--method", "dense", *by, *EVALUATE, tmp_path / "e.json", status=2)
    assert "policy 'net' is a network that this model lacks: fit one with `tokenexit policy`." in lacking
    wrong = said(capsys, "evaluate", out, "--merge", "supertokens:0.9,policy=net", "--method", "dense", status=2)
    assert "sizes must be some of (2,)" in wrong


def test_auto__is_a_value_that_calibrate_alone_chooses(trained: Path, capsys: Captured) -> None:
    words = ("evaluate", trained, "--method", "dense", "--merge", "algm:auto")
    assert "auto is a value that calibrate alone chooses" in said(capsys, *words, status=2)
    calibrate = ("calibrate", trained, *CALIBRATE, "--merge")
    assert "mpm has no amount to choose: give it as it is." in said(capsys, *calibrate, "mpm:auto", status=2)
    assert "algn" in said(capsys, *calibrate, "algn:auto", status=2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("calibrate", "--budget", "0.9", "--plan", "dense"),
            "--merge goes with thresholds for a budget or a bound alone",
        ),
        (("calibrate", "--budget", "0.9", "--cap", "0.9"), "leave --cap out"),
        (("calibrate", "--budget", "0.9", "--fit-temperature"), "leave --fit-temperature out"),
        (("calibrate", "--cbt", "0.9", "0.99"), "leave --cbt out"),
    ],
)
def test_merge__goes_with_thresholds_alone(
    words: tuple[str, ...], sentence: str, trained: Path, capsys: Captured
) -> None:
    assert sentence in said(capsys, words[0], trained, *words[1:], "--merge", "mpm:1", status=2)


def test_cost__refuses_merging_with_the_reason(capsys: Captured) -> None:
    assert "cost: what --merge saves follows from images" in said(capsys, "cost", "--merge", "algm:0.9", status=2)
