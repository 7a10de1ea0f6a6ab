"""HEIC images where pillow-heif is installed, and a sentence where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_segmenter
from tokenexit.errors import DataError
from tokenexit.inputs.heic import load_heic
from tokenexit.methods import Dense
from tokenexit.prediction.predict_files import Predicted, predict_files


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A dark-to-bright image of 24x40 pixels in the folder `in`."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    path = tmp_path / "in" / "a.HEIC"
    path.parent.mkdir()
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (24, 40, 3)).copy()).save(path, format="HEIF", quality=95)
    return path


def test_heic__is_read_as_an_rgb_image(photo: Path) -> None:
    image = load_heic(photo)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(image)[12, :, 1].astype(int) - np.linspace(0, 255, 40)).max() < 10


def test_heic__is_found_in_folders_and_predicted(photo: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = predict_files(tiny_segmenter("fcn"), [photo.parent], tmp_path / "out", Dense(), say=said.append)
    assert (done, said) == (Predicted(1, 0, ()), [])
    assert Image.open(tmp_path / "out" / "a.png").size == (40, 24)


def test_heic__damaged_missing_large_and_foreign_files_end_in_one_sentence(photo: Path) -> None:
    with pytest.raises(DataError, match=rf"^image '{photo}' has 24x40 pixels, more than max_pixels=959: shrink it"):
        load_heic(photo, 959)
    content = photo.read_bytes()
    photo.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"^image '{photo}' cannot be decoded \(.*\): check that it is an undamaged"):
        load_heic(photo)
    Image.new("RGB", (8, 8)).save(photo, format="PNG")  # whatever its name says
    with pytest.raises(DataError, match=r"cannot be decoded \(no HEIF\)"):
        load_heic(photo)
    photo.unlink()
    with pytest.raises(DataError, match="does not exist: check the path"):
        load_heic(photo)


def test_heic__without_pillow_heif_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"")
    done = predict_files(tiny_segmenter("fcn"), [tmp_path / "a.heic"], tmp_path / "out", Dense())
    assert done.failed == (
        f"image '{tmp_path / 'a.heic'}' cannot be read: HEIC needs the package pillow-heif: pip install "
        "'tokenexit[heic]', or convert it to JPEG.",
    )
