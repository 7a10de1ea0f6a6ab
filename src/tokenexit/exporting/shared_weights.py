"""Several ONNX files keep their weights in one file beside them, each value once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx

WEIGHTS = "weights.bin"
LARGE = 1024
"""Bytes from which a tensor moves; smaller ones are mostly shapes, which tools want in the file itself."""
ALIGNED = 4096
"""Bytes; where a tensor begins at a page, runtimes may map it."""


def share_weights(paths: Iterable[Path]) -> None:
    """Move the large tensors of ONNX files in one folder to `weights.bin` in it (ONNX's external data).

    Buckets of a stage then cost little more than their graphs.
    """
    places: dict[bytes, tuple[int, int]] = {}
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        with (path.parent / WEIGHTS).open("ab") as file:
            for tensor in model.graph.initializer:
                data = tensor.raw_data
                if len(data) < LARGE:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in places:
                    file.write(bytes(-file.tell() % ALIGNED))
                    places[digest] = (file.tell(), len(data))
                    file.write(data)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                entries = zip(("location", "offset", "length"), (WEIGHTS, *map(str, places[digest])))
                for key, value in entries:
                    tensor.external_data.add(key=key, value=value)
        onnx.save(model, path)
