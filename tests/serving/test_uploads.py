"""Files that were sent: their names, and which of them are images."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.serving.live import drawing, encoded, small_model
from tokenexit.errors import DataError
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.uploads import distinct, file_name, macs_by_header, read_image


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return small_model()


@given(st.text(max_size=200))
def test_file_name__is_a_plain_name_whatever_was_sent(sent: str) -> None:
    name = file_name(sent, 4)
    assert re.fullmatch(r"[\w()+-][\w .()+-]*", name)
    assert len(name) <= 100


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("street.jpg", "street.jpg"),
        ("C:\\photos\\Straße 1 (2).jpg", "Straße 1 (2).jpg"),
        ("../../.bashrc", "bashrc"),
        ('a"b\r\nc.png', "a_b__c.png"),
        ("", "image-5"),
        ("..", "image-5"),
        (None, "image-5"),
    ],
)
def test_file_name__by_example(sent: str | None, name: str) -> None:
    assert file_name(sent, 4) == name


@given(st.lists(st.sampled_from(["a.png", "a.jpg", "a-2.png", "b", "b.png", "a"]), max_size=8))
def test_distinct__keeps_order_and_suffixes_and_no_two_stems_alike(names: list[str]) -> None:
    found = distinct(names)
    stems = [name.rpartition(".")[0] or name for name in found]
    assert len(set(stems)) == len(names)
    assert [name.rpartition(".")[2] if "." in name else "" for name in found] == [
        name.rpartition(".")[2] if "." in name else "" for name in names
    ]
    if len(set(names)) == len(names) == 1:
        assert found == names


def test_read_image__weighs_what_the_network_sees(model: ExitSegmenter) -> None:
    image, taken = read_image(model, encoded(drawing(10, 13)), "a.png", 1000)
    assert (image.size, taken.size) == ((13, 10), (10, 13))
    assert taken.image.shape == (3, 10, 13)
    assert taken.tokens == 3 * 4  # patches of 4 pixels


def test_resized__weighs_what_the_network_sees_of_a_resized_image(model: ExitSegmenter) -> None:
    _, taken = read_image(model, encoded(drawing(10, 13)), "a.png", 1000)
    half = taken.resized(model, 0.5)
    assert half.tokens == 2 * 2  # 5 x 7 pixels
    assert 0 < half.macs < taken.macs
    assert half.macs == macs_by_header(model, encoded(drawing(10, 13)), 1000, 0.5)
    assert taken.resized(model, 1.0) == taken


def test_read_image__one_patch_is_never_too_large(model: ExitSegmenter) -> None:
    assert read_image(model, encoded(drawing(1, 1)), "dot.png", 1)[1].tokens == 1


@pytest.mark.parametrize("kind", ["PDF", "EPS", "ICNS", "TGA"])
def test_read_image__takes_no_format_that_it_does_not_name(model: ExitSegmenter, kind: str) -> None:
    data = encoded(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(DataError, match=r"image 'a\.png' cannot be decoded \(no PNG, JPEG, .* or JPEG2000\): check"):
        read_image(model, data, "a.png", 1000)
