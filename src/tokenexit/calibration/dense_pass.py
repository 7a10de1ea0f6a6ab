"""Record what each exit says in one dense pass per image; exits and costs for any thresholds follow without a run.

An approximation, and stated as one: in a true run the tokens that go on have lost those that left as context, so their
scores at later exits differ a little. Decisions at the first exit are exact. Whatever is chosen here is verified by a
true run.

Agreement is judged between tokens, too: where neighbours differ, class maps are interpolated, and an exit that names
the right class less loudly moves the edge. So each map is sampled at S = 16 places per token. A token's samples are
taken from a map of one exit alone; that its neighbours may have left elsewhere is the second approximation.

Legend: E exits, N patch tokens of all images, n images, K classes. Uncertainty is 1 - score: half precision holds it to
a thousandth of itself near a score of 1, where thresholds live.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.engine.tokens import Grid, Packing, Tokens, pack_grids, unpack_grids
from tokenexit.heads import Head, class_scores
from tokenexit.methods import Dense, ExitRecord, Method, ModelView, Reduced, ThresholdMethod
from tokenexit.methods.base import on_all_cells, record_of
from tokenexit.methods.resized import Resized
from tokenexit.methods.thresholded import Graded, calibratable
from tokenexit.outputs.ledger import dense_ops
from tokenexit.reducers import Reducer
from tokenexit.segmenter import ExitSegmenter

SAMPLES = 4
"""Places per side of a token at which maps are compared."""


@dataclass(frozen=True)
class DensePass:
    """The record of a dense pass over n images.

    uncertainty: `(E, N)` fp16, 1 - score of every token at every exit. label: `(E, N)` int16, the class its exit head
        names.
    said: `(E + 1, N, S)` uint8 (int16 from 256 classes on), classes at S places of every token if it left at an exit,
        the last block's answer last.
    wanted: `(N, S)` int16, classes that they are compared with: those of the dense model at full size, or the truth;
        -1 where neither counts.
    image: `(N,)` int64. grids: patches of each image. Where images are taken in windows, an image is a window here.
    groups: for each exit an order of all tokens by image, class and uncertainty, and where each token's group begins in
        it.
    """

    uncertainty: Tensor
    label: Tensor
    said: Tensor
    wanted: Tensor
    image: Tensor
    grids: tuple[Grid, ...]
    num_classes: int
    groups: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls,
        calibration_set: CalibrationSet,
        method: Method[Any],
        scale: float = 1.0,
        wanted: Sequence[Tensor] | None = None,
        by: Reducer | None = None,
    ) -> DensePass:
        """Run the dense model once on every image. Raises `ConfigError` for methods without thresholds.

        by: what merges tokens meanwhile; what is recorded of a token stands at all cells that it stands for.
        scale: factor on the images' sides. wanted: a map `(H, W)` of each image, or window, to compare answers with;
            those of this pass if not given.
        """
        rule = calibratable(method)
        recorder = _Recorder(decoded=rule.decodes_grid)
        classes, steps = calibration_set.model.config.num_classes, 2 if recorder.decoded else 1
        uncertainties, labels, said, places = [], [], [], []
        grids: list[Grid] = []
        merging: Method[Any] = recorder if by is None else Reduced(recorder, by)
        run = merging if scale == 1.0 else Resized(merging, scale)
        for _, _, images in calibration_set.forward(run, "dense pass" if scale == 1.0 else f"dense pass at {scale:g}"):
            output = images.windows
            own = tuple(output.grid(i) for i in range(len(output)))
            exits = output.exit_records[:-1:steps]
            left = (*output.exit_records[steps - 1 : -1 : steps], output.exit_records[-1])
            scores = [rule.grade(n, record, record.answer(own), own)[0] for n, record in enumerate(exits)]
            uncertainties.append(1.0 - torch.stack(scores).cpu())
            labels.append(torch.stack([_label(record, own) for record in exits]).short().cpu())
            said.append(torch.stack([_samples(record, own) for record in left]).to(_small(classes)).cpu())
            if wanted is not None:
                maps = wanted[len(grids) : len(grids) + len(own)]
                patch = calibration_set.model.config.backbone.patch_size
                places += [sampled(one, grid, size, patch) for one, grid, size in zip(maps, own, output.sizes)]
            grids += own
        wish = torch.cat(places) if places else None
        uncertainty, label = torch.cat(uncertainties, 1).half(), torch.cat(labels, 1)
        return cls.made(uncertainty, label, torch.cat(said, 1), grids, classes, wish)

    @classmethod
    def made(
        cls,
        uncertainty: Tensor,
        label: Tensor,
        said: Tensor,
        grids: Sequence[Grid],
        num_classes: int,
        wanted: Tensor | None = None,
    ) -> DensePass:
        image = Packing.of([h * w for h, w in grids], torch.device("cpu")).image_index()
        groups = tuple(_grouped(image * num_classes + own.long(), d) for own, d in zip(label, uncertainty))
        wanted = said[-1].short() if wanted is None else wanted
        return cls(uncertainty, label, said, wanted, image, tuple(grids), num_classes, groups)

    def __len__(self) -> int:
        return len(self.grids)

    def first(self, images: int) -> DensePass:
        """The first so many images."""
        n = sum(h * w for h, w in self.grids[:images])
        return DensePass.made(
            self.uncertainty[:, :n],
            self.label[:, :n],
            self.said[:, :n],
            self.grids[:images],
            self.num_classes,
            self.wanted[:n],
        )

    def at_exits(self, numbers: Sequence[int]) -> DensePass:
        """The same with some of the exits, in order, 0 for the first."""
        kept = list(numbers)
        return replace(
            self,
            uncertainty=self.uncertainty[kept],
            label=self.label[kept],
            said=self.said[[*kept, len(self.said) - 1]],
            groups=tuple(self.groups[n] for n in kept),
        )

    def losses(self, average: str) -> Tensor:
        """Loss of a token that leaves at an exit or at none: `(E + 1, N)` fp32, to be summed over tokens.

        average: "pixels" is the share of all samples whose class differs from the wanted one. "classes" weighs a
        sample of class a that is called b by (1 / samples of a + 1 / samples of b) / (2 K), both as they are wanted:
        to first order half the loss of mIoU, in which a class of few tokens, lost or invented, weighs as much as a
        large one.
        """
        counted = self.wanted >= 0
        wanted = self.wanted.long().clamp(min=0)
        wrong = (self.said != wanted) & counted
        if average == "pixels":
            return wrong.float().sum(dim=2) / counted.sum().clamp(min=1)
        counts = torch.bincount(wanted[counted], minlength=self.num_classes).float()
        weight = 1.0 / (2.0 * (counts > 0).sum().clamp(min=1) * counts.clamp(min=SAMPLES**2))
        return torch.stack([((weight[wanted] + weight[own.long()]) * bad).sum(1) for own, bad in zip(self.said, wrong)])


@dataclass(frozen=True)
class _Recorder(Dense):
    """Dense, with the exit heads run on all tokens and, with `decoded`, the decode head on them as well: DoViT's
    decode head reads the features a token left with."""

    name: ClassVar[str] = "recorder"

    decoded: bool = False

    def at_exit(
        self, n: int, tokens: Tokens, state: tuple[ExitRecord, ...], model: ModelView
    ) -> tuple[Tokens, tuple[ExitRecord, ...]]:
        patches = tokens.patches()
        state = (*state, _record(model.exit_heads[n], patches))
        if self.decoded:
            seen = tokens if model.decode_head.takes_prefix else patches
            state = (*state, _record(model.decode_head, seen.with_x(model.norm(seen.x))))
        return tokens, state


def _record(head: Head, seen: Tokens) -> ExitRecord:
    out, seen = on_all_cells(head, seen)
    return record_of(head, seen, out, out.logits)


def context_price(exits: Sequence[int], depth: int) -> Tensor:
    """Price for the others of a token that is gone, by exit and for none, `(E + 1,)`: the square of the share of blocks
    that miss it. A dense pass cannot see that cost; paths are built with several multiples of this and compared by
    true runs."""
    return torch.tensor([(1 - n / depth) ** 2 for n in exits] + [0.0])


def _label(record: ExitRecord, grids: tuple[Grid, ...]) -> Tensor:
    """Class of every token, `(cells,)`; of a finer grid the class of the mean score over the token."""
    return token_scores(record, grids).argmax(dim=-1)


def _samples(record: ExitRecord, grids: tuple[Grid, ...]) -> Tensor:
    """Classes at S places of every token, `(cells, S)`: the map interpolated as for the full size, sampled."""
    assert record.logits is not None, "the recorder keeps every map"
    maps = record.logits.float() if record.kind == "softmax" else _cell_scores(record, grids)
    batches = []
    for members, grid_maps in unpack_grids(maps, grids, record.scale):
        side = [cells * SAMPLES // record.scale for cells in grid_maps.shape[2:]]
        fine = F.interpolate(grid_maps.contiguous(), side, mode="bilinear", align_corners=False).argmax(dim=1)
        places = fine.unflatten(2, (-1, SAMPLES)).unflatten(1, (-1, SAMPLES))  # (b, h, S1, w, S2)
        batches.append((members, places.permute(0, 2, 4, 1, 3).flatten(1, 2)))
    return pack_grids(batches)


def _small(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int16


def sampled(labels: Tensor, grid: Grid, size: tuple[int, int], patch_size: int) -> Tensor:
    """Classes of a map `(H, W)` at S places of every token, `(cells, S)` int16; -1 in the padding, where no pixel is.

    grid, size: patches and pixels of the image as the network sees it, which may be padded behind its last pixel.
    """
    shares = [(torch.arange(cells * SAMPLES) + 0.5) * patch_size / SAMPLES / seen for cells, seen in zip(grid, size)]
    rows, columns = ((share * side).long().clamp(max=side - 1) for share, side in zip(shares, labels.shape))
    fine = labels.index_select(0, rows).index_select(1, columns).short()
    fine[shares[0] >= 1.0] = -1
    fine[:, shares[1] >= 1.0] = -1
    places: Tensor = fine.unflatten(1, (-1, SAMPLES)).unflatten(0, (-1, SAMPLES)).permute(0, 2, 1, 3)
    return places.flatten(2).flatten(0, 1)


def token_scores(record: ExitRecord, grids: tuple[Grid, ...]) -> Tensor:
    """`(cells, K)`, averaged over each token where the head speaks of a finer grid."""
    scores = _cell_scores(record, grids)
    if record.scale == 1:
        return scores
    batches = unpack_grids(scores, grids, record.scale)
    return pack_grids([(members, F.avg_pool2d(maps, record.scale)) for members, maps in batches])


def _cell_scores(record: ExitRecord, grids: tuple[Grid, ...]) -> Tensor:
    """`(cells scale^2, K)`, one row for each cell that the head speaks of."""
    answer = record.answer(grids)
    return class_scores(record.kind, answer.logits, answer.presence, answer.packing.image_index())


def _grouped(group: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by group, least uncertainty first, ties by row; and for each place in that order the start of its group."""
    by_uncertainty = torch.sort(uncertainty, stable=True).indices
    order = by_uncertainty[torch.sort(group[by_uncertainty], stable=True).indices]
    ordered = group[order]
    return order, torch.searchsorted(ordered, ordered)


# ------------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True)
class DensePassGrades(Graded):
    """Scores of an exit for all tokens on the dense pass, with the order that was made once.

    order: see `DensePass.groups`.
    """

    order: tuple[Tensor, Tensor] = field(kw_only=True)

    def most_confident(self, candidate: Tensor, k: int) -> Tensor:
        """As `Graded`, without sorting again."""
        if k == 0:
            return torch.zeros_like(candidate)
        order, start = self.order
        ordered = candidate[order]
        count = ordered.int().cumsum(0)
        before = count - ordered.int()  # candidates before this place, over all groups
        stays = ordered & (before - before[start] < k)
        return torch.zeros_like(candidate).index_copy_(0, order, stays)


Limits = Sequence[float | Sequence[float]]
"""For each exit a limit on uncertainty, or one for each class; 0 is never."""


def compose(dense: DensePass, method: ThresholdMethod[Any], limits: Limits) -> Tensor:
    """At which exit each token leaves if its uncertainty must be below `limits` (one per exit): `(N,)` int64, E is
    never.

    Every exit's decision is the method's own (`decide`), on recorded scores.
    """
    rule = method.with_thresholds(
        tuple(tuple(1.0 - own for own in limit) if isinstance(limit, Sequence) else 1.0 - limit for limit in limits)
    )
    cells = Packing.of([h * w for h, w in dense.grids], dense.image.device)
    exit_index = torch.full_like(dense.image, len(limits))
    live = torch.ones_like(dense.image, dtype=torch.bool)
    last_label = dense.label[0].long()  # the class each token had when it was last computed
    earlier: Tensor | None = None
    for n in range(len(limits)):
        score = 1.0 - dense.uncertainty[n].double()  # exact, as uncertainties are half precision
        label = dense.label[n].long()
        last_label = torch.where(live, label, last_label)
        graded = DensePassGrades(
            score, label, cells, dense.grids, dense.num_classes, last_label, earlier=earlier, order=dense.groups[n]
        )
        leaves = rule.decide(n, graded, live)
        exit_index = torch.where(leaves, n, exit_index)
        live, earlier = live & ~leaves, score
    return exit_index


def live_counts(dense: DensePass, exit_index: Tensor) -> Tensor:
    """Tokens of each image before the first exit and after each: `(n, E + 1)` int64."""
    exits = len(dense.uncertainty)
    left = torch.bincount(dense.image * (exits + 1) + exit_index, minlength=len(dense) * (exits + 1))
    left = left.view(len(dense), exits + 1)
    return left.flip(1).cumsum(1).flip(1)


# ----------------------------------------------------------------------------------------------------------- costs


class MacTable:
    """Multiply-adds of images from their live counts: the ledger's formulas, tabled over counts once per grid.

    Of tokens that left and stay keys and values the number is the expected one, as counts do not say where they lie.

    grids: patches of each image. full_grids: those at the size whose dense cost is the denominator, if it is another.
    """

    def __init__(
        self,
        model: ExitSegmenter,
        method: ThresholdMethod[Any],
        grids: tuple[Grid, ...],
        full_grids: tuple[Grid, ...] | None = None,
    ) -> None:
        self.exits, self.last_exit = model.config.exits, method.last_exit
        self.depth = model.config.backbone.depth
        self.on_grid, self.scored_on_grid = method.decodes_grid, method.scores_grid
        adapters = model.view().stage_adapters if method.adapts_stopped else ()
        self.per_stopped = adapters[0].ops(1).macs if adapters else 0
        by_itself, once_seen = (model.backbone.frozen_ops(queries, 1).macs for queries in (0, 1))
        self.prefix = model.config.backbone.num_prefix_tokens
        self.seen_on, self.per_key, self.per_look = method.seen_on, by_itself, once_seen - by_itself
        distinct = list(dict.fromkeys(grids))
        self.kind = torch.tensor([distinct.index(grid) for grid in grids])
        self.tables = [self._table(model, grid) for grid in distinct]
        full = grids if full_grids is None else full_grids
        dense = {grid: dense_ops(model.backbone, model.decode_head, grid).macs for grid in dict.fromkeys(full)}
        self.dense = torch.tensor([dense[grid] for grid in full])

    def _table(self, model: ExitSegmenter, grid: Grid) -> Tensor:
        """`(E + 3, cells + 1)` int64 by live tokens: each exit head, the decode head, a block, the embedding."""
        counts = range(grid[0] * grid[1] + 1)
        prefix = model.config.backbone.num_prefix_tokens
        heads = [head for head in (*model.exit_heads, model.decode_head) if isinstance(head, Head)]
        rows = [[head.ops(count, grid).macs for count in counts] for head in heads]
        rows.append([model.backbone.block_ops(count + prefix).macs for count in counts])
        rows.append([model.backbone.embed_ops(grid).macs] * len(counts))
        return torch.tensor(rows)

    def at_exits(self, numbers: Sequence[int], last_exit: int | None) -> MacTable:
        """The same with some of the exits, in order; `last_exit` is the one of these at which the network ends."""
        some = copy(self)
        some.exits, some.last_exit = tuple(self.exits[n] for n in numbers), last_exit
        rest = range(len(self.exits), len(self.exits) + 3)
        some.tables = [table[[*numbers, *rest]] for table in self.tables]
        return some

    def first(self, images: int) -> MacTable:
        """The same for the first so many images."""
        some = copy(self)
        some.kind, some.dense = self.kind[:images], self.dense[:images]
        return some

    def macs(self, live: Tensor) -> Tensor:
        """`(n, E + 1)` live counts to `(n,)` int64 multiply-adds, exit heads included; none behind a stop."""
        exits = len(self.exits)
        ran = exits if self.last_exit is None else self.last_exit + 1
        bounds = (0, *self.exits, self.depth)
        total = torch.zeros(len(live), dtype=torch.int64)
        for kind, table in enumerate(self.tables):
            rows = self.kind == kind
            own, cells = live[rows], live.new_full((int(rows.sum()),), table.shape[1] - 1)
            macs = table[exits + 2][own[:, 0]]
            for n in range(ran):
                macs = macs + (bounds[n + 1] - bounds[n]) * table[exits + 1][own[:, n]]
                macs = macs + table[n][cells if self.scored_on_grid else own[:, n]]
            if self.seen_on:
                for n in range(1, exits + 1 if self.last_exit is None else ran):
                    keys, queries = self.seen_on * (cells - own[:, n]), own[:, n] + self.prefix
                    each = torch.where(queries > 0, self.per_key + self.per_look * queries, 0)
                    macs = macs + ((bounds[n + 1] - bounds[n]) * keys * each).round().long()
            if self.last_exit is None:
                macs = macs + (bounds[exits + 1] - bounds[exits]) * table[exits + 1][own[:, exits]]
                macs = macs + table[exits][cells if self.on_grid else own[:, exits]]
                macs = macs + self.per_stopped * (cells - own[:, exits])
            total[rows] = macs
        return total

    def share(self, live: Tensor) -> float:
        """Multiply-adds over dense ones, both summed over images."""
        return self.macs(live).sum().item() / self.dense.sum().item()


def with_thresholds(method: ThresholdMethod[Any], limits: Limits) -> ThresholdMethod[Any]:
    """The method with thresholds for these limits."""
    return method.with_thresholds(
        tuple(
            tuple(map(threshold_of, limit)) if isinstance(limit, Sequence) else threshold_of(limit) for limit in limits
        )
    )


def threshold_of(limit: float) -> float:
    """A threshold for a limit on uncertainty."""
    return round(min(1.0, max(0.0, 1.0 - limit)), 10)
