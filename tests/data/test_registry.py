import numpy as np
import pytest

from tests.data.pictures import LABELS, write_pair
from tokenexit.data import SegmentationDataset, open_dataset
from tokenexit.data.registry import DATASETS, check_dataset_options, dataset_labels, dataset_options, dataset_splits
from tokenexit.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path):
    write_pair(tmp_path, "train", "a", np.array([[0, 1, 2]], np.uint8))
    return tmp_path


def test_open_dataset__opens_by_name_and_passes_options_on(root):
    dataset = open_dataset("folder", root, "train", labels=LABELS, ignore_values=(1,))
    assert isinstance(dataset, SegmentationDataset)
    assert dataset[0].mask.tolist() == [[0, 255, 2]]
    assert open_dataset("camvid", str(root), "train").labels.num_classes == 11


@pytest.mark.parametrize(
    ("name", "rooted", "split", "options", "error", "words"),
    [
        ("camvod", True, "train", {}, DataError, "'camvod' is unknown: choose one of ade20k, camvid, "),
        ("camvid", False, "train", {}, DataError, "'camvid' is read from a folder: give its root"),
        ("camvid", True, "trian", {}, DataError, "'trian' of CamVid is unknown: choose one of train, val, test"),
        ("camvid", True, "train", {"size": 3}, ConfigError, "no option 'size': its options are unpaired"),
        ("folder", True, "train", {"label": 3}, ConfigError, "no option 'label': its options are labels, "),
    ],
)
def test_open_dataset__what_does_not_exist_is_told_with_what_does(root, name, rooted, split, options, error, words):
    for function in (open_dataset, check_dataset_options):
        with pytest.raises(error, match=words):
            function(name, root if rooted else None, split, **options)


def test_open_dataset__a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere' does not exist"):
        open_dataset("camvid", tmp_path / "nowhere", "train")


def test_open_dataset__a_dataset_that_is_drawn_takes_no_root(monkeypatch, root):
    monkeypatch.setitem(DATASETS, "drawn", "tests.data.test_registry:open_drawn")
    assert open_dataset("drawn", None, "train", count=4) == ("train", 4)
    with pytest.raises(DataError, match="'drawn' needs no folder"):
        open_dataset("drawn", root, "train")


def open_drawn(split: str, count: int = 1):
    return split, count


def test_open_dataset__every_name_in_the_list_opens_by_root_and_split_or_draws():
    for name in DATASETS:
        assert ("unpaired" in dataset_options(name)) != (name in ("photos", "scenes"))
        assert name == "scenes" or "'nowhere' does not exist" in refusal(
            lambda name=name: open_dataset(name, "nowhere", "train")
        )


def test_check_dataset__needs_no_data():
    for name in DATASETS:
        check_dataset_options(name, None if name == "scenes" else "nowhere", "train")
    check_dataset_options("coco_stuff10k", "nowhere", "val")  # by another name
    assert "'scenes' needs no folder" in refusal(lambda: check_dataset_options("scenes", "nowhere", "train"))
    assert "'trian' of the scenes is unknown" in refusal(lambda: check_dataset_options("scenes", None, "trian"))


def test_dataset_labels__are_known_without_data_except_of_folders(root):
    assert dataset_labels("folder") is dataset_labels("photos") is None
    for name in DATASETS.keys() - {"folder", "photos"}:
        labels = dataset_labels(name)
        assert labels.num_classes == len(labels.names) > 1
    assert dataset_labels("camvid") == open_dataset("camvid", root, "train").labels
    assert "'camvod' is unknown" in refusal(lambda: dataset_labels("camvod"))


def test_dataset_splits__are_those_with_images_whether_complete_or_not(root):
    (root / "images" / "val").mkdir()
    assert dataset_splits("folder", root) == ("train", "val")
    assert dataset_splits("camvid", root) == ("train", "val")
    assert dataset_splits("scenes", None) == ("train", "val", "test")


def test_dataset_splits__nothing_to_open_is_told_with_what_was_looked_for(tmp_path):
    assert "no folder 'images'" in refusal(lambda: dataset_splits("folder", tmp_path))
    assert "leftImg8bit/train" in refusal(lambda: dataset_splits("cityscapes", tmp_path))
    (tmp_path / "images").mkdir()
    assert "has no split" in refusal(lambda: dataset_splits("folder", tmp_path))
    assert "is read from a folder" in refusal(lambda: dataset_splits("folder", None))


def refusal(action) -> str:
    with pytest.raises(DataError) as error:
        action()
    return str(error.value)
