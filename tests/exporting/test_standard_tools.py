"""Exported ONNX files pass the tools that people put between an export and a deployment, and still let tokens leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.helpers import random_image, tiny_segmenter
from tokenexit.exporting.export import export_model
from tokenexit.methods import Dense, DoViT, DToP, Method

onnx = pytest.importorskip("onnx", reason="ONNX needs the export extra")
pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
ort = pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")

SIZES = [(48, 64), (41, 70), (64, 36)]
ATM = {"kind": "atm", "channels": 16, "layers": 1, "num_heads": 2}
CASES: dict[str, tuple[Any, Method[Any]]] = {
    "dtop": ("fcn", DToP(0.75, 2)),
    "dovit": ("fcn", DoViT(0.75, min_improvement=0.0)),
    "atm": (ATM, DToP(0.75, 2)),
    "dense": ("fcn", Dense()),
}
IN_INT8 = ["Conv", "Gemm", "MatMul"]
CONST = {"MatMulConstBOnly": True}  # products of activations, as in attention, stay in float
Outputs = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class File:
    """An exported file, and what it says of a few images, at the method's thresholds and at 1."""

    path: Path
    thresholds: npt.NDArray[np.float32]
    said: Outputs
    unforced: Outputs

    def out(self, name: str) -> Path:
        return self.path.parent / name


def images() -> Iterator[npt.NDArray[np.float32]]:
    for seed, size in enumerate(SIZES):
        yield random_image(*size, seed=seed)[None].numpy()


def run(path: Path, thresholds: npt.NDArray[np.float32]) -> Outputs:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # not that some operators run on other kernels
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}  # onnxslim drops the thresholds of dense, which has no use
    feeds = [{"image": image, "thresholds": thresholds} for image in images()]
    return [
        tuple(session.run(["labels", "grid_logits", "exit_stage"], {name: feed[name] for name in wanted}))
        for feed in feeds
    ]


@pytest.fixture(scope="module", params=CASES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> File:
    head, method = CASES[request.param]
    model = tiny_segmenter(head, exits=(1, 2), depth=3)
    made = export_model(model, method, [random_image(21, 30)], tmp_path_factory.mktemp(request.param))
    thresholds = np.full(2, getattr(method, "threshold", 1.0), np.float32)
    file = File(made.path, thresholds, run(made.path, thresholds), run(made.path, np.ones(2, np.float32)))
    if method.thresholds is not None:
        assert 0.1 < left(file.said) < 1.0, "some leave and some stay"
        assert left(file.unforced) < left(file.said) - 0.1, "and thresholds decide it"
    return file


def left(outputs: Outputs) -> float:
    """Return the share of tokens that left."""
    return float(np.concatenate([(exits < 2).ravel() for _, _, exits in outputs]).mean())


def agreement(old: Outputs, new: Outputs, which: int) -> float:
    """Return the share of equal labels (0) or exits (2)."""
    return float(np.concatenate([(one[which] == other[which]).ravel() for one, other in zip(old, new)]).mean())


def assert_same(file: File, path: Path) -> None:
    """Nothing has changed but rounding."""
    for (labels, logits, exits), (new_labels, new_logits, new_exits) in zip(file.said, run(path, file.thresholds)):
        assert np.array_equal(exits, new_exits)
        assert np.abs(logits - new_logits).max() < 1e-4 * max(1.0, np.abs(logits).max())
        assert (labels == new_labels).mean() > 0.999


def assert_alike(file: File, path: Path, *, share: float) -> None:
    """All is finite, and labels and exits agree at so many places, at the method's thresholds and at 1."""
    for thresholds, old in ((file.thresholds, file.said), (np.ones_like(file.thresholds), file.unforced)):
        new = run(path, thresholds)
        assert all(np.isfinite(logits).all() for _, logits, _ in new)
        assert agreement(old, new, 0) >= share
        assert agreement(old, new, 2) >= share
        assert abs(left(old) - left(new)) <= 0.05


class Images:
    """The calibration reader that `quantize_static` asks for: every image, with leaving tokens and without."""

    def __init__(self, thresholds: npt.NDArray[np.float32]) -> None:
        settings = (thresholds, np.ones_like(thresholds))
        self.left = iter([{"image": image, "thresholds": setting} for setting in settings for image in images()])

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return next(self.left, None)


def preprocessed(file: File) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = file.out("preprocessed.onnx")
    if not path.exists():
        quant_pre_process(file.path, path)
    return path


def test_exported_file__passes_the_full_check_and_names_its_dimensions(file: File) -> None:
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "image": [1, 3, "height", "width"],
        "thresholds": [2],
        "labels": [1, "height", "width"],
        "grid_logits": [1, 5, "logits_height", "logits_width"],
        "exit_stage": [1, "grid_height", "grid_width"],
    }
    assert not model.graph.value_info


def test_quant_pre_process__leaves_the_file_as_it_was(file: File) -> None:
    assert_same(file, preprocessed(file))


@pytest.mark.parametrize("prepared", [False, True], ids=["as exported", "pre-processed"])
def test_quantize_dynamic__keeps_labels_and_exits(file: File, prepared: bool) -> None:
    from onnxruntime.quantization import quantize_dynamic

    out = file.out("dynamic.onnx")
    quantize_dynamic(preprocessed(file) if prepared else file.path, out, per_channel=True, reduce_range=True)
    operations = {node.op_type for node in onnx.load(out).graph.node}
    assert "MatMulInteger" in operations
    assert_alike(file, out, share=0.9)


def test_quantize_static__keeps_labels_and_exits(file: File) -> None:
    from onnxruntime.quantization import quantize_static

    out = file.out("static.onnx")
    reader = Images(file.thresholds)
    quantize_static(preprocessed(file), out, reader, op_types_to_quantize=IN_INT8, extra_options=CONST)
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(out).graph.node)
    assert_alike(file, out, share=0.85)


def test_float16__keeps_labels_and_exits(file: File) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16", reason="onnxruntime has no float16 converter")
    out = file.out("half.onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(file.path), keep_io_types=True), out)
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in onnx.load(out).graph.initializer)
    assert_alike(file, out, share=0.95)


def test_onnxslim__leaves_the_file_as_it_was(file: File) -> None:
    onnxslim = pytest.importorskip("onnxslim", reason="onnxslim is not installed")
    out = file.out("slim.onnx")
    onnx.save(onnxslim.slim(onnx.load(file.path)), out)
    assert_same(file, out)


def test_onnxsim__leaves_the_file_as_it_was(file: File) -> None:
    onnxsim = pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    simplified, checked = onnxsim.simplify(onnx.load(file.path))
    assert checked
    out = file.out("simplified.onnx")
    onnx.save(simplified, out)
    assert_same(file, out)
