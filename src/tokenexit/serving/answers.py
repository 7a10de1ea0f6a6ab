"""Responses made of results: figures, maps for the page, images.

Legend: H, W height and width of the image in pixels; h, w of the token grid; K classes.
"""

from __future__ import annotations

import base64
import io
import operator
import zipfile
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tokenexit.inputs.labels import Labels
from tokenexit.methods import Method
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.segmentation import check_finite
from tokenexit.report.html import Block, Facts, Figure, FigureRow, Legend, Section, report_html
from tokenexit.report.pictures import colorize, exit_legend, exit_map, overlay, palette_png
from tokenexit.report.tables import Swatch
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.batching import Answer

SHOWN_SIDE = 1024
"""Longest side of the page's maps in pixels."""
SHOWN_ELEMENTS = 1 << 26
"""Largest H W K of the page's maps: 256 MiB while they are made."""


@dataclass(frozen=True)
class ExitFigures:
    """The figures of one exit. after_block: its position. left: tokens that left there. live: tokens that went on."""

    after_block: int
    left: int
    live: int


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class. share: its share of the pixels."""

    id: int
    name: str
    share: float


@dataclass(frozen=True)
class Figures:
    """The cost and the classes of one image.

    method: its name and thresholds, those of each exit. share_of_dense: multiply-adds over those of the dense model.
    milliseconds: of the call of the model it ran in, with `batch` images. stayed: tokens that saw every block.
    classes: those that were found, largest first.
    """

    method: str
    threshold: list[Any] | None
    height: int
    width: int
    gmacs: float
    dense_gmacs: float
    share_of_dense: float
    milliseconds: float
    batch: int
    tokens: int
    exits: list[ExitFigures]
    stayed: int
    classes: list[ClassFigures]


@dataclass(frozen=True)
class PredictionFigures(Figures):
    """The figures of a file. exit_stage: `h` rows of `w` tokens, the exit each left at, 0 the first; the number of
    exits for those that stayed."""

    name: str
    exit_stage: list[list[int]]


@dataclass(frozen=True)
class View(Figures):
    """The figures with the page's maps, row by row and in base64.

    size: height and width of the maps. labels: class of each pixel, a byte, or two, low first, beyond 256 classes.
    scores: of that class, 255 for certain. grid: rows and columns of `exit_stage`, a byte for each token. extent:
    height and width of the image in tokens, less than the grid's where the image was padded. groups: four bytes for
    each token, low first, equal where one merged token stood for several; empty where none merged, and in windows.
    """

    size: tuple[int, int]
    labels: str
    scores: str
    grid: tuple[int, int]
    extent: tuple[float, float]
    exit_stage: str
    groups: str


def figures(model: ExitSegmenter, method: Method[Any], answer: Answer, labels: npt.NDArray[Any], size: Size) -> Figures:
    """Compute the figures of one image. size: of the image; labels: its label map at any size."""
    return Figures(**_figures(model, method, answer, labels, size))


def _figures(
    model: ExitSegmenter, method: Method[Any], answer: Answer, labels: npt.NDArray[Any], size: Size
) -> dict[str, Any]:
    ledger, exits = answer.output.ledger, model.config.exits
    left, stayed = left_at(answer, len(exits))
    live = [*accumulate(left, operator.sub, initial=stayed + sum(left))]
    threshold = method.thresholds
    pixels = np.bincount(labels.ravel(), minlength=model.config.num_classes)
    names = labels_of(model).names
    return {
        "method": method.name,
        "threshold": None if threshold is None else _per_exit(threshold, len(exits)),
        "height": size[0],
        "width": size[1],
        "gmacs": ledger.gmacs[0],
        "dense_gmacs": ledger.dense_macs[0] / 1e9,
        "share_of_dense": ledger.share_of_dense[0],
        "milliseconds": answer.milliseconds,
        "batch": answer.batch,
        "tokens": live[0],
        "exits": [ExitFigures(after, left[n], live[n + 1]) for n, after in enumerate(exits)],
        "stayed": stayed,
        "classes": [
            ClassFigures(int(k), names[k], pixels[k] / labels.size)
            for k in np.argsort(-pixels, kind="stable")
            if pixels[k]
        ],
    }


def left_at(answer: Answer, num_exits: int) -> tuple[list[int], int]:
    """Return how many patches left at each exit, over all windows, and how many stayed; merged ones leave together."""
    index = torch.cat([window.flatten() for window in answer.output.windows.exit_index])
    *left, stayed = torch.bincount(index, minlength=num_exits + 1).tolist()
    return left, stayed


def _per_exit(threshold: Any, num_exits: int) -> list[Any]:
    return [threshold] * num_exits if isinstance(threshold, int | float) else list(threshold)


def prediction(
    model: ExitSegmenter, method: Method[Any], answer: Answer, labels: npt.NDArray[Any], name: str
) -> PredictionFigures:
    height, width = labels.shape
    values = _figures(model, method, answer, labels, (height, width))
    exit_index, _ = token_grid(model, answer)
    return PredictionFigures(**values, name=name, exit_stage=exit_index.tolist())


@torch.inference_mode()
def label_map(answer: Answer) -> npt.NDArray[Any]:
    """Return the class of every pixel, `(H, W)`, at the requested size."""
    return answer.output.labels[0].cpu().numpy()


@torch.inference_mode()
def view(model: ExitSegmenter, method: Method[Any], answer: Answer, size: Size) -> View:
    """Make the page's view of an image. The maps have the requested size, see `shown_size`."""
    check_finite(*answer.output.windows.grid_logits)
    maps = answer.output.logits[0]
    best, label = maps.max(dim=0)
    scores = best.clamp(max=1.0) if answer.output.value != "logits" else (best - maps.logsumexp(dim=0)).exp()
    labels = label.cpu().numpy()
    grid, extent = token_grid(model, answer)
    return View(
        **_figures(model, method, answer, labels, size),
        size=labels.shape,
        labels=_base64(labels.astype(np.uint8 if model.config.num_classes <= 256 else "<u2")),
        scores=_base64((scores.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()),
        grid=grid.shape,
        extent=extent,
        exit_stage=_base64(grid.astype(np.uint8)),
        groups=_base64(answer.output.groups[0].cpu().numpy().astype("<u4")) if answer.output.groups else "",
    )


def shown_size(size: Size, num_classes: int) -> Size:
    """Return the size of the page's maps of an image: its own, or smaller in proportion."""
    height, width = size
    factor = min(1.0, SHOWN_SIDE / max(size), (SHOWN_ELEMENTS / (height * width * num_classes)) ** 0.5)
    return max(1, int(height * factor)), max(1, int(width * factor))


def token_grid(model: ExitSegmenter, answer: Answer) -> tuple[npt.NDArray[Any], tuple[float, float]]:
    """Return the exit map `(h, w)`, and the image's height and width in tokens. Overlapping windows are averaged."""
    output, patch = answer.output, model.config.backbone.patch_size
    exit_index: Tensor = output.exit_index[0]
    cell = patch // output.patch_size  # windows tell it for every pixel
    middle = min(cell // 2, *(side - 1 for side in exit_index.shape))
    height, width = output.sizes[0]
    return exit_index[middle::cell, middle::cell].cpu().numpy(), (height / patch, width / patch)


def labels_of(model: ExitSegmenter) -> Labels:
    assert model.preprocessing.labels is not None, "given when the server starts"
    return model.preprocessing.labels


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


# ------------------------------------------------------------------------------------------------------- images


def mask_png(model: ExitSegmenter, labels: npt.NDArray[Any]) -> bytes:
    """Encode a palette PNG whose values are the classes; 16-bit grey beyond 255 classes."""
    palette = labels_of(model).palette
    image = palette_png(labels, palette) if len(palette) <= 255 else Image.fromarray(labels.astype(np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # PNG is compressed already
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def plain_page(
    model: ExitSegmenter, image: Image.Image, labels: npt.NDArray[Any], answer: Answer, found: Figures, title: str
) -> str:
    """Render the result of one image as a page without scripts."""
    classes = labels_of(model)
    grid, extent = token_grid(model, answer)
    exits = model.config.exits
    size = (image.height, image.width)
    groups = answer.output.groups[0].cpu().numpy() if answer.output.groups else None
    shown = exit_map(grid, len(exits), size, image=image, extent=extent, groups=groups)
    present = [Swatch(f"{c.name}, {c.share:.1%}", classes.palette[c.id]) for c in found.classes]
    left = [*(exit.left for exit in found.exits), found.stayed]
    where = [Swatch(f"{name}: {n} tokens", colour) for n, (name, colour) in zip(left, exit_legend(len(exits), exits))]
    blocks: list[Block] = [
        Facts(
            [
                (f"{found.share_of_dense:.0%}", "of dense compute"),
                (f"{found.gmacs:.3g}", f"GMACs, {found.dense_gmacs:.3g} for Dense"),
                (f"{found.milliseconds:.0f}", "milliseconds"),
            ]
        ),
        FigureRow(
            [
                Figure(image, "Image"),
                Figure(colorize(labels, classes.palette, classes.ignore_index), "Prediction"),
                Figure(overlay(image, labels, classes.palette, ignore_index=classes.ignore_index), "Overlay"),
                Figure(shown, "Exit map"),
            ],
            columns=2,
        ),
        Legend("Classes", present),
        Legend("Exits", where),
    ]
    return report_html(title, [Section(found.method, blocks)])
