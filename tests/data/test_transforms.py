import colorsys
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.pictures import tiny_sample
from tokenexit.data.base import Sample
from tokenexit.data.transforms import (
    Compose,
    Foreign,
    Pad,
    PhotometricDistortion,
    RandomCrop,
    RandomFlip,
    RandomResize,
    Resize,
    fit_into,
    largest_class_share,
    resize_mask,
    training_transform,
)
from tokenexit.errors import ConfigError

sides = st.integers(1, 40)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixels(sample: Sample) -> np.ndarray:
    return np.asarray(sample.image)


def agrees(sample: Sample) -> bool:
    """Whether image and mask still show the same thing at the same place (see tiny_sample)."""
    shown = np.where(sample.mask == 255, 3, sample.mask) * 40
    return np.array_equal(pixels(sample)[:, :, 0], shown)


# ---------------------------------------------------------------------------------------------------- resizing


@given(sides, sides, sides, sides)
def test_resize__image_and_mask_get_exactly_the_size_asked_for(height, width, new_height, new_width):
    sample = Resize((new_height, new_width))(tiny_sample(height, width), rng())
    assert sample.size == sample.mask.shape == (new_height, new_width)


def test_resize__one_number_is_the_shortest_side():
    assert Resize(6)(tiny_sample(12, 16), rng()).size == (6, 8)
    assert Resize(24)(tiny_sample(16, 12), rng()).size == (32, 24)


@given(sides, sides, sides, sides, st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]))
def test_resize_mask__takes_the_nearest_value_as_pillow_does_and_invents_none(h, w, new_h, new_w, dtype):
    mask = rng(h * 41 + w).integers(0, 256, (h, w)).astype(np.uint8)
    resized = resize_mask(mask.astype(dtype), (new_h, new_w))
    assert resized.dtype == dtype
    assert set(np.unique(resized)) <= set(np.unique(mask))
    if (new_h % h, new_w % w) == (0, 0):  # elsewhere a centre may fall on a border, and both sides are nearest
        expected = Image.fromarray(mask).resize((new_w, new_h), Image.Resampling.NEAREST)
        assert np.array_equal(resized, np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),  # the short side limits
        ((512, 4096), (2048, 512), (256, 2048)),  # the long side limits
        ((683, 512), (512, 2048), (683, 512)),  # the order within the box does not matter
        ((360, 480), (960, 720), (720, 960)),
        ((1, 1000), (10, 10), (1, 10)),  # never less than one pixel
    ],
)
def test_fit_into__long_and_short_side_stay_within_the_box(size, box, expected):
    assert fit_into(size, box) == expected


@given(sides, sides, st.integers(0, 1000), st.booleans())
def test_random_resize__stays_within_the_ratio_of_the_base(height, width, seed, with_base):
    base = (30, 20) if with_base else None
    new = RandomResize((0.5, 2.0), base)(tiny_sample(height, width), rng(seed)).size
    long, short = base or (max(height, width), min(height, width))
    assert 1 <= max(new) <= 2.0 * long + 0.5
    assert 1 <= min(new) <= 2.0 * short + 0.5


def test_random_resize__a_fixed_ratio_of_one_gives_the_base():
    assert RandomResize((1.0, 1.0), (32, 32))(tiny_sample(12, 16), rng()).size == (24, 32)
    sample = tiny_sample(12, 16)
    assert RandomResize((1.0, 1.0))(sample, rng()) is sample


# ------------------------------------------------------------------------------------------------------ cropping


@given(sides, sides, sides, sides, st.integers(0, 1000))
def test_random_crop__is_a_window_of_the_image_with_its_own_mask(height, width, crop_h, crop_w, seed):
    sample = RandomCrop((crop_h, crop_w))(tiny_sample(height, width), rng(seed))
    assert sample.size == (min(height, crop_h), min(width, crop_w))
    assert agrees(sample)


def half_sky(share: float) -> Sample:
    """10 rows and 40 columns, the left `share` of the columns class 0 and the rest class 1."""
    mask = np.ones((10, 40), np.uint8)
    mask[:, : int(40 * share)] = 0
    return Sample(Image.new("RGB", (40, 10)), mask, "sky")


def shares(crop: RandomCrop, sample: Sample, draws: int = 200) -> np.ndarray:
    return np.array([largest_class_share(crop(sample, rng(s)).mask, 255) for s in range(draws)])


def test_random_crop__avoids_windows_that_one_class_fills():
    careless = shares(RandomCrop((10, 10), 1.0), half_sky(0.5)).mean()
    careful = shares(RandomCrop((10, 10), 0.75), half_sky(0.5))
    assert careless > 0.85
    assert (careful < 0.75).mean() > 0.75  # ten tries, each good with probability of about one in six


def test_random_crop__gives_up_where_no_window_can_be_better():
    assert shares(RandomCrop((10, 10), 0.75), half_sky(1.0), draws=3).tolist() == [1.0] * 3


def test_random_crop__void_pixels_do_not_count():
    mask = np.full((4, 8), 255, np.uint8)
    mask[0, :2] = (0, 1)
    assert largest_class_share(mask, 255) == 0.5
    assert largest_class_share(np.full((2, 2), 255, np.uint8), 255) == 1.0
    assert largest_class_share(np.array([[0, -1], [0, 1]]), -1) == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------- flipping and padding


def test_random_flip__turns_image_and_mask_together():
    sample = tiny_sample()
    flipped = RandomFlip(1.0)(sample, rng())
    assert np.array_equal(flipped.mask, sample.mask[:, ::-1])
    assert np.array_equal(pixels(flipped), pixels(sample)[:, ::-1])
    assert RandomFlip(0.0)(sample, rng()) is sample


def test_random_flip__happens_about_half_the_time():
    sample = tiny_sample()
    flips = sum(RandomFlip()(sample, rng(s)) is not sample for s in range(400))
    assert 150 < flips < 250


def test_pad__adds_void_at_the_right_and_at_the_bottom():
    sample = tiny_sample(12, 16)
    padded = Pad((20, 18), fill=(1, 2, 3))(sample, rng())
    assert padded.size == (20, 18)
    assert np.array_equal(padded.mask[:12, :16], sample.mask)
    assert np.array_equal(pixels(padded)[:12, :16], pixels(sample))
    assert (padded.mask[12:] == 255).all()
    assert (padded.mask[:, 16:] == 255).all()
    assert pixels(padded)[19, 17].tolist() == [1, 2, 3]


def test_pad__leaves_larger_images_alone_and_pads_each_side_on_its_own():
    sample = tiny_sample(12, 16)
    assert Pad((10, 10))(sample, rng()) is sample
    assert Pad((20, 10))(sample, rng()).size == (20, 16)


@pytest.mark.parametrize("ignore_index", [-1, 255, 65535])
def test_pad__the_mask_type_grows_where_it_cannot_hold_the_ignore_index(ignore_index):
    padded = Pad((13, 16), ignore_index)(tiny_sample(12, 16), rng())
    assert padded.mask[12, 0] == ignore_index


# ----------------------------------------------------------------------------------------------------------- colour


def one_pixel(colour: tuple[int, int, int]) -> Sample:
    return Sample(Image.new("RGB", (1, 1), colour), np.zeros((1, 1), np.uint8), "pixel")


colours = st.tuples(*[st.integers(0, 255)] * 3)


@given(colours, st.integers(0, 10_000))
def test_photometric__brightness_moves_all_channels_by_one_shift_within_its_range(colour, seed):
    only = PhotometricDistortion(contrast=(1, 1), saturation=(1, 1), hue=0)
    moved = pixels(only(one_pixel(colour), rng(seed)))[0, 0].astype(int)
    assert (np.abs(moved - colour) <= 32).all()
    inside = [int(m - c) for m, c in zip(moved, colour) if 0 < m < 255]
    assert len(set(inside)) <= 1


@given(colours, st.integers(0, 10_000))
def test_photometric__contrast_scales_all_channels_by_one_factor_within_its_range(colour, seed):
    only = PhotometricDistortion(brightness=0, saturation=(1, 1), hue=0)
    scaled = pixels(only(one_pixel(colour), rng(seed)))[0, 0]
    for new, old in zip(scaled, colour):
        assert 0.5 * old - 0.5 <= new <= min(1.5 * old + 0.5, 255)


@given(colours, st.integers(0, 10_000))
def test_photometric__saturation_and_hue_keep_the_brightest_channel(colour, seed):
    only = PhotometricDistortion(brightness=0, contrast=(1, 1))
    changed = pixels(only(one_pixel(colour), rng(seed)))[0, 0]
    assert abs(int(changed.max()) - max(colour)) <= 1


def test_photometric__hue_turns_by_at_most_its_share_of_the_circle():
    only = PhotometricDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1))
    turns = []
    for seed in range(300):
        red, green, blue = pixels(only(one_pixel((200, 40, 40)), rng(seed)))[0, 0] / 255.0
        hue = colorsys.rgb_to_hsv(red, green, blue)[0]
        turns.append((hue + 0.5) % 1.0 - 0.5)
    assert max(np.abs(turns)) <= 18 / 180 + 2 / 256
    assert min(turns) < -0.07
    assert max(turns) > 0.07


def test_photometric__grey_stays_grey_and_the_mask_stays_the_same():
    sample = one_pixel((90, 90, 90))
    for seed in range(50):
        changed = PhotometricDistortion()(sample, rng(seed))
        assert len(set(pixels(changed)[0, 0].tolist())) == 1
        assert changed.mask is sample.mask


def test_photometric__each_change_happens_half_the_time():
    sample = one_pixel((120, 90, 60))
    for only in (
        PhotometricDistortion(contrast=(1, 1), saturation=(1, 1), hue=0),
        PhotometricDistortion(brightness=0, saturation=(1, 1), hue=0),
        PhotometricDistortion(brightness=0, contrast=(1, 1), hue=0),
    ):
        changed = sum(pixels(only(sample, rng(s)))[0, 0].tolist() != [120, 90, 60] for s in range(400))
        assert 130 < changed < 250


# -------------------------------------------------------------------------------------------------------- together


@given(sides, sides, sides, sides, st.integers(0, 1000))
@settings(max_examples=50)
def test_training_transform__every_result_has_the_crop_size_and_repeats_for_equal_generators(h, w, ch, cw, seed):
    transform = training_transform((ch, cw))
    sample = tiny_sample(h, w)
    before = pixels(sample).copy(), sample.mask.copy()
    a, b = transform(sample, rng(seed)), transform(sample, rng(seed))
    assert a.size == a.mask.shape == (ch, cw)
    assert np.array_equal(pixels(a), pixels(b))
    assert np.array_equal(a.mask, b.mask)
    assert set(np.unique(a.mask)) <= {0, 1, 2, 255}
    assert np.array_equal(pixels(sample), before[0])  # the given sample is untouched: it may sit in a cache
    assert np.array_equal(sample.mask, before[1])


def test_geometry__image_and_mask_move_together():
    chain = Compose((RandomCrop((9, 9), 1.0), RandomFlip(), RandomCrop((5, 7))))
    for seed in range(30):
        assert agrees(chain(tiny_sample(), rng(seed)))


def test_foreign__any_callable_on_image_and_mask_takes_part():
    upside_down = Foreign(lambda image, mask: (image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), mask[::-1]))
    sample = Compose((upside_down, RandomFlip()))(tiny_sample(), rng())
    assert agrees(sample)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Resize(0), "Resize size=0"),
        (lambda: Resize(cast(Any, "none")), "leave the transform out"),
        (lambda: RandomResize((0.0, 2.0)), r"ratio must be .*, got \(0.0, 2.0\)"),
        (lambda: RandomResize((2.0, 0.5)), r"ratio must be .*, got \(2.0, 0.5\)"),
        (lambda: RandomResize(base=(0, 5)), r"base must be .*, got \(0, 5\)"),
        (lambda: RandomCrop((0, 5)), r"RandomCrop size=\(0, 5\)"),
        (lambda: RandomCrop(cast(Any, 5)), "RandomCrop size=5"),
        (lambda: RandomCrop((5, 5), 0.0), r"cat_max_ratio must lie in \(0, 1\], got 0.0"),
        (lambda: RandomFlip(1.5), r"probability must lie in \[0, 1\], got 1.5"),
        (lambda: PhotometricDistortion(contrast=(1.5, 0.5)), r"contrast must be .*, got \(1.5, 0.5\)"),
        (lambda: PhotometricDistortion(hue=-1), "hue=-1"),
        (lambda: Pad((5, -5)), r"Pad size=\(5, -5\)"),
    ],
)
def test_transforms__impossible_options_are_refused_by_name_and_value(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
