import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.pictures import LABELS, write_pair
from tokenexit.data.check import SUMMARY_COLUMNS, CheckReport, check_dataset, run_data_check
from tokenexit.data.registry import DATASETS
from tokenexit.errors import ConfigError, DataError

VALUES = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dataset.yaml").write_text("classes: [ground, leaf, fruit]")
    for name in ("a", "b"):
        write_pair(tmp_path, "train", name, VALUES)
    return tmp_path


def kinds(report: CheckReport) -> dict[str, int]:
    return Counter(problem.kind for split in report.splits for problem in split.problems)


def test_check__counts_files_sizes_classes_and_void(root):
    write_pair(root, "train", "c", np.zeros((4, 5), np.uint8))
    report = check_dataset("folder", root)
    (split,) = report.splits
    assert (report.status, split.status, split.problems) == ("ok", "ok", ())
    assert (split.images, split.masks, split.pairs, split.sound) == (3, 3, 3, 3)
    assert split.class_pixels == (24, 4, 2)
    assert split.class_images == (3, 2, 2)
    assert split.class_shares == (0.8, 4 / 30, 2 / 30)
    assert split.void_pixels == 2
    assert split.void_share == 2 / 32
    assert split.sizes is not None
    assert (split.sizes.smallest, split.sizes.median, split.sizes.largest) == ((2, 3), (2, 3), (4, 5))
    assert split.sizes.distinct == 2


def test_check__no_bad_file_stops_it_and_each_is_named_in_its_kind(root):
    for name in ("cut_image", "cut_mask", "colour", "size", "value", "no_mask", "no_image", "gone", "void"):
        write_pair(root, "train", name, VALUES)
    images, masks = root / "images/train", root / "annotations/train"
    (images / "cut_image.png").write_bytes((images / "cut_image.png").read_bytes()[:30])
    (masks / "cut_mask.png").write_bytes(b"")
    Image.new("RGB", (3, 2)).save(masks / "colour.png")
    Image.new("L", (2, 3)).save(masks / "size.png")
    Image.new("L", (3, 2), 7).save(masks / "value.png")
    Image.new("L", (3, 2), 255).save(masks / "void.png")
    (masks / "no_mask.png").unlink()
    (images / "no_image.png").unlink()
    (images / "gone.png").unlink()
    (images / "gone.png").symlink_to(root / "moved_away.png")
    report = check_dataset("folder", root, ["train"], workers=2)
    assert kinds(report) == {"no mask": 1, "no image": 1, "image": 2, "mask": 2, "size": 1, "values": 1, "void": 1}
    assert report.status == "error"
    (split,) = report.splits
    assert (split.images, split.masks, split.pairs, split.sound) == (10, 10, 9, 3)
    assert split.unknown_pixels == 6
    for kind, name in (("no mask", "no_mask"), ("mask", "cut_mask"), ("size", "size"), ("values", "value")):
        problem = next(p for p in split.problems if p.kind == kind and name in p.file)
        assert f"{name}.png" in problem.message
        assert "\n" not in problem.message


def test_check__the_counts_do_not_depend_on_the_number_of_threads(root):
    for k in range(9):
        write_pair(root, "train", f"n{k}", np.full((2, 2), k % 4, np.uint8))
    one, many = (check_dataset("folder", root, workers=workers) for workers in (1, 3))
    assert one == many
    assert one.status == "error"


@given(st.lists(st.sampled_from([0, 1, 2, 3, 40, 255]), min_size=1, max_size=12), st.booleans())
def test_check__every_pixel_is_of_a_class_void_or_unknown(tmp_path_factory, values, colour):
    root = tmp_path_factory.mktemp("pixels")
    options = "palette: [[0, 0, 0], [1, 1, 1], [2, 2, 2]]\nmasks: colour\nignore_colours: [[255, 255, 255]]"
    (root / "dataset.yaml").write_text("classes: [a, b, c]\n" + (options if colour else ""))
    array = np.array([values], np.uint8)
    write_pair(root, "train", "a", np.stack([array] * 3, axis=-1) if colour else array)
    (split,) = check_dataset("folder", root, workers=1).splits
    assert split.class_pixels == tuple(values.count(k) for k in range(3))
    assert split.void_pixels == values.count(255)
    assert split.unknown_pixels == values.count(3) + values.count(40)
    assert (split.status == "error") == (split.unknown_pixels > 0)


def test_check__unknown_colours_that_are_ignored_are_a_warning(root):
    (root / "dataset.yaml").write_text("classes: [a]\npalette: [[0, 9, 0]]\nmasks: colour\nunknown_colours: ignore\n")
    write_pair(root, "train", "a", np.array([[[0, 9, 0], [1, 1, 1]]], np.uint8))
    write_pair(root, "train", "b", np.array([[[0, 9, 0], [0, 9, 0]]], np.uint8))
    report = check_dataset("folder", root)
    assert (report.status, kinds(report)) == ("warning", {"ignored": 1})


def test_check__a_class_that_never_occurs_is_a_warning(root):
    for name in ("a", "b"):
        write_pair(root, "train", name, np.array([[0, 1]], np.uint8))
    report = check_dataset("folder", root)
    assert (report.status, kinds(report)) == ("warning", {"class": 1})
    assert "class 'fruit' has no pixel in split 'train'." in report.to_text()


def test_check__all_splits_are_read_and_one_that_cannot_be_opened_is_a_problem(root):
    (root / "images/test").mkdir()
    write_pair(root, "val", "c", VALUES)
    report = check_dataset("folder", root)
    assert [split.split for split in report.splits] == ["test", "train", "val"]
    assert [split.status for split in report.splits] == ["error", "ok", "ok"]
    assert "lacks 'annotations/test'" in report.splits[0].problems[0].message
    assert report.labels is not None
    assert check_dataset("folder", root, ["train", "val", "train"]).status == "ok"
    assert kinds(check_dataset("folder", root, ["trian"])) == {"open": 1}


def test_check__a_published_dataset_is_read_split_by_split_and_what_is_not_unpacked_is_told(tmp_path):
    for folder, name in (("train2014", "a"), ("train2014", "b"), ("test2014", "c")):
        (tmp_path / f"images/{folder}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / f"images/{folder}/{name}.jpg")
    (tmp_path / "annotations/train2014").mkdir(parents=True)
    Image.fromarray(np.array([[0, 1, 171], [172, 2, 2]], np.uint8)).save(
        tmp_path / "annotations/train2014/a_labelTrainIds.png"
    )
    train, test = check_dataset("coco_stuff10k", tmp_path).splits
    assert (train.split, train.images, train.masks, train.pairs, train.sound) == ("train", 2, 1, 1, 0)
    assert (train.class_pixels[0], train.class_pixels[1], train.class_pixels[170]) == (1, 2, 1)
    assert (train.void_pixels, train.unknown_pixels) == (1, 1)
    assert {p.kind for p in train.problems} == {"no mask", "values", "class"}
    assert "COCO-Stuff-10K lacks" in test.problems[0].message


def test_check__a_dataset_that_is_drawn_is_checked_sample_by_sample(monkeypatch):
    report = check_dataset("scenes", None, ["val"], {"length": 2, "size": (64, 64)})
    assert (report.splits[0].pairs, report.splits[0].sound) == (2, 2)
    monkeypatch.setitem(DATASETS, "broken", "tests.data.test_check:open_broken")
    report = check_dataset("broken", None)
    assert kinds(report) == {"sample": 3, "class": 9}
    assert "sample 0 cannot be read (no image today)." in report.to_text()


class Broken:
    labels = LABELS

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise OSError("no image today")


def open_broken(split: str):
    return Broken()


def test_check__progress_receives_every_sample_of_every_split(root):
    write_pair(root, "val", "c", VALUES)
    seen = []

    def progress(numbers):
        for number in numbers:
            seen.append(number)
            yield number

    check_dataset("folder", root, progress=progress)
    assert seen == [0, 1, 0]


def test_check__nothing_to_check_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder 'images'"):
        check_dataset("folder", tmp_path)
    with pytest.raises(DataError, match="'flowers' is unknown"):
        check_dataset("flowers", tmp_path, ["train"])
    with pytest.raises(ConfigError, match="no option 'sizes'"):
        check_dataset("scenes", None, options={"sizes": 3})
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        check_dataset("scenes", None, workers=0)


# --------------------------------------------------------------------------------------------------------------- text


def test_report__shows_tables_then_the_first_files_of_each_kind_then_the_status(root):
    for k in range(7):
        write_pair(root, "train", f"v{k}", np.full((1, 4), 9, np.uint8))
    text = check_dataset("folder", root).to_text(shown=2)
    lines = text.splitlines()
    assert tuple(lines[0].split()) == SUMMARY_COLUMNS
    assert lines[1].split() == ["train", "9", "9", "9", "2", "1x4", "1x4", "2x3", "2", "5.00%"]
    assert lines[4].split() == ["0", "ground", "40.00%", "2"]
    assert "error in train: masks with values that are neither class nor void (7)" in lines
    assert sum("holds the value 9 in 4 pixels" in line for line in lines) == 2
    assert "  and 5 more" in lines
    assert lines[-1] == "folder: error"


def test_report__to_dict_is_json_and_holds_every_figure(root):
    report = check_dataset("folder", root)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["status"] == "ok"
    assert values["labels"]["names"] == ["ground", "leaf", "fruit"]
    assert values["splits"][0]["class_pixels"] == [4, 4, 2]
    assert values["splits"][0]["sizes"]["median"] == [2, 3]


def test_run_data_check__says_what_was_found_writes_figures_and_returns_the_status(root, capsys, tmp_path):
    target = tmp_path / "figures.json"
    assert run_data_check("folder", root, json_path=target) == 0
    assert capsys.readouterr().out.endswith("folder: ok\n")
    assert json.loads(target.read_text())["root"] == str(root)
    (root / "images/train/a.png").write_bytes(b"")
    said: list[str] = []
    assert run_data_check("folder", root, say=said.append) == 1
    assert "error in train: images that cannot be read (1)" in said[0]
    with pytest.raises(ConfigError, match="cannot be written"):
        run_data_check("folder", root, json_path=tmp_path, say=said.append)


def test_check__reads_other_layouts_and_says_how_images_were_split(tmp_path):
    for k in range(40):
        write_pair(tmp_path, "all", f"p{k}", np.array([[0, 1], [2, 255]], np.uint8))
    (tmp_path / "images").rename(tmp_path / "img")
    with pytest.raises(DataError, match=r"write to dataset\.yaml, one a line: images: 'img'\.$"):
        check_dataset("folder", tmp_path)
    (tmp_path / "dataset.yaml").write_text("classes: [ground, leaf, fruit]\nimages: img\n")
    report = check_dataset("folder", tmp_path)
    assert [split.split for split in report.splits] == ["train", "val", "test"]
    assert sum(split.pairs for split in report.splits) == 40
    counts = ", ".join(f"{split.pairs} {split.split}" for split in report.splits)
    note = f"no split is given, so images are split by file name, 80/10/10: {counts}"
    assert report.to_text().splitlines()[0] == note
    assert report.to_text().count(note) == 1
    assert json.loads(json.dumps(report.to_dict()))["splits"][2]["note"] == note
    assert report.status == "ok"
