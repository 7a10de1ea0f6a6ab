"""`Tokens` is the one value that flows through the network: the live tokens of a whole batch, packed.

Legend: T live tokens of the batch (prefix included), P live patch tokens, B images, C channels,
cells = all patches of all images, the rows of the batch's flat canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]
"""Number of patches of an image as (rows, columns)."""


@dataclass(frozen=True)
class Packing:
    """Where each image begins in a packed tensor.

    The lengths are kept on the host as well as the device: the host copy sizes buffers and CPU attention without a
    synchronisation, the device copy, made when first asked for, drives variable-length kernels.

    Attributes:
        lengths: number of rows of each image.
        device: of the packed tensor.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        return cls(tuple(lengths), device)

    @cached_property
    def offsets(self) -> Tensor:
        """The first row of each image, and the total: `(B + 1,)` int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def uniform(self) -> bool:
        """Whether all images have the same number of rows, so that the packed tensor is a plain batch."""
        return len(self.lengths) <= 1 or len(set(self.lengths)) == 1

    def image_index(self) -> Tensor:
        """Return the image of every packed row, `(T,)` int64."""
        if len(self.lengths) == 1:
            return torch.zeros(self.total, dtype=torch.int64, device=self.device)
        images = torch.arange(len(self.lengths), device=self.device)
        counts = (self.offsets[1:] - self.offsets[:-1]).long()
        return torch.repeat_interleave(images, counts, output_size=self.total)

    def behind(self, rows: int) -> Packing:
        """Return the packing with so many more rows in front of each image."""
        return Packing.of([rows + length for length in self.lengths], self.device)


@dataclass(frozen=True)
class PaddedPacking(Packing):
    """One image whose last rows are padding, which nobody attends to; graphs of one size are made of it.

    Attributes:
        visible: `(T,)` bool, rows that are no padding; one at least.
    """

    visible: Tensor

    def behind(self, rows: int) -> PaddedPacking:
        lengths, front = super().behind(rows).lengths, self.visible.new_ones(rows)
        return PaddedPacking(lengths, self.device, torch.cat([front, self.visible]))


@dataclass(frozen=True)
class Detail:
    """What is held back of patches that share a token until the token is split: a row for each cell of the canvas.

    Attributes:
        x: `(cells, C)`, each patch as it is embedded, less what was embedded in its stead; 0 of those that are alone.
        phases: `(cells, 2 H)` of each patch; None without rotary positions.
        weight: `(cells,)` of each patch as a key, where tokens have weights; None where each is one.
    """

    x: Tensor
    phases: Tensor | None
    weight: Tensor | None = None


@dataclass(frozen=True)
class FrozenTokens:
    """Tokens that have left and stay as keys and values of those that are live, with the features they left with.

    Attributes:
        x: features `(F, C)`, image after image.
        packing: where each image begins among the F rows.
        phases: `(F, 2 H)` of each token; None without rotary positions.
    """

    x: Tensor
    packing: Packing
    phases: Tensor | None = None

    def joined(self, others: FrozenTokens) -> FrozenTokens:
        """Return these tokens, and behind those of each image the others of the same image."""
        x, packing = join_packed(self.x, others.x.to(self.x.dtype), self.packing, others.packing)
        phases = None
        if self.phases is not None and others.phases is not None:
            phases, _ = join_packed(self.phases, others.phases, self.packing, others.packing)
        return FrozenTokens(x, packing, phases)


@dataclass(frozen=True)
class Tokens:
    """Live tokens of a batch, image after image.

    Inside an image the prefix tokens come first, then patches in raster order.

    Attributes:
        x: features `(T, C)`.
        position: `(T,)` int64 row of each token on the batch's flat canvas, -1 for prefix tokens.
        packing: where each image begins among the T rows.
        grids: (rows, columns) of patches of every image, live or not.
        num_prefix: number of class and register tokens per image.
        phases: `(T, 2 H)` cosines and sines of rotary positions, which go where their token goes; None without them.
        cover: `(cells,)` int64, the cell of the token that stands for each cell, once tokens were merged; None where
            every cell stands for itself. A cell and its cover lie in one image, `cover[cover] == cover`, and the cover
            of a cell whose token has left the network changes no more. `split` makes it each cell's own again.
        weight: `(T,)` fp32, positive: attention of the backbone's blocks counts a token as that many keys; None where
            each is one. Heads see none.
        detail: what `split` gives back to cells that share a token; None where tokens are never split. Heads see none.
        frozen: tokens that are not live and stay keys and values in the backbone's blocks; None for none. Heads see
            none.
    """

    x: Tensor
    position: Tensor
    packing: Packing
    grids: tuple[Grid, ...]
    num_prefix: int
    phases: Tensor | None = None
    cover: Tensor | None = None
    weight: Tensor | None = None
    detail: Detail | None = None
    frozen: FrozenTokens | None = None

    @property
    def live(self) -> tuple[int, ...]:
        """Number of live patch tokens of each image, prefix tokens not counted."""
        return tuple(length - self.num_prefix for length in self.packing.lengths)

    @property
    def cells(self) -> int:
        """Number of rows of the flat canvas: all patches of all images."""
        return sum(h * w for h, w in self.grids)

    @property
    def some_left(self) -> bool:
        """Whether fewer tokens are live than there are patches: some have left, or were merged."""
        return len(self.position) < self.cells + self.num_prefix * len(self.grids)

    @property
    def row_multiple(self) -> int | None:
        """The multiple to which a graph pads rows where some have left; None outside of graphs, and where none is."""
        return None

    def with_x(self, x: Tensor) -> Tokens:
        return replace(self, x=x)

    def phases_at(self, index: Tensor) -> Tensor | None:
        """Return the phases of these rows."""
        return None if self.phases is None else self.phases.index_select(0, index)

    def weights(self) -> Tensor:
        """Return `weight`, which is 1 for each token where nothing else was said."""
        return torch.ones(len(self.position), device=self.x.device) if self.weight is None else self.weight

    def weight_at(self, index: Tensor) -> Tensor | None:
        """Return the weights of these rows."""
        return None if self.weight is None else self.weight.index_select(0, index)

    def patch_index(self) -> Tensor:
        """Return the rows of the patch tokens among the T, `(P,)` int64."""
        if len(self.grids) == 1:
            return torch.arange(self.num_prefix, self.x.shape[0], device=self.x.device)
        return rows_where(self.position >= 0, sum(self.live))

    def prefix_index(self) -> Tensor:
        """Return the rows of the prefix tokens, `(B * num_prefix,)` int64."""
        starts = self.packing.offsets[:-1].long()
        return (starts[:, None] + torch.arange(self.num_prefix, device=starts.device)).flatten()

    def patches(self) -> Tokens:
        """Return the live patch tokens alone, which is what heads see."""
        if self.num_prefix == 0:
            return self
        x, position, phases = self.x, self.position, self.phases
        if len(self.grids) == 1:  # the rows behind the prefix: views, no copies
            x, position = x[self.num_prefix :], position[self.num_prefix :]
            phases = None if phases is None else phases[self.num_prefix :]
        else:
            index = self.patch_index()
            x, position, phases = x.index_select(0, index), position.index_select(0, index), self.phases_at(index)
        return Tokens(x, position, Packing.of(self.live, x.device), self.grids, 0, phases, self.cover)

    def keep(self, mask: Tensor) -> Tokens:
        """Return the tokens that stay: all prefix tokens and the patch tokens where `mask` holds.

        mask: `(P,)` bool over the live patch tokens in packed order. One host synchronisation, for the counts. Where
        all stay, nothing is copied.
        """
        index, lengths = self._rows_that_stay(mask)
        if len(index) == len(self.position):
            return self
        return replace(
            self,
            x=self.x.index_select(0, index),
            position=self.position.index_select(0, index),
            packing=Packing.of(lengths, self.x.device),
            phases=self.phases_at(index),
            weight=self.weight_at(index),
        )

    def freeze(self, mask: Tensor) -> Tokens:
        """Return the same tokens with those where `mask` holds frozen, beside what is frozen already.

        mask: `(P,)` bool over the live patch tokens in packed order. The caller sees to it that they leave. One host
        synchronisation, as in `keep`.
        """
        some = self.patches().keep(mask)
        frozen = FrozenTokens(some.x, some.packing, some.phases)
        return replace(self, frozen=frozen if self.frozen is None else self.frozen.joined(frozen))

    def _rows_that_stay(self, mask: Tensor) -> tuple[Tensor, list[int]]:
        """Return the rows that stay, in order, and their number in each image; see `keep`."""
        if len(self.grids) == 1 and on_host(mask):  # numpy's calls take a third of torch's time
            here = np.ones(self.num_prefix + len(mask), dtype=np.bool_)
            here[self.num_prefix :] = mask.numpy()
            index = torch.from_numpy(np.flatnonzero(here))
            return index, [len(index)]
        stays = mask
        if self.num_prefix:
            stays = self.position < 0
            stays = stays.masked_scatter(~stays, mask)
        counts = torch.zeros(len(self.grids), dtype=torch.int64, device=mask.device)
        counts.index_add_(0, self.packing.image_index(), stays.long())
        lengths = counts.tolist()  # the one host read of an exit: buffer sizes and CPU attention need it
        return rows_where(stays, sum(lengths)), lengths

    def merge(self, into: Tensor, weight: Tensor | None = None) -> Tokens:
        """Let patch tokens join others, which then stand for the cells of both.

        A token that others join becomes the weighted mean of the group, in fp32; one that nobody joins keeps its bits.
        It stays at its own cell, and with rotary positions keeps the phases of that cell: where a group is, is not
        published. On CUDA sums of three and more may differ in the last bit from run to run.

        into: `(P,)` int64, for each live patch token in packed order the row, among them, of the one that it joins, its
            own if it stays; `into[into] == into`, within one image.
        weight: `(P,)` of each token in the mean, `sizes()` if not given; 0 of those that join drops their features.
            Groups need a positive sum.

        Returns the tokens that stay. One host synchronisation, that of `keep`.
        """
        rows = self.patch_index()
        x, position = self.x.index_select(0, rows), self.position.index_select(0, rows)
        stays = into == torch.arange(len(into), device=into.device)
        factor = (self.sizes() if weight is None else weight).float()[:, None]
        total = torch.zeros(len(into), 1, device=x.device).index_add(0, into, factor)
        summed = torch.zeros(x.shape, device=x.device).index_add(0, into, x.float() * factor)
        joined = torch.zeros_like(into).index_add(0, into, (~stays).long()) > 0
        x = torch.where(joined[:, None], (summed / total).to(x.dtype), x)

        cells = torch.arange(self.cells, device=into.device)
        target = cells.index_copy(0, position, position.index_select(0, into))
        cover = target if self.cover is None else target.index_select(0, self.cover)
        own = self.weight
        if own is not None:  # a group counts as much as its tokens did
            own = own.index_copy(0, rows, torch.zeros_like(total[:, 0]).index_add(0, into, own.index_select(0, rows)))
        return replace(self, x=self.x.index_copy(0, rows, x), cover=cover, weight=own).keep(stays)

    def apart(self, kept: Tokens) -> Tokens:
        """Return the live patch tokens that are not among `kept`, of which all are live here. One synchronisation."""
        gone = torch.ones(self.cells, dtype=torch.bool, device=self.x.device)
        patches, stays = self.patches(), kept.patches().position
        return patches.keep(gone.index_fill(0, stays, False).index_select(0, patches.position))

    def insert(self, others: Tokens) -> Tokens:
        """Return these tokens and patch tokens of other cells of the same images, in raster order again.

        What stands for which cell is not changed.
        """
        lengths = [own + more for own, more in zip(self.packing.lengths, others.packing.lengths)]
        image = torch.cat([self.packing.image_index(), others.packing.image_index()])
        position = torch.cat([self.position, others.position])
        order = torch.sort(image * (self.cells + 1) + position, stable=True).indices  # -1 of prefix tokens comes first
        x = torch.cat([self.x, others.x.to(self.x.dtype)]).index_select(0, order)
        phases = self.phases
        if phases is not None and others.phases is not None:
            phases = torch.cat([phases, others.phases]).index_select(0, order)
        weight = None
        if self.weight is not None or others.weight is not None:
            weight = torch.cat([self.weights(), others.weights()]).index_select(0, order)
        packing = Packing.of(lengths, x.device)
        return replace(
            self, x=x, position=position.index_select(0, order), packing=packing, phases=phases, weight=weight
        )

    def spread(self, canvas: Tensor) -> Tensor:
        """Return a canvas `(cells, ...)` in which every cell has the row of the token that stands for it."""
        return canvas if self.cover is None else canvas.index_select(0, self.cover)

    def stands(self) -> Tensor:
        """Return which cells stand for themselves, `(cells,)` bool; their tokens are live or have exited."""
        cells = torch.arange(self.cells, device=self.x.device)
        return torch.ones_like(cells, dtype=torch.bool) if self.cover is None else self.cover == cells

    def sizes(self) -> Tensor:
        """Return how many cells each live patch token stands for, `(P,)` int64."""
        position = self._live_cells()
        if self.cover is None:
            return torch.ones_like(position)
        count = torch.zeros_like(self.cover).index_add(0, self.cover, torch.ones_like(self.cover))
        return count.index_select(0, position)

    def weights_by_size(self) -> Tensor:
        """Return `weights` times `sizes`, of prefix tokens as they are: `(T,)` fp32."""
        sizes = torch.ones(len(self.x), device=self.x.device)
        return self.weights() * sizes.index_copy(0, self.patch_index(), self.sizes().float())

    def unmerged(self) -> Tokens:
        """Return the tokens of all cells, each with the features of the one that stands for it, which must be live."""
        if self.cover is None:
            return self
        cells = torch.arange(self.cells, device=self.x.device)
        return replace(self._copied_to(cells, [h * w for h, w in self.grids]), cover=None, detail=None)

    def split(self) -> Tokens:
        """Return one token for each cell of the live ones: what the token has become, and the cell's own `detail`.

        The blocks so far have added the same to all cells of a token. What has left is not split, and what is alone
        stays as it is. One host synchronisation, for the counts.
        """
        if self.cover is None or self.detail is None:
            return self
        lives = torch.zeros(self.cells, dtype=torch.bool, device=self.x.device).index_fill(0, self._live_cells(), True)
        lives = self.spread(lives)
        counts = torch.zeros(len(self.grids), dtype=torch.int64, device=lives.device)
        live = counts.index_add(0, cell_packing(self).image_index(), lives.long()).tolist()  # buffers, CPU attention
        cells = rows_where(lives, sum(live))
        cover = self.cover.index_copy(0, cells, cells)
        tokens = self._copied_to(cells, live)
        rows, phases, weight = tokens.patch_index(), tokens.phases, tokens.weight
        x = tokens.x.index_add(0, rows, self.detail.x.index_select(0, cells).to(tokens.x.dtype))
        if phases is not None and self.detail.phases is not None:
            phases = phases.index_copy(0, rows, self.detail.phases.index_select(0, cells))
        if weight is not None:
            own = torch.ones_like(self.detail.x[:, 0]) if self.detail.weight is None else self.detail.weight
            weight = weight.index_copy(0, rows, own.index_select(0, cells).to(weight.dtype))
        return replace(tokens, x=x, phases=phases, cover=cover, weight=weight, detail=None)

    def _live_cells(self) -> Tensor:
        """Return the cells at which live patch tokens are, `(P,)` int64."""
        return self.position.index_select(0, self.patch_index())

    def _copied_to(self, cells: Tensor, live: Sequence[int]) -> Tokens:
        """Return prefix tokens and, for each of these cells, a copy of the live token that stands for it.

        cells: in raster order, so many of each image. What stands for which cell is not changed.
        """
        packing = Packing.of([self.num_prefix + n for n in live], self.x.device)
        image = Packing.of(live, self.x.device).image_index()
        row = torch.arange(len(cells), device=cells.device) + (image + 1) * self.num_prefix  # of each of the cells
        prefix = replace(self, packing=packing).prefix_index()
        source = torch.zeros(self.cells, dtype=torch.int64, device=cells.device)
        source = self.spread(source.index_copy(0, self._live_cells(), self.patch_index()))
        position = torch.full((packing.total,), -1, device=cells.device).index_copy(0, row, cells)
        index = torch.zeros_like(position).index_copy(0, row, source.index_select(0, cells))
        index = index.index_copy(0, prefix, self.prefix_index())
        return replace(
            self,
            x=self.x.index_select(0, index),
            position=position,
            packing=packing,
            phases=self.phases_at(index),
            weight=self.weight_at(index),
        )


def cell_packing(tokens: Tokens) -> Packing:
    """Return which rows of the flat canvas belong to which image."""
    return Packing.of([h * w for h, w in tokens.grids], tokens.x.device)


def join_packed(first: Tensor, second: Tensor, packing: Packing, behind: Packing) -> tuple[Tensor, Packing]:
    """Return a packed tensor in which each image has its rows of the first, and then those of the second."""
    lengths = [own + more for own, more in zip(packing.lengths, behind.lengths)]
    joined = torch.cat([first, second])
    if len(lengths) > 1:
        image = torch.cat([packing.image_index(), behind.image_index()])
        joined = joined.index_select(0, torch.sort(image, stable=True).indices)
    if isinstance(packing, PaddedPacking) or isinstance(behind, PaddedPacking):
        return joined, PaddedPacking(tuple(lengths), joined.device, torch.cat([_visible(packing), _visible(behind)]))
    return joined, Packing.of(lengths, joined.device)


def _visible(packing: Packing) -> Tensor:
    """Return which rows of one image are no padding."""
    if isinstance(packing, PaddedPacking):
        return packing.visible
    return torch.ones(packing.total, dtype=torch.bool, device=packing.device)


def scatter(canvas: Tensor, position: Tensor, value: Tensor) -> Tensor:
    """Copy `canvas (cells, C)` with `value (P, C)` written to the rows `position (P,)`.

    Out of place: gradients flow into the written values and into the rows that stay.
    """
    return canvas.index_copy(0, position, value.to(canvas.dtype))


def group_equal(values: Sequence[object]) -> list[list[int]]:
    """Group the indices of equal values, in the order of their first members; values need no hash."""
    groups: list[list[int]] = []
    for i, value in enumerate(values):
        group = next((group for group in groups if values[group[0]] == value), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def unpack_grids(packed: Tensor, grids: Sequence[Grid], scale: int = 1) -> list[tuple[list[int], Tensor]]:
    """Turn a packed canvas `(sum h w s^2, K)` into image batches, one for every distinct grid.

    Returns pairs of the images' indices and their values `(b, K, h s, w s)`.
    """
    sizes = [h * w * scale * scale for h, w in grids]
    parts = packed.split(sizes)
    batches = []
    for members in group_equal(grids):
        grid = grids[members[0]]
        rows = torch.stack([parts[i] for i in members]) if len(members) < len(grids) else packed
        height, width = grid[0] * scale, grid[1] * scale
        maps = rows.view(len(members), height, width, packed.shape[1])
        batches.append((members, maps.permute(0, 3, 1, 2)))
    return batches


def pack_grids(batches: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Turn image batches `(b, K, H, W)` back into one packed `(sum H W, K)` canvas: the inverse of `unpack_grids`."""
    rows: dict[int, Tensor] = {}
    for members, maps in batches:
        for i, image in zip(members, maps.flatten(2).transpose(1, 2)):
            rows[i] = image
    return torch.cat([rows[i] for i in sorted(rows)])


def on_host(tensor: Tensor) -> bool:
    """Return whether values can be read at no cost: on a CPU, and in no graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def rows_where(mask: Tensor, total: int) -> Tensor:
    """Return the indices of the true rows, `(total,)` int64; the host knows `total`, so CUDA need not synchronise."""
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(1)
    return torch.nonzero_static(mask, size=total).squeeze(1)
