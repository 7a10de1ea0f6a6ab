"""An exported file is compared with the model on these images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from tokenexit.data.scenes import Scenes
from tokenexit.inputs.images import load_image
from tokenexit.inputs.sources import list_images
from tokenexit.segmenter import ExitSegmenter

COUNT = 3
MOST_FOR_RANGES = 32
SIZES = ((128, 192), (160, 120), (96, 96))


def compared_images(model: ExitSegmenter, sources: Sequence[Path] | None = None) -> list[Tensor]:
    """Return the first three images of `sources`, or three procedural scenes of different sizes, as model inputs.

    For a model that takes windows, it is the first window of each.
    """
    if sources is None:
        return _inputs(model, [Scenes(1, size, seed)[0].image for seed, size in enumerate(SIZES)])
    return _inputs(model, [load_image(path) for path in list(list_images(sources))[:COUNT]])


def images_for_ranges(model: ExitSegmenter, sources: Sequence[Path]) -> list[Tensor]:
    """Return at most `MOST_FOR_RANGES` images of `sources`, evenly spread, as model inputs."""
    paths = list(list_images(sources))
    step = max(1, -(-len(paths) // MOST_FOR_RANGES))
    return _inputs(model, [load_image(path) for path in paths[::step]])


def _inputs(model: ExitSegmenter, images: Sequence[Image]) -> list[Tensor]:
    height, width = model.preprocessing.window or (None, None)
    return [model.preprocessing.to_tensor(image)[:, :height, :width] for image in images]
