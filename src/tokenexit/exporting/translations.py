"""Operations that the ONNX exporter of torch does not know yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op


def _sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort of one dimension: TopK of all elements, which breaks ties by the lower index."""
    count = op.Shape(self)
    return op.TopK(self, count, axis=0, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: _sort_stable}
