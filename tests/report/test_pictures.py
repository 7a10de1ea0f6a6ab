"""Images show exactly the classes and exits that they were given."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tokenexit.errors import ConfigError, DataError
from tokenexit.report.pictures import (
    VOID_COLOUR,
    colorize,
    data_uri,
    exit_colours,
    exit_legend,
    exit_map,
    overlay,
    palette_png,
    panel,
)

PALETTE = ((128, 64, 128), (0, 0, 230), (107, 142, 35))
label_maps = hnp.arrays(
    st.sampled_from([np.int64, np.uint8]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=7),
    elements=st.sampled_from([0, 1, 2, 255]),
)


def photo(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -------------------------------------------------------------------------------------------------- label maps


@given(label_maps)
@settings(max_examples=40)
def test_colorize_and_palette_png__give_every_pixel_the_colour_of_its_class(labels):
    before = labels.copy()
    colours, index = np.asarray(colorize(labels, PALETTE)), palette_png(labels, PALETTE)
    for (y, x), label in np.ndenumerate(labels):
        assert tuple(colours[y, x]) == (VOID_COLOUR if label == 255 else PALETTE[label])
    assert index.mode == "P"
    np.testing.assert_array_equal(np.asarray(index), labels)
    np.testing.assert_array_equal(np.asarray(index.convert("RGB")), colours)
    np.testing.assert_array_equal(labels, before)


def test_palette_png__saved_and_read_again_is_the_mask():
    labels = torch.tensor([[0, 1, 2], [2, -100, 0]])
    buffer = io.BytesIO()
    palette_png(labels, PALETTE, ignore_index=-100).save(buffer, "PNG")
    again = Image.open(buffer)
    assert np.asarray(again).tolist() == [[0, 1, 2], [2, 255, 0]]


def test_overlay__blends_classes_and_leaves_void_as_it_was():
    image = Image.new("RGB", (3, 1), (100, 200, 50))
    mixed = np.asarray(overlay(image, [[0, 1, 255]], PALETTE, alpha=0.5))
    assert abs(mixed[0, 0].astype(int) - (114, 132, 89)).max() <= 1
    assert mixed[0, 2].tolist() == [100, 200, 50]
    assert np.array_equal(overlay(image, [[0, 1, 2]], PALETTE, alpha=1.0), colorize([[0, 1, 2]], PALETTE))
    assert np.array_equal(overlay(image, [[0, 1, 2]], PALETTE, alpha=0.0), image)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: colorize([[0, 3]], PALETTE), DataError, "class 3, the palette has 3 colours"),
        (lambda: colorize([[-1]], PALETTE), DataError, "class -1"),
        (lambda: colorize([[0.5]], PALETTE), DataError, "whole numbers, got .* float64"),
        (lambda: colorize([0, 1], PALETTE), DataError, r"shape \(2,\)"),
        (lambda: palette_png([[0]], [(0, 0, 0)] * 256), ConfigError, "256 colours"),
        (lambda: overlay(photo(2, 3), [[0]], PALETTE), DataError, "image is 2x3 .* labels is 1x1"),
        (lambda: overlay(photo(1, 1), [[0]], PALETTE, alpha=2), ConfigError, r"alpha must lie in \[0, 1\], got 2"),
        (lambda: exit_map([[0, 3]], 2, (4, 4)), DataError, r"values 0\.\.2"),
        (lambda: exit_map(np.zeros((0, 2), int), 2, (4, 4)), DataError, r"shape \(0, 2\)"),
        (lambda: exit_map([[0]], 2, (4, 4), image=photo(3, 4)), DataError, "image is 3x4 .* size is 4x4"),
        (lambda: exit_legend(2, [4]), ConfigError, "one value per exit, 2, got 1"),
        (lambda: panel([]), ConfigError, "images is empty"),
    ],
)
def test_impossible_images__are_refused_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- exit maps


def lightness(colour):
    """CIE L* of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("num_exits", [1, 2, 3, 4, 6, 11])
def test_exit_colours__darken_by_visible_steps_so_that_order_shows_without_hue(num_exits):
    levels = [lightness(colour) for colour in exit_colours(num_exits)]
    assert len(levels) == num_exits + 1
    steps = [a - b for a, b in pairwise(levels)]
    assert min(steps) > 50 / num_exits


def test_exit_colours__of_a_network_without_exits_is_the_colour_of_the_end():
    assert exit_colours(0) == (exit_colours(3)[-1],)


def test_exit_legend__names_the_colours_of_the_map_in_order():
    legend = exit_legend(2, [4, 8])
    assert [entry.label for entry in legend] == [
        "Exit 1 (after block 4)",
        "Exit 2 (after block 8)",
        "Stayed to the end",
    ]
    drawn = np.asarray(exit_map([[0, 1, 2]], 2, (1, 3)))[0]
    assert [entry.colour for entry in legend] == [tuple(c) for c in drawn.tolist()]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=40)
def test_exit_map__gives_each_pixel_the_token_whose_patch_holds_it(height, width, patch, seed):
    grid = (-(-height // patch), -(-width // patch))
    stage = np.random.default_rng(seed).integers(0, 4, grid)
    drawn = np.asarray(exit_map(torch.from_numpy(stage), 3, (height, width), extent=(height / patch, width / patch)))
    colours = exit_colours(3)
    for y in range(height):
        for x in range(width):
            assert tuple(drawn[y, x]) == colours[stage[y // patch, x // patch]]


def test_exit_map__over_an_image_shows_its_grey_and_keeps_equal_tokens_apart_by_it():
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    over = np.asarray(exit_map([[1]], 1, (1, 2), image=image, alpha=0.5)).astype(int)
    end = np.array(exit_colours(1)[1])
    assert abs(over[0, 0] - end / 2).max() <= 1
    assert abs(over[0, 1] - (end + 255) / 2).max() <= 1


def test_exit_map__draws_lines_between_tokens_only():
    plain = np.asarray(exit_map([[1, 1], [1, 1]], 1, (6, 8)))
    lined = np.asarray(exit_map([[1, 1], [1, 1]], 1, (6, 8), grid=True))
    changed = (plain != lined).any(axis=2)
    assert set(zip(*np.nonzero(changed))) == {(3, x) for x in range(8)} | {(y, 4) for y in range(6)}


# ----------------------------------------------------------------------------------------------- panel and data


def test_exit_map__draws_lines_between_groups_of_merged_tokens_only():
    index, groups = np.zeros((2, 3), dtype=int), np.array([[0, 0, 2], [0, 0, 5]])
    plain, lined = (np.asarray(exit_map(index, 1, (8, 12), groups=each)) for each in (None, groups))
    changed = (plain != lined).any(axis=2)
    assert changed[:, 8].all()  # between the group of four cells and those on the right
    assert changed[4, 8:].all()
    assert not changed[:, :8].any()
    assert not changed[:4, 9:].any()


def test_panel__puts_images_side_by_side_at_one_height_under_their_titles():
    red, blue = Image.new("RGB", (40, 20), (255, 0, 0)), Image.new("RGB", (30, 60), (0, 0, 255))
    sheet = panel([("a title far too long for its image", red), ("b", blue)], height=30, gap=10)
    assert sheet.width == 10 + 60 + 10 + 15 + 10
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 60 * 30
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == 15 * 30
    text_rows = pixels[: sheet.height - 30 - 10]
    assert (text_rows[:, 10:70] < 128).any()
    assert (text_rows[:, 70:80] == 255).all()


def test_panel__shrinks_index_images_without_inventing_classes():
    mask = palette_png(np.repeat([[0, 1]], 40, axis=0).repeat(20, axis=1), PALETTE)
    colours = {tuple(c) for c in np.asarray(panel([("", mask)], height=7, gap=0))[-7:].reshape(-1, 3)}
    assert colours == set(PALETTE[:2])


def test_data_uri__keeps_drawings_exact_and_photographs_small():
    import base64

    def decoded(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    drawing = colorize(np.arange(12).reshape(3, 4) % 3, PALETTE)
    uri, size = data_uri(drawing)
    assert uri.startswith("data:image/png;base64,")
    assert size == (4, 3)
    assert np.array_equal(decoded(uri).convert("RGB"), drawing)

    uri, size = data_uri(photo(150, 300), max_side=100)
    assert size == (100, 50) == decoded(uri).size
    assert uri.startswith(("data:image/webp", "data:image/jpeg"))
