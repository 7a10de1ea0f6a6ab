"""Large images are segmented in windows, whose maps are joined.

The window grid is that of mmsegmentation: windows start at multiples of the stride; one that would cross the border is
moved back inside, so that all keep their size; an image smaller than the window is taken whole along that axis. Or
windows are spread evenly, as EoMT is evaluated (Kerssies et al., 2025): as few as cover a side, at equal distances.
Maps of the windows at pixel resolution are added up, divided by how many windows see a pixel, and resized to the
target.

Windows of all images run packed, as many at a time as a budget of tokens allows. Only their grid logits are kept; maps
of the whole image are made on access, a few classes at a time. As with images, a window's result does not depend on its
companions (except DoViT's `batch_mode="mean"`).

Legend: H, W height and width in pixels; K classes, k of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.vit import ViT
from tokenexit.heads import Head
from tokenexit.inputs.preprocessing import Stride, scaled_size
from tokenexit.methods import Method
from tokenexit.methods.base import Value
from tokenexit.outputs.ledger import Ledger, MacsByPart, Size, dense_ops
from tokenexit.outputs.segmentation import (
    SegmentationOutput,
    argmax_by_tiles,
    check_finite,
    concatenated,
    scores_by_tiles,
    stack_equal,
)

PACK_TOKENS = 8192
"""Tokens that run at once: eight windows of 512 pixels at patch 16, about half a GiB of activations of a ViT-Large."""

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels; bottom and right are exclusive."""

Forward: TypeAlias = Callable[[Sequence[Tensor], Method[Any]], SegmentationOutput]


def window_boxes(size: Size, window: Size | None, stride: Stride | None) -> tuple[Box, ...]:
    """Return the windows of an image of `size`, row by row; without a window, the image itself.

    Together they cover every pixel, and all have one size: the window's, or the image's where that is smaller.
    """
    if window is None or stride is None:
        return ((0, 0, *size),)
    if stride == "even":
        rows, columns = (_even_spans(*sides) for sides in zip(size, window))
    else:
        rows, columns = (_spans(*sides) for sides in zip(size, window, stride))
    return tuple((top, left, bottom, right) for (top, bottom), (left, right) in product(rows, columns))


def dense_macs(
    backbone: ViT, decode_head: Head, size: Size, window: Size | None, stride: Stride | None, scale: float = 1.0
) -> int:
    """Multiply-adds of the dense model on an image of `size`, in its windows, which all have one size.

    scale: factor on the sides of every window, as of a method that resizes them.
    """
    boxes = window_boxes(size, window, stride)
    grid = backbone.patch_embed.grid(*scaled_size(_size(boxes[0]), scale))
    return len(boxes) * dense_ops(backbone, decode_head, grid).macs


def _spans(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return start and end of every window along one axis."""
    count = max(side - window + stride - 1, 0) // stride + 1
    ends = [min(n * stride + window, side) for n in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def _even_spans(side: int, window: int) -> list[tuple[int, int]]:
    """Return start and end of the fewest windows that cover an axis.

    Starts are equal fractions of the way, rounded down: the first window begins and the last one ends at a border.
    """
    count = -(-side // window)
    if count == 1:
        return [(0, side)]
    starts = [n * (side - window) // (count - 1) for n in range(count)]
    return [(start, start + window) for start in starts]


def segment_windows(
    forward: Forward,
    images: Sequence[Tensor],
    window: Size,
    stride: Stride,
    method: Method[Any],
    *,
    patch_size: int,
    targets: Sequence[Size] | None = None,
    max_tokens: int = PACK_TOKENS,
) -> WindowedOutput:
    """Segment images in windows, which are cut from the images as they are; a method may resize each of them.

    forward: runs the model with a method on a list of images `(3, h, w)`. targets: as for a call of the model.
    max_tokens: the budget of patch tokens in one call of `forward`, which bounds memory.
    """
    sizes = tuple((image.shape[1], image.shape[2]) for image in images)
    boxes = tuple(window_boxes(size, window, stride) for size in sizes)
    crops = [
        image[:, top:bottom, left:right]
        for image, windows in zip(images, boxes)
        for top, left, bottom, right in windows
    ]
    seen = [scaled_size((crop.shape[1], crop.shape[2]), method.input_scale) for crop in crops]
    grids = [(-(-height // patch_size), -(-width // patch_size)) for height, width in seen]
    outputs = [forward(crops[run.start : run.stop], each) for run, each in method.runs(grids, max_tokens)]
    return WindowedOutput(concatenated(outputs), boxes, sizes, sizes if targets is None else tuple(targets))


@dataclass(frozen=True)
class WindowedOutput:
    """The result for a batch of B images that were segmented in windows, read as a `SegmentationOutput`.

    Attributes:
        windows: the result of all windows, image after image.
        boxes: the windows of each image.
        sizes: height and width in pixels of the images as they were cut.
        targets: height and width in pixels of the maps that `labels` and `logits` return.
        patch_size: side in pixels of a cell of `exit_index`, which is 1.
    """

    windows: SegmentationOutput
    boxes: tuple[tuple[Box, ...], ...]
    sizes: tuple[Size, ...]
    targets: tuple[Size, ...]

    patch_size: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, image: int) -> WindowedOutput:
        if not -len(self) <= image < len(self):
            raise IndexError(f"image {image} of an output of {len(self)} images")
        image %= len(self)
        one, part = slice(image, image + 1), self._windows_of(image)
        windows = concatenated([self.windows[n] for n in range(part.start, part.stop)])
        return WindowedOutput(windows, self.boxes[one], self.sizes[one], self.targets[one])

    def __iter__(self) -> Iterator[WindowedOutput]:
        return (self[i] for i in range(len(self)))

    def _windows_of(self, image: int) -> slice:
        """Return which of the windows are this image's."""
        start = sum(map(len, self.boxes[:image]))
        return slice(start, start + len(self.boxes[image]))

    @property
    def window_counts(self) -> tuple[int, ...]:
        """Number of `windows` of each image."""
        return tuple(map(len, self.boxes))

    def with_windows(self, windows: SegmentationOutput) -> WindowedOutput:
        """Return the output of the same images with other results of their windows."""
        return replace(self, windows=windows)

    @property
    def value(self) -> Value:
        """The kind of values in the maps: class logits, or scores in [0, 1]."""
        return self.windows.value

    @property
    def num_exits(self) -> int:
        """Number of exits of the model."""
        return self.windows.num_exits

    @property
    def ledger(self) -> Ledger:
        """Sums over each image's windows; `dense_macs` is the cost of the same windows without exits."""
        windows = self.windows.ledger
        parts = [self._windows_of(image) for image in range(len(self))]
        return Ledger(
            live=tuple(tuple(map(sum, zip(*windows.live[part]))) for part in parts),
            tokens=tuple(sum(windows.tokens[part]) for part in parts),
            ended=tuple(sum(windows.ended[part]) for part in parts),
            parts=tuple(MacsByPart(*map(sum, zip(*map(astuple, windows.parts[part])))) for part in parts),
            dense_macs=tuple(sum(windows.dense_macs[part]) for part in parts),
        )

    @property
    def groups(self) -> tuple[Tensor, ...]:
        """No groups: windows overlap, so that a pixel is in several. Those of single windows are `windows.groups`."""
        return ()

    @property
    def exit_index(self) -> tuple[Tensor, ...]:
        """The exit at which a pixel's tokens left, mean over the windows that see it: `(H, W)` int64 per image.

        Halves are rounded up, to the later exit. The maps of single windows are `windows.exit_index`.
        """
        return tuple(self._exit_index(image) for image in range(len(self)))

    @property
    def logits(self) -> Tensor | list[Tensor]:
        """Full-size logits (or scores, see `value`), as of a `SegmentationOutput`."""
        return stack_equal([self._maps(image)(slice(None)) for image in range(len(self))])

    @property
    def labels(self) -> Tensor | list[Tensor]:
        """Class of every pixel: `(B, H, W)` int64, or a list of `(H, W)` if sizes differ."""
        return stack_equal([self._labels(image) for image in range(len(self))])

    @property
    def scores(self) -> Tensor | list[Tensor]:
        """Score of that class, in [0, 1], as of a `SegmentationOutput`."""
        return stack_equal([self._scores(image) for image in range(len(self))])

    def _labels(self, image: int) -> Tensor:
        check_finite(*self.windows.grid_logits[self._windows_of(image)])
        num_classes = self.windows.num_classes
        return argmax_by_tiles(self._maps(image), num_classes, self.sizes[image], self.targets[image])

    def _scores(self, image: int) -> Tensor:
        check_finite(*self.windows.grid_logits[self._windows_of(image)])
        num_classes = self.windows.num_classes
        return scores_by_tiles(self._maps(image), num_classes, self.value, self.sizes[image], self.targets[image])

    def _maps(self, image: int) -> Callable[[slice], Tensor]:
        """Return a function that makes the `(k, H, W)` maps of some classes at the target's size."""
        part, out, seen = self._windows_of(image), self.windows, self._seen(image)
        numbers = range(part.start, part.stop)

        windows = [out.maps(n) for n in numbers]

        def maps(classes: slice) -> Tensor:
            count = len(range(*classes.indices(out.num_classes)))
            canvas = torch.zeros(count, *seen.shape, device=seen.device)
            for box, window in zip(self.boxes[image], windows):
                _inside(canvas, box).add_(window(classes))
            canvas /= seen
            if self.targets[image] == self.sizes[image]:
                return canvas
            return F.interpolate(canvas[None], self.targets[image], mode="bilinear", align_corners=False)[0]

        return maps

    def _seen(self, image: int) -> Tensor:
        """Count the windows that see each pixel: `(H, W)` int64."""
        device = self.windows.exit_index[0].device
        seen = torch.zeros(self.sizes[image], dtype=torch.int64, device=device)
        for box in self.boxes[image]:
            _inside(seen, box).add_(1)
        return seen

    def _exit_index(self, image: int) -> Tensor:
        seen, patch, part = self._seen(image), self.windows.patch_size, self._windows_of(image)
        total = torch.zeros_like(seen)
        for box, size, exit_index in zip(self.boxes[image], self.windows.sizes[part], self.windows.exit_index[part]):
            pixels = exit_index.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[: size[0], : size[1]]
            if size != _size(box):  # a method resized it
                pixels = F.interpolate(pixels[None, None].float(), _size(box), mode="nearest-exact")[0, 0].long()
            _inside(total, box).add_(pixels)
        return (2 * total + seen) // (2 * seen)


Segmentation: TypeAlias = SegmentationOutput | WindowedOutput
"""A result whichever way the network saw the images: whole, or in windows. Both have `windows`, so nobody asks."""


def _size(box: Box) -> Size:
    top, left, bottom, right = box
    return bottom - top, right - left


def _inside(maps: Tensor, box: Box) -> Tensor:
    """Return a view of the part of `(..., H, W)` in the box."""
    top, left, bottom, right = box
    return maps[..., top:bottom, left:right]
