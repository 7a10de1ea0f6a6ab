"""Label Studio's brush masks, read by a decoder written from rle-pack's, and its tasks."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from tokenexit.inputs.labels import Labels
from tokenexit.prediction.label_studio import brush_rle, labelling_config, task

CLASSES = Labels(names=("sky", 'a "road" & more', "car"), palette=((1, 2, 3), (255, 0, 16), (9, 9, 9)))
MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24))


def decoded(rle: list[int]) -> npt.NDArray[np.uint8]:
    """All values of an rle-pack stream, as its decoder reads them: header, then runs and single values."""
    assert all(0 <= byte <= 255 for byte in rle)
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def number(size: int) -> int:
        nonlocal at
        at += size
        assert at <= len(bits)
        return int(bits[at - size : at], 2)

    count, word = number(32), number(5) + 1
    sizes = [number(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = number(1)
        length = number(sizes[number(2)]) + 1
        values += [number(word)] * length if repeated else [number(word) for _ in range(length)]
    assert len(values) == count
    assert len(bits) - at < 8  # nothing but what fills the last byte
    return np.array(values, dtype=np.uint8)


def as_mask(rle: list[int], height: int, width: int) -> npt.NDArray[np.bool_]:
    channels = decoded(rle).reshape(height, width, 4)
    assert (channels == channels[:, :, 3:]).all()
    assert set(np.unique(channels)) <= {0, 255}
    return channels[:, :, 3] == 255


@given(MASKS)
def test_brush_rle__is_decoded_to_the_mask(mask: npt.NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(as_mask(brush_rle(mask), *mask.shape), mask)


@pytest.mark.parametrize("pixels", [1, 2, 4, 5, 64, 65, 16384, 16385, 40000])
def test_brush_rle__holds_runs_of_every_length(pixels: int) -> None:
    mask = np.zeros((2, pixels), dtype=bool)
    mask[1] = True
    np.testing.assert_array_equal(as_mask(brush_rle(mask), 2, pixels), mask)


def test_brush_rle__of_two_pixels_by_hand() -> None:
    """Eight values; words of 8 bits; lengths of 3, 4, 8 and 16; four zeros, four 255."""
    bits = "00000000000000000000000000001000" + "00111" + "0010" + "0011" + "0111" + "1111"
    bits += "1" + "00" + "011" + "00000000" + "1" + "00" + "011" + "11111111"
    bits += "0" * (-len(bits) % 8)
    assert brush_rle([[0, 1]]) == [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def a_task(**changes: Any) -> dict[str, Any]:
    labels = np.array([[0, 0, 2], [0, 2, 2]])
    certainty = np.array([[1.0, 0.5, 0.5], [1.0, 0.0, 0.25]])
    values: dict[str, Any] = {"certainty": certainty, "model_version": "tokenexit abc"} | changes
    return task("a b/c.jpg", labels, CLASSES, **values)


def test_task__has_a_mask_of_every_class_and_scores_the_hardest_lowest() -> None:
    made = a_task()
    assert made["data"] == {"image": "/data/local-files/?d=a%20b/c.jpg"}
    (prediction,) = made["predictions"]
    assert prediction["model_version"] == "tokenexit abc"
    assert prediction["score"] == round((1 + 0.5 + 0.5 + 1 + 0 + 0.25) / 6, 4)
    sky, car = prediction["result"]
    assert (sky["value"]["brushlabels"], car["value"]["brushlabels"]) == (["sky"], ["car"])
    assert (sky["score"], car["score"]) == (round(2.5 / 3, 4), 0.25)
    for region in (sky, car):
        assert (region["original_width"], region["original_height"], region["image_rotation"]) == (3, 2, 0)
        assert (region["type"], region["value"]["format"]) == ("brushlabels", "rle")
    assert sky["id"] != car["id"]
    np.testing.assert_array_equal(as_mask(car["value"]["rle"], 2, 3), [[0, 0, 1], [0, 1, 1]])


def test_task__without_exits_has_no_scores() -> None:
    (prediction,) = a_task(certainty=None)["predictions"]
    assert "score" not in prediction
    assert all("score" not in region for region in prediction["result"])


def test_labelling_config__names_the_classes_and_what_tasks_refer_to() -> None:
    view = ElementTree.fromstring(labelling_config(CLASSES))
    image, brush = view
    region = a_task()["predictions"][0]["result"][0]
    assert (image.tag, image.get("name"), image.get("value")) == ("Image", region["to_name"], "$image")
    assert (brush.tag, brush.get("name"), brush.get("toName")) == (
        "BrushLabels",
        region["from_name"],
        image.get("name"),
    )
    assert [label.get("value") for label in brush] == list(CLASSES.names)
    assert brush[1].get("background") == "#ff0010"
