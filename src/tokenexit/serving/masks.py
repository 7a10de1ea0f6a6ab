"""Label maps in COCO's format, with one annotation per class in an image.

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenexit.inputs.labels import Labels
from tokenexit.prediction.coco import masks


def coco(maps: Mapping[str, npt.NDArray[Any]], labels: Labels) -> dict[str, Any]:
    """Write label maps `(H, W)` by file name in COCO's format, with one annotation per class in an image.

    Numbers of images begin at 1; those of categories are the model's classes.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, map_) in enumerate(maps.items(), start=1):
        height, width = map_.shape
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for mask in masks(map_):
            own = map_ == mask["class"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": mask["class"],
                    "segmentation": mask["segmentation"],
                    "area": int(own.sum()),
                    "bbox": _box(own),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(labels.names)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _box(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return left, top, width and height of the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
