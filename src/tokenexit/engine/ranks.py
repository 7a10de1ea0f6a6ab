"""Rows of a packed tensor are ranked within their group by a score."""

from __future__ import annotations

import torch
from torch import Tensor


def rank(group: Tensor, score: Tensor, descending: bool) -> Tensor:
    """Rank every row within its group by score, ties by row: `(P,)` int64, 0 is first.

    group: `(P,)` int64, none negative. All operations can be exported, and none synchronises with the host.
    """
    row = torch.arange(group.shape[0], device=group.device)
    by_score = torch.sort(score, descending=descending, stable=True).indices
    # No two keys are equal, since some runtimes do not sort stably.
    order = by_score[torch.sort(group[by_score] * group.shape[0] + row).indices]
    ordered = group[order]
    run = (ordered.diff(prepend=ordered.new_full((1,), -1)) != 0).cumsum(0) - 1  # every group is contiguous now
    length = torch.zeros_like(run).scatter_add(0, run, torch.ones_like(run))
    start = length.cumsum(0) - length
    place = row - start.index_select(0, run)
    return torch.empty_like(place).index_copy(0, order, place)
