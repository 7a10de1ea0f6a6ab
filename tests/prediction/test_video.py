"""Videos in and out; without PyAV, a sentence."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenexit.errors import DataError
from tokenexit.prediction.video import encoder, frames, rate_of


def shade(level: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def levels(path: Path) -> list[float]:
    return [float(np.asarray(load()).mean()) for load in frames(path)]


def test_video__frames_come_back_in_order_at_their_rate(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    with encoder(path, Fraction(30000, 1001)) as add:
        for n in range(9):
            add(shade(20 + 25 * n))
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]
    assert rate_of(path) == Fraction(30000, 1001)
    assert levels(path) == pytest.approx([20 + 25 * n for n in range(9)], abs=6)


@pytest.mark.parametrize(("size", "even"), [((33, 21), (32, 20)), ((1, 1), (2, 2))])
def test_video__odd_sides_lose_a_pixel(size: tuple[int, int], even: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("av")
    with encoder(tmp_path / "v.mp4", Fraction(25)) as add:
        add(shade(100, size))
    (frame,) = (load() for load in frames(tmp_path / "v.mp4"))
    assert frame.size == even


def test_video__frames_of_two_sizes_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    words = r"^a frame of 16x16 pixels follows one of 32x48 in v\.mp4: frames of a video have one size\.$"
    with pytest.raises(DataError, match=words), encoder(tmp_path / "v.mp4", Fraction(25)) as add:
        add(shade(1))
        add(shade(2, (16, 16)))
    assert list(tmp_path.iterdir()) == []


def test_video__a_damaged_or_missing_one_is_said_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(DataError, match=r"^video '.*nope\.mp4' does not exist: check the path\.$"):
        list(frames(tmp_path / "nope.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"^video '.*text\.mp4' cannot be read \(.*\): check that it is an undamaged"):
        list(frames(tmp_path / "text.mp4"))


def test_video__images_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with encoder(tmp_path / "v.mp4", Fraction(25)) as add:
        add(shade(100))
    (load,) = frames(tmp_path / "v.mp4", max_pixels=100)
    with pytest.raises(DataError, match="has 32x48 pixels, more than max_pixels=100"):
        load()


def test_video__without_pyav_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "v.mp4").write_bytes(b"")
    words = r"^video '.*v\.mp4' needs the package av: pip install 'tokenexit\[video\]', or give its frames\.$"
    with pytest.raises(DataError, match=words):
        list(frames(tmp_path / "v.mp4"))
    words = r"^o\.mp4 needs the package av: .*, or save overlays\.$"
    with pytest.raises(DataError, match=words), encoder(tmp_path / "o.mp4", Fraction(25)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
