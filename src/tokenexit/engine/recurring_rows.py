"""Numbers of rows that recur, for products in bf16 or fp16 on a CPU.

There torch multiplies with oneDNN, which generates machine code for every shape that it has not met: one to three
milliseconds for each product, longer than the product itself in a small model. Where tokens leave, every photograph
has numbers of its own, so that exits made new photographs slower than none at all did. Rows are therefore padded to
numbers of five significant bits, of which there are few (docs/evidence/performance.md); padding is seen by nobody.

Legend: T live tokens of the batch, C channels, H channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from tokenexit.engine.tokens import FrozenTokens, Packing, PaddedPacking, Tokens

FEWEST = 16
"""All recurring numbers are multiples of it: the rows of a tile."""
SIGNIFICANT = 5
"""Significant bits of a recurring number: at most one row in sixteen is padding above 512 rows."""

ImageRows = tuple[Tensor, Packing, Tensor | None, Tensor | None, FrozenTokens | None]
"""Features, packing, phases, weights and frozen tokens of one image."""


def recurring(rows: int) -> int:
    """Return the next number that recurs, this one or above: for 1,000 rows one of 16 from 512 to 1,024."""
    step = max(FEWEST, 1 << max((rows - 1).bit_length() - SIGNIFICANT, 0))
    return -(-rows // step) * step


def new_numbers_cost(x: Tensor) -> bool:
    """Return whether products with `x` take longer where their number of rows is new: in bf16 and fp16 on a CPU.

    Graphs are made for any number and are left as they are.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


def in_recurring_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply to `x (T, C)` a function of rows that are independent of each other, on a number of rows that recurs."""
    return function(_padded(x))[: len(x)]


def images_in_recurring_rows(tokens: Tokens) -> Iterator[ImageRows]:
    """Yield the rows of each image, padded where their number does not recur."""
    lengths, frozen = tokens.packing.lengths, _of_images(tokens.frozen, len(tokens.grids))
    parts = (_split(rows, lengths) for rows in (tokens.x, tokens.phases, tokens.weight))
    for x, phases, weight, seen in zip(*parts, frozen):
        assert x is not None
        yield _padded(x), _packing(len(x), x.device), _padded(phases), _padded(weight, 1.0), seen


def _of_images(frozen: FrozenTokens | None, images: int) -> list[FrozenTokens | None]:
    """Return the frozen tokens of each image, padded; None for an image without any."""
    if frozen is None:
        return [None] * images
    lengths = frozen.packing.lengths
    return [
        None if not len(x) else FrozenTokens(_padded(x), _packing(len(x), x.device), _padded(phases))
        for x, phases in zip(frozen.x.split(lengths), _split(frozen.phases, lengths))
    ]


def _split(rows: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(lengths) if rows is None else rows.split(lengths)


def _packing(rows: int, device: torch.device) -> Packing:
    """Return the packing of one image with so many rows, padded to a number that recurs."""
    length = recurring(rows)
    if length == rows:
        return Packing.of([rows], device)
    return PaddedPacking((length,), device, torch.arange(length, device=device) < rows)


@overload
def _padded(rows: Tensor, value: float = 0.0) -> Tensor: ...
@overload
def _padded(rows: Tensor | None, value: float = 0.0) -> Tensor | None: ...
def _padded(rows: Tensor | None, value: float = 0.0) -> Tensor | None:
    """Return the rows and behind them as many of this value as make a number that recurs."""
    if rows is None or (more := recurring(len(rows)) - len(rows)) == 0:
        return rows
    return torch.cat([rows, rows.new_full((more, *rows.shape[1:]), value)])
