"""Buckets are the numbers of tokens that a stage's files hold: chosen so that padding costs least.

A bucket's price is that of its padding: with live counts of images, the multiply-adds that images take in the smallest
bucket that holds them, over those of their own tokens. They are chosen for counts spread around those of the images.

Legend: N patches of an image, E exits behind which the network goes on, n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid
from tokenexit.errors import ConfigError
from tokenexit.exporting.stages import StagedMethod
from tokenexit.methods import DToP
from tokenexit.segmenter import ExitSegmenter

COUNT = 4
"""Buckets of each stage, if nothing else is asked for."""
ALIGNED = 8
"""Rows of a chosen bucket are a multiple of this, and of more where there would be too many to choose from."""
CHOICES = 128
LIKELY = 64
"""Counts that stand for a distribution."""
OTHERS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Images to come are like those that were counted, and not the same: each count stands for these multiples of it."""
ANYTHING = 0.1
"""Beside them, so many more counts that are equally likely, whatever was counted."""

Counts = Sequence[Sequence[int]]
"""For each of n images its live patch tokens behind each of E exits."""
Cost = Callable[[int], int]


@dataclass(frozen=True)
class Buckets:
    """Buckets of all exits, and what their padding costs.

    Attributes:
        tokens: for every exit behind which the network goes on, numbers of patch tokens, of which the last is N.
        waste: multiply-adds of padding over those of an image without any, in the mean over images.
        source: whose live counts these are, in words.
    """

    tokens: tuple[tuple[int, ...], ...]
    waste: float
    source: str


def go_on(model: ExitSegmenter, method: StagedMethod) -> int:
    """Return behind how many exits blocks or a decode head of live tokens run."""
    return len(model.config.exits) if method.last_exit is None else method.last_exit


def choose_buckets(
    model: ExitSegmenter,
    method: StagedMethod,
    grid: Grid,
    images: Sequence[Tensor] = (),
    asked: Sequence[Sequence[int]] | None = None,
    count: int = COUNT,
) -> Buckets:
    """Choose buckets for images of one grid.

    Live counts are measured on `images`; without any they are those of the images that the model was calibrated on for
    this method, and are else taken to be equally likely.

    Args:
        model: the segmenter, in evaluation mode.
        method: of `staged_method`.
        grid: (rows, columns) of patches.
        images: `(3, H, W)` each, of that grid.
        asked: buckets given by hand, for all exits alike or for each; that of all patches is added.
        count: number of buckets of each stage, that of all patches included.

    Raises:
        ConfigError: for buckets outside 1 to N, and for a list of them for another number of exits.
    """
    cells, exits = grid[0] * grid[1], go_on(model, method)
    if count < 1:
        raise ConfigError(f"bucket count must be at least 1, got {count}: the bucket of all tokens is one.")
    if exits == 0:
        return Buckets((), 0.0, "the network ends at its first exit")
    counts, source = _live_counts(model, method, cells, images)
    costs = [_cost_behind(model, method, n, grid) for n in range(exits)]
    if asked is None:
        prefix = model.backbone.config.num_prefix_tokens
        expected = [_with_others([one[n] for one in counts], cells) for n in range(exits)]
        tokens = tuple(best_buckets(own, count, cells, cost, prefix) for own, cost in zip(expected, costs))
    else:
        tokens = _by_hand(asked, exits, cells)
    return Buckets(tokens, _waste(counts, tokens, costs, _fixed_cost(model, method, grid)), source)


def best_buckets(counts: Sequence[int], most: int, cells: int, cost: Cost, prefix: int = 0) -> tuple[int, ...]:
    """Return at most `most` buckets, increasing to `cells`, in which `counts` cost least together.

    An exact choice among aligned counts, by dynamic programming over the largest bucket so far.
    """
    step = ALIGNED * -(-cells // (ALIGNED * CHOICES))
    aligned = sorted({min(cells, max(1, -(-(count + prefix) // step) * step - prefix)) for count in counts} | {cells})
    within = [sum(count <= bucket for count in counts) for bucket in aligned]  # counts that a bucket could hold
    best: list[tuple[int, tuple[int, ...]]] = [
        (within[i] * cost(bucket), (bucket,)) for i, bucket in enumerate(aligned)
    ]
    ends = best[-1]
    for _ in range(most - 1):
        best = [
            min(
                [
                    (total + (within[i] - within[j]) * cost(bucket), (*chosen, bucket))
                    for j, (total, chosen) in enumerate(best[:i])
                ]
                or [best[i]]
            )
            for i, bucket in enumerate(aligned)
        ]
        ends = min(ends, best[-1])
    return ends[1]


def _with_others(counts: Sequence[int], cells: int) -> list[int]:
    """Return counts of images to come: those of one video are so much alike that the next one's fit no bucket."""
    near = [min(cells, round(count * factor)) for count in counts for factor in OTHERS]
    more = max(1, round(ANYTHING * len(near)))
    return near + [round((i + 0.5) / more * cells) for i in range(more)]


def smallest(buckets: Sequence[int], count: int) -> int:
    """Return the smallest of increasing `buckets` that holds `count` tokens."""
    return next(bucket for bucket in buckets if bucket >= count)


def _by_hand(asked: Sequence[Sequence[int]], exits: int, cells: int) -> tuple[tuple[int, ...], ...]:
    lists = list(asked) * exits if len(asked) == 1 else list(asked)
    if len(lists) != exits:
        raise ConfigError(f"buckets has {len(lists)} lists for {exits} exits that go on: give one, or one for each.")
    wrong = [bucket for one in lists for bucket in one if not 1 <= bucket <= cells]
    if wrong:
        raise ConfigError(f"buckets must be numbers of patch tokens from 1 to {cells}, got {wrong[0]}: change it.")
    return tuple(tuple(sorted({*one, cells})) for one in lists)


def _live_counts(
    model: ExitSegmenter, method: StagedMethod, cells: int, images: Sequence[Tensor]
) -> tuple[Counts, str]:
    """Return live counts behind the exits that go on, and where they come from."""
    exits = go_on(model, method)
    if images:
        with torch.no_grad():
            ledgers = [model([image], method).ledger for image in images]
        counts = [ledger.live_after(model.config.exits)[:exits] for ledger in ledgers]
        return counts, f"live tokens of {len(images)} image{'s' if len(images) > 1 else ''}"
    likely = [(i + 0.5) / LIKELY for i in range(LIKELY)]
    calibration = model.calibration
    if calibration is not None and calibration.method_name == method.name:
        if (quantiles := calibration.live_quantiles) is not None:
            shares = list(zip(*quantiles[:exits]))
            return [
                [round(share * cells) for share in one] for one in shares
            ], "live tokens of the calibration's images"
        if (means := calibration.live_after_exit) is not None:
            # Of means alone: counts are spread as far around them as they can be evenly.
            spans = [(max(0.0, 2 * mean - 1), min(1.0, 2 * mean)) for mean in means[:exits]]
            counts = [[round((low + at * (high - low)) * cells) for low, high in spans] for at in likely]
            return counts, "mean shares of the calibration"
    return [[round(at * cells)] * exits for at in likely], "no images and no calibration: all counts equally likely"


def _cost_behind(model: ExitSegmenter, method: StagedMethod, n: int, grid: Grid) -> Cost:
    """Return the multiply-adds of live tokens from exit `n` to the next, the next head included if it sees them."""
    backbone, exits = model.backbone, model.config.exits
    blocks = (*exits, backbone.config.depth)[n + 1] - exits[n]
    view, prefix = model.view(), backbone.config.num_prefix_tokens
    head = None
    if n + 1 < len(exits):
        head = None if method.scores_grid else view.exit_heads[n + 1]
    elif isinstance(method, DToP):
        head = view.decode_head

    def cost(count: int) -> int:
        if count + prefix == 0:
            return 0
        return (backbone.block_ops(count + prefix) * blocks + (Ops() if head is None else head.ops(count, grid))).macs

    return cost


def _fixed_cost(model: ExitSegmenter, method: StagedMethod, grid: Grid) -> int:
    """Return the multiply-adds that do not depend on who leaves."""
    backbone, view, cells = model.backbone, model.view(), grid[0] * grid[1]
    first = backbone.block_ops(cells + backbone.config.num_prefix_tokens) * model.config.exits[0]
    on_grid = view.exit_heads if method.scores_grid else view.exit_heads[:1]
    heads = sum((head.ops(cells, grid) for head in on_grid), Ops())
    final = Ops() if isinstance(method, DToP) else view.decode_head.ops(cells, grid)
    return (backbone.embed_ops(grid) + first + heads + final).macs


def _waste(counts: Counts, tokens: Sequence[Sequence[int]], costs: Sequence[Cost], fixed: int) -> float:
    """Return the multiply-adds of padding over those without any, over all images."""
    own = padded = 0
    for one in counts:
        own += fixed + sum(cost(count) for cost, count in zip(costs, one))
        padded += fixed + sum(cost(smallest(held, count)) for cost, held, count in zip(costs, tokens, one))
    return padded / own - 1
