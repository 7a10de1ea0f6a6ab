import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import LABELS, write_pair
from tokenexit.data.folder import FolderDataset, read_dataset_file
from tokenexit.data.folder_layout import drawn_split
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels

PAINTED = "classes: [a]\npalette: [[9, 0, 0]]\nmasks: colour\n"
VALUES = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)


def message_of(action) -> str:
    with pytest.raises(DataError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif"])
def test_folder__pairs_images_of_any_format_with_masks_sorted_by_name(suffix, tmp_path):
    for name in ("b", "a", "drive/c.left"):
        write_pair(tmp_path, "train", name, VALUES, suffix)
    dataset = FolderDataset(tmp_path, "train", LABELS)
    assert dataset.names == ("a", "b", "drive/c.left")
    assert [sample.name for sample in dataset] == list(dataset.names)
    assert len(dataset) == 3
    assert dataset[2].mask.tolist() == VALUES.tolist()
    assert dataset[2].image.size == (3, 2)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_folder__masks_of_every_one_channel_mode_read_as_indices(mode, tmp_path):
    values = np.array([[0, 1], [1, 0]], np.uint8)
    write_pair(tmp_path, "train", "a", values)
    mask = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    if mode == "P":
        mask.putpalette([90, 90, 90, 90, 90, 90])  # equal colours: only the indices tell them apart
    if mode == "1":
        mask = Image.fromarray(values.astype(bool))
    mask.save(tmp_path / "annotations/train/a.png")
    assert FolderDataset(tmp_path, "train", LABELS)[0].mask.tolist() == values.tolist()


def test_folder__opening_decodes_nothing(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    (tmp_path / "images/train/a.png").write_bytes(b"damaged")
    dataset = FolderDataset(tmp_path, "train", LABELS)
    assert "a.png' cannot be decoded" in message_of(lambda: dataset[0])


def test_folder__hidden_and_foreign_files_are_left_out(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    for name in (".DS_Store", "._a.png", "notes.txt"):
        (tmp_path / "images/train" / name).write_bytes(b"x")
    assert FolderDataset(tmp_path, "train", LABELS).names == ("a",)


def test_folder__unpaired_files_are_counted_and_the_first_are_named(tmp_path):
    for k in range(6):
        write_pair(tmp_path, "train", f"p{k}", VALUES)
    for k in range(5):
        (tmp_path / f"annotations/train/p{k}.png").unlink()
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "5 of 6 images have no mask" in message
    assert "p0.png" in message
    assert "p2.png, ..." in message
    assert "p3.png" not in message
    for k in range(5):
        (tmp_path / f"images/train/p{k}.png").unlink()
    write_pair(tmp_path, "train", "q", VALUES)
    (tmp_path / "images/train/q.png").unlink()
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "1 of 2 masks have no image" in message
    assert "q.png)" in message


def test_folder__two_images_of_one_name_are_refused(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES, ".png")
    write_pair(tmp_path, "train", "a", VALUES, ".jpg")
    assert "share the name 'a'" in message_of(lambda: FolderDataset(tmp_path, "train", LABELS))


def test_folder__damaged_colour_ill_sized_and_ill_valued_masks_are_refused_by_file_name(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    dataset = FolderDataset(tmp_path, "train", LABELS)
    path = tmp_path / "annotations/train/a.png"
    for mask, words in [
        (Image.new("RGB", (3, 2)), "mode 'RGB', not one channel"),
        (Image.new("L", (2, 3)), "has 3x2 pixels and its image 2x3"),
        (Image.new("L", (3, 2), 7), "holds the value 7 in 6 pixels"),
    ]:
        mask.save(path)
        message = message_of(lambda: dataset[0])
        assert words in message
        assert "annotations/train/a.png" in message
    path.write_bytes(path.read_bytes()[:40])
    assert "a.png' cannot be decoded" in message_of(lambda: dataset[0])


def test_folder__missing_folders_and_splits_are_named_with_what_exists(tmp_path):
    assert "nowhere' does not exist" in message_of(lambda: FolderDataset(tmp_path / "nowhere", "train", LABELS))
    (tmp_path / "camvid").mkdir()
    assert "holds camvid but no folder 'images'" in message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    (tmp_path / "images/val").mkdir(parents=True)
    (tmp_path / "images/train").mkdir()
    message = message_of(lambda: FolderDataset(tmp_path, "test", LABELS))
    assert "split 'test' is unknown" in message
    assert "there is train, val" in message
    assert "lacks 'annotations/val'" in message_of(lambda: FolderDataset(tmp_path, "val", LABELS))
    (tmp_path / "annotations/val").mkdir(parents=True)
    assert "holds no images" in message_of(lambda: FolderDataset(tmp_path, "val", LABELS))


# ------------------------------------------------------------------------------------------------- other layouts


def write_files(root: Path, *names: str) -> None:
    """Images of 3x2 pixels, which serve as masks of class 0, too."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2)).save(root / name)


def pairs(dataset: FolderDataset, root: Path) -> list[tuple[str, str]]:
    """Images and masks by their paths within root."""
    return [(pair.image.removeprefix(f"{root}/"), pair.mask.removeprefix(f"{root}/")) for pair in dataset.pairing.pairs]


def test_folder__takes_folders_and_suffixes_of_any_name(tmp_path):
    write_files(tmp_path, "img/train/a_image.jpg", "gt/train/a_annotation.png", "img/train/b/c_image.jpg")
    write_files(tmp_path, "gt/train/b/c_annotation.png", "img/train/notes.png")
    options = {"images": "img", "annotations": "gt", "image_suffix": "_image", "mask_suffix": "_annotation"}
    dataset = FolderDataset(tmp_path, "train", LABELS, **options)
    assert dataset.names == ("a", "b/c")
    assert pairs(dataset, tmp_path)[0] == ("img/train/a_image.jpg", "gt/train/a_annotation.png")
    assert dataset.note == ""
    (tmp_path / "dataset.yaml").write_text("classes: [a]\n" + "".join(f"{k}: {v}\n" for k, v in options.items()))
    assert FolderDataset(tmp_path, "train").names == ("a", "b/c")
    assert FolderDataset.splits(tmp_path) == ("train",)


def test_folder__takes_the_splits_as_outer_folders(tmp_path):
    write_files(tmp_path, "data/train/img/a.jpg", "data/train/mask/a.png", "data/valid/img/b.jpg")
    write_files(tmp_path, "data/valid/mask/b.png", "data/readme/x.png")
    options = {"images": "data/{split}/img", "annotations": "data/{split}/mask"}
    assert FolderDataset.splits(tmp_path, **options) == ("train", "valid")
    assert FolderDataset(tmp_path, "valid", LABELS, **options).names == ("b",)
    message = message_of(lambda: FolderDataset(tmp_path, "val", LABELS, **options))
    assert "split 'val' is unknown" in message
    assert "there is train, valid" in message
    with pytest.raises(ConfigError, match="stands in one of images and annotations: write it in both"):
        FolderDataset(tmp_path, "val", LABELS, images="{split}/img")


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("a.jpg", "a.png"), {"image_suffix": ".jpg", "mask_suffix": ".png"}),
        (("a.png", "a_mask.png"), {"mask_suffix": "_mask"}),
        (("a_rgb.png", "a.png"), {"image_suffix": "_rgb"}),
    ],
)
def test_folder__images_and_masks_may_lie_side_by_side(names, options, tmp_path):
    write_files(tmp_path, *(f"all/train/{name}" for name in names))
    dataset = FolderDataset(tmp_path, "train", LABELS, images="all", annotations="all", **options)
    assert dataset.names == ("a",)
    assert pairs(dataset, tmp_path) == [tuple(f"all/train/{name}" for name in names)]
    assert dataset.pairing.unpaired == ()


def test_folder__masks_may_lie_within_the_folder_of_the_images(tmp_path):
    write_files(tmp_path, *(f"{k}.png" for k in range(20)), *(f"gt/{k}.png" for k in range(20)))
    names = [FolderDataset(tmp_path, s, LABELS, images=".", annotations="gt").names for s in ("train", "val", "test")]
    assert sorted(name for split in names for name in split) == sorted(map(str, range(20)))


def test_folder__asks_for_suffixes_where_nothing_tells_images_from_masks(tmp_path):
    write_files(tmp_path, "all/a.png")
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS, images="all", annotations="all"))
    assert "tell them apart with image_suffix and mask_suffix" in message


# ---------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "line",
    [
        *("site/a", "site/a.jpg", "images/site/a.jpg", "./images/site/a.jpg", "annotations/site/a.png", "a", "a.jpg"),
        *("images/site/a.jpg annotations/site/a.png", "images/site/a.jpg,annotations/site/a.png"),
        *("/images/site/a.jpg\t/annotations/site/a.png", "images\\site\\a.jpg", "{root}/images/site/a.jpg"),
    ],
)
def test_folder__lists_hold_names_or_paths(line, tmp_path):
    write_files(tmp_path, "images/site/a.jpg", "annotations/site/a.png", "images/b.jpg", "annotations/b.png")
    (tmp_path / "train.txt").write_text(f"# mine\n{line.format(root=tmp_path)}\n\n")
    (tmp_path / "val.txt").write_text("b\n")
    (tmp_path / "classes.txt").write_text("ground\nleaf\n")
    assert FolderDataset.splits(tmp_path) == ("train", "val")
    dataset = FolderDataset(tmp_path, "train", LABELS)
    assert pairs(dataset, tmp_path) == [("images/site/a.jpg", "annotations/site/a.png")]
    assert FolderDataset(tmp_path, "val", LABELS).names == ("b",)


def test_folder__lists_may_lie_elsewhere_and_then_win_over_folders(tmp_path):
    write_files(
        tmp_path, *(f"{kind}/{name}.png" for kind in ("images", "annotations") for name in ("train/a", "val/b"))
    )
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/fold1.txt").write_text("train/a\nval/b\n")
    assert FolderDataset(tmp_path, "train", LABELS).names == ("a",)
    assert FolderDataset(tmp_path, "fold1", LABELS, lists="splits").names == ("train/a", "val/b")


def test_folder__lists_that_name_nothing_are_refused_with_the_first_names(tmp_path):
    write_files(tmp_path, "images/a.jpg", "annotations/a.png")
    (tmp_path / "train.txt").write_text("x\na\ny z\n")
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "train.txt' lists 2 of 3 names that are no image" in message
    assert "(x, y z)" in message
    (tmp_path / "train.txt").write_text("a\na.jpg\n")
    assert "'a' is listed twice" in message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    (tmp_path / "train.txt").write_text("\n")
    assert "lists no names" in message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "train.txt" not in message_of(lambda: FolderDataset(tmp_path, "nope", LABELS))


def test_folder__listed_images_without_mask_are_unpaired(tmp_path):
    write_files(tmp_path, "images/a.jpg", "annotations/a.png", "images/b.jpg")
    (tmp_path / "train.txt").write_text("a\nb\n")
    assert "1 of 2 images have no mask" in message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert FolderDataset(tmp_path, "train", LABELS, unpaired="skip").names == ("a",)


# ------------------------------------------------------------------------------------------------- drawn by name


def test_folder__draws_splits_by_name_where_none_is_given(tmp_path):
    write_files(tmp_path, *(f"{kind}/{k // 50}/{k:03}.png" for kind in ("images", "annotations") for k in range(100)))
    splits = {split: FolderDataset(tmp_path, split, LABELS) for split in ("train", "val", "test")}
    assert FolderDataset.splits(tmp_path) == ("train", "val", "test")
    names = {split: set(dataset.names) for split, dataset in splits.items()}
    assert set.union(*names.values()) == {f"{k // 50}/{k:03}" for k in range(100)}
    assert sum(map(len, names.values())) == 100
    assert 70 <= len(names["train"]) <= 90
    counts = ", ".join(f"{len(names[split])} {split}" for split in names)
    assert splits["val"].note == f"no split is given, so images are split by file name, 80/10/10: {counts}"
    write_files(tmp_path, "images/new.png", "annotations/new.png")
    later = {split: set(FolderDataset(tmp_path, split, LABELS).names) for split in names}
    assert all(names[split] <= later[split] for split in names)  # adding an image moves no other


def test_drawn_split__is_the_same_for_ever():
    drawn = [drawn_split(name) for name in ("a", "b", "leaf-12", "site/7", "2", "60")]
    assert drawn == ["train", "train", "val", "val", "val", "train"]


def test_folder__does_not_draw_where_folders_or_lists_look_like_splits(tmp_path):
    write_files(
        tmp_path, *(f"{kind}/{name}.png" for kind in ("images", "annotations") for name in ("training/a", "v/b"))
    )
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "split 'train' is unknown" in message
    assert "there is training, v" in message


def test_folder__a_folder_of_any_name_is_a_split_if_it_is_asked_for(tmp_path):
    write_files(
        tmp_path, *(f"{kind}/{name}.png" for kind in ("images", "annotations") for name in ("north/a", "south/b"))
    )
    assert FolderDataset(tmp_path, "north", LABELS).names == ("a",)
    assert "there is train, val, test, drawn by file name" in message_of(lambda: FolderDataset(tmp_path, "x", LABELS))


def test_folder__says_so_where_drawing_leaves_nothing(tmp_path):
    write_files(tmp_path, "images/a.jpg", "annotations/a.png")
    message = message_of(lambda: FolderDataset(tmp_path, "test", LABELS))
    assert "leaves none of 1 pairs for 'test': list its images in test.txt" in message


# ---------------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("names", "suggested"),
    [
        (("img/{k}.jpg", "gt/{k}.png"), "images: 'img', annotations: 'gt'"),
        (("img/{k}_image.jpg", "gt/{k}_annotation.png"), "mask_suffix: '_annotation'"),
        (("img/train/{k}.png", "labels/train/{k}.png"), "images: 'img', annotations: 'labels'"),
        (("train/img/{k}.jpg", "train/gt/{k}.png"), "images: '{split}/img', annotations: '{split}/gt'"),
        (("all/{k}.jpg", "all/{k}_mask.png"), "images: 'all', annotations: 'all', mask_suffix: '_mask'"),
        (("{k}.jpg", "{k}.png"), "images: '.', annotations: '.', image_suffix: '.jpg', mask_suffix: '.png'"),
        (("images/site/{k}.jpg", "masks/site/{k}.png"), "annotations: 'masks'"),
    ],
)
def test_folder__shows_what_is_expected_what_is_there_and_what_would_fit(names, suggested, tmp_path):
    write_files(tmp_path, *(name.format(k=f"photo{k}", split="") for name in names for k in range(12)))
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert "expected are images/NAME.jpg and annotations/NAME.png" in message
    assert re.search(r"found \d+ images in '[\w.]+' such as '.*photo0", message)
    assert message.endswith(f"{suggested}.")
    written = message.rpartition("write to dataset.yaml, one a line: ")[2].rstrip(".")
    (tmp_path / "dataset.yaml").write_text("classes: [a]\n" + written.replace(", ", "\n"))
    assert len(FolderDataset(tmp_path, "train")) > 5  # what is suggested works


def test_folder__hints_at_suffixes_where_no_name_is_shared(tmp_path):
    write_files(tmp_path, *(f"images/train/{k}.jpg" for k in "ab"), *(f"annotations/train/{k}_mask.png" for k in "ab"))
    message = message_of(lambda: FolderDataset(tmp_path, "train", LABELS))
    assert message.startswith("none of 2 images in")
    assert message.endswith("write to dataset.yaml, one a line: mask_suffix: '_mask'.")


def test_folder__says_that_there_is_no_image_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert message_of(lambda: FolderDataset(tmp_path, "train", LABELS)).endswith("found no image at all.")


# ------------------------------------------------------------------------------------------------------ dataset.yaml


def test_dataset_file__gives_classes_colours_and_void(tmp_path):
    (tmp_path / "dataset.yaml").write_text(
        "classes: [leaf, fruit]\npalette: [[0, 9, 0], [9, 0, 0]]\nignore_index: 254\n"
        "reduce_zero_label: true\nignore_values: [255]\n"
    )
    write_pair(tmp_path, "train", "a", VALUES)
    dataset = FolderDataset(tmp_path, "train")
    assert dataset.labels == Labels(("leaf", "fruit"), ((0, 9, 0), (9, 0, 0)), 254)
    assert dataset[0].mask.tolist() == [[254, 0, 1], [254, 0, 254]]


def test_dataset_file__class_names_are_enough(tmp_path):
    (tmp_path / "dataset.yaml").write_text("classes: [a, b, c]")
    labels = read_dataset_file(tmp_path / "dataset.yaml").labels
    assert labels.names == ("a", "b", "c")
    assert labels.ignore_index == 255
    assert len(set(labels.palette)) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no classes"),
        ("[a, b]", "lists no classes"),
        ("classes: [", "no valid YAML"),
        ("classes: " + "[" * 50_000, "no valid YAML .it nests too deeply.: correct it"),
        ("classes: [2026-13-45]", "no valid YAML .month must be in"),
        ("#" * (2 * 2**20 + 1), "no valid YAML .it has more than 2 MB.: correct it"),
        ("classes: road", "classes must be a list"),
        ("classes: []", "empty"),
        ("classes: [road, no]", "False"),
        ("classes: [a, a]", "'a' more than once"),
        ("classes: [a]\ncolours: []", "key 'colours' is unknown"),
        ("classes: [a]\npalette: [[1, 2]]", r"\(1, 2\)"),
        ("classes: [a]\npalette: red", "'red'"),
        ("classes: [a]\nignore_index: 0", "ignore_index=0 is also class 'a'"),
        ("classes: [a]\nignore_values: 3", "ignore_values must be a list"),
        ("classes: [a]\nignore_values: [x]", "'x'"),
        ("classes: [a]\nreduce_zero_label: 1", "reduce_zero_label must be true or false, got 1"),
        ("classes: [a]\nmasks: rgb", "masks must be 'index' or 'colour', got 'rgb'"),
        ("classes: [a]\nmasks: colour", "masks are colours, but there is no palette"),
        ("classes: [a]\nignore_colours: [[0, 0, 0]]", "ignore_colours=.* does not apply to masks='index'"),
        (f"{PAINTED}reduce_zero_label: true", "reduce_zero_label=True does not apply to masks='colour'"),
        (f"{PAINTED}unknown_colours: skip", "unknown_colours must be 'refuse' or 'ignore', got 'skip'"),
        (f"{PAINTED}ignore_colours: red", "ignore_colours must be a list"),
        (f"{PAINTED}ignore_colours: [red]", "ignore_colours must hold .*, got 'red'"),
        (f"{PAINTED}ignore_colours: [[9, 0, 0]]", "ignore_colours holds .*the colour of 'a'"),
        ("classes: [a, b]\nmasks: colour\npalette: [[9, 0, 0], [9, 0, 0]]", "stands for 'a' and for 'b'"),
    ],
)
def test_dataset_file__nonsense_is_refused_with_the_file_and_the_value(text, words, tmp_path):
    path = tmp_path / "dataset.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=f"dataset.yaml'.*{words}"):
        read_dataset_file(path)


def test_dataset_file__nonsense_about_folders_is_refused_too(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    (tmp_path / "dataset.yaml").write_text("classes: [a]\nimages: 3")
    assert "dataset.yaml': images must be a text, got 3" in message_of(lambda: FolderDataset(tmp_path, "train"))


def test_dataset_file__its_absence_is_told_with_what_to_write(tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    message = message_of(lambda: FolderDataset(tmp_path, "train"))
    assert "dataset.yaml' does not exist" in message
    assert "classes: [road, tree]" in message


def test_dataset_file__colours_in_masks_become_classes(tmp_path):
    (tmp_path / "dataset.yaml").write_text(
        "classes: [leaf, fruit]\npalette: [[0, 9, 0], [9, 0, 0]]\nignore_index: -1\n"
        "masks: colour\nignore_colours: [[255, 255, 255]]\n"
    )
    write_pair(tmp_path, "train", "a", np.array([[[0, 9, 0], [9, 0, 0], [255, 255, 255]]], np.uint8))
    assert FolderDataset(tmp_path, "train")[0].mask.tolist() == [[0, 1, -1]]
    write_pair(tmp_path, "train", "a", np.array([[[0, 9, 0], [8, 0, 0], [8, 0, 0]]], np.uint8))
    message = message_of(lambda: FolderDataset(tmp_path, "train")[0])
    assert "a.png' holds the colour (8, 0, 0) in 2 pixels, but no class has it" in message


def test_folder__options_beside_given_labels_decode_colours_too(tmp_path):
    write_pair(tmp_path, "train", "a", np.array([[[0, 200, 0], [1, 1, 1]]], np.uint8))
    dataset = FolderDataset(tmp_path, "train", LABELS, masks="colour", unknown_colours="ignore")
    assert dataset[0].mask.tolist() == [[1, 255]]
    with pytest.raises(ConfigError, match=r"ignore_values=.* does not apply to masks='colour'"):
        FolderDataset(tmp_path, "train", LABELS, masks="colour", ignore_values=(3,))


def test_folder__unpaired_files_can_be_left_out_and_are_listed(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, "train", name, VALUES)
    (tmp_path / "annotations/train/a.png").unlink()
    (tmp_path / "images/train/c.png").unlink()
    dataset = FolderDataset(tmp_path, "train", LABELS, unpaired="skip")
    assert dataset.names == ("b",)
    assert [(lacks, path.rsplit("/", 1)[1]) for lacks, path in dataset.pairing.unpaired] == [
        ("mask", "a.png"),
        ("image", "c.png"),
    ]
    with pytest.raises(ConfigError, match="unpaired must be 'refuse' or 'skip', got 'drop'"):
        FolderDataset(tmp_path, "train", LABELS, unpaired="drop")


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".TIFF"])
def test_folder__masks_may_be_any_image_that_loses_nothing(suffix, tmp_path):
    write_pair(tmp_path, "train", "a", VALUES)
    path = tmp_path / "annotations/train/a.png"
    Image.open(path).save(path.with_suffix(suffix))
    path.unlink()
    assert FolderDataset(tmp_path, "train", LABELS)[0].mask.tolist() == VALUES.tolist()
