"""What docs/guide/predicting.md shows works as it stands, with a small model and small images."""

from __future__ import annotations

import doctest
import shlex
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_segmenter
from tests.test_docs_commands import ROOT, commands
from tokenexit.cli import main
from tokenexit.data.scenes import scene_split
from tokenexit.prediction import video

PAGE = ROOT / "docs" / "guide" / "predicting.md"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the page speaks of."""
    monkeypatch.chdir(tmp_path)
    model = tiny_segmenter("fcn", num_classes=9)
    model.preprocessing = type(model.preprocessing)(labels=scene_split("test").labels, resize=16)
    model.save_pretrained("runs/street")
    Path("photos").mkdir()
    for n, name in enumerate(("street", "other")):
        noise = np.random.default_rng(n).integers(0, 256, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(noise).save(f"photos/{name}.jpg")
    Path("new.txt").write_text("photos/street.jpg\nphotos/other.jpg\n")
    return tmp_path


def test_predicting_page__its_commands_work(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called = commands(PAGE)
    assert len(called) == 10
    if find_spec("av") is not None:
        with video.encoder(Path("street.mp4"), Fraction(10)) as add:
            add(Image.open("photos/street.jpg"))
            add(Image.open("photos/other.jpg"))
    else:
        called = [command for command in called if ".mp4" not in command and "video" not in command]
    for command in called:
        status = main([*shlex.split(command)[1:], "--device", "cpu"])
        assert status == 0, f"{command}: {capsys.readouterr().err}"
    for made in (
        *("masks/street.exits.png", "kept/coco.index.json", "kept/labelstudio.xml", "kept/other.scores.png"),
        *("masks.zip", "masks/predictions.json", "runs/street/evaluation.json"),
    ):
        assert Path(made).is_file(), made
    if len(called) == 10:
        videos = ("frames/street/000002.png", "overlays/street.overlay.mp4", "photos-video/photos.overlay.mp4")
        assert all(Path(made).is_file() for made in videos)


def test_predicting_page__its_python_works(home: Path) -> None:
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (found.failed, found.attempted > 8) == (0, True)
    assert 'license: "cc-by-4.0"' in Path("shared/street/README.md").read_text()
