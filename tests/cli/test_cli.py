"""Every command as a user types it: what it prints, how it ends, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenexit.cli as cli
from tests.training.tiny import HEADS, silent, tiny_run, write_dataset
from tokenexit.calibration import latency
from tokenexit.calibration.latency import Curve, Latency
from tokenexit.cli import COMMANDS, main
from tokenexit.cli.chosen_methods import resized
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP, Reduced, Resized, build_method
from tokenexit.reducers import MPM
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.loop import train
from tokenexit.version import __version__

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model; nobody writes into it."""
    out = tmp_path_factory.mktemp("run") / "model"
    train(tiny_run(data, out, steps=3), say=silent, progress=False)
    return out


def wrong(capsys: Captured, *arguments: object) -> str:
    """Run a command that must end in one sentence on stderr; returns it without the command's name."""
    status = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert status in (1, 2)
    assert printed.err.startswith(f"tokenexit {arguments[0]}: ")
    assert printed.err.endswith((".\n", "?\n"))
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix(f"tokenexit {arguments[0]}: ").rstrip("\n")


def fine(capsys: Captured, *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- the program


def test_help_lists_all_commands(capsys: Captured) -> None:
    for arguments in ([], ["-h"], ["--help"], ["help"]):
        assert main(arguments) == (0 if arguments else 2)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)


def test_version_is_that_of_the_package(capsys: Captured) -> None:
    assert fine(capsys, "--version") == f"{__version__}\n"


def test_help_is_fast_and_needs_no_library() -> None:
    code = """
import sys
from tokenexit.cli import main
assert main(["--help"]) == 0
assert not {"torch", "numpy", "PIL", "rich", "jsonargparse", "accelerate"} & set(sys.modules)
"""
    bare = _child_seconds([sys.executable, "-c", "pass"])
    assert _child_seconds([sys.executable, "-c", code]) - bare < 0.5


def _child_seconds(command: list[str]) -> float:
    """Processor time, so that a busy machine does not matter."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: Captured) -> None:
    text = fine(capsys, name, "--help")
    assert f"usage: tokenexit {name}" in text
    assert "(default: None)" not in text


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: Captured) -> None:
    assert main(["evalute"]) == 2
    message = capsys.readouterr().err
    assert message == f"tokenexit: command 'evalute' is unknown: choose one of {', '.join(COMMANDS)}.\n"


def test_python_m_runs_the_same_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tokenexit", "cost", "--foo"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert run.stderr == "tokenexit cost: unrecognized arguments: --foo: see tokenexit cost --help.\n"


def test_ctrl_c_ends_with_130_and_one_line(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ntokenexit doctor: interrupted.\n"


@pytest.mark.parametrize("arguments", [["cost"], ["cost", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tokenexit", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()  # long before anything is printed
        assert run.stderr.read() == ""
        assert run.wait(60) in (0, 1)  # help swallows what it cannot print


@pytest.mark.parametrize("name", ["quickstart", "evaluate", "predict", "cost", "doctor"])
def test_unknown_options_point_to_the_help(name: str, capsys: Captured) -> None:
    needed = {"evaluate": ["m"], "predict": ["m", "p"]}.get(name, [])
    assert wrong(capsys, name, *needed, "--nope") == f"unrecognized arguments: --nope: see tokenexit {name} --help."


# ----------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("backbone", "classes", "side", "gmacs"),
    [
        ("vit_base_patch16", 150, 512, 109.86),
        ("vit_large_patch16", 150, 640, 616.98),
        ("vit_large_patch16", 59, 480, 315.36),
        ("vit_large_patch16", 171, 512, 366.86),
    ],
)
def test_cost_gives_the_dense_baselines_of_the_dtop_paper(
    backbone: str, classes: int, side: int, gmacs: float, capsys: Captured
) -> None:
    options = ["--backbone", backbone, "--num-classes", classes, "--image-size", side]
    text = fine(capsys, "cost", "--head", "atm", *options, "--convention", "dtop", "--json")
    assert json.loads(text)["gmacs"] == gmacs


def test_cost_prints_a_line_per_figure(capsys: Captured) -> None:
    text = fine(capsys, "cost", "--image-size", "64", "96")
    assert [line.split()[0] for line in text.splitlines()] == [
        *("gmacs", "backbone", "head", "convention", "tokens", "parameters")
    ]
    assert "tokens       24\n" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbone", "vit_huge"], "--backbone vit_huge is unknown: choose one of vit_tiny_patch16"),
        (["--head", "nope"], "--head nope is unknown: choose one of linear"),
        (["--num-classes", "0"], "--num-classes 0 must be at least 1."),
        (["--image-size", "-3"], "--image-size -3 must be at least 1."),
        (["--image-size", "1", "2", "3"], "--image-size has 3 numbers: give one side, or height and width."),
        (["--image-size", "big"], "argument --image-size: invalid int value: 'big': see tokenexit cost --help."),
        (["--convention", "mine"], "--convention mine is unknown: choose one of tokenexit, dtop."),
    ],
)
def test_cost_refuses_what_cannot_be_counted(arguments: list[str], words: str, capsys: Captured) -> None:
    assert wrong(capsys, "cost", *arguments).startswith(words)


# ---------------------------------------------------------------------------------------------------------- train


def train_options(data: Path, out: Path) -> list[str]:
    head = json.dumps(HEADS["fcn"])
    return [
        *("--out", str(out), "--data.name", "folder", "--data.root", str(data), "--data.crop", "[24,32]"),
        *("--model.exits", "[1,2]", "--model.exit_head", head, "--model.decode_head", head),
        *("--model.options", '{"embed_dim":16,"depth":3,"num_heads":2,"patch_size":4,"pos_embed_grid":[6,8]}'),
        *("--steps", "2", "--batch-size", "2", "--validate_every", "2"),
    ]


def test_train_leaves_a_model_and_says_so_and_a_second_call_says_it_is_finished(
    data: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "run"
    method = ["--method", "dtop", "--threshold", "0.9/0.8", "--keep-per-class", "3"]
    first = fine(capsys, "train", *train_options(data, out), *method)
    assert "step 2: loss " in first
    assert first.endswith(f"model: {out}\n")
    saved = json.loads((out / "training.json").read_text())["config"]
    assert saved["methods"] == [{"name": "dtop", "threshold": [0.9, 0.8], "keep_per_class": 3}]
    again = fine(capsys, "train", *train_options(data, out), *method)
    assert again == f"{out} is finished: all 2 steps are done, its model is there\nmodel: {out}\n"
    assert wrong(capsys, "train", *train_options(data, out), *method, "--seed", 5).startswith(
        f"{out} holds a run with seed=0, not 5: choose another out"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nope.yaml"], "--config nope.yaml cannot be read"),
        (["--steps", "many"], "steps: many does not fit, give a whole number."),
        (["--stepz", "3"], "stepz is no key of a run: did you mean steps?"),
        (["--optim.lr", "-1"], "optim.lr must be positive, got -1.0: give a number above 0."),
        (["--method", "nope"], "--method nope is unknown: choose one of dense, dtop, dovit"),
        (["--methods", "[nope]"], "method 'nope' is unknown: choose one of dense, dtop, dovit"),
        (["--threshold", "0.9"], "options of a method need --method"),
        (["--method", "dense", "--threshold", "0.9"], "--threshold is no option of dense: leave it out"),
        (["--method", "dtop", "--threshold", "1.5"], "threshold must be in [0, 1], got 1.5"),
        (["--data.name", "nope"], "dataset 'nope' is unknown: choose one of"),
        (["--data.name", "camvid"], "dataset 'camvid' is read from a folder: give its root"),
        (["--data.name", "folder", "--data.root", "nope"], "'nope"),
        (["--model.backbone", "nope"], "backbone 'nope' is unknown"),
        (["--model.options", '{"nope": 3}'], "a backbone has no option 'nope'"),
        (["--model.exits", "[9,3]"], "exits="),
        (["--model.exit_head", "nope"], "head 'nope' is unknown"),
        (["--model.weights", "nope.pth"], "weights 'nope.pth' is no file"),
        (["--model.init_from", "nope"], "nope holds no config.json"),
    ],
)
def test_train_refuses_impossible_runs(arguments: list[str], words: str, tmp_path: Path, capsys: Captured) -> None:
    message = wrong(capsys, "train", "--out", tmp_path / "run", *arguments)
    assert message.startswith(words) or (words == "'nope" and "nope" in message)
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_file_as_folder(data: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    message = wrong(capsys, "train", *train_options(data, tmp_path / "file"))
    assert message == f"out={tmp_path / 'file'} cannot be made (File exists): choose another folder."


def test_train_prints_its_configuration_on_request(capsys: Captured) -> None:
    text = fine(capsys, "train", "--print_config", "--steps", "7")
    assert "steps: 7\n" in text


# ------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_prints_a_row_per_method_and_threshold_and_writes_json(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = fine(
        *(capsys, "evaluate", model, "--data", "folder", "--data-root", data, "--json", tmp_path / "figures.json"),
        *("--method", "dense", "dtop", "--threshold", "0.9", "0.4/0.3", "--references", "--device", "cpu"),
    )
    labels = ["dense", "dtop 0.9", "dtop 0.4/0.3", "random, counts of dtop 0.9", "random, counts of dtop 0.4/0.3"]
    labels += ["agreement oracle", "oracle in context", "greedy by labels"]
    labels += ["truncated after=1 (block 1)", "truncated after=2 (block 2)"]
    for label in labels:
        assert f"│ {label} " in text
    assert "3 images of folder (test), fp32 on cpu" in text
    assert "bright" in text  # a class
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [row["label"] for row in content["results"]] == labels
    assert [row["latency_ms_median"] is None for row in content["results"]] == [False] * 6 + [True, False, True, True]
    assert content["about"]["split"] == "test"


def test_evaluate_takes_scores_rules_and_rivals(model: Path, tmp_path: Path, capsys: Captured) -> None:
    by_class = "0.5/" + ",".join(["0.4"] * len(ExitSegmenter.from_pretrained(model).preprocessing.labels.names))
    fine(
        *(capsys, "evaluate", model, "--limit", "1", "--json", tmp_path / "figures.json", "--temperature", "1.5/0.8"),
        *("--method", "dtop", "paumer", "fixed_ratio", "truncated", "--threshold", "0.6", by_class),
        *("--score", "margin", "--boundary-guard", "--ratios", "0.5/0.2", "--after", "2"),
    )
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    rule = "score=margin temperature=(1.5, 0.8) boundary_guard=True"
    assert [row["label"] for row in rows] == [
        *(f"dtop 0.6 {rule}", f"dtop 0.4-0.5 per class {rule}"),
        *(f"paumer 0.6 {rule}", f"paumer 0.4-0.5 per class {rule}"),
        "fixed_ratio ratios=(0.5, 0.2) score=margin temperature=(1.5, 0.8)",
        "truncated after=2",
    ]
    assert rows[1]["method"]["threshold"][1] == [0.4] * len(rows[0]["IoU"])
    assert rows[-1]["share_of_dense"] < 1.0


def test_evaluate_merges_tokens_beside_exits(model: Path, tmp_path: Path, capsys: Captured) -> None:
    fine(
        *(capsys, "evaluate", model, "--limit", "1", "--json", tmp_path / "figures.json", "--method", "dense", "dtop"),
        *("--threshold", "0.6", "--merge", "none", "g2tm:0.2", "mpm:1/2", "tome", "--device", "cpu"),
    )
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [row["label"] for row in rows] == [
        *("dense", "dtop 0.6", "dense + g2tm threshold=0.2", "dtop 0.6 + g2tm threshold=0.2"),
        *("dense + mpm after=1/2", "dtop 0.6 + mpm after=1/2", "dense + tome ratio=0.02", "dtop 0.6 + tome ratio=0.02"),
    ]
    assert rows[4]["gmacs_mean"] < rows[0]["gmacs_mean"]
    assert rows[2]["method"]["by"] == {"name": "g2tm", "threshold": 0.2, "block": 2, "warmup": 0.0}


def test_merge_takes_options_of_its_reducer(model: Path, tmp_path: Path, capsys: Captured) -> None:
    fine(
        *(capsys, "evaluate", model, "--limit", "1", "--json", tmp_path / "figures.json", "--method", "dtop"),
        *("--threshold", "0.6", "--device", "cpu", "--merge", "algm:0.5,global_block=none"),
        *(
            "supertokens:0.5,policy=entropy,sizes=2",
            "supertokens:0.8",
            "zerotprune:0.5/0.25,blocks=1/2,iterations=3",
            "tome:0.1,proportional=true",
            "coarse_first:2,side=3",
        ),
    )
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [row["label"] for row in rows] == [
        "dtop 0.6 + algm threshold=0.5 global_block=None",
        "dtop 0.6 + supertokens threshold=0.5 sizes=2 policy=entropy",
        "dtop 0.6 + supertokens threshold=0.8",
        "dtop 0.6 + zerotprune keep=0.5/0.25 blocks=1/2 iterations=3",
        "dtop 0.6 + tome ratio=0.1 proportional=True",
        "dtop 0.6 + coarse_first after=2 side=3",
    ]


@pytest.mark.parametrize(
    ("merge", "sentence"),
    [
        (
            "algn:0.9",
            "--merge algn:0.9 is unknown: choose algm, mpm, tome, g2tm, supertokens, zerotprune, coarse_first, or "
            "none for no",
        ),
        ("algm:high", "--merge high is no number"),
        ("mpm:0.5", "--merge takes whole numbers here, got 0.5"),
        ("algm:0.9,tau=0.9", "'tau' is no option with its value: write algm:VALUE,OPTION=VALUE with options threshold"),
        ("supertokens,sizes=2/3", "sizes must be sides of windows that nest, got (2, 3)"),
        ("supertokens,policy=labels", "policy of reducer 'supertokens' must be"),
        ("coarse_first:0", "after must be at least 1, got 0"),
        ("coarse_first:40", "reduces tokens at block 41 and this backbone has"),
        ("tome:0.7", "ratio must be a number from 0 to 0.5, got 0.7"),
        ("mpm:1 --references", "--references are rows without merged tokens: leave it or --merge out."),
        ("mpm:1 --gate", "--gate closes exits by times without merged tokens: leave it or --merge out."),
        ("mpm:1/40", "reduces tokens at block 41 and this backbone has"),
    ],
)
def test_a_merge_that_cannot_be__is_refused(merge: str, sentence: str, model: Path, capsys: Captured) -> None:
    words = ("--method", "dense", "--merge", *merge.split())
    assert sentence in wrong(capsys, "evaluate", model, "--limit", "1", *words)


def test_predict_merges_tokens_beside_exits(model: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    photos, out, method = data / "images" / "test", tmp_path / "out", ("--method", "dtop", "--threshold", "0.6")
    fine(capsys, "predict", model, photos, "--out", out, *method, "--merge", "g2tm:0.2")
    assert len(list(out.glob("*.png"))) == 6  # masks and exit maps
    refused = wrong(capsys, "predict", model, photos, "--out", tmp_path / "b", *method, "--merge", "mpm:1", "--gate")
    assert refused == "--gate closes exits by times without merging: leave it or --merge out."


def test_predict_takes_images_at_another_size__and_masks_keep_their_own(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    photos, method = data / "images" / "test", ("--method", "dtop", "--threshold", "0.6", "--no-gate")
    fine(capsys, "predict", model, photos, "--out", tmp_path / "half", *method, "--input-scale", "0.5")
    fine(capsys, "predict", model, photos, "--out", tmp_path / "full", *method, "--input-scale", "1")
    by = ("--merge", "mpm:1", "--input-scale", "0.5")
    fine(capsys, "predict", model, photos, "--out", tmp_path / "both", *method, *by)
    half, full, both = (
        build_method(json.loads((tmp_path / name / "predictions.json").read_text())["method"])
        for name in ("half", "full", "both")
    )
    assert half == Resized(DToP(0.6), 0.5)
    assert full == DToP(0.6)
    assert both == Resized(Reduced(DToP(0.6), MPM((1,))), 0.5)
    loaded = ExitSegmenter.from_pretrained(model)
    for photo in photos.iterdir():
        mask = np.asarray(Image.open(tmp_path / "half" / f"{photo.stem}.png"))
        assert mask.shape == Image.open(photo).size[::-1]
        np.testing.assert_array_equal(mask, loaded.predict(photo, method=half).labels[0])
    assert "scale must be above 0 and at most 4, got 0.0" in wrong(
        capsys, "predict", model, photos, "--out", tmp_path / "none", *method, "--input-scale", "0"
    )


def test_resized__refuses_a_plan_that_resizes_by_itself() -> None:
    with pytest.raises(ConfigError, match=r"--input-scale 0.7 does not go with this model's calibrated plan"):
        resized(Resized(Dense(), 0.5), 0.7)
    assert resized(Resized(Dense(), 0.5), None) == Resized(Dense(), 0.5)


def test_evaluate_gates_if_asked(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "measure_latency", lambda model, *_: Latency(Curve(0, 1, 0), (Curve(1e6, 0, 0),) * 2))
    asked = ("evaluate", model, "--limit", "1", "--method", "dense", "dtop", "--threshold", "0", "--json")
    fine(capsys, *asked, tmp_path / "open.json")
    text = fine(capsys, *asked, tmp_path / "gated.json", "--gate")
    assert "gated" in text
    free, gated = (json.loads((tmp_path / name).read_text())["results"] for name in ("open.json", "gated.json"))
    assert free[0]["gmacs_mean"] == gated[0]["gmacs_mean"] == gated[1]["gmacs_mean"]
    assert free[1]["gmacs_mean"] != gated[1]["gmacs_mean"]
    assert gated[1]["method"]["closed"][0] == [1, [0, 1]]


def test_evaluate_takes_the_data_that_the_model_was_trained_on(model: Path, capsys: Captured) -> None:
    text = fine(capsys, "evaluate", model, "--limit", "1", "--split", "val", "--precision", "bf16", "--device", "cpu")
    assert "1 images of folder (val), bf16 on cpu" in text


def test_evaluate_gives_every_input_scale_a_row(model: Path, tmp_path: Path, capsys: Captured) -> None:
    text = fine(capsys, "evaluate", model, "--input-scale", "1", "0.8", "1.0", "--json", tmp_path / "figures.json")
    assert "│ dense @0.8 " in text
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(row["label"], row["input_scale"]) for row in rows] == [("dense", 1.0), ("dense @0.8", 0.8)]
    assert rows[1]["dense_gmacs_mean"] == rows[0]["dense_gmacs_mean"] == rows[0]["gmacs_mean"] > rows[1]["gmacs_mean"]


def test_evaluate_and_predict_take_windows_from_the_model_and_from_options(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    own = ExitSegmenter.from_pretrained(model)
    own.preprocessing = replace(own.preprocessing, window=16, stride=(12, 16))  # type: ignore[arg-type]
    own.save_pretrained(tmp_path / "own")
    costs = {}
    for name, options in {
        "own": [],
        "stride": ["--stride", "8"],
        "even": ["--stride", "even"],
        "window": ["--window", "16", "24"],
        "whole": ["--window", "none"],
    }.items():
        arguments = [tmp_path / "own", "--data", "folder", "--data-root", data, *options]
        text = fine(capsys, "evaluate", *arguments, "--json", tmp_path / f"{name}.json")
        content = json.loads((tmp_path / f"{name}.json").read_text())
        size, about = content["results"][0]["gmacs_mean"], content["about"]
        costs[name] = (size, about["window"], about["stride"])
        assert (" in windows of " in text) == (name != "whole")
        out = tmp_path / name
        fine(capsys, "predict", tmp_path / "own", data / "images" / "test" / "p0.png", "--out", out, *options)
        assert np.asarray(Image.open(out / "p0.png")).shape == (24, 32)
    assert [costs[name][1:] for name in costs] == [
        ([16, 16], [12, 16]),
        ([16, 16], [8, 8]),
        ([16, 16], "even"),
        ([16, 24], [16, 24]),
        (None, None),
    ]
    whole = fine(capsys, "evaluate", model, "--data", "folder", "--data-root", data, "--json", tmp_path / "plain.json")
    assert "windows" not in whole
    plain = json.loads((tmp_path / "plain.json").read_text())["results"][0]["gmacs_mean"]
    assert costs["whole"][0] == plain < costs["own"][0] < costs["stride"][0]
    assert costs["even"][0] == costs["own"][0], "two by two of them cover 24x32, too"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--window", "0"],
            "--window=(0, 0) is no size: give one side in pixels, or a (height, width) pair",
        ),
        (["--window", "wide"], "--window wide is no size: give one side in pixels, or height and width."),
        (["--window", "8", "8", "8"], "--window=(8, 8, 8) is no size"),
        (["--window", "8", "--stride", "9"], "--stride=(9, 9) is longer than --window=(8, 8) and would leave pixels"),
        (["--stride", "9"], "--stride=(9, 9) has no --window: give both, or neither."),
        (["--window", "none", "--stride", "9"], "--stride=(9, 9) has no --window: give both, or neither."),
    ],
)
def test_impossible_windows_end_in_one_sentence(
    command: str, arguments: list[str], words: str, model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    needed = [data / "images" / "test" / "p0.png", "--out", tmp_path / "out"] if command == "predict" else []
    assert wrong(capsys, command, model, *needed, *arguments).startswith(words)
    assert not (tmp_path / "out").exists()


def test_evaluate_asks_for_data_where_the_model_does_not_say_what_it_knows(
    model: Path, tmp_path: Path, capsys: Captured
) -> None:
    ExitSegmenter.from_pretrained(model).save_pretrained(tmp_path)
    (tmp_path / "training.json").unlink()
    assert wrong(capsys, "evaluate", tmp_path) == (
        f"{tmp_path} does not say what it was trained on: name it with --data."
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], "--limit 0 must be at least 1."),
        (["--input-scale", "0"], "input_scale=0.0 is no share of a side: give a number above 0."),
        (["--input-scale", "small"], "argument --input-scale: invalid float value: 'small'"),
        (["--limit", "two"], "argument --limit: invalid int value: 'two'"),
        (["--method", "nope"], "--method nope is unknown: choose one of dense, dtop, dovit"),
        (["--method", "dtop", "--threshold", "1.5"], "threshold must be in [0, 1], got 1.5"),
        (["--method", "dtop", "--threshold", "-0.1"], "threshold must be in [0, 1], got -0.1"),
        (["--method", "dtop", "--threshold", "nan"], "threshold of method 'dtop' must be a number or a list"),
        (["--method", "dtop", "--threshold", "high"], "--threshold high is no number: write 0.95, or"),
        (["--method", "dtop", "--threshold", "0.9/"], "--threshold 0.9/ is no number"),
        (["--method", "dtop", "--threshold", "0.9/0.8/0.7"], "threshold has 3 values for 2 exits"),
        (["--method", "dtop", "--threshold", "0.9/0.8,0.7"], "threshold of exit 2 has 2 values for"),
        (["--method", "dtop", "--temperature", "hot"], "--temperature hot is no number"),
        (["--method", "fixed_ratio"], "ratios has 3 values for 2 exits"),
        (
            ["--method", "fixed_ratio", "--ratios", "0.9/2"],
            "ratios must be a share in [0, 1] for each exit, got (0.9, 2.0)",
        ),
        (["--method", "dense", "--threshold", "0.9"], "--threshold is no option of dense"),
        (["--threshold", "0.9"], "options of a method need --method: name it, such as dtop."),
        (["--method", "dense", "calibrated"], "--method calibrated: this model is not"),
        (["--method", "dovit", "--keep-per-class", "3"], "--keep-per-class is no option of dovit"),
        (["--method", "dtop", "--keep-per-class", "-1"], "keep_per_class must be at least 0, got -1"),
        (
            ["--method", "dtop", "--finish", "soon"],
            "--finish soon is unknown: choose one of auto, presence_last, frozen, masks.",
        ),
        (["--method", "dtop", "--finish", "presence_last"], "finish='presence_last' needs ATM heads"),
        (["--method", "dovit", "--blend-weight", "2"], "blend_weight must be in [0, 1], got 2.0"),
        (["--method", "dovit", "--batch-mode", "x"], "--batch-mode x is unknown: choose one of exact, mean."),
        (["--data", "nope"], "--data nope is unknown: choose one of"),
        (["--data", "camvid"], "dataset 'camvid' is read from a folder: give its root"),
        (["--data", "scenes"], "the model predicts 3 classes, the dataset has 9: evaluate on the dataset"),
        (["--split", "nope"], "split 'nope'"),
        (["--precision", "fp8"], "--precision fp8 is unknown: choose one of"),
        (["--device", "nope"], "--device nope is not there: choose cpu, or auto."),
        (["--device", "meta"], "--device meta is not there: choose cpu, or auto."),
        (["--input-scale", "1000"], "--input-scale 1000.0 must be a number of at most 8."),
        (["--input-scale", "0.5", "inf"], "--input-scale inf must be a number of at most 8."),
        (["--limit", "9" * 30], f"--limit {'9' * 30} must be a number of at most 2147483647."),
        (["--window", "9" * 30], f"--window {'9' * 30} must be a number of at most 2147483647."),
        (["--method", "dtop", "--keep-per-class", "9" * 23], "must be a number of at most 2147483647."),
        (["--method", "dovit", "--blend-weight", "nan"], "--blend-weight nan must be a number of at most"),
        (["--device", "cuda:99"], "--device cuda:99 is not there: choose cpu, or auto."),
        (["--json", "."], "--json . cannot be written: name a file in a folder of yours."),
    ],
)
def test_evaluate_refuses_impossible_options(
    arguments: list[str], words: str, model: Path, data: Path, capsys: Captured
) -> None:
    message = wrong(capsys, "evaluate", model, *arguments)
    assert words in message


def damaged(kind: str, model: Path, folder: Path) -> Path:
    """A copy of the model with something wrong."""
    if kind == "missing":
        return folder / "missing"
    ExitSegmenter.from_pretrained(model).save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "empty config":
        config.write_text("")
    elif kind == "list config":
        config.write_text("[]")
    elif kind == "binary config":
        config.write_bytes(b"\xff\xfe\x00\x01")
    else:
        content = json.loads(config.read_text())
        if kind == "other format":
            content["format"] = 99
        elif kind == "other classes":
            content["model"]["num_classes"] = 7
            content["preprocessing"]["labels"] = None
        elif kind == "odd value":
            content["model"]["backbone"]["depth"] = "three"
        elif kind == "odd head":
            content["model"]["decode_head"] = {"kind": "nope"}
        config.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "holds no config.json: give the folder of a model saved by tokenexit."),
        ("no weights", "model.safetensors"),
        ("cut weights", "model.safetensors"),
        ("empty config", "config.json is damaged"),
        ("list config", "config.json is damaged"),
        ("binary config", "config.json"),
        ("other format", "has format 99"),
        ("other classes", "does not fit"),
        ("odd value", ""),
        ("odd head", "head 'nope' is unknown"),
    ],
)
def test_damaged_models_end_in_one_sentence(
    command: str, kind: str, words: str, model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = damaged(kind, model, tmp_path / "model")
    image = data / "images" / "test" / "p0.png"
    arguments = [folder, image, "--out", tmp_path / "out"] if command == "predict" else [folder, "--data", "scenes"]
    assert words in wrong(capsys, command, *arguments)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_end_in_one_sentence(model: Path, tmp_path: Path, capsys: Captured) -> None:
    broken = ExitSegmenter.from_pretrained(model)
    with torch.no_grad():
        broken.backbone.pos_embed.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    assert "NaN" in wrong(capsys, "evaluate", tmp_path, "--data", "scenes")


# -------------------------------------------------------------------------------------------------------- predict


def test_an_uncalibrated_model_runs_dense_in_every_command_and_says_so(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Whatever a command does, it has the same default; those that are of no use with dense alone say that."""
    image = data / "images" / "test" / "p0.png"
    said = "tokenexit: the model is not calibrated: running dense; run `tokenexit calibrate`, or name --method.\n"
    assert main(["evaluate", str(model), "--limit", "1", "--json", str(tmp_path / "e.json")]) == 0
    assert capsys.readouterr().err == said
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert row["method"] == {"name": "dense"}
    assert main(["predict", str(model), str(image), "--out", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().err == said
    assert json.loads((tmp_path / "p" / "predictions.json").read_text())["method"] == {"name": "dense"}
    assert main(["predict", str(model), str(image), "--out", str(tmp_path / "q"), "--method", "dense"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["export", str(model), "--format", "torch", "--images", str(image), "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().err == said
    facts = {"tokenexit.json": ""}
    torch.export.load(tmp_path / "x" / "model.pt2", extra_files=facts)
    assert json.loads(facts["tokenexit.json"])["method"] == {"name": "dense"}
    for command in ("report", "gate"):
        refused = wrong(capsys, command, model, *(["--limit", "1"] if command == "report" else []))
        assert refused.endswith("and this model is not calibrated: calibrate it, or name --method.")


def test_predict_writes_masks_and_says_where(model: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    text = fine(
        capsys, "predict", model, data / "images" / "test", "--out", out, "--method", "dtop", "--threshold", "0.4"
    )
    assert text == f"masks, overlays and exit maps: {out}\n"
    assert len(list(out.iterdir())) == 9 + 1  # and what they were made with
    assert Image.open(out / "p0.png").mode == "P"


def test_predict_reports_bad_images_writes_the_others_and_ends_with_1(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = (data / "images" / "test" / "p0.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "bad.png").write_bytes(good[:60])
    message = wrong(capsys, "predict", model, folder, "--out", tmp_path / "out")
    assert message.startswith(f"image '{folder / 'bad.png'}' cannot be ")
    mask = np.asarray(Image.open(tmp_path / "out" / "good.png"))
    assert mask.shape == (24, 32)
    assert main(["predict", str(model), str(folder), "--out", str(tmp_path / "out"), "--overwrite"]) == 1
    assert capsys.readouterr().out == "images segmented: 1, failed: 1\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope.png"], "image 'nope.png' does not exist: check the path."),
        (["nope.png", "--method", "dtop", "--threshold", "2"], "threshold must be in [0, 1], got 2.0"),
        (["nope.png", "--threshold", "0.9"], "options of a method need --method: name it, such as dtop."),
        (["nope.png", "--method", "calibrated"], "--method calibrated: this model is not, run `tokenexit calibrate`"),
        (["nope.png", "--method", "calibrated", "--threshold", "0.9"], "do not go with --method calibrated"),
        (["nope.png", "--method", "nope"], "--method nope is unknown"),
        (["nope.png", "--max-pixels", "0"], "--max-pixels 0 must be at least 1."),
        (["nope.png", "--max-tokens", "0"], "--max-tokens 0 must be at least 1."),
        (["nope.png", "--device", "nope"], "--device nope is not there"),
        (["nope.png", "--device", "meta"], "--device meta is not there"),
        (["nope.png", "--fps", "nan"], "--fps nan must be a number of at most 2147483647."),
        ([], "the following arguments are required: IMAGE|DIR: see tokenexit predict --help."),
    ],
)
def test_predict_refuses_impossible_options(
    arguments: list[str], words: str, model: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert words in wrong(capsys, "predict", model, "--out", tmp_path / "out", *arguments)


def test_predict_and_evaluate_report_outputs_that_are_not_finite(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    broken = ExitSegmenter.from_pretrained(model)
    broken.preprocessing = replace(broken.preprocessing, std=(1e-300,) * 3)
    broken.save_pretrained(tmp_path / "model")
    image = data / "images" / "test" / "p0.png"
    message = wrong(capsys, "predict", tmp_path / "model", image, "--out", tmp_path / "out")
    assert message.startswith(
        f"image '{image}' cannot be segmented: the model's output is not finite (NaN or infinity)"
    )
    assert not (tmp_path / "out" / "p0.png").exists()
    message = wrong(capsys, "evaluate", tmp_path / "model", "--data", "folder", "--data-root", data)
    assert message.startswith("the model's output is not finite (NaN or infinity): check its weights")


def test_predict_says_what_it_passes_over_and_prints_any_name(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes((data / "images" / "test" / "p0.png").read_bytes())
    (folder / "a.txt").write_text("")
    out = os.fsdecode(os.fsencode(str(tmp_path)) + b"/out\xff")
    assert main(["predict", str(model), str(folder), "--out", out, "--save", "masks", "--method", "dense"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"tokenexit predict: passed over in {folder}: 1 .txt.\n"
    assert printed.out == f"masks: {tmp_path}/out\\udcff\n"


def test_predict_refuses_an_empty_folder_and_a_file_as_place(
    model: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    image = data / "images" / "test" / "p0.png"
    assert "holds no image" in wrong(capsys, "predict", model, tmp_path / "empty", "--out", tmp_path / "out")
    assert "cannot be written" in wrong(capsys, "predict", model, image, "--out", tmp_path / "file")


# --------------------------------------------------------------------------------------------- quickstart, doctor


def test_quickstart_refuses_a_time_that_is_none(tmp_path: Path, capsys: Captured) -> None:
    assert "minutes" in wrong(capsys, "quickstart", "--out", tmp_path, "--minutes", "0")
    assert "minutes" in wrong(capsys, "quickstart", "--out", tmp_path, "--minutes", "soon")


def test_doctor_ends_by_what_it_found(capsys: Captured) -> None:
    assert main(["doctor"]) in (0, 1)
    assert "torch" in capsys.readouterr().out


def test_time_to_help_is_not_spent_on_imports() -> None:
    start = time.process_time()
    assert main(["--help"]) == 0
    assert time.process_time() - start < 0.1
    assert "torch" not in vars(cli)


def test_convert__makes_a_backbone_file_of_timm_weights_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    from tests.helpers import tiny_segmenter

    state = {
        name: value.detach().clone()
        for name, value in tiny_segmenter(pos_embed_grid=(3, 3)).backbone.state_dict().items()
    }
    save_file(state, tmp_path / "timm.safetensors")
    target = tmp_path / "backbone.safetensors"
    assert main(["convert", str(tmp_path / "timm.safetensors"), str(target), "--kind", "timm"]) == 0
    assert target.is_file()
    assert "timm" in capsys.readouterr().out


def test_convert__takes_options_of_heads_and_refuses_what_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    from tests.conversion.test_convert import dtop_as_saved

    _, state = dtop_as_saved(heads=4)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "dtop.safetensors")
    source, target = str(tmp_path / "dtop.safetensors"), str(tmp_path / "out")
    assert main(["convert", source, target]) == 0
    assert "WARNING: nothing in these weights says how many attention heads" in capsys.readouterr().out
    assert main(["convert", source, target, "--head-options", "num_heads=4", "dropout=0.2"]) == 0
    said = capsys.readouterr().out
    assert "num_heads 4, dropout 0.2" in said
    assert "WARNING" not in said
    for wrong, words in (
        ("num_heads", "--head-options num_heads does not fit: write NAME=VALUE, such as num_heads=16."),
        ("num_heads=", "--head-options num_heads= does not fit"),
        ("num_heads=[", "--head-options num_heads=[ does not fit"),
        ("num_heads=x", "num_heads of head 'atm' must be a whole number or None, got 'x'"),
        ("dropout=much", "dropout of head 'atm' must be a number, got 'much'"),
        ("colour=3", "head_options names 'colour', which is no option of atm"),
    ):
        assert main(["convert", source, target, "--head-options", wrong]) == 2
        assert words in capsys.readouterr().err


def test_convert__a_missing_source_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none.pth" in error


def test_data_check__of_a_missing_folder_is_an_error_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", "camvid", "--data-root", str(tmp_path / "none")]) == 1
    said = "".join(capsys.readouterr())
    assert "none" in said
    assert "Traceback" not in said
