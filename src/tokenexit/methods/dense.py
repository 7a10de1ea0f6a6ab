"""Dense runs every token through every block. It is the baseline of all comparisons.

At inference exit heads do not run, so that they cost Dense nothing; they do where exits are recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenexit.engine.tokens import Tokens
from tokenexit.methods.base import ExitRecord, Method, ModelView, Result, all_stay, decode_grid, on_all_cells, record_of


@dataclass(frozen=True)
class Dense(Method[tuple[ExitRecord, ...]]):
    """No token leaves; the method has no options. The state is the exit records so far."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "Dense"
    has_exits: ClassVar[bool] = False
    offered: ClassVar[bool] = True

    def check(self, model: ModelView) -> None:
        """Accept every model."""

    def start(self, tokens: Tokens, model: ModelView) -> tuple[ExitRecord, ...]:
        return ()

    def at_exit(
        self, n: int, tokens: Tokens, state: tuple[ExitRecord, ...], model: ModelView
    ) -> tuple[Tokens, tuple[ExitRecord, ...]]:
        if not model.with_records:
            return tokens, (*state, ExitRecord())
        head = model.exit_heads[n]
        out, patches = on_all_cells(head, tokens.patches())
        return tokens, (*state, record_of(head, patches, out, out.logits))

    def result(self, tokens: Tokens, state: tuple[ExitRecord, ...], model: ModelView) -> Result:
        return decode_grid(tokens, state, all_stay(tokens, model.num_exits), model)
