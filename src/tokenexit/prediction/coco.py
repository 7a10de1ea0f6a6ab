"""COCO's format of label maps: the annotations of one image, and those of all images as a results file.

A results file is a list of `{image_id, category_id, segmentation}`, as COCO-Stuff's server takes it, with one
annotation per class in an image. `image_id` and `category_id` mean what the index beside it says, which pycocotools'
`COCO(index).loadRes(results)` reads.

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenexit.inputs.labels import Labels
from tokenexit.prediction.rle import compressed, run_lengths

STUFF_CLASSES = 171
NO_CLASS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
"""Ids from 1 to 182 that COCO-Stuff leaves out."""


def masks(labels: npt.ArrayLike) -> list[dict[str, Any]]:
    """List the class index and mask of every class in an `(H, W)` map."""
    size = list(np.asarray(labels).shape)
    runs = run_lengths(labels).items()
    return [{"class": k, "segmentation": {"size": size, "counts": compressed(counts)}} for k, counts in runs]


def results(parts: Sequence[dict[str, Any]], labels: Labels) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the results file of all images, and its index of images and categories.

    parts: `{file_name, height, width, masks}` each, with `masks` as above. Images whose names are numbers, as COCO's
    own, have these as ids; otherwise they are numbered from 1, in order.
    """
    ids = _image_ids([part["file_name"] for part in parts])
    categories = category_ids(labels)
    images = [
        {"id": number, **{key: part[key] for key in ("file_name", "height", "width")}}
        for number, part in zip(ids, parts)
    ]
    found = [
        {"image_id": number, "category_id": categories[mask["class"]], "segmentation": mask["segmentation"]}
        for number, part in zip(ids, parts)
        for mask in part["masks"]
    ]
    named = [{"id": number, "name": name} for number, name in zip(categories, labels.names)]
    return found, {"images": images, "categories": named, "annotations": []}


def category_ids(labels: Labels) -> list[int]:
    """Return an id for every class: its index, or the published ids for COCO-Stuff's 171 classes, with gaps."""
    if labels.num_classes == STUFF_CLASSES and (labels.names[0], labels.names[-1]) == ("person", "wood"):
        return [number for number in range(1, 183) if number not in NO_CLASS]
    return list(range(labels.num_classes))


def _image_ids(names: Sequence[str]) -> list[int]:
    stems = [name.rsplit("/", 1)[-1].rsplit(".", 1)[0] for name in names]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(names) + 1))
