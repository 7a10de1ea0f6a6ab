"""Label Studio's tasks with predictions as brush masks, to be corrected instead of drawn.

A brush mask is the image as RGBA bytes, row by row, all four channels 255 in the mask and 0 elsewhere, in the run
lengths of the rle-pack library (github.com/thi-ng/umbrella, Label Studio's own choice), here with its defaults:

    32 bits: values; 5: bits of a value, less 1; four times 4: bits of a length, less 1, of each of four kinds
    then, again and again: 1 bit: a run (1) or single values (0); 2: the kind; its bits: length, less 1; the value

Legend: H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import fsencode
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from tokenexit.inputs.labels import Labels

LENGTH_BITS = (3, 4, 8, 16)
LOCAL_FILES = "/data/local-files/?d="
"""The address of files on Label Studio's own machine; the path below its root follows."""

TAG, IMAGE = "tag", "image"


def brush_rle(mask: npt.ArrayLike) -> list[int]:
    """Encode an `(H, W)` mask as bytes."""
    flat = np.asarray(mask, dtype=bool).ravel()
    edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    bits = [f"{4 * flat.size:032b}{8 - 1:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    for start, length in zip(edges, np.diff(edges)):
        bits += _runs(4 * int(length), 255 if flat[start] else 0)
    text = "".join(bits)
    count = -(-len(text) // 8)
    return list(int(text.ljust(8 * count, "0"), 2).to_bytes(count, "big"))


def _runs(length: int, value: int) -> Iterator[str]:
    """Encode `length` equal values, in runs as long as possible."""
    while length:
        run = min(length, 1 << LENGTH_BITS[-1])
        kind = next(kind for kind, size in enumerate(LENGTH_BITS) if run <= 1 << size)
        yield f"1{kind:02b}{run - 1:0{LENGTH_BITS[kind]}b}{value:08b}"
        length -= run


def task(
    file: str,
    labels: npt.NDArray[Any],
    classes: Labels,
    certainty: npt.NDArray[np.float64] | None,
    model_version: str,
    url: str = LOCAL_FILES,
) -> dict[str, Any]:
    """Make the task of an image: its address and what the model predicts.

    labels: `(H, W)` classes. certainty: `(H, W)` in [0, 1], how early tokens left; its mean is the score of the
    prediction and of each class's mask. Label Studio's order by prediction score shows the lowest first, those that the
    network found hardest. None leaves the scores out. url: what comes before the file's name, of which bytes that
    are no text are quoted as they are.
    """
    height, width = labels.shape
    found = []
    for k in np.unique(labels).tolist():
        mask = labels == k
        region = {
            "id": f"class-{k}",
            "type": "brushlabels",
            "from_name": TAG,
            "to_name": IMAGE,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [classes.names[k]]},
        }
        found.append(region | _score(certainty, mask))
    prediction = {"model_version": model_version, "result": found} | _score(certainty, ...)
    return {"data": {IMAGE: url + quote(fsencode(file))}, "predictions": [prediction]}


def _score(certainty: npt.NDArray[np.float64] | None, where: Any) -> dict[str, float]:
    return {} if certainty is None else {"score": round(float(certainty[where].mean()), 4)}


def labelling_config(classes: Labels) -> str:
    """Return the XML of a labelling interface for these tasks."""
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in classes.palette]
    rows = [f"    <Label value={quoteattr(n)} background={quoteattr(c)}/>" for n, c in zip(classes.names, colours)]
    image = f'  <Image name="{IMAGE}" value="${IMAGE}" zoom="true" zoomControl="true"/>'
    head = f'  <BrushLabels name="{TAG}" toName="{IMAGE}">'
    return "\n".join(["<View>", image, head, *rows, "  </BrushLabels>", "</View>", ""])
