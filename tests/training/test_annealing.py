"""How mask attention fades over a run."""

from __future__ import annotations

import pytest

from tokenexit.errors import ConfigError
from tokenexit.training.annealing import fades, mask_share, mask_shares
from tokenexit.training.config import MaskConfig


@pytest.mark.parametrize(
    ("steps", "published"),
    [
        (39120, [(6520, 13040), (13040, 19560), (19560, 26080), (26080, 32600)]),
        (19902, [(3317, 6634), (6634, 9951), (9951, 13268), (13268, 16585)]),
    ],
    ids=["ade20k", "cityscapes"],
)
def test_fades__are_the_published_ones_for_four_joint_blocks(steps: int, published: list[tuple[int, int]]) -> None:
    assert fades(MaskConfig(), 4, steps) == published


def test_share__is_one_before_and_zero_after_and_falls_with_the_power_of_the_release() -> None:
    found = [mask_share(step, 10, 20) for step in (0, 10, 15, 19, 20, 99)]
    assert found == pytest.approx([1.0, 1.0, 0.5**0.9, 0.1**0.9, 0.0, 0.0])
    assert mask_share(0, 0, 0) == 0.0
    assert [mask_share(step, 5, 5) for step in (4, 5)] == [1.0, 0.0]


def test_shares__fade_in_turn_the_first_block_first() -> None:
    config = MaskConfig(fade_start=[0, 10], fade_end=[10, 20])
    assert mask_shares(config, 2, 5, 20) == pytest.approx((0.5**0.9, 1.0))
    assert mask_shares(config, 2, 15, 20) == pytest.approx((0.0, 0.5**0.9))
    assert mask_shares(MaskConfig(fade_start=[], fade_end=[]), 2, 0, 20) == ()


def test_steps_that_do_not_fit__are_refused() -> None:
    with pytest.raises(ConfigError, match=r"masks.fade_start must have 3 steps"):
        fades(MaskConfig(fade_start=[1, 2], fade_end=[2, 3]), 3, 10)
    with pytest.raises(ConfigError, match="go together"):
        MaskConfig(fade_start=[1])
    with pytest.raises(ConfigError, match="must not be before"):
        MaskConfig(fade_start=[5], fade_end=[4])
    with pytest.raises(ConfigError, match="give one of each"):
        MaskConfig(fade_start=[5], fade_end=[6, 7])
