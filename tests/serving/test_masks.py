"""Label maps in COCO's layout."""

from __future__ import annotations

import numpy as np

from tests.serving.live import LABELS
from tokenexit.serving.masks import coco


def test_coco__has_areas_and_boxes() -> None:
    labels = np.zeros((4, 5), dtype=np.int64)
    labels[1:3, 2:5] = 3
    labels[1, 2] = 0
    found = coco({"a.png": labels, "b.png": np.zeros((2, 2), dtype=np.int64)}, LABELS)
    assert found["images"] == [
        {"id": 1, "file_name": "a.png", "height": 4, "width": 5},
        {"id": 2, "file_name": "b.png", "height": 2, "width": 2},
    ]
    assert found["categories"][3] == {"id": 3, "name": "car"}
    car = next(a for a in found["annotations"] if a["category_id"] == 3)
    assert (car["image_id"], car["area"], car["bbox"]) == (1, 5, [2, 1, 3, 2])
    assert car["segmentation"]["size"] == [4, 5]
    assert [a["id"] for a in found["annotations"]] == [1, 2, 3]
