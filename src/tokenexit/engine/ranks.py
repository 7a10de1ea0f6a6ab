"""Rows of a packed tensor are ranked within their group by a score."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_rows(group: Tensor, score: Tensor, descending: bool) -> Tensor:
    """Sort rows by group, within it by score, ties by row: `(P,)` int64, the rows in that order.

    group: `(P,)` int64, none negative. All operations can be exported, and none synchronises with the host.
    """
    by_score = torch.sort(score, descending=descending, stable=True).indices
    # No two keys are equal, since some runtimes do not sort stably.
    key = group[by_score] * group.shape[0] + torch.arange(group.shape[0], device=group.device)
    return by_score[torch.sort(key).indices]


def rank(group: Tensor, score: Tensor, descending: bool) -> Tensor:
    """Rank every row within its group by score, ties by row: `(P,)` int64, 0 is first; see `sorted_rows`."""
    order = sorted_rows(group, score, descending)
    ordered = group[order]
    run = (ordered.diff(prepend=ordered.new_full((1,), -1)) != 0).cumsum(0) - 1  # every group is contiguous now
    length = torch.zeros_like(run).scatter_add(0, run, torch.ones_like(run))
    start = length.cumsum(0) - length
    place = torch.arange(group.shape[0], device=group.device) - start.index_select(0, run)
    return torch.empty_like(place).index_copy(0, order, place)


def among_first(group: Tensor, score: Tensor, k: int) -> Tensor:
    """Return which rows are among the k highest scores of their group, ties by lowest row: `(P,)` bool.

    In sorted order, a row is if the one k places before it is of another group. k: at least 1.
    """
    order = sorted_rows(group, score, descending=True)
    ordered = group[order]
    before = torch.cat([ordered.new_full((k,), -1), ordered]).narrow(0, 0, ordered.shape[0])
    first = ordered != before
    return torch.empty_like(first).index_copy(0, order, first)
