"""Truncated: the whole picture leaves at one exit, whatever is in it.

The rival that needs no rule: a shallower network with a trained head, which every model with exits contains. Prefix
tokens, which never leave, run on alone; they are counted as they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods.base import Method, Model, Result, Stage, option, stage_of
from tokenexit.tokens import Tokens


@dataclass(frozen=True)
class Truncated(Method[Result | None]):
    """All tokens leave at one exit with what its head says. The state is that map, once there is one.

    after: which exit ends the network, 1 for the first.
    """

    name: ClassVar[str] = "truncated"
    title: ClassVar[str] = "Truncated"

    after: int = option(1, "exit that ends the network, 1 the first")

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ConfigError(f"after={self.after} must be at least 1: it counts exits, 1 is the first.")

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Every exit as the end, the last one first."""
        return [replace(self, after=n) for n in range(num_exits, 0, -1)]

    def check(self, model: Model) -> None:
        if self.after > model.num_exits:
            raise ConfigError(f"after={self.after} names no exit: the model has {model.num_exits}.")
        if model.with_stages:
            raise ConfigError("Truncated leaves no map at later exits: train and record stages with dense instead.")
        head, decode_head = model.exit_heads[self.after - 1], model.decode_head
        if (head.scale, head.upscale) != (decode_head.scale, decode_head.upscale):
            raise ConfigError(
                f"Truncated needs exit {self.after} and the end to have heads of one resolution: use the same head."
            )

    def start(self, tokens: Tokens, model: Model) -> Result | None:
        return None

    def at_exit(self, n: int, tokens: Tokens, state: Result | None, model: Model) -> tuple[Tokens, Result | None]:
        if n != self.after - 1:
            return tokens, state
        head, patches = model.exit_heads[n], tokens.patches()
        out = head(patches)
        softmax = head.kind == "softmax"
        scores = out.logits if softmax else class_scores("atm", out.logits, out.presence, out.packing.image_index())
        stages = [Stage()] * (model.num_exits + 1)
        stages[n] = stage_of(head, patches, out, None)
        exit_stage = torch.full((tokens.cells,), n, dtype=torch.int64, device=patches.x.device)
        result = Result(scores, "logits" if softmax else "scores", tuple(stages), exit_stage)
        return tokens.keep(torch.zeros_like(patches.position, dtype=torch.bool)), result

    def result(self, tokens: Tokens, state: Result | None, model: Model) -> Result:
        assert state is not None, "check() has seen that the exit exists"
        return state
