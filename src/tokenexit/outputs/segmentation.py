"""The result of a call holds grid logits, the exit map and the cost. Full-size maps are made on access."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid
from tokenexit.errors import DataError
from tokenexit.heads import MaskPrediction
from tokenexit.methods.base import ExitRecord, Value
from tokenexit.outputs.ledger import Ledger, Size
from tokenexit.outputs.upsampling import can_skip, labels_of_grid

T = TypeVar("T")

LABEL_TILE_ELEMENTS = 1 << 22
"""Full-size elements held at once while labels are made: 16 MiB in fp32, whatever the number of classes."""


@dataclass(frozen=True)
class SegmentationOutput:
    """The result for a batch of B images; indexing and iterating give outputs of one image.

    Attributes:
        grid_logits: one `(K, h s, w s)` map per image on the patch grid (s is the decode head's scale); of masks one
            `(Q, h s, w s)`.
        value: "logits" before a softmax, or "scores" in [0, 1]: those of ATM heads (presence times sigmoid, not
            normalised over classes) and of models that mix kinds of heads; "masks" of queries before a sigmoid, which
            full-size maps turn into scores.
        exit_index: one `(h, w)` int64 map per image: the exit at which each token left, 0 for the first; `num_exits`
            where it stayed to the end.
        num_exits: number of exits of the model.
        ledger: live tokens in every block and multiply-adds, per image.
        sizes: height and width in pixels of the images as the network saw them.
        targets: height and width in pixels of the maps that `labels` and `logits` return.
        patch_size: side of a patch in pixels.
        upscale: factor of the decode head's bilinear step that is applied to `grid_logits` first.
        exit_records: records of the exits and, last, the decode head, from which losses are taken in training.
        loss: scalar loss of the batch, where the model was called with `labels`.
        queries: of masks, one `(Q, K)` per image: each query's probabilities of the classes.
        frozen: of masks, one `(K, h, w)` per image: scores that stand in place of theirs where tokens have exited;
            empty where masks answer for all.
        groups: with merged tokens one `(h, w)` int64 map per image, equal where one token stood for several cells;
            empty where no tokens could merge.
    """

    grid_logits: tuple[Tensor, ...]
    value: Value
    exit_index: tuple[Tensor, ...]
    num_exits: int
    ledger: Ledger
    sizes: tuple[Size, ...]
    targets: tuple[Size, ...]
    patch_size: int
    upscale: int
    exit_records: tuple[ExitRecord, ...] = ()
    loss: Tensor | None = None
    queries: tuple[Tensor, ...] = ()
    frozen: tuple[Tensor, ...] = ()
    groups: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.grid_logits)

    def __getitem__(self, image: int) -> SegmentationOutput:
        if not -len(self) <= image < len(self):
            raise IndexError(f"image {image} of an output of {len(self)} images")
        image %= len(self)
        one = slice(image, image + 1)
        return SegmentationOutput(
            self.grid_logits[one],
            self.value,
            self.exit_index[one],
            self.num_exits,
            self.ledger[image],
            self.sizes[one],
            self.targets[one],
            self.patch_size,
            self.upscale,
            queries=self.queries[one],
            frozen=self.frozen[one],
            groups=self.groups[one],
        )

    def __iter__(self) -> Iterator[SegmentationOutput]:
        return (self[i] for i in range(len(self)))

    @property
    def windows(self) -> SegmentationOutput:
        """The output itself: each image is its own single window; see `WindowedOutput`."""
        return self

    @property
    def window_counts(self) -> tuple[int, ...]:
        """Number of `windows` of each image."""
        return (1,) * len(self)

    def with_windows(self, windows: SegmentationOutput) -> SegmentationOutput:
        """Return the output of the same images with other results of their windows."""
        return windows

    @property
    def logits(self) -> Tensor | list[Tensor]:
        """Full-size logits (or scores, see `value`): `(B, K, H, W)`, or a list of `(K, H, W)` if sizes differ.

        This is the largest tensor of all; use `labels` if the classes are all you need.
        """
        return stack_equal([self.maps(i)(slice(None)) for i in range(len(self))])

    @property
    def labels(self) -> Tensor | list[Tensor]:
        """Class of every pixel: `(B, H, W)` int64, or a list of `(H, W)` if sizes differ.

        Raises `DataError` where grid logits are not finite.
        """
        return stack_equal([self._labels(i) for i in range(len(self))])

    @property
    def scores(self) -> Tensor | list[Tensor]:
        """Score of that class, in [0, 1]: `(B, H, W)` fp32, or a list of `(H, W)` if sizes differ.

        It is the probability where `value` is "logits". Raises `DataError` where grid logits are not finite.
        """
        return stack_equal([self._scores(i) for i in range(len(self))])

    def at_target(self, image: int, maps: Tensor) -> Tensor:
        """Resize grid maps `(k, h s, w s)` of one image to its target size; classes do not mix."""
        size = self.sizes[image]
        resized = resize_maps(maps[None].float(), self.grid(image), self.patch_size, self.upscale, size)
        if self.targets[image] != size:
            resized = F.interpolate(resized, self.targets[image], mode="bilinear", align_corners=False)
        return resized[0]

    def grid(self, image: int) -> Grid:
        """Return (rows, columns) of patches of one image."""
        h, w = self.exit_index[image].shape
        return h, w

    @property
    def num_classes(self) -> int:
        """Number K of classes."""
        return self.queries[0].shape[1] if self.value == "masks" else len(self.grid_logits[0])

    def maps(self, image: int) -> Callable[[slice], Tensor]:
        """Return a function that makes the `(k, H, W)` maps of some classes at the target's size.

        Of masks they are scores, made as EoMT's release does: masks are resized to the size that the network saw, and
        each class sums their sigmoid times the queries' probability of it. In patches that have exited stand the scores
        that they left with.
        """
        if self.value != "masks":
            return lambda classes: self.at_target(image, self.grid_logits[image][classes])
        size, target, queries = self.sizes[image], self.targets[image], self.queries[image]
        masks = resize_maps(
            self.grid_logits[image][None].float(), self.grid(image), self.patch_size, self.upscale, size
        )
        inside = torch.sigmoid(masks[0])
        left = self._left(image) if self.frozen else None

        def composed(classes: slice) -> Tensor:
            scores = scores_of_masks(inside, queries[:, classes])
            if left is not None:
                frozen = resize_maps(self.frozen[image][None, classes], self.grid(image), self.patch_size, 1, size)
                scores = torch.where(left, frozen[0], scores)
            if target == size:
                return scores
            return F.interpolate(scores[None], target, mode="bilinear", align_corners=False)[0]

        return composed

    def _left(self, image: int) -> Tensor:
        """Return which pixels of the network's input belong to patches that have exited, `(H, W)` bool."""
        left, (height, width) = self.exit_index[image] < self.num_exits, self.sizes[image]
        return left.repeat_interleave(self.patch_size, 0).repeat_interleave(self.patch_size, 1)[:height, :width]

    def _labels(self, image: int) -> Tensor:
        check_finite(self.grid_logits[image])
        maps, size = self.grid_logits[image], self.sizes[image]
        num_classes, scale = self.num_classes, maps.shape[1] // self.grid(image)[0]
        cell, rest = divmod(self.patch_size, scale)
        if self.value != "masks" and rest == 0 and can_skip(cell, size, self.targets[image], self.upscale):
            return labels_of_grid(maps, cell, size)
        return argmax_by_tiles(self.maps(image), num_classes, self.sizes[image], self.targets[image])

    def _scores(self, image: int) -> Tensor:
        check_finite(self.grid_logits[image])
        return scores_by_tiles(self.maps(image), self.num_classes, self.value, self.sizes[image], self.targets[image])


def scores_of_masks(inside: Tensor, queries: Tensor) -> Tensor:
    """Sum for each class the masks `(Q, H, W)`, in [0, 1], times the queries' probability of it `(Q, k)`."""
    return torch.einsum("qk,qhw->khw", queries, inside)


def check_finite(*maps: Tensor) -> None:
    """Raise `DataError` for maps with NaN or infinity, whose argmax would be a class like any other.

    It is called on grid logits, which are small, where maps become labels or scores; not in training and export.
    """
    for each in maps:
        if not torch.stack(each.detach().aminmax()).isfinite().all():  # NaN is the least and the greatest of all
            raise DataError(
                "the model's output is not finite (NaN or infinity): check its weights and the mean and std of its "
                "preprocessing, or run it in fp32."
            )


def argmax_by_tiles(maps: Callable[[slice], Tensor], num_classes: int, *sizes: Size) -> Tensor:
    """Return the class of every pixel, `(H, W)` int64, from a few full-size maps at a time; ties go to the lower class.

    maps: makes the `(k, H, W)` maps of some classes. sizes: the sizes of all maps made on the way.
    """
    first, *rest = _tiles(num_classes, sizes)
    best, label = maps(first).max(dim=0)
    for classes in rest:
        value, index = maps(classes).max(dim=0)
        label = torch.where(value > best, index + classes.start, label)
        best = torch.maximum(best, value)
    return label


def scores_by_tiles(maps: Callable[[slice], Tensor], num_classes: int, value: Value, *sizes: Size) -> Tensor:
    """Return the largest score of every pixel, `(H, W)` fp32; for logits, the probability. See `argmax_by_tiles`."""
    first, *rest = _tiles(num_classes, sizes)
    tile = maps(first)
    best, total = tile.amax(dim=0), tile.logsumexp(dim=0)
    for classes in rest:
        tile = maps(classes)
        best, total = torch.maximum(best, tile.amax(dim=0)), torch.logaddexp(total, tile.logsumexp(dim=0))
    return (best - total).exp() if value == "logits" else best.clamp(max=1.0)  # sums over queries may exceed it


def _tiles(num_classes: int, sizes: Sequence[Size]) -> list[slice]:
    """Split the classes so that their maps of these sizes stay within `LABEL_TILE_ELEMENTS`."""
    step = max(1, LABEL_TILE_ELEMENTS // max(height * width for height, width in sizes))
    return [slice(start, start + step) for start in range(0, num_classes, step)]


def stack_equal(maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Stack maps of one size, and list maps of several."""
    return torch.stack(list(maps)) if len({m.shape for m in maps}) == 1 else list(maps)


def resize_maps(maps: Tensor, grid: Grid, patch_size: int, upscale: int, size: Size, out: Size | None = None) -> Tensor:
    """Resize grid maps `(B, K, h s, w s)` to image size `(B, K, H, W)`, bilinear without aligned corners.

    The head's own `upscale` comes first; padding added for the patch size is cut off. out: another resolution of the
    same image to sample at, such as half of `size`.
    """
    # Packed rows arrive with classes innermost; interpolation and all that follows are faster on planes.
    maps = maps.contiguous()
    if upscale > 1:
        maps = F.interpolate(maps, scale_factor=upscale, mode="bilinear", align_corners=False)
    out = size if out is None else out
    padded = padded_size(grid, patch_size, size, out)
    if maps.shape[2:] != padded:
        maps = F.interpolate(maps, padded, mode="bilinear", align_corners=False)
    return maps[:, :, : out[0], : out[1]]


def padded_size(grid: Grid, patch_size: int, size: Size, out: Size) -> Size:
    """Return the size of the map of whole patches whose part of size `out` is the image of size `size`."""
    height, width = (-(-side * cells * patch_size // whole) for side, cells, whole in zip(out, grid, size))
    return height, width


def concatenated(outputs: Sequence[SegmentationOutput]) -> SegmentationOutput:
    """Join the outputs of several calls of one model, which have the same exits and kind of values."""
    ledgers = [out.ledger for out in outputs]
    return replace(
        outputs[0],
        grid_logits=_chained(out.grid_logits for out in outputs),
        exit_index=_chained(out.exit_index for out in outputs),
        ledger=Ledger(
            live=_chained(ledger.live for ledger in ledgers),
            tokens=_chained(ledger.tokens for ledger in ledgers),
            ended=_chained(ledger.ended for ledger in ledgers),
            parts=_chained(ledger.parts for ledger in ledgers),
            dense_macs=_chained(ledger.dense_macs for ledger in ledgers),
        ),
        sizes=_chained(out.sizes for out in outputs),
        targets=_chained(out.targets for out in outputs),
        exit_records=tuple(map(_concatenated_records, zip(*(out.exit_records for out in outputs)))),
        queries=_chained(out.queries for out in outputs),
        frozen=_chained(out.frozen for out in outputs),
        groups=_chained(out.groups for out in outputs),
    )


def _concatenated_records(records: Sequence[ExitRecord]) -> ExitRecord:
    """Join the records of one exit in several calls."""
    logits = [record.logits for record in records if record.logits is not None]
    presence = [record.presence for record in records if record.presence is not None]
    return replace(
        records[0],
        head_tokens=_chained(record.head_tokens for record in records),
        logits=torch.cat(logits) if logits else None,
        presence=torch.cat(presence) if presence else None,
        masks=_concatenated_masks(records),
        seen=None,  # features of overlapping windows are not one map
    )


def _concatenated_masks(records: Sequence[ExitRecord]) -> tuple[MaskPrediction, ...]:
    """Join predictions of masks; none where sizes differ, as they have no loss in common."""
    calls = list(zip(*(record.masks for record in records)))
    if any(len({each.logits.shape[1:] for each in call}) > 1 for call in calls):
        return ()
    return tuple(
        MaskPrediction(torch.cat([each.logits for each in call]), torch.cat([each.classes for each in call]))
        for call in calls
    )


def _chained(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(chain.from_iterable(parts))
