"""Numbers of rows that recur, where a product takes longer for each new one.

In bf16 and fp16 on a CPU torch multiplies with oneDNN, which generates machine code for every shape that it has not
met: one to three milliseconds for each product, longer than the product itself in a small model. Where tokens leave,
every photograph has numbers of its own, and with exits a new one took longer than without any. Rows are
therefore padded to numbers of five significant bits, of which there are few (docs/evidence/performance.md), and in
graphs for a runtime that does the same, OpenVINO, to a multiple of `Tokens.row_multiple`. Nobody sees the padding.

Legend: T live tokens of the batch, C channels.
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
"""Significant bits of a recurring number: at most one row in sixteen is padding above 256 rows."""

ImageRows = tuple[Tensor, Packing, Tensor | None, Tensor | None, FrozenTokens | None]
"""Features, packing, phases, weights and frozen tokens of one image."""


def recurring(rows: int, multiple: int | None = None) -> int:
    """Return the next number that recurs, this one or above: for 1,000 rows one of 16 from 512 to 1,024.

    multiple: recurring numbers are its multiples, which a graph can compute.
    """
    if multiple is None:
        multiple = max(FEWEST, 1 << max((rows - 1).bit_length() - SIGNIFICANT, 0))
    return (rows + multiple - 1) // multiple * multiple  # graphs divide towards zero: no negative numbers


def pads_rows(tokens: Tokens) -> bool:
    """Return whether products on these tokens are to have numbers of rows that recur."""
    return (tokens.row_multiple is not None or new_numbers_cost(tokens.x)) and tokens.some_left


def new_numbers_cost(x: Tensor) -> bool:
    """Return whether products with `x` take longer where their number of rows is new: in bf16 and fp16 on a CPU."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


def in_recurring_rows(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tensor:
    """Apply to the features `(T, C)` a function of rows that are independent of each other, on rows that recur."""
    x = tokens.x
    return function(_padded(x, tokens.row_multiple))[: x.shape[0]]


def images_in_recurring_rows(tokens: Tokens) -> Iterator[ImageRows]:
    """Yield the rows of each image, padded where their number does not recur."""
    lengths, multiple = tokens.packing.lengths, tokens.row_multiple
    parts = (_split(rows, lengths) for rows in (tokens.x, tokens.phases, tokens.weight))
    for x, phases, weight, frozen in zip(*parts, _frozen_of_images(tokens)):
        assert x is not None
        packing = _packing(x, multiple)
        yield _padded(x, multiple), packing, _padded(phases, multiple), _padded(weight, multiple, 1.0), frozen


def _frozen_of_images(tokens: Tokens) -> list[FrozenTokens | None]:
    """Return the frozen tokens of each image, padded."""
    frozen, multiple = tokens.frozen, tokens.row_multiple
    if frozen is None:
        return [None] * len(tokens.grids)
    lengths = frozen.packing.lengths
    return [
        FrozenTokens(_padded(x, multiple), _packing(x, multiple), _padded(phases, multiple))
        for x, phases in zip(_split(frozen.x, lengths), _split(frozen.phases, lengths))
    ]


@overload
def _split(rows: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]: ...
@overload
def _split(rows: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]: ...
def _split(rows: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    """Return the rows of each image."""
    if rows is None or len(lengths) == 1:
        return [rows] * len(lengths)
    images: tuple[Tensor, ...] = rows.split(list(lengths))
    return images


def _packing(x: Tensor, multiple: int | None) -> Packing:
    """Return the packing of one image whose rows `x` are padded to a number that recurs."""
    rows = x.shape[0]
    length = recurring(rows, multiple)
    if multiple is None and length == rows:
        return Packing.of([rows], x.device)
    return PaddedPacking((length,), x.device, torch.arange(length, device=x.device) < rows)


@overload
def _padded(rows: Tensor, multiple: int | None, value: float = 0.0) -> Tensor: ...
@overload
def _padded(rows: Tensor | None, multiple: int | None, value: float = 0.0) -> Tensor | None: ...
def _padded(rows: Tensor | None, multiple: int | None, value: float = 0.0) -> Tensor | None:
    """Return the rows and behind them as many of this value as make a number that recurs."""
    if rows is None:
        return None
    more = recurring(rows.shape[0], multiple) - rows.shape[0]
    if multiple is None and more == 0:
        return rows
    torch._check(more >= 0)  # a graph cannot know
    return torch.cat([rows, rows.new_full((more, *rows.shape[1:]), value)])
