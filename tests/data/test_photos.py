"""Images without masks: which are listed, what their masks say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenexit.data import SegmentationDataset, open_dataset
from tokenexit.data.check import check_dataset
from tokenexit.data.loader import Cached, Spread, is_unlabelled
from tokenexit.data.photos import Photos, UnlabelledImages
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import default_labels

NAMES = ["a.png", "below/b.png", "below/c.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.new("RGB", (8 + i, 6), (40 * i, 0, 0)).save(folder / name)
    return folder


def names(dataset: UnlabelledImages, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in dataset.paths]


def test_photos__are_all_images_below_a_folder_and_every_pixel_is_ignored(root: Path) -> None:
    dataset = open_dataset("photos", root, "train", labels=default_labels(3))
    assert isinstance(dataset, SegmentationDataset)
    assert isinstance(dataset, Photos)
    assert names(dataset, root) == NAMES
    assert [sample.size for sample in (dataset[i] for i in range(3))] == [(6, 8), (6, 9), (6, 10)]
    assert np.unique(dataset[1].mask).tolist() == [255]
    assert open_dataset("photos", root, "train", labels=default_labels(300))[0].mask[0, 0] == 65535


def test_photos__may_be_a_part_by_names_in_a_list_or_a_file(root: Path, tmp_path: Path) -> None:
    assert names(Photos(root, "train", files=["below/c.png", "a.png"]), root) == ["below/c.png", "a.png"]
    assert names(Photos(root, "train", files=["below"]), root) == NAMES[1:]
    (tmp_path / "fit.txt").write_text("a.png\n\n  below/b.png\n")
    assert names(Photos(root, "train", files=str(tmp_path / "fit.txt")), root) == NAMES[:2]


def test_photos__names_that_begin_with_an_at_are_no_lists(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a.png").rename(root / "@a.png")
    monkeypatch.chdir(root)
    assert [path.name for path in Photos(".", "train", files=["@a.png"]).paths] == ["@a.png"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"root": "nowhere"}, DataError, "'nowhere' does not exist"),
        ({"split": "val"}, DataError, "split 'val' of photos is unknown: choose train"),
        ({"files": ["a.png", "d.png"]}, DataError, "file 'd.png' does not exist in"),
        ({"files": []}, ConfigError, "files must be names of images"),
        ({"files": [3]}, ConfigError, "files must be names of images"),
        ({"files": "nowhere.txt"}, DataError, "'nowhere.txt' cannot be read"),
        ({"size": 3}, ConfigError, "no option 'size': its options are files, labels"),
    ],
)
def test_photos__what_is_not_there_ends_in_one_sentence(root, changes, error, words) -> None:
    given = {"root": root, "split": "train"} | changes
    with pytest.raises(error, match=words):
        open_dataset("photos", given.pop("root"), given.pop("split"), **given)


def test_photos__an_empty_list_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "fit.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no names: write one a line"):
        Photos(root, "train", files=str(tmp_path / "fit.txt"))


def test_photos__have_no_classes_of_their_own(root: Path) -> None:
    assert Photos(root, "train", labels=default_labels(3)).labels == default_labels(3)
    with pytest.raises(ConfigError, match="photos have no classes of their own: give those of a model as labels"):
        _ = Photos(root, "train").labels


def test_is_unlabelled__sees_through_what_is_around_a_dataset(root: Path) -> None:
    photos = Photos(root, "train", labels=default_labels(3))
    assert is_unlabelled(photos)
    assert is_unlabelled(Cached(Spread(photos, 2)))
    scenes = open_dataset("scenes", None, "val", length=2, size=(16, 16))
    assert not is_unlabelled(Cached(scenes))


def test_check_dataset__counts_and_sizes_photos_and_finds_damaged_ones(root: Path) -> None:
    report = check_dataset("photos", root)
    assert report.status == "ok"
    assert report.labels is None
    (split,) = report.splits
    assert (split.images, split.masks, split.pairs, split.sound) == (3, 0, 0, 3)
    assert split.sizes is not None
    assert (split.sizes.smallest, split.sizes.largest) == ((6, 8), (6, 10))
    assert "class" not in report.to_text()
    (root / "a.png").write_bytes(b"no image")
    damaged = check_dataset("photos", root)
    assert damaged.status == "error"
    assert "a.png" in damaged.to_text()
