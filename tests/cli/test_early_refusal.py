"""Wrong use is refused before torch is imported, which takes seconds, and before anything is read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tokenexit.cli import COMMANDS

ASK = """
import io, json, sys
from contextlib import redirect_stderr
from tokenexit.cli import main
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with redirect_stderr(said):
        status = main(line)
    print(json.dumps([status, said.getvalue(), "torch" in sys.modules]))
"""

DATA, METHOD, MACHINE = ["--data", "nope"], ["--method", "nope"], ["--precision", "fp8"]
COMMON = [DATA, METHOD, MACHINE, ["--limit", "0"], ["--limit", "two"], ["--method", "dtop", "--ratios", "0.5"]]
NEEDED = {
    **{name: ["m"] for name in ("evaluate", "sweep", "report", "gate", "serve")},
    "adapt": ["m", "--images", "i.png", "--budget", "0.5", "--out", "x"],
    "predict": ["m", "i.png"],
    "calibrate": ["m", "--budget", "0.6"],
    "export": ["m", "--out", "x"],
    "policy": ["m", "--out", "x"],
    "convert": ["a.pth", "b"],
    "data": ["check", "camvid"],
    "completion": ["bash"],
}
"""Arguments without which a command is not complete."""
WRONG: dict[str, list[list[str]]] = {
    "adapt": [
        *(DATA, MACHINE, ["--limit", "0"], ["--limit", "two"], ["--depth", "0"], ["--size", "0"], ["--size", "4.5"]),
        *(["--exits", "three"], ["--exits", "auto", "3"], ["--exit-head", "atm"], ["--finetune", "-1"]),
        *(["--budget", "half"], ["--budget", "1.5"], ["--max-disagreement", "2%"], ["--confidence", "0.8"]),
        *(["--data-root", "d"], ["--kind", "nope"], ["--keep", "nope"]),
    ],
    "quickstart": [["--minutes", "soon"], ["--threads", "0"]],
    "train": [
        METHOD,
        ["--threads", "0"],
        ["--data-name", "nope"],
        ["--steps", "many"],
        ["--threshold", "0.9"],
        ["--config", "nope.yaml"],
    ],
    "evaluate": [*COMMON, ["--threshold", "0.9"], ["--json", "."], ["--method", "calibrated", "--threshold", "0.9"]],
    "calibrate": [*COMMON, ["--threshold", "0.9"], ["--method", "dense"], ["--images", "a", "--data", "camvid"]],
    "sweep": [*COMMON[:5], ["--points", "0"]],
    "predict": [METHOD, MACHINE, ["--save", "nope"], ["--max-tokens", "0"], ["--fps", "0"], ["--threshold", "0.9"]],
    "report": [*COMMON, ["--examples", "0"], ["--references", "perhaps"]],
    "serve": [MACHINE, ["--threads", "0"], ["--port", "70000"], ["--queue", "0"], ["--wait-ms", "-1"]],
    "export": [METHOD, ["--threads", "two"], ["--format", "nope"], ["--method", "dense", "--score", "margin"]],
    "cost": [["--backbone", "nope"], ["--head", "nope"], ["--num-classes", "0"], ["--image-size", "1", "2", "3"]],
    "gate": [METHOD, MACHINE, ["--image-size", "0"], ["--method", "dense", "--score", "margin"]],
    "policy": [DATA, MACHINE, ["--sizes", "0"], ["--steps", "0"], ["--batch", "few"]],
    "convert": [
        ["--kind", "nope"],
        ["--exits", "two"],
        ["--head-options", "num_heads"],
        ["--backbone-options", "rope"],
    ],
    "data": [["--split"]],
    "doctor": [["now"]],
    "completion": [["fish"]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_use__is_refused_before_torch_is_imported(command: str) -> None:
    import json

    needed = NEEDED.get(command, [])
    lines = [[command, *needed, *options] for options in (["--nope"], *WRONG[command])]
    lines += [[command, *needed[:-1]]] if needed else []  # something is missing
    run = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(lines)], capture_output=True, text=True, timeout=120, check=True
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(lines)
    for line, (status, said, torch) in zip(lines, answers):
        assert status == 2 or "dataset 'nope'" in said, (line, said)
        assert said.startswith(f"tokenexit {command}: "), (line, said)
        assert said.count("\n") == 1, (line, said)
        assert not torch, (line, said)
