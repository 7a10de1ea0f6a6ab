"""Two questions about exits beside merging, on one trained model.

    python -m benchmarks.exits_and_merging runs/camvid-dense --data camvid --data-root data/camvid --json FILE

Do merged tokens leave earlier? Each cell of an image by the size of the group that it is in at the end, with exits and
merging, against the same cell with exits alone. Which score should decide who leaves? At every exit as many tokens
leave as a fixed ratio says: the surest, those of lowest rank in the attention graph of the dense pass (PageRank, in the
block before the exit, see `ZeroTPrune`), those of highest rank, or random ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.study import bar, model_and_data_parser
from tokenexit.cli.chosen_methods import reducers_of
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Spread
from tokenexit.data.registry import open_dataset
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.evaluation.metrics import boundary_counts, boundary_iou, confusion_matrix, scores
from tokenexit.methods import Dense, DToP, FixedRatio, Method, Reduced
from tokenexit.methods.reference import PrescribedExits
from tokenexit.reducers import Reducer
from tokenexit.reducers.base import Site
from tokenexit.reducers.zero_tprune import page_rank
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

STEPS = 5
"""Iterations of PageRank."""


@dataclass(frozen=True, eq=False)
class Ranks(Reducer):
    """Merges nothing, and notes the PageRank of each token of one image in some blocks: `found`, by number of block."""

    name: ClassVar[str] = "ranks"
    title: ClassVar[str] = "Ranks"
    main_option: ClassVar[str] = "blocks"

    blocks: tuple[int, ...] = ()
    found: dict[int, Tensor] = field(default_factory=dict)

    def sites(self, depth: int) -> tuple[Site, ...]:  # noqa: ARG002
        return tuple(Site(block - 1, inside=True) for block in self.blocks)

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        assert qkv is not None, "the sites lie inside of blocks"
        self.found[site.after + 1] = page_rank(qkv[:, 0].float(), qkv[:, 1].float(), STEPS)[tokens.num_prefix :]
        return tokens

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:  # noqa: ARG002
        return Ops()


def leaving(ranks: Sequence[Tensor], ratio: float) -> Tensor:
    """Return the exit of each token of an image, where at each exit the lowest leave and a share of all goes on.

    ranks: `(cells,)` at every exit. ratio: for the first exit; that of the n-th is its n-th power. Returns `(cells,)`.
    """
    cells = len(ranks[0])
    exits = torch.full((cells,), len(ranks))
    live = torch.arange(cells)
    for n, rank in enumerate(ranks):
        order = live[rank[live].argsort(stable=True)]
        gone = len(live) - int(cells * ratio ** (n + 1))
        exits[order[:gone]] = n
        live = order[gone:]
    return exits


class Count:
    """Sums of one row over images."""

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.boundary = torch.zeros(2, classes, dtype=torch.int64)
        self.macs, self.dense = 0, 0

    def add(self, output: Any, truth: Tensor, ignored: int) -> None:
        (labels,), classes = output.labels, len(self.confusion)
        self.confusion += confusion_matrix(labels, truth, classes, ignored)
        self.boundary += torch.stack(boundary_counts(labels, truth, classes, ignored))
        self.macs += sum(output.ledger.macs)
        self.dense += sum(output.ledger.dense_macs)

    def row(self) -> dict[str, float]:
        return {
            "share_of_dense": self.macs / self.dense,
            "mIoU": scores(self.confusion).miou,
            "boundary_IoU": boundary_iou(*self.boundary),
        }


def scores_of_who_leaves(model: ExitSegmenter, data: SegmentationDataset, ratios: Sequence[float]) -> dict[str, Any]:
    """Return a row for each rule and ratio, all with the same counts."""
    exits, ignored = model.config.exits, data.labels.ignore_index
    rows: dict[str, Count] = {}

    def count(name: str, image: Tensor, truth: Tensor, method: Method[Any]) -> None:
        tally = rows.setdefault(name, Count(model.config.num_classes))
        tally.add(model([image], method, targets=[tuple(truth.shape)]), truth, -1 if ignored is None else ignored)

    for n in bar("who leaves")(range(len(data))):
        sample = data[n]
        image, truth = model.preprocessing.to_tensor(sample.image), torch.from_numpy(sample.mask.astype("int64"))
        noted = Ranks(blocks=exits)
        model([image], Reduced(Dense(), noted))
        ranks = [noted.found[block] for block in exits]
        shuffle = torch.Generator().manual_seed(n)
        at_random = [torch.rand(len(ranks[0]), generator=shuffle) for _ in exits]
        rules = {"lowest PageRank": ranks, "highest PageRank": [-rank for rank in ranks], "random": at_random}
        for ratio in ratios:
            shares = tuple(ratio ** (k + 1) for k in range(len(exits)))
            count(f"surest, {ratio:g}", image, truth, FixedRatio(shares))
            for name, order in rules.items():
                count(f"{name}, {ratio:g}", image, truth, PrescribedExits(exit_index=leaving(order, ratio)))
    return {name: tally.row() for name, tally in rows.items()}


def exits_by_size(
    model: ExitSegmenter, data: SegmentationDataset, thresholds: tuple[float, ...], by: Reducer
) -> dict[str, Any]:
    """Return, by size of the group, its share of all cells and how many of them left at each exit, with and without."""
    numbers = len(model.config.exits) + 1
    together: dict[int, Tensor] = {}
    alone: dict[int, Tensor] = {}
    method = DToP(thresholds)
    for n in bar(by.label)(range(len(data))):
        image = model.preprocessing.to_tensor(data[n].image)
        both, plain = model([image], Reduced(method, by)), model([image], method)
        (groups,), (mine,), (its,) = both.groups, both.exit_index, plain.exit_index
        sizes = groups.flatten().bincount()[groups.flatten()]
        for size in sizes.unique().tolist():
            for sums, index in ((together, mine), (alone, its)):
                held = sums.setdefault(min(size, 16), torch.zeros(numbers, dtype=torch.int64))
                held += torch.bincount(index.flatten()[sizes == size], minlength=numbers)
    total = sum(int(each.sum()) for each in together.values())
    return {
        str(size): {
            "share_of_cells": int(together[size].sum()) / total,
            "left_at_exit": (together[size] / together[size].sum()).tolist(),
            "alone": (alone[size] / alone[size].sum()).tolist(),
        }
        for size in sorted(together)
    }


def main() -> None:
    parser = model_and_data_parser(__doc__)
    parser.add_argument("--limit", type=int, help="number of images, evenly spread over the split; all if not given")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--threshold", default="0.98/0.8/0.65", help="of exits beside merging")
    parser.add_argument("--merge", nargs="+", default=["algm:0.9", "g2tm:0.9", "mpm", "tome:0.04"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = ExitSegmenter.from_pretrained(options.model)
    data: SegmentationDataset = open_dataset(options.data, options.data_root, options.split)
    if options.limit:
        data = Spread(data, options.limit)
    thresholds = tuple(map(float, options.threshold.split("/")))
    with inference(model.device, options.precision):
        content: dict[str, Any] = {
            "settings": {
                "data": options.data,
                "split": options.split,
                "images": len(data),
                "threshold": options.threshold,
                "precision": options.precision,
            },
            "who_leaves": scores_of_who_leaves(model, data, options.ratios),
            "exit_by_size": {
                by.label: exits_by_size(model, data, thresholds, by)
                for by in reducers_of(options.merge)
                if by is not None
            },
        }
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
