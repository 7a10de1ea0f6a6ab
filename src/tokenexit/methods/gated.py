"""A method some of whose exits are passed over: their heads do not run and nobody leaves there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tokenexit.errors import ConfigError
from tokenexit.methods.base import Method, Model, Result, Stage
from tokenexit.tokens import Tokens


@dataclass(frozen=True)
class Gated(Method[Any]):
    """`method` without the exits in `closed`, counted from 0; those that stay keep their thresholds.

    Which exits to close is for `tokenexit.gating` to say. For inference: training wants the maps of all exits.
    """

    name: ClassVar[str] = "gated"

    method: Method[Any]
    closed: tuple[int, ...] = ()

    def at(self, progress: float) -> Gated:
        return replace(self, method=self.method.at(progress))

    def of_cells(self, cells: slice) -> Gated:
        return replace(self, method=self.method.of_cells(cells))

    def check(self, model: Model) -> None:
        if any(not 0 <= n < model.num_exits for n in self.closed):
            raise ConfigError(f"closed={self.closed} names exits that are not there: this model has {model.num_exits}.")
        if self.closed and model.with_stages:
            raise ConfigError("closed exits leave no map for losses and studies: run the method itself instead.")
        self.method.check(model)

    def start(self, tokens: Tokens, model: Model) -> Any:
        return self.method.start(tokens, model)

    def at_exit(self, n: int, tokens: Tokens, state: Any, model: Model) -> tuple[Tokens, Any]:
        if n in self.closed:
            return tokens, replace(state, stages=(*state.stages, Stage()))
        return self.method.at_exit(n, tokens, state, model)

    def result(self, tokens: Tokens, state: Any, model: Model) -> Result:
        return self.method.result(tokens, state, model)
