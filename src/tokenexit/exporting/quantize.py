"""An exported ONNX file is written once more with INT8 weights, and compared with the first one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting.export import Answers, open_onnx
from tokenexit.runtime.atomic import atomic_write

FILE = "model.int8.onnx"
AGREEMENT = 0.9
"""At least this share of labels, and of exits, must be the float file's, if nothing else is asked for."""
REPEATS = 3


@dataclass(frozen=True)
class Quantized:
    """A file with INT8 weights, and how it compares with the float one, which is named first in pairs.

    Attributes:
        path: the file.
        megabytes: sizes of both files.
        milliseconds: time of an image in both, median of the runs in onnxruntime.
        same_labels: share of pixels with the float file's class.
        same_exits: share of tokens that leave where they leave in the float file.
        left: share of tokens that leave at an exit, in both.
    """

    path: Path
    megabytes: tuple[float, float]
    milliseconds: tuple[float, float]
    same_labels: float
    same_exits: float
    left: tuple[float, float]


def quantize_int8(path: Path, images: Sequence[Tensor], agreement: float = AGREEMENT) -> Quantized:
    """Write `model.int8.onnx` beside the exported file `path`, with weights in INT8 by channel.

    Ranges of activations are taken as they come (onnxruntime's `quantize_dynamic`). Exit heads stay in fp32, and so do
    softmax, scores and their comparison with thresholds. Both files run on `images` at the thresholds of the metadata.

    Args:
        path: a file of `export_model`.
        images: `(3, H, W)` fp32 each, as `Preprocessing` makes them.
        agreement: least share of equal labels, and of equal exits, in [0, 1].

    Raises:
        ConfigError: for an agreement outside [0, 1], and without images.
        CheckpointError: if fewer labels or exits agree; no INT8 file is written.
    """
    check_agreement(agreement)
    if not images:
        raise ConfigError("there is no image to compare the INT8 file with the float one on: give one.")
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(path)
    in_float = exit_head_nodes(model)
    in_float += [f"{name}_MatMul" for name in in_float]  # what the quantiser makes of each Gemm before it looks
    about = {entry.key: entry.value for entry in model.metadata_props}
    thresholds = np.array(json.loads(about["tokenexit"])["thresholds"], np.float32)
    with atomic_write(path.with_name(FILE)) as unfinished:
        with _quiet():
            quantize_dynamic(model, unfinished, per_channel=True, nodes_to_exclude=in_float)
        found = _compare(path, unfinished, images, thresholds)
        if min(found.same_labels, found.same_exits) < agreement:
            raise CheckpointError(
                f"{found.same_labels:.1%} of the labels and {found.same_exits:.1%} of the exits of the INT8 file are "
                f"those of {path.name}, and {agreement:.1%} are asked for: no INT8 file was written; lower agreement "
                "to accept it."
            )
    return replace(found, path=path.with_name(FILE))


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


def _compare(
    float_file: Path, int8_file: Path, images: Sequence[Tensor], thresholds: npt.NDArray[np.float32]
) -> Quantized:
    """Run both files in turn, so that a busy machine slows both."""
    runs = [open_onnx(file) for file in (float_file, int8_file)]
    answers: list[list[Answers]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for image in images:
        for repeat in range(REPEATS):
            for which, run in enumerate(runs):
                start = time.perf_counter()
                answer = run(image[None].numpy(), thresholds)
                seconds[which].append(time.perf_counter() - start)
                if repeat == 0:
                    answers[which].append(answer)
    exits = len(thresholds)
    left = [float(np.concatenate([(one[2] < exits).ravel() for one in ours]).mean()) for ours in answers]
    same_labels, same_exits = (
        float(np.concatenate([(one[i] == other[i]).ravel() for one, other in zip(*answers)]).mean()) for i in (0, 2)
    )
    sizes = [file.stat().st_size / 1e6 for file in (float_file, int8_file)]
    times = [float(np.median(one)) * 1e3 for one in seconds]
    return Quantized(int8_file, (sizes[0], sizes[1]), (times[0], times[1]), same_labels, same_exits, (left[0], left[1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what onnxruntime's quantiser tells the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
