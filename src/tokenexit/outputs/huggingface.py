"""Results take the form that users of Hugging Face's `transformers` know; the package itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenexit.errors import ConfigError
from tokenexit.inputs.images import ImageSource
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.windows import Segmentation


def label_maps(outputs: Segmentation, target_sizes: Sequence[Size] | None = None) -> list[Tensor]:
    """Return the class of every pixel, as `post_process_semantic_segmentation` of transformers' processors does.

    Args:
        outputs: result of a call of the model.
        target_sizes: height and width in pixels of each map; the call's targets if not given.

    Returns:
        One `(H, W)` int64 map per image.

    Raises:
        ConfigError: for another number of sizes than images.
    """
    if target_sizes is not None:
        if len(target_sizes) != len(outputs):
            raise ConfigError(
                f"target_sizes has {len(target_sizes)} sizes for {len(outputs)} images: give one for each."
            )
        outputs = replace(outputs, targets=tuple((int(height), int(width)) for height, width in target_sizes))
    return list(outputs.labels)


def segments(output: Segmentation, id2label: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the segments of one image, as the `image-segmentation` pipeline of transformers does.

    For every class in it, in order: `label`, `mask` (PIL, mode L, 255 inside and 0 elsewhere) and `score`, here the
        mean
    over the class's pixels (None in transformers).
    """
    labels, scores = output.labels[0].cpu().numpy(), output.scores[0].cpu().numpy()
    return [
        {
            "score": float(scores[labels == k].mean()),
            "label": id2label[k],
            "mask": Image.fromarray(np.where(labels == k, 255, 0).astype(np.uint8)),
        }
        for k in np.unique(labels).tolist()
    ]


@dataclass(frozen=True)
class ImageSegmentation:
    """A call with an image (path, PIL image, array) returns its segments, a call with a list a list of these.

    Attributes:
        predict: segments one image.
        id2label: names of the classes.
    """

    predict: Callable[[ImageSource], Segmentation]
    id2label: Mapping[int, str]

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> list[Any]:
        if isinstance(images, list | tuple):
            return [self(image) for image in images]
        return segments(self.predict(images), self.id2label)  # type: ignore[arg-type]
