"""INT8 files are smaller, say about what the float file says, and are refused where they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.calibration.test_dense_pass import Noise
from tests.cli.test_cli import fine, wrong
from tests.helpers import random_image, tiny_segmenter
from tokenexit.data.scenes import Scenes
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.exporting import quantize as module
from tokenexit.exporting.export import Runner, export_model
from tokenexit.exporting.quantize import (
    FILE,
    exit_head_nodes,
    matched_thresholds,
    miou_of,
    quantize_int8,
    thresholds_of,
)
from tokenexit.methods import DToP

onnx = pytest.importorskip("onnx", reason="ONNX needs the export extra")
pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")

IMAGES = [random_image(48, 64, seed=0), random_image(41, 70, seed=1)]


def test_quantize_int8__leaves_exit_heads_in_float_and_keeps_the_metadata(exported: Path) -> None:
    found = quantize_int8(exported, IMAGES)
    assert found.path == exported.with_name(FILE)
    assert found.megabytes[1] < found.megabytes[0]
    assert found.same_labels > 0.9
    assert found.same_exits > 0.9
    assert found.left == pytest.approx((found.left[0],) * 2, abs=0.05)
    assert 0.1 < found.left[0] < 1.0
    model = onnx.load(found.path)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}["tokenexit"])
    assert about["thresholds"] == pytest.approx(found.thresholds[1])
    assert about["thresholds"] == pytest.approx([0.75, 0.75], abs=0.05)
    before = onnx.load(exported).graph.node
    heads = {node.name for node in before if node.op_type == "Gemm"} & set(exit_head_nodes(onnx.load(exported)))
    assert len(heads) == 4, "a projection and a classifier each"
    assert {f"{name}_MatMul" for name in heads} <= {node.name for node in model.graph.node if node.op_type == "MatMul"}
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)


def test_quantize_int8__with_ranges_from_images_has_no_products_of_weights_left_in_float(exported: Path) -> None:
    found = quantize_int8(exported, IMAGES, 0.5, IMAGES)
    model = onnx.load(found.path)
    weights = {one.name for one in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    in_float = [node.name for node in products if weights & {*node.input}]
    assert in_float == exit_head_products(exported)
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert not any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    assert min(found.same_labels, found.same_exits) > 0.5


def exit_head_products(path: Path) -> list[str]:
    model = onnx.load(path)
    names = {*exit_head_nodes(model)}
    return [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.name in names]


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=2),
    st.booleans(),
    st.sampled_from([1.5, 0.004]),
)
@settings(max_examples=30)
def test_matched_thresholds__let_as_many_tokens_leave_where_scores_have_moved(
    seed: int, moved: list[float], by_class: bool, spread: float
) -> None:
    logits = np.random.default_rng(seed).normal(0.0, spread, (2, 4000)) + np.log([[4.0], [1.5]])  # half above each

    def file(shift: list[float]) -> Runner:
        def run(image: Any, thresholds: Any) -> Any:
            scores = 1 / (1 + np.exp(-(logits + np.array(shift)[:, None])))
            taus = thresholds[:, 0] if by_class else thresholds
            leaves = scores >= taus[:, None]
            return None, None, np.where(leaves[0], 0, np.where(leaves[1], 1, 2))[None]

        return run

    thresholds = np.array([[0.8, 0.8], [0.6, 0.6]] if by_class else [0.8, 0.6], np.float32)
    own = matched_thresholds(file([0.0, 0.0]), file(moved), [torch.zeros(3, 2, 2)], thresholds)
    before, after = (
        run(np.zeros(1, np.float32), tau)[2] for run, tau in ((file([0.0, 0.0]), thresholds), (file(moved), own))
    )
    for n in range(2):
        assert np.mean(after <= n) == pytest.approx(np.mean(before <= n), abs=0.0025)
    assert np.array_equal(own, thresholds) or any(abs(one) > 0.003 * spread for one in moved)


def test_matched_thresholds__that_never_fire_stay() -> None:
    def run(image: Any, thresholds: Any) -> Any:
        return None, None, np.full((1, 5), 1)

    own = matched_thresholds(run, run, [torch.zeros(3, 2, 2)], np.array([1.0], np.float32))
    assert own.tolist() == [1.0]


def test_moved_thresholds__are_those_of_the_file(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matched_thresholds", lambda *_: np.array([0.7, 0.8], np.float32))
    found = quantize_int8(exported, IMAGES, 0.0)
    assert found.thresholds == ([0.75, 0.75], pytest.approx([0.7, 0.8]))
    assert thresholds_of(found.path) == pytest.approx([0.7, 0.8])
    assert thresholds_of(exported) == pytest.approx([0.75, 0.75])


def test_miou__of_the_float_file_is_that_of_the_model(tmp_path: Path) -> None:
    model, data = tiny_segmenter("fcn", exits=(1, 2), depth=3), Noise(4, ((30, 41), (24, 32)))
    method = DToP(0.75, 2)
    path = export_model(model, method, [random_image(21, 30)], tmp_path).path
    (row,) = evaluate(model, data, [method])
    assert miou_of(path, model.preprocessing, data) == pytest.approx(row.scores.miou, abs=0.05)


def test_quantize_int8__refuses_below_the_stated_agreement(exported: Path) -> None:
    exported.with_name(FILE).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"100\.0% are asked for: no INT8 file was written"):
        quantize_int8(exported, IMAGES, agreement=1.0)
    assert not exported.with_name(FILE).exists()
    with pytest.raises(ConfigError, match="agreement must be in"):
        quantize_int8(exported, IMAGES, agreement=1.5)


def test_export__quantizes_and_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_segmenter("fcn", exits=(1, 2), depth=3).save_pretrained(tmp_path / "model")
    options = ("--method", "dtop", "--threshold", 0.75, "--out", tmp_path / "out", "--quantize", "int8")
    said = fine(capsys, "export", tmp_path / "model", *options, "--agreement", 0.5)
    assert "ms an image of" in said
    assert "of the exits are the float file's" in said
    assert (tmp_path / "out" / FILE).exists()


def test_export__with_labels_prints_the_miou_of_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = Scenes(1).labels.num_classes
    tiny_segmenter("fcn", exits=(1, 2), depth=3, num_classes=classes).save_pretrained(tmp_path / "model")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "image.png")
    options = ("--method", "dtop", "--threshold", 0.75, "--out", tmp_path / "out", "--quantize", "int8-static")
    images = ("--images", tmp_path / "image.png", "--agreement", 0)
    said = fine(capsys, "export", tmp_path / "model", *options, *images, "--data", "scenes")
    assert re.search(r"mIoU \d+\.\d\d, \d+\.\d\d of the float file, on \d+ images", said)


def test_export__refuses_options_of_int8_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_segmenter().save_pretrained(tmp_path / "model")
    command = ("export", tmp_path / "model", "--out", tmp_path / "out")
    assert "add --quantize int8" in wrong(capsys, *command, "--agreement", 0.9)
    assert "--quantize is for --format onnx" in wrong(capsys, *command, "--quantize", "int8", "--format", "torch")
    assert "needs --images like those" in wrong(capsys, *command, "--quantize", "int8-static")
    assert "--data is for the mIoU" in wrong(capsys, *command, "--data", "scenes")
    assert "agreement must be in [0, 1]" in wrong(capsys, *command, "--quantize", "int8", "--agreement", 2)
