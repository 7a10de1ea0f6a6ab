"""Buckets cost as little as any others would, and their padding is counted in multiply-adds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import random_image, tiny_segmenter
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import ConfigError
from tokenexit.exporting.buckets import best_buckets, choose_buckets, smallest
from tokenexit.methods import DoViT, DToP


def cost(count: int) -> int:
    """Like attention's: more than linear."""
    return 100 * count + count * count


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 5))
def test_best_buckets__cost_as_little_as_any_aligned_ones(counts: list[int], most: int, prefix: int) -> None:
    chosen = best_buckets(counts, most, 60, cost, prefix)
    assert chosen[-1] == 60
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) <= most
    assert all((bucket + prefix) % 8 == 0 or bucket in (60, 1) for bucket in chosen)
    aligned = [bucket for bucket in range(1, 60) if (bucket + prefix) % 8 == 0]

    def total(buckets: tuple[int, ...]) -> int:
        return sum(cost(smallest(buckets, count)) for count in counts)

    every = [(*some, 60) for number in range(most) for some in combinations(aligned, number)]
    assert total(chosen) <= min(map(total, every))


def test_choose_buckets__counts_the_multiply_adds_of_padding() -> None:
    model, image = tiny_segmenter("fcn"), random_image(24, 32)
    methods: list[tuple[Any, bool]] = [(DToP(0.6, 2), False), (DoViT(0.6), True)]
    for method, on_grid in methods:
        found = choose_buckets(model, method, (6, 8), [image], asked=[[20], [9]])
        assert found.tokens == ((20, 48), (9, 48))
        assert found.source == "live tokens of 1 image"
        with torch.no_grad():
            ledger = model([image], method).ledger
        first, second = ledger.live_after((1, 3))
        assert first > second, "some leave at each exit"
        held = [next(b for b in own if b >= live) for own, live in zip(found.tokens, (first, second))]
        block, head, own = model.backbone.block_ops, model.exit_heads[0].ops, ledger.macs[0]
        more = 0
        for bucket, live, blocks in zip(held, (first, second), (2, 1)):
            more += (block(1 + bucket).macs - block(1 + live).macs) * blocks
            more += 0 if on_grid else head(bucket, (6, 8)).macs - head(live, (6, 8)).macs
        assert more > 0
        assert found.waste == pytest.approx(more / own)


def test_choose_buckets__follow_images_else_the_calibration_else_nothing() -> None:
    model, method = tiny_segmenter("fcn"), DToP(0.6, 2)
    images = [random_image(48, 64, seed) for seed in range(3)]
    measured = choose_buckets(model, method, (12, 16), images, count=3)
    even = choose_buckets(model, method, (12, 16), count=4)
    assert even.source == "no images and no calibration: all counts equally likely"
    for bucket, quarter in zip(even.tokens[0], (48, 96, 144, 192)):
        assert abs(bucket - quarter) <= 16, "an even split"
    assert measured.waste < even.waste
    model.calibration = Calibration(method={"name": "dtop"}, reached={"live_after_exit": [0.3, 0.1]})
    calibrated = choose_buckets(model, method, (12, 16))
    assert calibrated.source == "mean shares of the calibration"
    assert calibrated.tokens[0][:-1] < (0.6 * 192 + 16,) * 3
    assert calibrated.tokens[1][1] <= 1.3 * 0.2 * 192 + 8
    quantiles = [[0.3, 0.35, 0.4], [0.1, 0.2, 0.2]]
    reached = {"live_after_exit": [0.35, 0.2], "live_after_exit_quantiles": quantiles}
    model.calibration = Calibration(method={"name": "dtop"}, reached=reached)
    exact = choose_buckets(model, method, (12, 16))
    assert exact.source == "live tokens of the calibration's images"
    assert 0.7 * 0.3 * 192 <= exact.tokens[0][0] < exact.tokens[0][1] <= 1.3 * 0.4 * 192 + 8
    assert exact.tokens[1][0] <= 0.2 * 192 + 8
    assert exact.waste < calibrated.waste
    assert choose_buckets(model, DoViT(), (12, 16)).source == even.source, "it is another method's"
    assert choose_buckets(model, DToP(0.6, 2, stop=1), (12, 16)).tokens == ()


def test_choose_buckets__leave_room_for_other_images_than_those_that_were_counted() -> None:
    model = tiny_segmenter("fcn")
    alike = {"live_after_exit_quantiles": [[0.5] * 21, [0.2] * 21]}  # as of the images of one video
    model.calibration = Calibration(method={"name": "dtop"}, reached=alike)
    found = choose_buckets(model, DToP(0.6, 2), (24, 32))
    for held, share in zip(found.tokens, (0.5, 0.2)):
        for factor in (0.8, 1.0, 1.25):
            count = round(share * factor * 768)
            assert count <= smallest(held, count) <= 1.4 * count + 8


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"asked": [[0, 5]]}, "from 1 to 48, got 0"),
        ({"asked": [[49]]}, "from 1 to 48, got 49"),
        ({"asked": [[5], [6], [7]]}, "has 3 lists for 2 exits that go on"),
        ({"count": 0}, "must be at least 1, got 0"),
    ],
)
def test_choose_buckets__refuses_what_cannot_be(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_buckets(tiny_segmenter(), DToP(), (6, 8), **asked)
