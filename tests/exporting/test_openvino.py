"""OpenVINO runs exported files as they are, and INT8 files that NNCF makes of them."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_cli import fine, wrong
from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.cli.export import _pad_rows
from tokenexit.data.scenes import Scenes
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting import quantize as module
from tokenexit.exporting.export import export_model
from tokenexit.exporting.graph import threshold_table
from tokenexit.exporting.openvino import FILES, open_openvino
from tokenexit.exporting.quantize import metadata_of, quantize_int8
from tokenexit.methods import DoViT, DToP

pytest.importorskip("onnx", reason="ONNX needs the export extra")
pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")

SIZES = [(21, 30), (40, 25), (4, 4), (3, 50), (12, 16)]
IMAGES = [random_image(48, 64, seed=0), random_image(41, 70, seed=1)]


@pytest.mark.parametrize(
    ("head", "method"),
    [("fcn", DToP(0.26, 1)), ("atm", DToP(0.3, 2)), ("fcn", DoViT(0.26, min_improvement=0.0))],
)
def test_openvino__says_what_the_model_says(head: str, method: DToP | DoViT, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO needs the openvino extra")
    model = tiny_segmenter(head)
    made = export_model(model, method, [random_image(12, 16)], tmp_path)
    run = open_openvino(made.path)
    own = threshold_table(model, method)
    left: set[int] = set()
    for seed, size in enumerate(SIZES):
        image = random_image(*size, seed=seed)
        for thresholds in (own, torch.ones_like(own), torch.zeros_like(own), own + 0.05):
            labels, logits, stages = run(image[None].numpy(), thresholds.numpy())
            with torch.no_grad():
                ours = model([image], replace(method, threshold=tuple(thresholds.tolist())))
            assert_close(torch.from_numpy(logits[0]), ours.grid_logits[0])
            assert np.array_equal(stages[0], ours.exit_index[0].numpy())
            assert np.array_equal(labels[0], ours.labels[0].numpy())
            left |= set(ours.exit_index[0].unique().tolist())
    assert len(left) > 1, "some leave and some stay"


def test_quantize_int8__for_openvino_writes_graph_and_weights_that_keep_the_metadata(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf", reason="INT8 for OpenVINO needs the openvino extra")
    import openvino

    monkeypatch.setattr(module, "matched_thresholds", lambda *_: np.array([0.7, 0.8], np.float32))
    found = quantize_int8(exported, IMAGES, 0.5, IMAGES, "openvino")
    assert [found.path.name, found.path.with_suffix(".bin").name] == [*FILES]
    assert min(found.same_labels, found.same_exits) > 0.5
    about = metadata_of(found.path)
    assert about == metadata_of(exported) | {"thresholds": about["thresholds"]}
    assert about["thresholds"] == pytest.approx([0.7, 0.8]) == found.thresholds[1]
    graph = openvino.Core().read_model(found.path)
    kinds = {op.get_type_name() for op in graph.get_ops()}
    assert "FakeQuantize" in kinds
    products = [op for op in graph.get_ops() if op.get_type_name() == "MatMul"]
    of_heads = [op for op in products if op.input_value(1).get_node().get_type_name() == "Constant"]
    assert len(of_heads) == 4, "of two exit heads the projection and the classifier, in fp32"


def test_quantize_int8__for_openvino_refuses_below_the_stated_agreement(exported: Path) -> None:
    pytest.importorskip("nncf", reason="INT8 for OpenVINO needs the openvino extra")
    for name in FILES:
        exported.with_name(name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no INT8 file was written"):
        quantize_int8(exported, IMAGES, 1.0, IMAGES, "openvino")
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_quantize_int8__for_openvino_needs_images_for_ranges(exported: Path) -> None:
    with pytest.raises(ConfigError, match="takes ranges of activations in advance: give images"):
        quantize_int8(exported, IMAGES, runtime="openvino")


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_quantize_int8__for_openvino_says_which_package_lacks(
    exported: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "openvino":
        pytest.importorskip("nncf", reason="without NNCF, that one is named")
    monkeypatch.setitem(sys.modules, package, None)
    before = {*exported.parent.iterdir()}
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'tokenexit\[openvino\]'"):
        quantize_int8(exported, IMAGES, 0.5, IMAGES, "openvino")
    assert {*exported.parent.iterdir()} == before


def test_export__for_openvino_needs_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_segmenter("fcn", exits=(1, 2), depth=3).save_pretrained(tmp_path / "model")
    options = ("--method", "dtop", "--out", tmp_path / "out", "--quantize", "int8-openvino")
    assert "--quantize int8-openvino needs --images" in wrong(capsys, "export", tmp_path / "model", *options)


def test_export__for_openvino_says_the_miou_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf", reason="INT8 for OpenVINO needs the openvino extra")
    classes = Scenes(1).labels.num_classes
    tiny_segmenter("fcn", exits=(1, 2), depth=3, num_classes=classes).save_pretrained(tmp_path / "model")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "image.png")
    options = ("--method", "dtop", "--threshold", 0.75, "--out", tmp_path / "out", "--quantize", "int8-openvino")
    images = ("--images", tmp_path / "image.png", "--agreement", 0)
    said = fine(capsys, "export", tmp_path / "model", *options, *images, "--data", "scenes")
    assert re.search(r"mIoU \d+\.\d\d, \d+\.\d\d of the float file, on \d+ images", said)
    assert (tmp_path / "out" / FILES[0]).exists()


@pytest.mark.parametrize(
    ("asked", "quantize", "padded"),
    [(None, None, None), (None, "int8", None), (None, "int8-openvino", 32), (0, "int8-openvino", None), (8, None, 8)],
)
def test_export__pads_rows_by_itself_for_openvino_alone(asked: Any, quantize: Any, padded: Any) -> None:
    assert _pad_rows(argparse.Namespace(pad_rows=asked, quantize=quantize)) == padded
