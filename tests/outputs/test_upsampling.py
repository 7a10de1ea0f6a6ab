"""Classes at full size: what interpolation and argmax say, found without interpolating everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenexit.outputs import upsampling
from tokenexit.outputs.upsampling import can_skip, labels_of_grid


def interpolated(maps: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """The oracle, in fp64."""
    full = F.interpolate(maps.double()[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    return full[:, : size[0], : size[1]]


def smooth(classes: int, h: int, w: int, seed: int) -> Tensor:
    """Logits with regions, as images have: some cells agree with their neighbours and some do not."""
    coarse = torch.randn(1, classes, 2, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse * 4, size=(h, w), mode="bicubic")[0]


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4, 14, 16]), st.integers(0, 99))
def test_labels_of_grid__are_the_highest_of_interpolated_logits(k: int, h: int, w: int, patch: int, seed: int) -> None:
    for maps in (smooth(k, h, w, seed), torch.randn(k, h, w, generator=torch.Generator().manual_seed(seed))):
        size = (h * patch - seed % patch, w * patch - seed % 3 % patch)
        labels, values = labels_of_grid(maps, patch, size), interpolated(maps, patch, size)
        assert labels.shape == size
        lost = values.amax(0) - values.gather(0, labels[None])[0]
        assert lost.max() < 1e-5, "the class named is the highest, but for rounding"


def test_labels_of_grid__interpolate_only_where_corners_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.zeros(3, 6, 6)
    maps[0] = 1.0
    maps[2, :, 3:] = 2.0
    seen = []
    product = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.shape)
        return product(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    labels = labels_of_grid(maps, 4, (24, 24))
    assert [shape[0] for shape in seen] == [7], "one column of squares, from top to bottom"
    assert torch.equal(labels, interpolated(maps, 4, (24, 24)).argmax(0))


def test_labels_of_grid__give_ties_to_the_lower_class_and_take_half_precision() -> None:
    maps = torch.ones(3, 4, 4, dtype=torch.bfloat16)
    assert labels_of_grid(maps, 16, (64, 60)).unique().tolist() == [0]
    with torch.autocast("cpu", torch.bfloat16):
        maps = smooth(5, 8, 8, 3)
        assert torch.equal(labels_of_grid(maps, 16, (128, 128)), interpolated(maps, 16, (128, 128)).argmax(0))


def test_labels_of_grid__are_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = smooth(6, 9, 7, 5)
    whole = labels_of_grid(maps, 8, (72, 56))
    monkeypatch.setattr(upsampling, "TILE_ELEMENTS", 1)
    assert torch.equal(labels_of_grid(maps, 8, (72, 56)), whole)


@pytest.mark.parametrize(
    ("patch", "target", "upscale", "can"),
    [
        (16, (8, 8), 1, True),
        (14, (8, 8), 1, True),
        (7, (8, 8), 1, False),
        (16, (9, 8), 1, False),
        (16, (8, 8), 4, False),
    ],
)
def test_can_skip__is_for_one_even_step(patch: int, target: tuple[int, int], upscale: int, can: bool) -> None:
    assert can_skip(patch, (8, 8), target, upscale) is can
