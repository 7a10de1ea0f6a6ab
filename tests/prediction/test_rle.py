"""Run lengths in COCO's layout, by hand, against a reader written from the format, and for any map."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tokenexit.prediction.rle import compressed, run_lengths

MAPS = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3))


def read(text: str) -> list[int]:
    """Run lengths from COCO's text: six bits to a character, the last of a number with its sign."""
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def painted(counts: list[int], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(size, order="F")


def test_run_lengths__go_down_the_columns_and_begin_with_background() -> None:
    labels = [[0, 1, 1], [0, 1, 2]]  # columns: 00, 11, 12
    assert run_lengths(labels) == {0: [0, 2, 4], 1: [2, 3, 1], 2: [5, 1]}


def test_run_lengths__of_one_class_everywhere() -> None:
    assert run_lengths(np.full((3, 4), 7)) == {7: [0, 12]}


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([2, 3, 1], "231"),  # small numbers are their own digits
        ([0, 12], "0<"),
        ([1, 15, 16], "1?`0"),  # 16 needs a second character: its fifth bit would be the sign
        ([5, 100, 5, 100], "5T350"),  # the fourth is a difference to the second: none
        ([5, 100, 5, 98, 2], "5T35NM"),  # differences of -2 and -3
    ],
)
def test_compressed__is_what_coco_tools_write(counts: list[int], text: str) -> None:
    assert compressed(counts) == text


def test_compressed__of_a_square_with_a_hole_as_pycocotools_wrote_it() -> None:
    mask = np.zeros((100, 100), dtype=np.int64)
    mask[10:60, 20:70] = 1
    mask[30:40, 30:40] = 0
    text = (
        "jn1b1b1000000000000000000ROhN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0X10hN0X1n"
        "00000000000000000000000000000000000000000000000000000000000^m2"
    )
    assert compressed(run_lengths(mask)[1]) == text


@given(MAPS)
def test_run_lengths__give_the_map_back(labels: npt.NDArray[np.int64]) -> None:
    found = run_lengths(labels)
    assert sorted(found) == sorted(set(labels.ravel().tolist()))
    for k, counts in found.items():
        assert read(compressed(counts)) == counts
        np.testing.assert_array_equal(painted(counts, labels.shape), labels == k)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=9))
def test_compressed__holds_numbers_of_any_size(counts: list[int]) -> None:
    assert read(compressed(counts)) == counts
