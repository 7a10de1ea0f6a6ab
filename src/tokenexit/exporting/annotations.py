"""Shapes in an ONNX file: names for people at its inputs and outputs, and none between them."""

from __future__ import annotations

from pathlib import Path

import onnx

DIMENSIONS = {
    "image": ("height", "width"),
    "labels": ("height", "width"),
    "grid_logits": ("logits_height", "logits_width"),
    "exit_stage": ("grid_height", "grid_width"),
}
"""Names of the last two dimensions: pixels, the decode head's grid, and patches."""


def annotate(path: Path) -> None:
    """Name the open dimensions of a file's inputs and outputs, and drop the shapes of all values between them.

    Quantisers, simplifiers and converters replace weights and operations, keep the shapes that are written beside
    them, and fail where the two differ: without any, they infer what they need.
    """
    model = onnx.load(path, format="protobuf", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        names = DIMENSIONS.get(value.name, ())
        for dimension, name in zip(value.type.tensor_type.shape.dim[-2:], names):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = name
    del model.graph.value_info[:]
    onnx.save(model, path, format="protobuf")
