import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.pictures import LABELS
from tokenexit.data.masks import ColourMasks, IndexMasks, decode, read_index_image
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels, default_labels

VALUES = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)
RED, BLUE, WHITE, ODD = (200, 0, 0), (0, 0, 9), (255, 255, 255), (1, 2, 3)
PAINTED = Labels(("red", "blue"), (RED, BLUE))
WITH_BLACK = Labels(("none", "red"), ((0, 0, 0), RED))


def codes_of(image, mask_format, tmp_path):
    image.save(tmp_path / "m.png")
    return mask_format.read(tmp_path / "m.png")


def painted(*colours) -> Image.Image:
    return Image.fromarray(np.array([colours], np.uint8))


# ---------------------------------------------------------------------------------------------------------- indices


@given(st.integers(1, 300), st.booleans(), st.data())
def test_index_masks__every_allowed_value_becomes_its_class_or_void(num_classes, reduce_zero_label, data):
    labels = default_labels(num_classes)
    ignored = tuple(data.draw(st.lists(st.integers(0, 400), max_size=3)))
    mask_format = IndexMasks(labels, reduce_zero_label, ignored)
    first = int(reduce_zero_label)
    value = data.draw(
        st.one_of(st.integers(0, first + num_classes - 1), st.sampled_from([*ignored, labels.ignore_index]))
    )
    mask = decode(mask_format, np.full((2, 2), value, np.uint16), "m")
    void = value in ignored or value == labels.ignore_index or value < first
    assert (mask == (labels.ignore_index if void else value - first)).all()


@pytest.mark.parametrize(
    ("options", "value", "words"),
    [
        ({}, 3, r"street holds the value 3 in 1 pixel, but classes are 0\.\.2 and void is 255"),
        ({}, 70000, "value 70000"),
        ({}, -2, "value -2"),
        ({"reduce_zero_label": True}, 4, r"value 4 in 1 pixel, but classes are 1\.\.3 and void is 0, 255"),
        ({"ignore_values": (11,)}, 12, "value 12 in 1 pixel, but .* void is 11, 255"),
    ],
)
def test_index_masks__a_value_out_of_range_is_refused_with_the_range(options, value, words):
    with pytest.raises(DataError, match=words):
        decode(IndexMasks(LABELS, **options), np.array([[0, value]], np.int32), "street")


def test_index_masks__one_byte_per_pixel_where_it_suffices():
    assert decode(IndexMasks(LABELS), VALUES, "m").dtype == np.uint8
    wide = Labels(LABELS.names, LABELS.palette, ignore_index=-1)
    assert decode(IndexMasks(wide, ignore_values=(255,)), VALUES, "m").tolist() == [[0, 1, 2], [-1, 1, 0]]


@pytest.mark.parametrize("value", [-1, 65536, 1.5, True, "x"])
def test_index_masks__ignore_values_that_no_file_can_hold_are_refused(value):
    with pytest.raises(ConfigError, match="ignore_values"):
        IndexMasks(LABELS, ignore_values=(value,))


def test_index_masks__unknown_values_are_counted_the_most_frequent_first_and_become_void():
    values = np.array([[0, 9, 7], [7, 70000, -1]], np.int32)
    mask, unknown = IndexMasks(LABELS).translate(values)
    assert mask.tolist() == [[0, 255, 255], [255, 255, 255]]
    assert next(iter(unknown.items())) == ("7", 2)
    assert unknown == {"7": 2, "9": 1, "70000": 1, "-1": 1}


def test_index_masks__an_image_in_colours_is_refused_with_the_way_to_read_it(tmp_path):
    with pytest.raises(DataError, match=r"mode 'RGB', not one channel: .* 'masks: colour'"):
        codes_of(painted(RED), IndexMasks(LABELS), tmp_path)


def test_index_masks__a_missing_file_is_missing_not_damaged(tmp_path):
    for mask_format in (IndexMasks(LABELS), ColourMasks(PAINTED)):
        with pytest.raises(DataError, match=r"gone.png' does not exist"):
            mask_format.read(tmp_path / "gone.png")


# ---------------------------------------------------------------------------------------------------------- colours


@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([255, -1, 4000]))
def test_colour_masks__what_was_painted_with_the_palette_is_read_back(num_classes, seed, ignore_index):
    default = default_labels(num_classes)
    labels = Labels(default.names, default.palette, ignore_index)
    mask = np.random.default_rng(seed).integers(-1, num_classes, (3, 5))
    palette = np.array([*labels.palette, WHITE])  # no class of the default palette is white before 2**24 - 1
    pixels = palette[mask]
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    read = decode(ColourMasks(labels, ignore_colours=(WHITE,)), codes, "m")
    assert (read == np.where(mask < 0, ignore_index, mask)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_masks__rgb_rgba_and_palette_images_mean_the_same(mode, tmp_path):
    image = painted(RED, BLUE, BLUE)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert image.mode == mode
    mask_format = ColourMasks(PAINTED)
    assert decode(mask_format, codes_of(image, mask_format, tmp_path), "m").tolist() == [[0, 1, 1]]


def test_colour_masks__grey_images_are_colours_too(tmp_path):
    mask_format = ColourMasks(Labels(("grey",), ((7, 7, 7),)), ignore_colours=((0, 0, 0),))
    codes = codes_of(Image.fromarray(np.array([[7, 0]], np.uint8)), mask_format, tmp_path)
    assert decode(mask_format, codes, "m").tolist() == [[0, 255]]


def test_colour_masks__transparent_pixels_are_void_or_the_black_class_whatever_colour_they_hide(tmp_path):
    image = painted((*RED, 255), (*RED, 1), (*RED, 0), (*ODD, 0))
    for labels, expected in ((PAINTED, [0, 0, 255, 255]), (WITH_BLACK, [1, 1, 0, 0])):
        mask_format = ColourMasks(labels)
        assert decode(mask_format, codes_of(image, mask_format, tmp_path), "m").tolist() == [expected]


def test_colour_masks__an_unknown_colour_is_refused_with_its_count_or_ignored(tmp_path):
    image = painted(RED, ODD, ODD, WHITE, BLUE)
    strict, lax = ColourMasks(PAINTED), ColourMasks(PAINTED, unknown_colours="ignore")
    with pytest.raises(
        DataError, match=r"street holds the colour \(1, 2, 3\) in 2 pixels \(and 1 further colour\), but no class"
    ):
        decode(strict, codes_of(image, strict, tmp_path), "street")
    assert decode(lax, codes_of(image, lax, tmp_path), "street").tolist() == [[0, 255, 255, 255, 1]]
    assert lax.translate(codes_of(image, lax, tmp_path))[1] == {"(1, 2, 3)": 2, "(255, 255, 255)": 1}


def test_colour_masks__sixteen_bits_and_damage_are_refused(tmp_path):
    with pytest.raises(DataError, match="mode 'I;16', not 8-bit colour"):
        codes_of(Image.fromarray(np.array([[7]], np.uint16)), ColourMasks(PAINTED), tmp_path)
    (tmp_path / "m.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"m.png' cannot be decoded"):
        ColourMasks(PAINTED).read(tmp_path / "m.png")


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (Labels(("a", "b"), (RED, RED)), {}, r"\(200, 0, 0\) stands for 'a' and for 'b'"),
        (PAINTED, {"ignore_colours": (RED,)}, "the colour of 'red'"),
        (PAINTED, {"ignore_colours": ((1, 2),)}, r"three whole numbers from 0 to 255 each, got \(1, 2\)"),
        (PAINTED, {"unknown_colours": "drop"}, "unknown_colours must be 'refuse' or 'ignore', got 'drop'"),
    ],
)
def test_colour_masks__a_colour_with_two_meanings_is_refused(labels, options, words):
    with pytest.raises(ConfigError, match=words):
        ColourMasks(labels, **options)


@pytest.mark.parametrize("read", [read_index_image, ColourMasks(PAINTED).read], ids=["index", "colour"])
def test_masks__are_read_in_the_formats_of_images_only(read, tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "m.png", "EPS")
    with pytest.raises(DataError, match=r"m\.png' cannot be decoded \(no PNG, JPEG"):
        read(tmp_path / "m.png")
