"""Which photos can be used, and how they are shared out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenexit.adaptation.photos import FEWEST, MOST_TEST, split_photos, usable_photos
from tokenexit.calibration.targets import Bound, Budget
from tokenexit.errors import ConfigError

HALF = Budget("budget", 0.5)


@given(st.integers(5, 2000), st.integers(0, 2**31), st.sampled_from([None, 0.1, 0.02, 0.01]))
def test_split__is_disjoint_and_whole_with_something_in_every_part(count: int, seed: int, bound: float | None) -> None:
    target = HALF if bound is None else Bound("max_disagreement", bound)
    if isinstance(target, Bound) and count < 2 * target.needed_images():
        return
    split = split_photos(count, target, seed, fewest=5)
    assert sorted((*split.fit, *split.choose, *split.test)) == list(range(count))
    assert min(map(len, (split.fit, split.choose, split.test))) >= 1
    if isinstance(target, Bound):
        assert len(split.test) >= target.needed_images()
    assert split == split_photos(count, target, seed, fewest=5)


def test_split__follows_the_seed_and_says_its_parts() -> None:
    split = split_photos(100, HALF, 0)
    assert split != split_photos(100, HALF, 1)
    assert str(split) == "60 to fit exit heads, 20 to choose, 20 to test"


def test_split__of_too_few_names_the_number_that_is_needed() -> None:
    with pytest.raises(ConfigError, match=f"at least {FEWEST} photos, got 59; give more"):
        split_photos(FEWEST - 1, HALF, 0)
    split_photos(FEWEST, HALF, 0)


@pytest.mark.parametrize("value", [0.05, 0.02, 0.013, 0.01])
def test_split__for_a_bound_needs_exactly_what_its_test_takes(value: float) -> None:
    target = Bound("max_disagreement", value)
    needed = max(FEWEST, 2 * target.needed_images())
    with pytest.raises(ConfigError, match=f"at least {needed} photos, got {needed - 1}: max_disagreement={value:g} at"):
        split_photos(needed - 1, target, 0)
    split = split_photos(needed, target, 0)
    assert len(split.test) == MOST_TEST * needed
    assert len(split_photos(20 * needed, target, 0).test) == 0.2 * 20 * needed  # many photos: the usual share


def test_usable__leaves_out_what_cannot_be_used_with_a_line_each(tmp_path: Path) -> None:
    for name, size in (("a", (8, 4)), ("b", (3, 40)), ("d", (4, 4))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "e.jpg").write_text("no image")
    lines: list[str] = []
    paths = sorted(tmp_path.iterdir())
    found = usable_photos(paths, 4, 10, 0, lines.append)
    assert [path.name for path in found] == ["a.png", "d.png"]
    assert len(lines) == 3
    assert all(line.startswith("left out: ") and "\n" not in line for line in lines)
    assert "b.png has 3x40 pixels, fewer than a patch of 4" in lines[0]


def test_usable__decodes_no_more_photos_than_are_drawn(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    seen: list[Any] = []

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            seen.append(item)
            yield item

    paths = sorted(tmp_path.iterdir())
    found = usable_photos(paths, 4, 6, 3, print, counted)
    assert len(seen) == len(found) == 6
    assert found == sorted(found)
    assert found == usable_photos(paths, 4, 6, 3, print)
    assert found != usable_photos(paths, 4, 6, 4, print)
    assert usable_photos(paths, 4, 20, 3, print) == paths
