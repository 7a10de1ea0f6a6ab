"""Images of every kind come in, one kind of tensor goes out, and everything that makes it is saved."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import FORMATS, load_image
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.inputs.preprocessing import Preprocessing, resized_size

# ---------------------------------------------------------------------------------------------------- labels

colours = st.tuples(*[st.integers(0, 255)] * 3)
names = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6, unique=True)


@st.composite
def any_labels(draw):
    given_names = draw(names)
    palette = tuple(draw(colours) for _ in given_names)
    ignore = draw(st.integers(-100, 300).filter(lambda v: not 0 <= v < len(given_names)))
    return Labels(tuple(given_names), palette, ignore)


def test_labels__lists_become_tuples_so_that_equal_labels_are_equal():
    a = Labels(["a", "b"], [[0, 0, 0], [1, 2, 3]])
    b = Labels(("a", "b"), ((0, 0, 0), (1, 2, 3)))
    assert a == b
    assert hash(a) == hash(b)
    assert a.num_classes == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ()}, "names is empty"),
        ({"names": ("a", "a")}, "'a' more than once"),
        ({"names": ("a", " ")}, "' '"),
        ({"names": ("a", True)}, "True"),
        ({"names": "ab"}, "'ab'"),
        ({"palette": ((0, 0, 0),)}, "1 colours for 2 class names"),
        ({"palette": ((0, 0, 0), (0, 0, 256))}, "256"),
        ({"palette": ((0, 0, 0), (0, 0))}, r"\(0, 0\)"),
        ({"palette": ((0, 0, 0), (0, 0, 1.5))}, "1.5"),
        ({"palette": 7}, "7"),
        ({"ignore_index": 1}, "ignore_index=1 is also class 'b'"),
        ({"ignore_index": "x"}, "'x'"),
    ],
)
def test_labels__nonsense_is_refused_by_name_and_value(changes, words):
    with pytest.raises(ConfigError, match=words):
        Labels(**{"names": ("a", "b"), "palette": ((0, 0, 0), (1, 1, 1)), **changes})


@pytest.mark.parametrize("num_classes", [1, 2, 19, 150, 255, 256, 847])
def test_default_labels__every_class_has_its_own_colour_and_none_is_black(num_classes):
    labels = default_labels(num_classes)
    assert labels.num_classes == num_classes == len(set(labels.palette))
    assert (0, 0, 0) not in labels.palette
    assert labels.names[-1] == f"class_{num_classes - 1}"


def test_default_labels__first_colours_do_not_depend_on_the_number_of_classes():
    assert default_labels(20).palette[:5] == default_labels(5).palette
    assert default_labels(3).palette == ((128, 0, 0), (0, 128, 0), (128, 128, 0))


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0])
def test_default_labels__a_number_of_classes_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="num_classes"):
        default_labels(wrong)


# --------------------------------------------------------------------------------------------- preprocessing

finite = st.floats(-2, 2, allow_nan=False)
positive = st.floats(1e-3, 2)
resizes = st.one_of(st.just("none"), st.integers(1, 2000), st.tuples(st.integers(1, 2000), st.integers(1, 2000)))


strides = st.tuples(st.integers(1, 400), st.integers(1, 400))
windows = st.just((None, None)) | st.tuples(
    st.tuples(*[st.integers(400, 999)] * 2), st.none() | st.just("even") | strides
)


@given(st.tuples(*[finite] * 3), st.tuples(*[positive] * 3), resizes, st.none() | any_labels(), windows)
def test_preprocessing__survives_json(mean, std, resize, labels, window):
    preprocessing = Preprocessing(mean, std, resize, labels, *window)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_preprocessing__keys_left_out_take_their_defaults():
    assert Preprocessing.from_dict({}) == Preprocessing()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"means": [0, 0, 0]}, "unknown key 'means'"),
        ({"mean": [0, 0]}, r"mean=\[0, 0\]"),
        ({"mean": [0, 0, float("nan")]}, "nan"),
        ({"std": [1, 0, 1]}, "divide by zero"),
        ({"std": "0.5"}, "'0.5'"),
        ({"resize": 0}, "resize=0"),
        ({"resize": "big"}, "'big'"),
        ({"resize": [224, 224, 3]}, "224, 224, 3"),
        ({"resize": True}, "True"),
        ({"labels": {"names": ["a"]}}, "lacks the key 'palette'"),
        ({"labels": 5}, "labels is 5"),
        ({"window": 0}, r"preprocessing\.window=0 is no size: give one side in pixels, or a \(height, width\) pair"),
        ({"window": [10**6, 512]}, r"window=\[1000000, 512\] is no size: .* of 1 to 8192 each"),
        ({"resize": [30000, 30000]}, r"resize=\[30000, 30000\] is no size: .* of 1 to 8192 each"),
        ({"resize": 2**31}, r"resize=2147483648 is no size"),
        ({"mean": [10**5000, 0, 0]}, r"mean=\[a number of more|mean=.* is no colour"),
        ({"labels": {"names": ["a"], "palette": [[1, 2, 3]], "ignore_index": 2**40}}, "ignore_index is 1099511627776"),
        ({"window": [512]}, r"window=\[512\]"),
        ({"window": [512, 512.0]}, r"window=\[512, 512\.0\]"),
        ({"window": "512"}, "window='512'"),
        ({"window": True}, "window=True"),
        ({"window": 512, "stride": [341, -1]}, r"stride=\[341, -1\]"),
        ({"window": 512, "stride": [512, 513]}, r"stride=\(512, 513\) is longer than .*window=\(512, 512\)"),
        ({"window": 512, "stride": "odd"}, r"stride='odd' is no size: .* of 1 to 8192 each, or \"even\"\."),
        ({"stride": "even"}, "stride='even' has no preprocessing.window: give both, or neither"),
        ({"stride": 341}, "stride=341 has no preprocessing.window: give both, or neither"),
        ([], "mapping"),
    ],
)
def test_preprocessing__nonsense_is_refused_by_name_and_value(values, words):
    with pytest.raises(ConfigError, match=words):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize(
    ("window", "stride", "pairs"),
    [
        (None, None, (None, None)),
        (512, 341, ((512, 512), (341, 341))),
        ([768, 800], 512, ((768, 800), (512, 512))),
        ((480, 320), None, ((480, 320), (480, 320))),
        (512, "even", ((512, 512), "even")),
    ],
)
def test_preprocessing__a_number_is_a_square_and_windows_touch_without_a_stride(window, stride, pairs):
    preprocessing = Preprocessing(window=window, stride=stride)
    assert (preprocessing.window, preprocessing.stride) == pairs


def test_to_tensor__subtracts_mean_and_divides_by_std_per_channel():
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    tensor = Preprocessing(mean=(0.0, 0.1, 0.5), std=(1.0, 0.1, 0.25)).to_tensor(image)
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("resize", "expected"),
    [("none", (30, 40)), (15, (15, 20)), (60, (60, 80)), ((10, 50), (10, 50)), (1, (1, 1))],
)
def test_to_tensor__resize_is_none_or_shortest_side_or_height_and_width(resize, expected):
    tensor = Preprocessing(resize=resize).to_tensor(Image.new("RGB", (40, 30)))
    assert tuple(tensor.shape[1:]) == expected


@pytest.mark.parametrize(
    ("resize", "scale", "expected"),
    [
        ("none", 0.9, (27, 36)),
        ("none", 0.85, (26, 34)),
        (15, 2.0, (30, 40)),
        ((10, 50), 0.5, (5, 25)),
        (1, 0.1, (1, 1)),
    ],
)
def test_to_tensor__scale_multiplies_both_sides_and_resizes_once(resize, scale, expected):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8))
    tensor = Preprocessing(resize=resize).to_tensor(image, scale)
    assert tuple(tensor.shape[1:]) == expected
    assert torch.equal(tensor, Preprocessing(resize=expected).to_tensor(image))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000))
def test_resized_size__shortest_side_is_exact_and_the_other_within_half_a_pixel(height, width, side):
    new = resized_size((height, width), side)
    assert min(new) == side
    assert abs(max(new) - side * max(height, width) / min(height, width)) <= 0.5 + 1e-6


def test_normalise__keeps_the_size_whatever_resize_says():
    assert Preprocessing(resize=7).normalise(Image.new("RGB", (40, 30))).shape == (3, 30, 40)


def test_normalise__refuses_what_is_not_rgb():
    with pytest.raises(DataError, match="mode 'L'"):
        Preprocessing().normalise(Image.new("L", (4, 4)))


# --------------------------------------------------------------------------------------- images: what comes in


def pixel(image, xy=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(xy)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 40, (40, 40, 40)),
        ("I;16", 128, (0, 0, 0)),
        ("I;16", 129, (1, 1, 1)),
        ("I;16B", 257 * 40, (40, 40, 40)),
        ("I", 257 * 200, (200, 200, 200)),
        ("F", 0.2, (51, 51, 51)),
    ],
)
def test_load_image__every_mode_becomes_rgb(mode, colour, expected):
    assert pixel(load_image(Image.new(mode, (3, 2), colour))) == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_load_image__a_png_of_any_mode_reads_as_the_image_in_memory(mode, tmp_path):
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.full((3, 4), 65535, np.uint16))
    image.save(tmp_path / "x.png")
    assert pixel(load_image(tmp_path / "x.png")) == (255, 255, 255)


def test_load_image__half_transparent_pixels_are_darkened_and_palette_transparency_counts(tmp_path):
    assert pixel(load_image(Image.new("RGBA", (1, 1), (200, 100, 0, 128)))) == (100, 50, 0)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    image = load_image(tmp_path / "p.png")
    assert (pixel(image, (0, 0)), pixel(image, (1, 0))) == ((0, 0, 0), (200, 100, 50))


def test_load_image__transparent_images_lie_on_black_or_on_a_colour_that_is_given():
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    for source in (image, np.asarray(image)):
        assert pixel(load_image(source, background=(255, 255, 255))) == (227, 177, 127)
        assert pixel(load_image(source, background=(0, 0, 200))) == (100, 50, 100)
    assert pixel(load_image(Image.new("RGB", (1, 1), (1, 2, 3)), background=(9, 9, 9))) == (1, 2, 3)
    for wrong in ((0, 0), (0, 0, 256), (0.5, 0, 0)):
        with pytest.raises(ConfigError, match="background must be three whole numbers from 0 to 255, got"):
            load_image(image, background=wrong)


def test_load_image__follows_the_exif_orientation_of_files_and_of_open_images(tmp_path):
    image = Image.new("RGB", (16, 8), (250, 0, 0))
    image.paste((0, 0, 250), (8, 0, 16, 8))  # left red, right blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(tmp_path / "x.png", exif=exif)
    for source in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        upright = load_image(source)
        assert upright.size == (8, 16)
        assert pixel(upright, (4, 1))[0] == 250  # the left half is on top now
        assert load_image(upright).size == (8, 16)  # and turned only once


def test_load_image__damaged_exif_data_do_not_cost_the_image(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "x.png", exif=b"Exif\x00\x00garbage")
    assert pixel(load_image(tmp_path / "x.png")) == (1, 2, 3)


def test_load_image__takes_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert pixel(load_image(tmp_path / "x.gif")) == (255, 0, 0)


def test_load_image__takes_paths_strings_bytes_and_open_files_alike(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4), (5, 6, 7)).save(path)
    with path.open("rb") as file:
        sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file]
        assert [pixel(load_image(s)) for s in sources] == [(5, 6, 7)] * 5


def test_load_image__leaves_the_given_image_as_it_is():
    image = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    load_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (9, 9, 9, 0)


# ------------------------------------------------------------------------------------------------------ arrays

SHAPES = [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "full"),
    [(np.uint8, 255), (np.uint16, 65535), (np.float16, 1), (np.float32, 1), (np.float64, 1), (np.bool_, 1)],
)
def test_load_image__arrays_of_every_known_type_are_white_at_their_largest_value(shape, dtype, full):
    image = load_image(np.full(shape, full, dtype))
    assert image.size == (3, 2)
    assert pixel(image) == (255, 255, 255)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
@settings(max_examples=40)
def test_load_image__an_rgb_array_comes_back_unchanged(array):
    assert np.array_equal(np.asarray(load_image(array)), array)
    assert np.array_equal(np.asarray(load_image(array[:, ::-1])), array[:, ::-1])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=40)
def test_load_image__floats_and_16_bits_agree_with_8_bits(array):
    expected = np.asarray(load_image(array))
    assert np.array_equal(np.asarray(load_image(array / 255.0)), expected)
    assert np.array_equal(np.asarray(load_image(array.astype(np.uint16) * 257)), expected)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4,), np.uint8), r"shape \(4,\)"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((3, 4, 5), np.uint8), "channels first"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \(1, 4, 4, 3\)"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros((4, 0, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), np.complex64), "complex64"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), np.inf), "infinite"),
        (np.full((4, 4), 255.0), "from 255 to 255"),
        (np.full((4, 4), -0.1), "-0.1"),
    ],
)
def test_load_image__arrays_that_are_no_images_are_refused_by_shape_and_type(array, words):
    with pytest.raises(DataError, match=words):
        load_image(array)


# ------------------------------------------------------------------------------------------------ what is refused


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert error.value.__cause__ is None
    return message


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_load_image__what_is_no_image_is_refused_by_file_name(content, tmp_path):
    path = tmp_path / "street.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_image(path)
    assert "street.png" in one_sentence(error)


@pytest.fixture
def foreign_decoders(monkeypatch):
    """Which of Pillow's other decoders were asked to open a file."""
    asked = []
    Image.init()
    for kind, (_, accept) in list(Image.OPEN.items()):
        if kind not in FORMATS:
            refuse = lambda *given, kind=kind: asked.append(kind) or pytest.fail(kind)  # noqa: E731
            monkeypatch.setitem(Image.OPEN, kind, (refuse, accept))
    return asked


def postscript():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 scale\nshowpage\n%%EOF\n"


def photo_cd():
    """A whole TIFF whose bytes from 2048 on are those of a Photo CD."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    data[2048:2052] = b"PCD_"
    return bytes(data)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICNS", "PDF"])
def test_load_image__a_name_opens_no_other_decoder(kind, tmp_path, foreign_decoders):
    path = tmp_path / "holiday.jpg"
    Image.new("RGB", (16, 16)).save(path, kind)
    for source in (path, path.read_bytes()):
        with pytest.raises(DataError, match=r"no PNG, JPEG, .* or JPEG2000"):
            load_image(source)
    assert not foreign_decoders


def test_load_image__postscript_does_not_start_ghostscript(tmp_path, foreign_decoders):
    (tmp_path / "holiday.jpg").write_bytes(postscript())
    with pytest.raises(DataError, match=r"holiday\.jpg' cannot be decoded \(no PNG"):
        load_image(tmp_path / "holiday.jpg")
    assert not foreign_decoders


def test_load_image__a_tiff_is_decoded_as_tiff_whatever_stands_in_it(foreign_decoders):
    assert pixel(load_image(photo_cd())) == (1, 2, 3)
    assert not foreign_decoders


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in Image.registered_extensions().values()])
def test_load_image__reads_every_format_that_it_names(kind, tmp_path):
    Image.new("RGB", (16, 16), (120, 60, 30)).save(tmp_path / "x", kind)
    assert np.allclose(pixel(load_image(tmp_path / "x")), (120, 60, 30), atol=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_load_image__a_truncated_file_is_refused_by_file_name(suffix, share, tmp_path):
    path = tmp_path / f"street.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for source in (path, path.read_bytes()):
        with pytest.raises(DataError) as error:
            load_image(source)
        assert "undamaged" in one_sentence(error)


def test_load_image__a_lazily_opened_truncated_image_is_refused(tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(Image.open(path))


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_load_image__a_damaged_file_gives_an_image_or_a_data_error_and_nothing_else(data):
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert load_image(bytes(content), max_pixels=1_000_000).mode == "RGB"


def test_load_image__a_missing_file_a_folder_and_an_impossible_name_are_refused(tmp_path):
    for source in (tmp_path / "nowhere.png", tmp_path, "a\0b"):
        with pytest.raises(DataError) as error:
            load_image(source)
        one_sentence(error)
    with pytest.raises(DataError, match=r"nowhere\.png' does not exist"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("source", [None, 5, [1, 2], torch.zeros(3, 4, 4)])
def test_load_image__things_that_are_no_sources_are_refused_by_type(source):
    with pytest.raises(DataError, match=type(source).__name__):
        load_image(source)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_load_image__an_image_without_pixels_is_refused(size):
    with pytest.raises(DataError, match="no pixels"):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize(("mode", "words"), [("I", "more than 16 bits"), ("F", "scale floats")])
def test_load_image__values_out_of_range_are_refused(mode, words):
    with pytest.raises(DataError, match=words):
        load_image(Image.new(mode, (2, 2), 70000))


def test_load_image__more_than_max_pixels_are_refused_before_decoding(tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", max_pixels=5000).size == (100, 50)
    for source in (tmp_path / "x.png", Image.new("L", (100, 50)), np.zeros((50, 100), np.uint8)):
        with pytest.raises(DataError, match="50x100 pixels, more than max_pixels=4999"):
            load_image(source, max_pixels=4999)


def test_load_image__a_decompression_bomb_is_refused_without_being_decoded(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path: Path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.png"):
        load_image(path)
    with pytest.raises(DataError, match=r"bomb\.png' has far more than 10000 pixels: shrink it\."):
        load_image(path, max_pixels=10_000)
