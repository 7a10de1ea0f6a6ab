"""Label maps and exit maps as images, with numpy and Pillow alone.

Legend: H, W height and width in pixels; h, w the token grid; K classes. Sizes are (height, width), as everywhere
but inside Pillow. Maps are anything that `numpy.asarray` reads, tensors on the CPU among them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features

from tokenexit.errors import ConfigError, DataError
from tokenexit.report.tables import Colour, Swatch

VOID_COLOUR: Colour = (0, 0, 0)
"""Pixels without a class are black, as in the mask files of most data sets."""

VOID_INDEX = 255  # of index images, which hold one byte per pixel

EXIT_RAMP: tuple[Colour, ...] = ((222, 240, 246), (124, 190, 224), (104, 134, 206), (152, 52, 134), (86, 0, 26))
"""From the first exit (pale ice) to the end of the network (dark red).

Its lightness falls all the way, so that the order survives colour blindness and a grey printer.
"""

MAX_SIDE = 1024
"""Images inside a page are shrunk to this many pixels, still sharp at twice the width of a column."""

_FLAT_COLOURS = 160  # images of fewer colours are drawings: PNG keeps their edges, and is smaller there
_INK, _PAPER = (32, 34, 38), (255, 255, 255)


# -------------------------------------------------------------------------------------------------- label maps


def colorize(labels: npt.ArrayLike, palette: Sequence[Colour], ignore_index: int = VOID_INDEX) -> Image.Image:
    """Colour every class, void in black: `(H, W)` int to RGB. Raises `DataError` for values without a colour."""
    indices = _void_last(labels, len(palette), ignore_index)
    return Image.fromarray(np.array([*palette, VOID_COLOUR], dtype=np.uint8)[indices])


def palette_png(labels: npt.ArrayLike, palette: Sequence[Colour], ignore_index: int = VOID_INDEX) -> Image.Image:
    """Make an index image (mode P): pixel values are the classes, 255 is void, the palette gives the colours.

    Saved as PNG, it is a mask file and an image at once. Raises `DataError` for values without a colour, and
    `ConfigError` for more than 255 classes.
    """
    if len(palette) > VOID_INDEX:
        raise ConfigError(
            f"palette has {len(palette)} colours, an index image holds {VOID_INDEX} and void: use colorize."
        )
    indices = _void_last(labels, len(palette), ignore_index)
    indices[indices == len(palette)] = VOID_INDEX
    image = Image.fromarray(indices.astype(np.uint8))
    unused = [VOID_COLOUR] * (256 - len(palette))
    image.putpalette([int(channel) for colour in [*palette, *unused] for channel in colour])
    return image


def overlay(
    image: Image.Image,
    labels: npt.ArrayLike,
    palette: Sequence[Colour],
    alpha: float = 0.5,
    ignore_index: int = VOID_INDEX,
) -> Image.Image:
    """Blend an image with its label map, RGB: `alpha` 0 is the image, 1 the map; void pixels stay as they are.

    labels: `(H, W)` of the image's size.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha must lie in [0, 1], got {alpha}: 0 shows only the image, 1 only the labels.")
    colours = colorize(labels, palette, ignore_index)
    _check_same_size(image, (colours.height, colours.width), "labels")
    blended = Image.blend(image.convert("RGB"), colours, alpha)
    void = Image.fromarray(np.asarray(labels) == ignore_index)
    blended.paste(image.convert("RGB"), mask=void)
    return blended


def _void_last(labels: npt.ArrayLike, num_classes: int, ignore_index: int) -> npt.NDArray[np.intp]:
    """Copy `(H, W)` labels with void as class K."""
    array = np.asarray(labels)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"labels must be an (H, W) map of whole numbers, got shape {array.shape} and type {array.dtype}: "
            "convert them."
        )
    void = array == ignore_index
    indices = np.where(void, num_classes, array).astype(np.intp)
    wrong = ~void & ((array < 0) | (array >= num_classes))
    if wrong.any():
        raise DataError(
            f"labels hold class {array[wrong][0]}, the palette has {num_classes} colours: give the palette of these "
            f"classes, or check ignore_index={ignore_index}."
        )
    return indices


# --------------------------------------------------------------------------------------------------- exit maps


def exit_colours(num_exits: int) -> tuple[Colour, ...]:
    """Return num_exits + 1 RGB colours, evenly along `EXIT_RAMP`: one per exit, and one for "stayed to the end"."""
    stops = np.array(EXIT_RAMP, dtype=np.float64)
    # Without an exit only the end is left.
    places = np.linspace(0.0, len(stops) - 1.0, num_exits + 1) if num_exits else np.array([len(stops) - 1.0])
    channels = [np.interp(places, np.arange(len(stops)), stops[:, c]).round().astype(int) for c in range(3)]
    return tuple((int(r), int(g), int(b)) for r, g, b in zip(*channels))


def exit_legend(num_exits: int, blocks: Sequence[int] | None = None) -> list[Swatch]:
    """Return the legend of an exit map, in order of exits. blocks: the blocks before each exit, if known."""
    if blocks is not None and len(blocks) != num_exits:
        raise ConfigError(f"blocks must have one value per exit, {num_exits}, got {len(blocks)}: give one each.")
    names = [f"Exit {i + 1}" + (f" (after block {blocks[i]})" if blocks else "") for i in range(num_exits)]
    return [Swatch(name, colour) for name, colour in zip([*names, "Stayed to the end"], exit_colours(num_exits))]


def exit_map(
    exit_index: npt.ArrayLike,
    num_exits: int,
    size: tuple[int, int],
    image: Image.Image | None = None,
    alpha: float = 0.72,
    extent: tuple[float, float] | None = None,
    grid: bool = False,
    groups: npt.ArrayLike | None = None,
) -> Image.Image:
    """Draw an exit map: `(h, w)` exit indices to an RGB image of `size`, each token one flat tile.

    exit_index: 0 for the first exit, `num_exits` where a token stayed to the end.
    image: an image of `size` to show in grey underneath; `alpha` is the share of the exit colours.
    extent: height and width of the image in tokens (pixels that the network saw / patch size), where that is
        less than the grid because the image was padded; the whole grid by default.
    grid: thin lines between tokens.
    groups: `(h, w)`, equal where one merged token stood for several cells: thin lines between these groups.
    """
    index = np.asarray(exit_index)
    if index.ndim != 2 or index.size == 0 or index.min() < 0 or index.max() > num_exits:
        raise DataError(
            f"exit_index of shape {index.shape} is no (h, w) map of values 0..{num_exits}: check num_exits."
        )
    rows, columns = (token_of_pixels(size[i], (extent or index.shape)[i], index.shape[i]) for i in range(2))
    tiles = np.array(exit_colours(num_exits), dtype=np.float32)[index[rows[:, None], columns[None, :]]]  # (H, W, 3)
    if image is not None:
        _check_same_size(image, size, "size")
        grey = np.asarray(image.convert("L"), dtype=np.float32)[:, :, None]
        tiles = alpha * tiles + (1.0 - alpha) * grey
    if grid:
        lines = _starts(rows)[:, None] | _starts(columns)[None, :]
        tiles[lines] = 0.7 * tiles[lines] + 0.3 * 255.0
    if groups is not None:
        lines = _edges(np.asarray(groups)[rows[:, None], columns[None, :]])
        tiles[lines] = 0.7 * tiles[lines] + 0.3 * 255.0
    return Image.fromarray(tiles.round().astype(np.uint8))


def token_of_pixels(pixels: int, extent: float, tokens: int) -> npt.NDArray[np.intp]:
    """Return the row (or column) of tokens in which the middle of each pixel lies: `(pixels,)`."""
    token = np.floor((np.arange(pixels) + 0.5) * extent / pixels).astype(np.intp)
    return token.clip(0, tokens - 1)


def _starts(tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Return True at the first pixel of every token but the first."""
    starts = np.zeros(len(tokens), dtype=np.bool_)
    starts[1:] = tokens[1:] != tokens[:-1]
    return starts


def _edges(groups: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return True at pixels `(H, W)` whose neighbour above or to the left is of another group."""
    edges = np.zeros(groups.shape, dtype=np.bool_)
    edges[1:] |= groups[1:] != groups[:-1]
    edges[:, 1:] |= groups[:, 1:] != groups[:, :-1]
    return edges


# ------------------------------------------------------------------------------------------------------ panels


def panel(images: Sequence[tuple[str, Image.Image]], height: int | None = None, gap: int = 12) -> Image.Image:
    """Draw images side by side under their titles, RGB on white.

    height: of every image in pixels; that of the first one by default. gap: pixels between and around them.
    """
    if not images:
        raise ConfigError("images is empty: give at least one (title, image) pair.")
    height = height or images[0][1].height
    scaled = [_to_height(image, height) for _, image in images]
    text_height = max(12, height // 18)
    font = ImageFont.load_default(text_height)
    top = gap + text_height + text_height // 2
    width = sum(image.width for image in scaled) + gap * (len(scaled) + 1)
    sheet = Image.new("RGB", (width, top + height + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = gap
    for (title, _), image in zip(images, scaled):
        draw.text((left, gap), _fitting(title, font, image.width), fill=_INK, font=font)
        sheet.paste(image, (left, top))
        left += image.width + gap
    return sheet


def _to_height(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(image.width * height / image.height))
    # Index images keep their flat colours; an interpolated index would be another class.
    resample = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.LANCZOS
    return image.resize((width, height), resample).convert("RGB")


def _fitting(text: str, font: Any, width: int) -> str:
    """Return `text`, or as much of its beginning as fits into `width` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def data_uri(image: Image.Image, max_side: int = MAX_SIDE) -> tuple[str, tuple[int, int]]:
    """Encode an image as a data URI, with its (width, height) in pixels: PNG for drawings, else WebP or JPEG.

    Sides beyond `max_side` pixels are shrunk; flat colours stay flat.
    """
    flat = image.mode in ("1", "P")
    image = image.convert("RGB")
    flat = flat or image.getcolors(_FLAT_COLOURS) is not None
    if max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if flat:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp" if features.check("webp") else "jpeg"
        image.save(buffer, kind.upper(), quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size


def _check_same_size(image: Image.Image, size: tuple[int, int], what: str) -> None:
    if (image.height, image.width) != size:
        raise DataError(
            f"the image is {image.height}x{image.width} (height x width), {what} is {size[0]}x{size[1]}: resize one."
        )
