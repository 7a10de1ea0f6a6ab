"""Drawn scenes as photos on disk, and small dense models that look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import tiny_segmenter
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.data.photos import UnlabelledImages
from tokenexit.data.scenes import Scenes
from tokenexit.segmenter import ExitSegmenter

SIDES = (24, 36)


def draw(folder: Path, count: int, size: tuple[int, int] = SIDES) -> Path:
    """Write scenes as PNG and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(count, size)
    for i in range(count):
        scenes[i].image.save(folder / f"{i:02}.png")
    return folder


def dense_model(decode_head: Any = "linear", **options: Any) -> ExitSegmenter:
    """A model without exits, of three blocks."""
    return tiny_segmenter(decode_head, exits=(), **({"depth": 3} | options))


def photos_of(model: ExitSegmenter, folder: Path) -> CalibrationSet:
    data = UnlabelledImages([folder], model.classes)
    return CalibrationSet(model, data, range(len(data)))
