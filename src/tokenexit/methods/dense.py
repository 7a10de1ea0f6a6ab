"""Dense: every token runs through every block. The baseline of all comparisons.

At inference exit heads do not run, so that they cost Dense nothing; for losses and studies they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenexit.engine.tokens import Tokens
from tokenexit.methods.base import Method, Model, Result, Stage, all_stay, decode_grid, stage_of


@dataclass(frozen=True)
class Dense(Method[tuple[Stage, ...]]):
    """No token leaves. The state is the stages seen so far."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "Dense"
    has_exits: ClassVar[bool] = False

    def check(self, model: Model) -> None:
        """Every model will do."""

    def start(self, tokens: Tokens, model: Model) -> tuple[Stage, ...]:
        return ()

    def at_exit(
        self, n: int, tokens: Tokens, state: tuple[Stage, ...], model: Model
    ) -> tuple[Tokens, tuple[Stage, ...]]:
        if not model.with_stages:
            return tokens, (*state, Stage())
        head, patches = model.exit_heads[n], tokens.patches()
        out = head(patches)
        return tokens, (*state, stage_of(head, patches, out, out.logits))

    def result(self, tokens: Tokens, state: tuple[Stage, ...], model: Model) -> Result:
        return decode_grid(tokens.patches(), state, all_stay(tokens, model.num_exits), model)
