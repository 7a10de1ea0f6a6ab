"""Outputs of a prediction: a file for each image, and for some kinds one file for all images.

Legend: H, W height and width of the image in pixels; h, w of the token grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenexit.inputs.labels import Labels
from tokenexit.prediction import coco, label_studio
from tokenexit.report.pictures import exit_map, overlay, palette_png, token_of_pixels

PARTS = ".parts"
"""Folder of the parts that single images add to a file of all images."""


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one image.

    file: the image's own name, relative to the folder that was given. image: the image. labels: `(H, W)` classes.
    scores: `(H, W)` in [0, 1], of these classes, where they were asked for. exit_index: `(h, w)`, the exit each token
        left
    at. extent: height and width of the image in tokens. exits: whether the method has any.
    groups: `(h, w)`, equal where one merged token stood for several; None where none merged.
    """

    file: str
    image: Image.Image
    labels: npt.NDArray[Any]
    scores: npt.NDArray[np.float32] | None
    exit_index: npt.NDArray[np.int64]
    num_exits: int
    extent: tuple[float, float]
    exits: bool = True
    groups: npt.NDArray[np.int64] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def certainty(self) -> npt.NDArray[np.float64] | None:
        """Return `(H, W)`: 1 where a token left at the first exit, 0 where it stayed to the end; None without exits."""
        if not self.exits or self.num_exits == 0:
            return None
        rows, columns = (token_of_pixels(self.size[i], self.extent[i], self.exit_index.shape[i]) for i in range(2))
        grid: npt.NDArray[np.float64] = 1.0 - self.exit_index / self.num_exits
        return grid[rows[:, None], columns[None, :]]


@dataclass(frozen=True)
class CallInfo:
    """Facts that all predictions of a call share. model: its name and weights. url: see `label_studio.task`."""

    classes: Labels
    model: str
    url: str = label_studio.LOCAL_FILES


Save: TypeAlias = Callable[[Prediction, CallInfo, Path], None]


@dataclass(frozen=True)
class Output:
    """A kind of output.

    title: for people. suffix: what follows an image's name in the name of the file that `save` writes. folder: where
    these files are. of_all: makes of their contents the contents of `files_of_all`, the files of all images.
    """

    title: str
    suffix: str
    save: Save
    folder: str = "."
    files_of_all: tuple[str, ...] = ()
    of_all: Callable[[list[Any], CallInfo], tuple[str, ...]] = lambda parts, about: ()

    def file(self, name: str) -> str:
        """Return the path of an image's file, relative to the results."""
        return str(Path(self.folder) / f"{name}{self.suffix}")


def _mask(seen: Prediction, about: CallInfo, path: Path) -> None:
    palette = about.classes.palette
    wide = len(palette) > 255  # a palette ends there
    (Image.fromarray(seen.labels.astype(np.uint16)) if wide else palette_png(seen.labels, palette)).save(path)


def _overlay(seen: Prediction, about: CallInfo, path: Path) -> None:
    blended(seen, about).save(path)


def blended(seen: Prediction, about: CallInfo) -> Image.Image:
    return overlay(seen.image, seen.labels, about.classes.palette)


def _exits(seen: Prediction, about: CallInfo, path: Path) -> None:
    drawn = exit_map(
        seen.exit_index, seen.num_exits, seen.size, image=seen.image, extent=seen.extent, groups=seen.groups
    )
    drawn.save(path)


def _scores(seen: Prediction, about: CallInfo, path: Path) -> None:
    assert seen.scores is not None, "asked for with this output"
    Image.fromarray((255.0 * seen.scores).round().clip(0, 255).astype(np.uint8)).save(path)


def _coco(seen: Prediction, about: CallInfo, path: Path) -> None:
    height, width = seen.size
    _write(path, {"file_name": seen.file, "height": height, "width": width, "masks": coco.masks(seen.labels)})


def _coco_of_all(parts: list[Any], about: CallInfo) -> tuple[str, str]:
    found, index = coco.results(parts, about.classes)
    return _text(found), _text(index)


def _label_studio(seen: Prediction, about: CallInfo, path: Path) -> None:
    _write(path, label_studio.task(seen.file, seen.labels, about.classes, seen.certainty(), about.model, about.url))


def _label_studio_of_all(parts: list[Any], about: CallInfo) -> tuple[str, str]:
    return _text(parts), label_studio.labelling_config(about.classes)


def _write(path: Path, content: Any) -> None:
    path.write_text(_text(content), encoding="utf-8")


def _text(content: Any) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


OUTPUTS: dict[str, Output] = {
    "masks": Output("masks", ".png", _mask),
    "overlays": Output("overlays", ".overlay.jpg", _overlay),
    "exits": Output("exit maps", ".exits.png", _exits),
    "scores": Output("scores", ".scores.png", _scores),
    "coco": Output("COCO results", ".coco.json", _coco, PARTS, ("coco.results.json", "coco.index.json"), _coco_of_all),
    "labelstudio": Output(
        "Label Studio tasks",
        ".labelstudio.json",
        _label_studio,
        PARTS,
        ("labelstudio.json", "labelstudio.xml"),
        _label_studio_of_all,
    ),
}
DEFAULT = ("masks", "overlays", "exits")
VIDEO = "video"
"""The overlays of a video's frames, or of a folder's images, as a video."""
VIDEO_SUFFIX = ".overlay.mp4"
