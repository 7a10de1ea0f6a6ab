"""Two free baselines: a fixed ratio of tokens at every exit, and the whole image leaving at one exit.

FixedRatio is the baseline without a threshold: easy and hard images cost alike, and the number of tokens in every block
follows from the image's size alone. All else is DToP's: what the exit heads score, the canvas, the finish.

Truncated needs no rule: a shallower network with a trained head, which every model with exits contains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenexit.engine.tokens import Tokens
from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods.base import (
    ExitRecord,
    LeftAt,
    Method,
    ModelView,
    PerExit,
    Result,
    check_rejoin,
    check_rejoin_place,
    decode_grid,
    exits_of,
    on_all_cells,
    option,
    record_of,
    rejoin_sites,
    rejoined,
)
from tokenexit.methods.dtop import DToP, DToPState, Finish
from tokenexit.methods.selection import Score
from tokenexit.methods.thresholded import NEVER, per_exit
from tokenexit.reducers.base import Site


@dataclass(frozen=True)
class FixedRatioState(DToPState):
    """DToP's state and, with `rejoin`, the tokens that each exit let go.

    Attributes:
        left: the tokens that each exit let go, with the features they left with.
    """

    left: tuple[LeftAt, ...] = ()


@dataclass(frozen=True)
class FixedRatio(Method[FixedRatioState]):
    """DToP with a cap and no threshold.

    Attributes:
        ratios: for each exit the share in [0, 1] of an image's tokens that may go on, of all and not of those still
            live, rounded down; one number stands for all exits. The least confident go on, ties by lowest position.
        score: the score by which the most confident leave, as in `DToP`.
        temperature: of the exit heads' softmax, as in `DToP`.
        finish: scores of exited tokens in the result, as in `DToP`.
        rejoin: number of last blocks before which tokens that left come back, with the features they left with, to run
            through them as all others; the decode head then answers for all (last-layer fusion, of Token Cropr). None:
            they never do, as in `DToP`.

    Raises:
        ConfigError: for a value out of range, and for a finish beside `rejoin`.
    """

    name: ClassVar[str] = "fixed_ratio"
    title: ClassVar[str] = "Fixed ratio"

    ratios: PerExit = option((0.7, 0.5, 0.3), "share of an image's tokens that go on after each exit, as 0.7/0.5/0.3")
    score: Score = option(
        "probability", "score by which the most confident leave", choices=("probability", "margin", "entropy")
    )
    temperature: PerExit = option(1.0, "temperature of the exit heads' softmax: 1.5, or 1.8/1.5/1.2")
    finish: Finish = option(
        "auto", "scores of exited tokens in the result", choices=("auto", "presence_last", "frozen", "masks")
    )
    rejoin: int | None = option(None, "number of last blocks before which tokens that left come back", kw_only=True)

    def __post_init__(self) -> None:
        check_rejoin(self.rejoin)
        if self.rejoin is not None and self.finish != "auto":
            raise ConfigError(
                f"finish='{self.finish}' scores tokens that left, and with rejoin none has: leave one of the two out."
            )
        values = (self.ratios,) if isinstance(self.ratios, int | float) else self.ratios
        if isinstance(values, str) or not all(isinstance(v, int | float) and 0.0 <= v <= 1.0 for v in values):
            raise ConfigError(
                f"ratios must be a share in [0, 1] for each exit, got {self.ratios!r}: give those that go on."
            )
        self._dtop(())

    def _dtop(self, cap: tuple[float, ...]) -> DToP:
        return DToP(NEVER, score=self.score, temperature=self.temperature, finish=self.finish, cap=cap)

    def _for(self, model: ModelView) -> DToP:
        return self._dtop(per_exit(self.ratios, model.num_exits, "ratios"))

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Return methods whose shares fall from all tokens towards none, and by the same factor from exit to exit."""
        shares = [1 - i / (points + 1) for i in range(1, points + 1)]
        ratios = [tuple(round(share ** (n + 1), 4) for n in range(num_exits)) for share in shares]
        return [replace(self, ratios=each) for each in ratios]

    def for_export(self) -> Method[Any]:
        raise ConfigError(
            "a cap counts tokens on the host and cannot be exported: choose a method that has thresholds, such as dtop."
        )

    def check(self, model: ModelView) -> None:
        self._for(model).check(model)
        check_rejoin_place(self.rejoin, model)

    def start(self, tokens: Tokens, model: ModelView) -> FixedRatioState:
        return FixedRatioState(**vars(self._for(model).start(tokens, model)))

    def at_exit(
        self, n: int, tokens: Tokens, state: FixedRatioState, model: ModelView
    ) -> tuple[Tokens, FixedRatioState]:
        after, next_state = self._for(model).at_exit(n, tokens, state, model)
        assert isinstance(next_state, FixedRatioState), "DToP hands on what it is given"
        if self.rejoin is not None:
            next_state = replace(next_state, left=(*state.left, (n, tokens.apart(after))))
        return after, next_state

    def sites(self, depth: int) -> tuple[Site, ...]:
        return rejoin_sites(self.rejoin, depth)

    def at_site(self, site: Site, tokens: Tokens, state: FixedRatioState, qkv: Tensor | None) -> Tokens:
        return rejoined(state.left, tokens)

    def result(self, tokens: Tokens, state: FixedRatioState, model: ModelView) -> Result:
        if self.rejoin is not None:
            return decode_grid(tokens, state.exit_records, exits_of(state.left, tokens, model.num_exits), model)
        return self._for(model).result(tokens, state, model)


@dataclass(frozen=True)
class Truncated(Method[Result | None]):
    """A shallower network: all tokens leave at one exit with the logits of its head.

    The state is that map, None before the exit.

    Attributes:
        after: the exit that ends the network, 1 for the first.

    Raises:
        ConfigError: for an exit below 1.
    """

    name: ClassVar[str] = "truncated"
    title: ClassVar[str] = "Truncated"

    after: int = option(1, "exit that ends the network, 1 the first")

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ConfigError(f"after must be at least 1, got {self.after}: it counts exits, 1 is the first.")

    @property
    def last_exit(self) -> int | None:
        return self.after - 1

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Return the method with every exit as the end, the last one first."""
        return [replace(self, after=n) for n in range(num_exits, 0, -1)]

    def check(self, model: ModelView) -> None:
        if self.after > model.num_exits:
            raise ConfigError(
                f"after must be at most {model.num_exits}, the number of exits, got {self.after}: choose one of them."
            )
        if model.with_records:
            raise ConfigError("Truncated leaves no map at later exits: train and record exits with dense instead.")
        head, decode_head = model.exit_heads[self.after - 1], model.decode_head
        if (head.scale, head.upscale) != (decode_head.scale, decode_head.upscale):
            masks = "no exit answers in masks as this decode head does, name another method"
            cure = masks if decode_head.kind == "masks" else "use the same head"
            raise ConfigError(f"Truncated needs exit {self.after} and the end to have heads of one resolution: {cure}.")

    def start(self, tokens: Tokens, model: ModelView) -> Result | None:
        return None

    def at_exit(self, n: int, tokens: Tokens, state: Result | None, model: ModelView) -> tuple[Tokens, Result | None]:
        if n != self.after - 1:
            return tokens, state
        head = model.exit_heads[n]
        out, patches = on_all_cells(head, tokens.patches())
        softmax = head.kind == "softmax"
        scores = out.logits if softmax else class_scores(head.kind, out.logits, out.presence, out.packing.image_index())
        records = [ExitRecord()] * (model.num_exits + 1)
        records[n] = record_of(head, patches, out, None)
        exit_index = torch.full((tokens.cells,), n, dtype=torch.int64, device=patches.x.device)
        return tokens, Result(scores, "logits" if softmax else "scores", tuple(records), exit_index)

    def result(self, tokens: Tokens, state: Result | None, model: ModelView) -> Result:
        assert state is not None, "check() has seen that the exit exists"
        return state
