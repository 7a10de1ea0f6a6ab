"""An exported ONNX file is run by OpenVINO, and written for it with INT8 weights and activations by NNCF.

OpenVINO reads files of `export_model` as they are. An INT8 model is in its own format, two files: a graph (.xml) with
what the file says of itself under `tokenexit` of its runtime information, and weights (.bin).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tokenexit.errors import ConfigError
from tokenexit.exporting.export import Answers, Runner
from tokenexit.exporting.graph import OUTPUTS

FILES = ("model.int8.xml", "model.int8.bin")
PAD_ROWS = 32
"""A good `pad_rows` of `export_model` for OpenVINO, which generates code for each number of rows."""


def open_openvino(graph: Path, weights: Path | None = None, *, precision: Literal["f32", "bf16"] = "f32") -> Runner:
    """Return a function that runs a file in OpenVINO on as many threads as torch has.

    Args:
        graph: an exported ONNX file, or the graph of an INT8 model.
        weights: the weights of an INT8 model.
        precision: of what is not INT8. On some processors OpenVINO takes bf16 by itself, scores of exits included.

    Raises:
        ConfigError: where OpenVINO is not installed.
    """
    import torch

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = _core().compile_model(_read(graph, weights), "CPU", settings)

    def run(image: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32]) -> Answers:
        found = compiled({"image": image, "thresholds": thresholds})
        labels, logits, exit_index = (np.array(found[name]) for name in OUTPUTS)
        return labels, logits, exit_index

    return run


def write_openvino(
    path: Path,
    out: Sequence[Path],
    asked: Sequence[dict[str, npt.NDArray[np.float32]]],
    in_float: Sequence[str],
    about: dict[str, Any],
) -> None:
    """Quantise an exported ONNX file after its ranges of activations (`nncf.quantize`, transformer scheme).

    Args:
        path: the ONNX file.
        out: graph and weights.
        asked: inputs that the ranges are taken from.
        in_float: names of ONNX nodes that stay in fp32.
        about: what the file says of itself.

    Raises:
        ConfigError: where OpenVINO or NNCF is not installed.
    """
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    with _quiet():
        made = nncf.quantize(
            _read(path),
            nncf.Dataset(asked),
            subset_size=len(asked),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(
                patterns=[rf"{re.escape(name)}(/.*)?" for name in in_float], validate=False
            ),
        )
    _save(made, out, about)


def metadata_of_graph(graph: Path, weights: Path) -> dict[str, Any]:
    """Return what an INT8 model says of itself."""
    about: dict[str, Any] = json.loads(_read(graph, weights).get_rt_info(["tokenexit"]).astype(str))
    return about


def set_metadata(out: Sequence[Path], about: dict[str, Any]) -> None:
    """Change what an INT8 model says of itself."""
    _save(_read(*out), out, about)


def _save(model: Any, out: Sequence[Path], about: dict[str, Any]) -> None:
    import openvino

    model.set_rt_info(json.dumps(about), ["tokenexit"])
    graph, weights = out
    openvino.serialize(model, graph, weights)


def _read(graph: Path, weights: Path | None = None) -> Any:
    core = _core()
    core.set_property({"ENABLE_MMAP": False})  # so that the files may be written again
    return core.read_model(graph) if weights is None else core.read_model(graph, weights)


def _core() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return openvino.Core()


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f"INT8 for OpenVINO needs the package {error.name}: pip install 'tokenexit[openvino]'.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what NNCF notes beside its progress bars."""
    import nncf

    logger, before = logging.getLogger("nncf"), logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
