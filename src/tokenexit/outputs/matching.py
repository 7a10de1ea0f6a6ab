"""Assign predictions to targets at the least total cost (Kuhn, 1955).

Rows are added one after the other, each along the shortest augmenting path with potentials (Jonker and Volgenant,
1987): O(rows^2 columns) on the host, where a row is a mask of the image, so that no other package is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORST = 1e10
"""The cost that stands for NaN and for infinity, which are assigned only where nothing else is left."""


def assign(cost: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign rows to columns, each at most once and as many as there can be, so that the sum of costs is the least.

    Args:
        cost: `(rows, columns)`; NaN and infinite costs count as the worst.

    Returns:
        Row and column of each pair, `(min(rows, columns),)` each, by increasing row.
    """
    finite = np.clip(np.nan_to_num(cost.astype(np.float64), nan=WORST, posinf=WORST, neginf=WORST), -WORST, WORST)
    if finite.shape[0] > finite.shape[1]:
        columns, rows = np.arange(finite.shape[1]), _columns_of_rows(finite.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    return np.arange(finite.shape[0]), _columns_of_rows(finite)


def _columns_of_rows(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the column of every row; there are at least as many columns as rows."""
    rows, columns = cost.shape
    row_of = np.full(columns, -1, dtype=np.int64)
    by_row, by_column = np.zeros(rows), np.zeros(columns)  # potentials: cost - by_row - by_column >= 0, = 0 if assigned
    for added in range(rows):
        distance = np.full(columns, np.inf)
        before = np.full(columns, -1, dtype=np.int64)  # the column in front of each on its shortest path
        reached = np.zeros(columns, dtype=bool)
        row, column, length = added, -1, 0.0
        while True:
            through = length + cost[row] - by_row[row] - by_column
            shorter = ~reached & (through < distance)
            distance[shorter], before[shorter] = through[shorter], column
            column = int(np.where(reached, np.inf, distance).argmin())
            length, row = float(distance[column]), int(row_of[column])
            reached[column] = True
            if row < 0:
                break
        inner = reached & (row_of >= 0)
        by_row[row_of[inner]] += length - distance[inner]
        by_column[reached] += distance[reached] - length
        by_row[added] += length
        while before[column] >= 0:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
        row_of[column] = added
    assigned = np.flatnonzero(row_of >= 0)
    column_of = np.empty(rows, dtype=np.int64)
    column_of[row_of[assigned]] = assigned
    return column_of
