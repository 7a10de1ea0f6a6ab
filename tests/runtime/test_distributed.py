"""Several processes evaluate as one: the same counts, one voice, and one fate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenexit.runtime.distributed as distributed
from tests.evaluation.test_evaluate import METHODS, Images
from tests.helpers import tiny_segmenter
from tests.runtime.driver import OPTIONS, figures
from tests.training.tiny import silent, tiny_run, write_dataset
from tokenexit.cli import main
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense
from tokenexit.runtime.distributed import all_or_none, gather, process_group, rank_and_size
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.build import build_dataset
from tokenexit.training.loop import train, validate

ROOT = Path(__file__).resolve().parents[2]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    threads = str(torch.get_num_threads())  # another number may round differently
    environment = {
        "PYTHONPATH": paths,
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment, cwd=ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": 4, "val": 3, "test": 5})


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "model"
    train(tiny_run(data, out, steps=1), say=silent, progress=False)
    return out


@pytest.fixture(scope="module")
def seen(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of two processes left."""
    out = tmp_path_factory.mktemp("out")
    damaged = write_dataset(tmp_path_factory.mktemp("damaged") / "set", {"test": 5})
    (damaged / "images" / "test" / "p3.png").write_bytes(b"no image")
    ended = torchrun(2, "-m", "tests.runtime.driver", data, damaged, model, out)
    assert ended.returncode == 0, ended.stderr
    return out, [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


Seen = tuple[Path, list[dict[str, Any]]]


def test_two_processes_return_what_one_returns_to_both(seen: Seen) -> None:
    model = tiny_segmenter("fcn", num_classes=5)
    alone = {
        "five": figures(evaluate(model, Images(5), METHODS, references=True)),
        "one": figures(evaluate(model, Images(1), METHODS, references=True)),  # the second process has no image
        "limit": figures(evaluate(model, Images(5), [Dense()], limit=3)),
    }
    for rank, process in enumerate(seen[1]):
        assert process["place"] == (rank, 2)
        assert process["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert process["times"] == 5
        for name, rows in alone.items():
            assert process[name] == rows, name


def test_only_the_first_process_shows_progress(seen: Seen) -> None:
    assert [process["asked"] for process in seen[1]] == [[0, 2, 4], []]


def test_what_fails_in_one_process_fails_in_all_with_its_words_and_leaves_them_in_step(seen: Seen) -> None:
    for process in seen[1]:
        assert process["fine"] == "none"
        assert process["second fails"] == "ConfigError: process 1 refuses."
        assert process["damaged"] == "DataError: image 1 is damaged."
        assert process["after"] == [0, 1]


def test_validation_in_a_run_of_two_processes_is_that_of_one(seen: Seen, data: Path) -> None:
    out = seen[0] / "run"
    history = json.loads((out / "training.json").read_text())["history"]
    config = tiny_run(data, out)
    model = ExitSegmenter.from_pretrained(out)
    alone = validate(model, config, Dense(), build_dataset(config.data, "val"))
    assert [entry["step"] for entry in history] == [3, 6]
    assert {name: history[-1][name] for name in alone} == alone


def test_one_process_is_alone() -> None:
    assert rank_and_size() == (0, 1)
    assert gather("value") == ["value"]
    with process_group():
        assert rank_and_size() == (0, 1)
    with pytest.raises(ConfigError, match="mine"), all_or_none():
        raise ConfigError("mine")


def test_processes_that_torchrun_did_not_start_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    words = r"^the processes do not find each other \(.*\): start them with torchrun\.$"
    with pytest.raises(ConfigError, match=words), process_group():
        pass


def test_a_process_that_has_ended_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(values: list[object], value: object) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:43210")

    monkeypatch.setattr(distributed, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr("torch.distributed.all_gather_object", broken)
    with pytest.raises(ConfigError, match=r"^another process of this run has ended: its own message says why\.$"):
        gather(1)


# -------------------------------------------------------------------------------------------------- as a user types it


def test_evaluate_writes_the_figures_of_one_process_but_for_its_times(
    seen: Seen, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(model), *OPTIONS, "--json", str(tmp_path / "one.json")]) == 0
    one, two = (without_times(path) for path in (tmp_path / "one.json", seen[0] / "figures.json"))
    assert one == two
    assert len(one["results"]) == 4 + 2 + 3 + 2  # methods, random, oracles, depths
    first, second = (process["commands"]["evaluate"] for process in seen[1])
    assert (first[0], second) == (0, (0, "", ""))
    assert "5 images of folder (test) in windows of 16x16 every 12x12, fp32 on cpu" in first[1]


def without_times(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    for row in content["results"]:
        ms = row.pop("latency_ms_median")
        untimed = row["label"].startswith(("truncated", "oracle in context"))  # not run as they would be
        assert ms is None if untimed else ms > 0
    return content


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("damaged", 1, "p3.png"),  # an image of the second process
        ("no model", 1, "holds no config.json"),
        ("wrong", 2, "--limit 0 must be at least 1."),
    ],
)
def test_evaluate_ends_in_all_processes_with_one_sentence_of_the_first(
    command: str, status: int, words: str, seen: Seen
) -> None:
    first, second = (process["commands"][command] for process in seen[1])
    assert first[:2] == (status, "")
    assert first[2].startswith("tokenexit evaluate: ")
    assert words in first[2]
    assert first[2].count("\n") == 1
    assert second == (status, "", "")
    assert not (seen[0] / "damaged.json").exists()
