"""INT8 files are smaller, say about what the float file says, and are refused where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import fine, wrong
from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting.export import export_model
from tokenexit.exporting.quantize import FILE, exit_head_nodes, quantize_int8
from tokenexit.methods import DToP

onnx = pytest.importorskip("onnx", reason="ONNX needs the export extra")
pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")

IMAGES = [random_image(48, 64, seed=0), random_image(41, 70, seed=1)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_segmenter("fcn", exits=(1, 2), depth=3)
    return export_model(model, DToP(0.75, 2), [random_image(21, 30)], tmp_path_factory.mktemp("int8")).path


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
    assert about["thresholds"] == [0.75, 0.75]
    before = onnx.load(exported).graph.node
    heads = {node.name for node in before if node.op_type == "Gemm"} & set(exit_head_nodes(onnx.load(exported)))
    assert len(heads) == 4, "a projection and a classifier each"
    assert {f"{name}_MatMul" for name in heads} <= {node.name for node in model.graph.node if node.op_type == "MatMul"}
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)


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


def test_export__refuses_options_of_int8_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_segmenter().save_pretrained(tmp_path / "model")
    command = ("export", tmp_path / "model", "--out", tmp_path / "out")
    assert "add --quantize int8" in wrong(capsys, *command, "--agreement", 0.9)
    assert "--quantize is for --format onnx" in wrong(capsys, *command, "--quantize", "int8", "--format", "torch")
    assert "agreement must be in [0, 1]" in wrong(capsys, *command, "--quantize", "int8", "--agreement", 2)
