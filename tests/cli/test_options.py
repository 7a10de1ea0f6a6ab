"""What commands share: the machine that was asked for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.test_cli import fine, wrong
from tests.heads.test_module import own_segmenter
from tokenexit.cli.options import machine_of
from tokenexit.runtime import precision as inference
from tokenexit.runtime import threads

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["evaluate", "predict", "serve", "calibrate", "sweep", "report", "gate"])
def test_precision__is_auto_by_default_in_every_command(command: str, capsys: Captured) -> None:
    from tokenexit.cli import main

    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--precision {auto,fp32,bf16,fp16}" in text
    assert "fp32 on CPUs (default: auto)" in text


def test_machine_of__resolves_auto_and_warns_of_a_slow_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(inference, "cpu_instructions", lambda: frozenset({"avx2"}))

    def asked(precision: str) -> tuple[str, str]:
        given = argparse.Namespace(device="cpu", precision=precision, threads=None)
        assert machine_of(given).type == "cpu"
        return given.precision, capsys.readouterr().err

    assert asked("auto") == ("fp32", "")
    precision, warning = asked("bf16")
    assert precision == "bf16"
    assert warning.startswith("warning: precision bf16 is slow on this cpu")
    assert warning.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert asked("bf16") == ("bf16", "")  # of several processes, the first speaks


STARTERS = ["adapt", "quickstart", "train", "evaluate", "calibrate", "sweep", "predict", "report", "serve", "export"]


@pytest.mark.parametrize("command", [*STARTERS, "gate"])
def test_threads__is_an_option_of_every_command_that_runs_a_model(command: str, capsys: Captured) -> None:
    from tokenexit.cli import main

    assert main([command, "--help"]) == 0
    assert "--threads N" in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of threads that torch was told to start, where it would start 8 on 2 cores."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads, "processors", lambda: threads.Processors(8, 8, 1.5))
    monkeypatch.setattr(threads, "idle_cores", lambda: 8.0)
    for name in threads.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_threads__are_those_given_else_no_more_than_cores(started: list[int], capsys: Captured, tmp_path: Path) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    gate = ("gate", tmp_path, "--method", "dovit", "--image-size", "16", "--head-module", "tests.heads.own_heads:Plain")
    fine(capsys, *gate)
    assert started == [2]
    fine(capsys, *gate, "--threads", "5")
    assert started == [2, 5]


def test_threads__of_the_environment_stay(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    gate = ("gate", tmp_path, "--method", "dovit", "--image-size", "16", "--head-module", "tests.heads.own_heads:Plain")
    fine(capsys, *gate)
    assert started == []
    fine(capsys, *gate, "--threads", "3")
    assert started == [3]


def test_threads__are_chosen_by_quickstart_and_train_too(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    monkeypatch.setattr("tokenexit.cli.quickstart.run_quickstart", lambda *_, **__: [])
    monkeypatch.setattr("tokenexit.training.loop.train", lambda config: None)
    fine(capsys, "quickstart", "--out", tmp_path)
    fine(capsys, "quickstart", "--out", tmp_path, "--threads", "3")
    fine(capsys, "train", "--out", tmp_path)
    fine(capsys, "train", "--out", tmp_path, "--threads", "4")
    assert started == [2, 3, 2, 4]


def test_threads__fewer_than_cores_are_explained_once_on_stderr(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(threads, "idle_cores", lambda: 0.9)
    monkeypatch.setattr(threads, "pass_seconds", lambda counts: {2: 0.1, 1: 0.01})
    given = argparse.Namespace(device="cpu", precision="fp32", threads=None)
    machine_of(given)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("note: torch starts 1 of 2 threads, as other programs leave 0.9 cores idle")
    assert said.err.endswith("--threads N says otherwise.\n")
    assert said.err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    machine_of(given)
    assert capsys.readouterr().err == ""  # of several processes, the first speaks
    assert started == [1, 1]


def test_threads__are_left_alone_by_the_package(started: list[int]) -> None:
    own_segmenter("Plain").predict(Image.new("RGB", (20, 16)))
    assert started == []


@pytest.mark.parametrize("command", [("train",), ("predict", "m", "i.png"), ("quickstart",)])
def test_threads__must_be_some(command: tuple[str, ...], capsys: Captured) -> None:
    assert wrong(capsys, *command, "--threads", "0") == "--threads 0 must be at least 1."
    assert wrong(capsys, *command, "--threads", "100000") == "--threads 100000 must be a number of at most 4096."


READERS = ["calibrate", "evaluate", "export", "gate", "predict", "report", "serve", "sweep"]


@pytest.mark.parametrize("command", READERS)
def test_head_module__is_an_option_of_every_command_that_opens_a_model(command: str, capsys: Captured) -> None:
    from tokenexit.cli import main

    assert main([command, "--help"]) == 0
    assert "--head-module MODULE:NAME" in capsys.readouterr().out


def test_head_module__opens_a_model_with_a_head_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path / "model")
    Image.new("RGB", (20, 16), (90, 120, 30)).save(tmp_path / "photo.png")
    (tmp_path / "my_heads_here.py").write_text("from tests.heads.own_heads import Plain as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    predict = ("predict", "model", "photo.png", "--out", "masks", "--method", "dense")
    fine(capsys, *predict, "--head-module", "my_heads_here:Mine")
    assert (tmp_path / "masks" / "photo.png").exists()
    said = wrong(capsys, *predict)
    assert said.startswith("the decode head is a module of its own, 'tests.heads.own_heads:Plain', and nothing is")
    assert "--head-module package.module:Name" in said
    gate = ("gate", "model", "--method", "dovit", "--image-size", "16")
    assert "exit" in fine(capsys, *gate, "--head-module", "my_heads_here:Mine")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_head.py", "--head-module my_head.py is no import path: write package.module:Name."),
        ("tests.heads.own_heads", "--head-module tests.heads.own_heads is no import path"),
        ("no_such_module:Head", "cannot be imported (No module named 'no_such_module'): check the name"),
        ("tests.heads.own_heads:Missing", "cannot be imported (module 'tests.heads.own_heads' has no attribute"),
        ("tests.heads.own_heads:Up", "holds other weights than head tests.heads.own_heads:Up has"),
    ],
)
def test_head_module__what_cannot_be_taken_is_one_sentence(
    path: str, message: str, tmp_path: Path, capsys: Captured
) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path)
    assert message in wrong(capsys, "gate", tmp_path, "--method", "dovit", "--head-module", path)
