"""Completion as a shell asks for it: the script is read by the shell itself, which then runs the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import fine, wrong
from tokenexit.cli import COMMANDS

ASK_BASH = """
eval "$(tokenexit completion bash)"
read -r _ called <<< "$(complete -p tokenexit | grep -o -- '-F [^ ]*')"
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9
    $called tokenexit
    echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment whose `tokenexit` is the one under test."""
    shim = tmp_path / "bin" / "tokenexit"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tokenexit "$@"\n')
    shim.chmod(0o755)
    return {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}


def said(program: dict[str, str], *call: str, cwd: Path | None = None) -> list[str]:
    if shutil.which(call[0]) is None:
        pytest.skip(f"{call[0]} is not installed")
    run = subprocess.run(call, env=program, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout.splitlines()


def in_bash(program: dict[str, str], *lines: str, cwd: Path | None = None) -> list[list[str]]:
    """For every line, the words that may stand at its end."""
    return [line.split() for line in said(program, "bash", "-c", ASK_BASH, "bash", *lines, cwd=cwd)]


def test_bash__completes_commands_and_each_ones_options(program: dict[str, str]) -> None:
    commands, one, unknown, *options = in_bash(
        program, "tokenexit ", "tokenexit ev", "tokenexit x ", *(f"tokenexit {name} --hel" for name in COMMANDS)
    )
    assert commands == list(COMMANDS)
    assert one == ["evaluate"]
    assert unknown == []
    assert options == [["--help"]] * len(COMMANDS)


def test_bash__completes_options_and_what_they_take(program: dict[str, str]) -> None:
    asked = {
        "tokenexit calibrate m --max-": ["--max-disagreement", "--max-error-increase", "--max-miou-drop"],
        "tokenexit calibrate m --budget 0.7 --max-": [],  # one target only
        "tokenexit cost --json --convention ": ["tokenexit", "dtop"],
        "tokenexit predict --precision=b": ["bf16"],
        "tokenexit predict --threa": ["--threads"],
        "tokenexit quickstart --thr": ["--threads"],
        "tokenexit train --threa": ["--threads"],
        "tokenexit data ": ["check"],
        "tokenexit data check camv": ["camvid"],
        "tokenexit evaluate m --data coco": ["coco_stuff10k", "coco_stuff164k"],
        "tokenexit evaluate m --split t": ["train", "test"],
        "tokenexit predict m i --method cal": ["calibrated"],
        "tokenexit calibrate m --method d": ["dtop", "dovit"],
        "tokenexit convert --kind dino": [
            *("dinov3", "dinov3_timm", "dinov3_huggingface", "dinov3_head", "dinov2_head", "dinov2")
        ],
        "tokenexit cost --backbone vit_t": ["vit_tiny_patch16"],
        "tokenexit cost --head s": ["setr_naive", "setr_pup"],
        "tokenexit train --data.name camv": ["camvid"],
        "tokenexit train --model.backbone vit_t": ["vit_tiny_patch16"],
        "tokenexit train --method do": ["dovit"],
        "tokenexit train --config dtop/setr": ["dtop/setr_ade20k_base"],
        "tokenexit train --optim.la": ["--optim.layer_decay"],
        "tokenexit train --dry": ["--dry-run"],
        "tokenexit train --freeze ": ["none", "backbone", "all_but_exit_heads"],
        "tokenexit train --resume ": ["true", "false"],
    }
    assert dict(zip(asked, in_bash(program, *asked))) == asked


def test_bash__completes_files_elsewhere(program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "recipe.yaml").touch()
    lines = ("evaluate r", "train --config r", "train --model.init_from r", "report m --out rec")
    found = in_bash(program, *(f"tokenexit {line}" for line in lines), cwd=tmp_path)
    assert [sorted(words) for words in found] == [["recipe.yaml", "runs/"]] * 3 + [["recipe.yaml"]]


def test_zsh__takes_the_script(program: dict[str, str]) -> None:
    read = 'autoload -U compinit; compinit -u -D; eval "$(tokenexit completion zsh)"; print $+_comps[tokenexit]'
    assert said(program, "zsh", "-fc", read) == ["1"]


def test_fish__completes(program: dict[str, str]) -> None:
    ask = 'tokenexit completion fish | source; complete -C "tokenexit ev"; complete -C "tokenexit predict --prec"'
    assert [line.split("\t")[0] for line in said(program, "fish", "--no-config", "-c", ask)] == [
        "evaluate",
        "--precision",
    ]


@pytest.mark.parametrize("line", ["tokenexit ", "tokenexit predict --prec", "tokenexit train --ba"])
def test_an_answer__waits_for_no_large_library(line: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tokenexit"],
        env={**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    imported = {words[-1] for words in map(str.split, run.stderr.splitlines()) if words[:2] == ["import", "time:"]}
    assert "argcomplete" in imported
    assert not {"torch", "numpy", "PIL", "rich", "accelerate"} & imported
    assert answer.read_text()


def test_completion__refuses_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(capsys, "completion", "tcsh") == "shell tcsh is unknown: choose one of bash, zsh, fish."


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion__prints_a_script_and_nothing_else(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "complete" in fine(capsys, "completion", shell)
    assert fine(capsys, "completion", "--help").count("usage: ") == 1
