"""Token Cropr (Bergner, Lippert, Mahendran; CVPR 2025): at every exit a fixed number leaves, by learned scores.

At each exit a head with learned queries scores the live tokens, and the lowest leave. Before the last block all of them
come back with the features they left with, and run through it as all others (last-layer fusion). The decode head reads
the full grid. A query sees all tokens and learns the class of its place, so that what its attention favours is what the
task needs; at inference only one inner product of each token is left of a head.

Source: the official release, read; model `exits=(1, ..., depth - 2)` with exit heads "cropr" is its setting. Where this
differs from it, and why:

- the number that leaves is a share of the image's cells, so that any size works; the release has 40 of 1024;
- the release lets one token more go at the first exit, for the class token in its count; here counts are of patches;
- ties go to the lowest position; the release's sort is unstable;
- losses of exits are taken on their maps resized to the labels, as of all heads; the release makes the labels smaller.

In training the rate grows from 0 over the first half, as published. Published, too: the weight of every exit's loss is
1, AdamW at 2e-5, weight decay 0.05, layer decay 0.9, stochastic depth 0.2 but for the last block, 64 epochs of batch 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from tokenexit.engine.ranks import rank
from tokenexit.engine.tokens import Tokens
from tokenexit.errors import ConfigError
from tokenexit.heads import CroprHead
from tokenexit.methods.base import (
    ExitRecord,
    LeftAt,
    Method,
    ModelView,
    Result,
    check_rejoin,
    check_rejoin_place,
    decode_grid,
    exits_of,
    option,
    record_of,
    rejoin_sites,
    rejoined,
)
from tokenexit.methods.thresholded import check_share
from tokenexit.reducers.base import Site


@dataclass(frozen=True)
class CroprState:
    """The state that travels from exit to exit.

    Attributes:
        left: the tokens that each exit let go, with the features they left with.
        exit_records: one for each exit so far.
    """

    left: tuple[LeftAt, ...] = ()
    exit_records: tuple[ExitRecord, ...] = ()


@dataclass(frozen=True)
class Cropr(Method[CroprState]):
    """Token Cropr: the same share of an image's cells leaves at every exit, those with the lowest learned scores.

    Attributes:
        rate: share in [0, 1] of an image's cells that leaves at each exit, to the nearest whole number, as long as
            there are tokens; 0.04 is about the published 40 of 1024.
        rejoin: number of last blocks before which tokens come back, 1 as published.
        rate_warmup: share of the training over which the rate grows from 0, 0.5 as published; 0 for none.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "cropr"
    title: ClassVar[str] = "Cropr"

    rate: float = option(0.04, "share of an image's tokens that leaves at each exit")
    rejoin: int = option(1, "number of last blocks before which tokens that left come back", kw_only=True)
    rate_warmup: float = option(0.5, "share of the training over which the rate grows from 0", kw_only=True)

    def __post_init__(self) -> None:
        check_share("rate", self.rate)
        check_share("rate_warmup", self.rate_warmup)
        check_rejoin(self.rejoin)

    def at(self, progress: float) -> Self:
        done = min(1.0, progress / self.rate_warmup) if self.rate_warmup > 0.0 else 1.0
        return replace(self, rate=self.rate * done)

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Return methods whose rates grow from 0 to where all tokens have left at the last exit."""
        return [replace(self, rate=round(i / points / max(num_exits, 1), 5)) for i in range(1, points + 1)]

    def for_export(self) -> NoReturn:
        raise ConfigError(
            "a number of tokens is counted on the host and cannot be exported: choose a method that has thresholds, "
            "such as dtop."
        )

    def check(self, model: ModelView) -> None:
        check_rejoin_place(self.rejoin, model)
        if not all(isinstance(head, CroprHead) for head in model.exit_heads):
            raise ConfigError(
                "Cropr scores tokens with exit heads of kind cropr, and this model has others: train one with "
                "exit_head='cropr', or use fixed_ratio with rejoin."
            )

    def start(self, tokens: Tokens, model: ModelView) -> CroprState:
        return CroprState()

    def at_exit(self, n: int, tokens: Tokens, state: CroprState, model: ModelView) -> tuple[Tokens, CroprState]:
        head, patches = model.exit_heads[n], tokens.patches()
        assert isinstance(head, CroprHead), "check() has seen that it is"

        # Score, and decide: the lowest leave. Neither carries a gradient.
        number = torch.tensor([round(self.rate * h * w) for h, w in tokens.grids], device=patches.x.device)
        image = patches.packing.image_index()
        leaves = rank(image, head.score(patches.x), descending=False) < number[image]
        gone = patches.keep(leaves)

        # In training the head's map is for its loss alone.
        record = ExitRecord(work=tuple(head.score_ops(live) for live in patches.live))
        if model.with_records:
            out = head(patches)
            record = replace(record_of(head, patches, out, out.logits), work=record.work)
        return tokens.keep(~leaves), CroprState((*state.left, (n, gone)), (*state.exit_records, record))

    def sites(self, depth: int) -> tuple[Site, ...]:
        return rejoin_sites(self.rejoin, depth)

    def at_site(self, site: Site, tokens: Tokens, state: CroprState, qkv: Tensor | None) -> Tokens:
        return rejoined(state.left, tokens)

    def result(self, tokens: Tokens, state: CroprState, model: ModelView) -> Result:
        return decode_grid(tokens, state.exit_records, exits_of(state.left, tokens, model.num_exits), model)
