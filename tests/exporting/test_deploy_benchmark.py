"""The benchmark of what users deploy measures all of it on one image, and goes on where it was interrupted."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import deploy

from tests.helpers import random_image, tiny_segmenter
from tokenexit.runtime.precision import is_fast


def row() -> dict[str, Any]:
    """A row as its file holds it."""
    cells = [
        {"what": what, "precision": precision, "runtime": "onnxruntime", "ms": [ms, ms - 1, ms + 1], "agreement": 0.98}
        for precision in ("fp32", "int8")
        for what, ms in (("dense", 200.0), ("exits", 100.0))
    ]
    gain = {"median": 2.0, "interval": [1.9, 2.1]}
    return {"mac_ratio": 1.69, "cells": cells, "speed-up": {f"onnxruntime {each}": gain for each in ("fp32", "int8")}}


def test_measured__times_every_cell_and_compares_it_with_dense_in_fp32(tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX needs the export extra")
    model = tiny_segmenter("fcn", exits=(1,), depth=2)
    openvino = all(find_spec(name) is not None for name in ("openvino", "nncf"))
    found = deploy.measured(
        model, random_image(24, 32), rounds=3, threads=1, folder=tmp_path, compiled=False, openvino=openvino
    )
    by = {(cell["what"], cell["precision"], cell["runtime"]): cell for cell in found["cells"]}
    runtimes = ("torch eager", "onnxruntime", *(["OpenVINO"] if openvino else []))
    pairs = [(precision, runtime) for precision in ("fp32", "int8") for runtime in runtimes]
    if is_fast("bf16", torch.device("cpu")):
        pairs += [("bf16", runtime) for runtime in runtimes if runtime != "onnxruntime"]
    assert set(by) == {(what, *pair) for what in ("dense", "exits") for pair in pairs}
    assert found["mac_ratio"] > 1.02, "half of the tokens leave, and pass by one of two blocks"
    assert by["dense", "fp32", "torch eager"]["agreement"] == by["dense", "fp32", "onnxruntime"]["agreement"] == 1.0
    assert by["exits", "fp32", "torch eager"]["agreement"] == by["exits", "fp32", "onnxruntime"]["agreement"] < 1.0
    assert 0.8 < by["dense", "int8", "torch eager"]["agreement"] < 1.0, "its weights are others"
    assert all(low <= median <= high for median, low, high in (cell["ms"] for cell in found["cells"]))
    assert set(found["speed-up"]) == {f"{runtime} {precision}" for precision, runtime in pairs}


def test_main__measures_rows_without_a_file_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def measure(command: list[str], **_: object) -> None:
        called.append(command)
        (tmp_path / f"{command[-1]}.json").write_text(json.dumps(row()))

    monkeypatch.setattr(deploy.subprocess, "run", measure)
    monkeypatch.setattr(sys, "argv", ["deploy", "--out", str(tmp_path), "--only", "small-512"])
    deploy.main()
    first = capsys.readouterr().out
    assert "| small-512-1 | onnxruntime, int8 | 200 [199, 201] | 100 [99, 101] | 2.00 [1.90, 2.10] | 1.69 " in first
    assert [command[-1] for command in called] == ["small-512-1"]
    deploy.main()
    assert capsys.readouterr().out == first
    assert len(called) == 1, "the row has its file"


def test_main__names_the_rows_there_are_where_only_asks_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deploy", "--out", str(tmp_path), "--only", "huge-512"])
    with pytest.raises(SystemExit):
        deploy.main()
    message = capsys.readouterr().err
    assert "huge-512" in message
    assert all(name in message for name in ("small-512", "base-512", "small-1024", "base-1024"))
