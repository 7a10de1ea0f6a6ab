"""Assignment against every permutation."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from tokenexit.outputs.matching import assign

Cost = NDArray[np.floating]


def least_cost(cost: Cost) -> float:
    """The least sum over all ways to give every row, or every column, a partner of its own."""
    rows, columns = cost.shape
    if rows > columns:
        return least_cost(cost.T)
    return min(sum(cost[i, j] for i, j in enumerate(chosen)) for chosen in permutations(range(columns), rows))


def costs() -> st.SearchStrategy[Cost]:
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5)
    # Few distinct values make ties, where an augmenting path could go in circles.
    values = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


@given(costs())
def test_assignment__costs_the_least_of_all_permutations(cost: Cost) -> None:
    rows, columns = assign(cost)
    assert cost[rows, columns].sum() == pytest.approx(least_cost(cost), abs=1e-9 * max(1.0, np.abs(cost).max()))
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(cost.shape)
    assert (np.diff(rows) > 0).all()


def test_assignment__without_targets_is_empty() -> None:
    rows, columns = assign(np.zeros((0, 4)))
    assert rows.shape == columns.shape == (0,)
    rows, columns = assign(np.zeros((4, 0)))
    assert rows.shape == columns.shape == (0,)


def test_costs_that_are_no_numbers__are_assigned_last() -> None:
    cost = np.array([[np.nan, 1.0, 5.0], [2.0, np.inf, 9.0]])
    assert [axis.tolist() for axis in assign(cost)] == [[0, 1], [1, 0]]
