"""COCO's results files, by hand and painted again by a reader written from the format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tests.prediction.test_rle import painted, read
from tokenexit.data.coco_stuff import COCO_STUFF_LABELS
from tokenexit.inputs.labels import default_labels
from tokenexit.prediction.coco import category_ids, masks, results

LABELS = default_labels(4)


def picture(name: str, labels: npt.ArrayLike) -> dict[str, object]:
    height, width = np.asarray(labels).shape
    return {"file_name": name, "height": height, "width": width, "masks": masks(labels)}


@given(arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 3)))
def test_results__paint_the_label_map_again(labels: npt.NDArray[np.int64]) -> None:
    found, index = results([picture("a.png", labels)], LABELS)
    again = np.full(labels.shape, -1)
    for one in found:
        assert one["image_id"] == index["images"][0]["id"]
        assert one["segmentation"]["size"] == list(labels.shape)
        again[painted(read(one["segmentation"]["counts"]), labels.shape)] = one["category_id"]
    np.testing.assert_array_equal(again, labels)


def test_results__have_an_index_of_images_and_categories() -> None:
    found, index = results([picture("x/b.png", [[0, 0]]), picture("a.jpg", [[1], [3]])], LABELS)
    assert [(one["image_id"], one["category_id"]) for one in found] == [(1, 0), (2, 1), (2, 3)]
    assert index["images"] == [
        {"id": 1, "file_name": "x/b.png", "height": 1, "width": 2},
        {"id": 2, "file_name": "a.jpg", "height": 2, "width": 1},
    ]
    assert index["categories"][3] == {"id": 3, "name": "class_3"}


def test_results__take_the_numbers_that_cocos_own_images_are_named_by() -> None:
    files = ["val2017/000000000139.jpg", "val2017/000000000285.jpg"]
    found, index = results([picture(file, [[2]]) for file in files], LABELS)
    assert [one["image_id"] for one in found] == [image["id"] for image in index["images"]] == [139, 285]
    _, doubled = results([picture(file, [[2]]) for file in ("a/1.jpg", "b/1.jpg")], LABELS)
    assert [image["id"] for image in doubled["images"]] == [1, 2]


def test_category_ids__of_coco_stuff_are_the_published_ones() -> None:
    ids = dict(zip(COCO_STUFF_LABELS.names, category_ids(COCO_STUFF_LABELS)))
    assert len(set(ids.values())) == 171
    # From the table of labels that the dataset is published with.
    published = {"person": 1, "fire hydrant": 11, "stop sign": 13, "backpack": 27, "umbrella": 28, "handbag": 31}
    published |= {"bowl": 51, "dining table": 67, "toilet": 70, "tv": 72, "book": 84, "toothbrush": 90}
    published |= {"banner": 92, "wall-wood": 177, "wood": 182}
    assert {name: ids[name] for name in published} == published
    assert category_ids(LABELS) == [0, 1, 2, 3]
