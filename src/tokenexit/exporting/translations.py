"""Operations that torch's ONNX exporter does not know yet, or writes in a form on which runtimes disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20

op: Any = opset20  # its annotations know tensors, and it takes numbers, too


def _sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Sort one dimension stably: TopK of all elements, which breaks ties by the lower index."""
    count = op.Shape(self)
    return op.TopK(self, count, axis=0, largest=int(descending), sorted=1)


def _max_with_index(self: Any, dim: int, keepdim: bool = False) -> Any:
    """Return the largest values along `dim` and their indices.

    It is not ReduceMax, whose shape onnxruntime's `quant_pre_process` cannot infer where axes are an input.
    """
    index = op.ArgMax(self, axis=dim, keepdims=1)
    values = op.GatherElements(self, index, axis=dim)
    return (values, index) if keepdim else (op.Squeeze(values, [dim]), op.Squeeze(index, [dim]))


def _max(self: Any, dim: Sequence[int], keepdim: bool = False) -> Any:
    """Return the largest values along one dimension or several."""
    if len(dim) != 1:
        return op.ReduceMax(self, list(dim) or None, keepdims=int(keepdim))
    return _max_with_index(self, dim[0], keepdim)[0]


def _bmm(self: Any, mat2: Any) -> Any:
    """Return the product `(B, m, k) (B, k, n)`, by matrices where B is 1: weights of rank 3 break per-channel INT8."""
    if mat2.shape is None or mat2.shape[0] != 1:
        return op.MatMul(self, mat2)
    return op.Unsqueeze(op.MatMul(op.Squeeze(self, [0]), op.Squeeze(mat2, [0])), [0])


def _bicubic_antialiased(
    self: Any, output_size: Any, align_corners: bool, scales_h: float | None = None, scales_w: float | None = None
) -> Any:
    """Resize `(1, C, h, w)` by two matrix products, since OpenVINO ignores Resize's `antialias`."""
    rows = _cubic_weights(op.Shape(self, start=2, end=3), op.Slice(output_size, [0], [1]), scales_h)
    columns = _cubic_weights(op.Shape(self, start=3, end=4), op.Slice(output_size, [1], [2]), scales_w)
    # The table comes first: as a second factor quantisers would take it for weights, and it is too fine for INT8.
    return op.MatMul(rows, op.MatMul(self, op.Transpose(columns, perm=[1, 0])))


def _cubic_weights(old: Any, new: Any, factor: float | None) -> Any:
    """Return the share of every old row in every new one, `(new, old)`: Keys' cubic, a = -1/2, widened in shrinking."""
    old_count, new_count = (op.Cast(count, to=1) for count in (old, new))
    scale = op.Div(old_count, new_count) if factor is None else op.Constant(value_floats=[1 / factor])
    centre = op.Mul(op.Add(_range(new), 0.5), scale)
    apart = op.Sub(op.Unsqueeze(op.Add(_range(old), 0.5), [0]), op.Unsqueeze(centre, [1]))
    widened = op.Where(op.Less(scale, 1.0), 1.0, scale)  # no Max: onnxruntime's float16 converter fails on two of one
    x = op.Abs(op.Div(apart, widened))
    near = op.Add(op.Mul(op.Mul(op.Sub(op.Mul(x, 1.5), 2.5), x), x), 1.0)
    far = op.Mul(op.Sub(op.Mul(op.Add(op.Mul(op.Sub(x, 5.0), x), 8.0), x), 4.0), -0.5)
    weights = op.Where(op.Less(x, 1.0), near, op.Where(op.Less(x, 2.0), far, 0.0))
    return op.Div(weights, op.ReduceSum(weights, [1], keepdims=1))


def _range(count: Any) -> Any:
    """Return `0.0, 1.0, ...`, as many as `count (1,)`."""
    return op.Cast(op.Range(0, op.Squeeze(count, [0]), 1), to=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _sort_stable,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.max.dim: _max_with_index,
    torch.ops.aten.amax.default: _max,
    torch.ops.aten._upsample_bicubic2d_aa.default: _bicubic_antialiased,
}
