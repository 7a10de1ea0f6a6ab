"""An exported ONNX file is written once more in INT8, for onnxruntime or OpenVINO, and compared with the first one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import mask_tensor
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.evaluation.metrics import confusion_matrix, scores
from tokenexit.exporting import openvino
from tokenexit.exporting.export import Answers, Runner, open_onnx
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.outputs.segmentation import resize_maps
from tokenexit.runtime.atomic import atomic_write

Runtime = Literal["onnxruntime", "openvino"]
FILE = "model.int8.onnx"
FILES: dict[Runtime, tuple[str, ...]] = {"onnxruntime": (FILE,), "openvino": openvino.FILES}
AGREEMENT = 0.9
"""At least this share of labels, and of exits, must be the float file's, if nothing else is asked for."""
REPEATS = 3
MATCHED = 0.002
"""Thresholds of an exit stay where the share of tokens that leave there is that of the float file to this."""
SHIFT, HALVINGS = 2.0, 20
"""Thresholds are looked for within this distance, in logits, of the float file's, by at most so many halvings."""

Thresholds = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """A file with INT8 weights, and how it compares with the float one, which is named first in pairs.

    Attributes:
        path: the file; with OpenVINO the graph, whose weights lie beside it.
        megabytes: sizes of both.
        milliseconds: time of an image in both, median of the runs in the runtime that the file is for.
        same_labels: share of pixels with the float file's class.
        same_exits: share of tokens that leave where they leave in the float file.
        left: share of tokens that leave at an exit, in both.
        thresholds: those of the metadata, in both.
    """

    path: Path
    megabytes: tuple[float, float]
    milliseconds: tuple[float, float]
    same_labels: float
    same_exits: float
    left: tuple[float, float]
    thresholds: tuple[list[Any], list[Any]]


def quantize_int8(
    path: Path,
    images: Sequence[Tensor],
    agreement: float = AGREEMENT,
    ranges: Sequence[Tensor] = (),
    runtime: Runtime = "onnxruntime",
) -> Quantized:
    """Write `model.int8.onnx`, or `model.int8.xml` and `.bin`, beside the exported file `path`.

    Exit heads stay in fp32, and so do softmax, scores and their comparison with thresholds. Scores move all the same:
    the new file's thresholds are those at which as many tokens leave at each exit as in the float file. Each file runs
    on `images` at its own thresholds.

    Args:
        path: a file of `export_model`.
        images: `(3, H, W)` fp32 each, as `Preprocessing` makes them.
        agreement: least share of equal labels, and of equal exits, in [0, 1].
        ranges: images from which ranges of activations are taken in advance (onnxruntime's `quantize_static`, NNCF);
            without any they are taken as they come (`quantize_dynamic`), which is for onnxruntime alone.
        runtime: what the file is for; both files run and are timed in it.

    Raises:
        ConfigError: for an agreement outside [0, 1], without images, and where a package is missing.
        CheckpointError: if fewer labels or exits agree; no INT8 file is written.
    """
    check_agreement(agreement)
    if not images:
        raise ConfigError("there is no image to compare the INT8 file with the float one on: give one.")
    if runtime == "openvino" and not ranges:
        raise ConfigError("INT8 for OpenVINO takes ranges of activations in advance: give images for them.")
    names, about = FILES[runtime], metadata_of(path)
    thresholds = np.array(about["thresholds"], np.float32)
    with ExitStack() as stack:
        out = [stack.enter_context(atomic_write(path.with_name(name))) for name in names]
        with _quiet():
            if runtime == "openvino":
                in_float = exit_head_nodes(_load(path))
                openvino.write_openvino(path, out, _asked(ranges, thresholds), in_float, about)
            elif ranges:
                _write_static(path, out[0], ranges, thresholds)
            else:
                _write_dynamic(path, out[0])
        files = (_open(runtime, path), _open(runtime, *out))
        own = matched_thresholds(*files, images, thresholds)
        if not np.array_equal(own, thresholds):
            _set_thresholds(out, own)
        found = _compare(files, images, (thresholds, own))
        if min(found.same_labels, found.same_exits) < agreement:
            raise CheckpointError(
                f"{found.same_labels:.1%} of the labels and {found.same_exits:.1%} of the exits of the INT8 file are "
                f"those of {path.name}, and {agreement:.1%} are asked for: no INT8 file was written; lower agreement "
                "to accept it."
            )
        sizes = [sum(each.stat().st_size for each in those) / 1e6 for those in ([path], out)]
    return Quantized(
        path.with_name(names[0]), (sizes[0], sizes[1]), thresholds=(thresholds.tolist(), own.tolist()), **vars(found)
    )


def _open(runtime: Runtime, *files: Path) -> Runner:
    return openvino.open_openvino(*files) if runtime == "openvino" else open_onnx(*files)


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def metadata_of(path: Path) -> dict[str, Any]:
    """Return what an exported file, or the graph of an INT8 model for OpenVINO, says of itself."""
    if path.suffix == ".xml":
        return openvino.metadata_of_graph(path, path.with_suffix(".bin"))
    about: dict[str, Any] = json.loads({one.key: one.value for one in _load(path).metadata_props}["tokenexit"])
    return about


def thresholds_of(path: Path) -> Thresholds:
    """Return the thresholds in a file's metadata, `(E,)` or `(E, K)`."""
    return np.array(metadata_of(path)["thresholds"], np.float32)


def matched_thresholds(
    float_file: Runner, int8_file: Runner, images: Sequence[Tensor], thresholds: Thresholds
) -> Thresholds:
    """Return thresholds at which as many tokens leave the second file at each exit as the first, over all images.

    They are moved exit by exit, the first one first, by one distance in logits for all classes of an exit; a threshold
    of 0 or 1 stays.
    """
    asked = [image[None].numpy() for image in images]

    def exits_of(file: Runner, tried: Thresholds) -> npt.NDArray[np.int64]:
        return np.concatenate([file(image, tried)[2].ravel() for image in asked])

    own, wanted = thresholds.copy(), exits_of(float_file, thresholds)
    left = exits_of(int8_file, own)
    near = max(MATCHED, 1.01 / wanted.size)  # of few tokens, one more or less
    for n in range(len(thresholds)):
        low, high = -SHIFT, SHIFT
        for _ in range(HALVINGS):
            if abs(np.mean(left <= n) - np.mean(wanted <= n)) <= near:
                break
            middle = (low + high) / 2
            own[n] = _moved(thresholds[n], middle)
            left = exits_of(int8_file, own)
            if np.mean(left <= n) > np.mean(wanted <= n):
                low = middle  # a higher threshold lets fewer leave
            else:
                high = middle
    return own


def _moved(thresholds: Thresholds, shift: float) -> Thresholds:
    """Move thresholds by a distance in logits."""
    with np.errstate(divide="ignore"):
        logits = np.log(thresholds) - np.log1p(-thresholds)
    return (1 / (1 + np.exp(-(logits + np.float32(shift))))).astype(np.float32)


def _write_dynamic(path: Path, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    model = _load(path)
    in_float = exit_head_nodes(model)
    in_float += [f"{name}_MatMul" for name in in_float]  # what the quantiser makes of each Gemm before it looks
    quantize_dynamic(model, out, per_channel=True, nodes_to_exclude=in_float)


def _write_static(path: Path, out: Path, images: Sequence[Tensor], thresholds: Thresholds) -> None:
    """Quantise products with weights alone."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(_asked(images, thresholds))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    model = _load(path)
    quantize_static(
        model,
        out,
        Images(),
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        nodes_to_exclude=exit_head_nodes(model),
        per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _asked(images: Sequence[Tensor], thresholds: Thresholds) -> list[dict[str, npt.NDArray[np.float32]]]:
    """Return the inputs that ranges are taken from: every image with the thresholds, and with nobody leaving.

    Tokens that stay see other values in deep blocks than tokens that leave.
    """
    settings = (thresholds, np.ones_like(thresholds))
    return [{"image": image[None].numpy(), "thresholds": setting} for setting in settings for image in images]


def _set_thresholds(out: Sequence[Path], thresholds: Thresholds) -> None:
    """Change the thresholds in a file's metadata; with OpenVINO its files are graph and weights."""
    values = np.round(thresholds.astype(np.float64), 7).tolist()
    if len(out) > 1:
        openvino.set_metadata(out, openvino.metadata_of_graph(*out) | {"thresholds": values})
        return
    import onnx

    (path,) = out
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "tokenexit":
            entry.value = json.dumps(json.loads(entry.value) | {"thresholds": values})
    onnx.save(model, path)


def miou_of(path: Path, preprocessing: Preprocessing, data: SegmentationDataset) -> float:
    """Return the mIoU of a file at its own thresholds, in percent, over all images of a dataset, taken whole.

    Raises:
        ConfigError: for a model that takes windows.
    """
    if preprocessing.window is not None:
        raise ConfigError("mIoU of an exported file is for images taken whole, and this model takes windows.")
    for_openvino = path.suffix == ".xml"
    run = _open("openvino", path, path.with_suffix(".bin")) if for_openvino else _open("onnxruntime", path)
    about = metadata_of(path)
    thresholds = np.array(about["thresholds"], np.float32)
    classes = len(about["classes"])
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for i in range(len(data)):
        sample = data[i]
        image = preprocessing.to_tensor(sample.image)
        _, logits, exits = run(image[None].numpy(), thresholds)
        truth, grid = mask_tensor(sample.mask), (exits.shape[1], exits.shape[2])
        maps = resize_maps(
            torch.from_numpy(logits),
            grid,
            about["patch_size"],
            about["upscale"],
            (image.shape[1], image.shape[2]),
            (truth.shape[0], truth.shape[1]),
        )
        confusion += confusion_matrix(maps[0].argmax(0), truth, classes, data.labels.ignore_index)
    return scores(confusion).miou


def check_agreement(agreement: float) -> None:
    """Raise `ConfigError` for a share outside [0, 1]."""
    if not 0.0 <= agreement <= 1.0:
        raise ConfigError(f"agreement must be in [0, 1], got {agreement}: it is a share of labels and exits.")


def exit_head_nodes(model: object) -> list[str]:
    """Return the names of the nodes of an `onnx.ModelProto` that the exporter made from exit heads."""
    return [
        node.name
        for node in model.graph.node  # type: ignore[attr-defined]
        if any("exit_heads" in entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes"))
    ]


@dataclass(frozen=True)
class _Compared:
    """What `Quantized` says of two files that ran."""

    milliseconds: tuple[float, float]
    same_labels: float
    same_exits: float
    left: tuple[float, float]


def _compare(
    files: tuple[Runner, Runner], images: Sequence[Tensor], thresholds: tuple[Thresholds, Thresholds]
) -> _Compared:
    """Run both files in turn, so that a busy machine slows both."""
    answers: list[list[Answers]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for image in images:
        for repeat in range(REPEATS):
            for which, (run, own) in enumerate(zip(files, thresholds)):
                start = time.perf_counter()
                answer = run(image[None].numpy(), own)
                seconds[which].append(time.perf_counter() - start)
                if repeat == 0:
                    answers[which].append(answer)
    exits = len(thresholds[0])
    left = [float(np.concatenate([(one[2] < exits).ravel() for one in ours]).mean()) for ours in answers]
    same_labels, same_exits = (
        float(np.concatenate([(one[i] == other[i]).ravel() for one, other in zip(*answers)]).mean()) for i in (0, 2)
    )
    times = [float(np.median(one)) * 1e3 for one in seconds]
    return _Compared((times[0], times[1]), same_labels, same_exits, (left[0], left[1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what onnxruntime's quantiser tells the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
