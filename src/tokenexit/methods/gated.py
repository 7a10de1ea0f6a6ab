"""A method some of whose exits are passed over: their heads do not run and nobody leaves there.

Which exits to close is for `tokenexit.gating` to say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tokenexit.errors import ConfigError
from tokenexit.methods.base import Method, Model, Result, Stage
from tokenexit.tokens import Grid, Tokens


@dataclass(frozen=True)
class Gated(Method[Any]):
    """`method` without the exits in `closed`, counted from 0; those that stay keep their thresholds.

    For inference: training wants the maps of all exits.
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


@dataclass(frozen=True)
class GatedBySize(Method[Any]):
    """`method` without the exits that are closed at an image's size, whatever is in it and beside it in the batch.

    closed: `((1, (0, 1)), (97, (0,)), (400, ()))`: from so many patches on, up to those of the next, these are closed.
    """

    name: ClassVar[str] = "gated_by_size"

    method: Method[Any]
    closed: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def at(self, progress: float) -> GatedBySize:
        return replace(self, method=self.method.at(progress))

    def of_cells(self, cells: slice) -> GatedBySize:
        return replace(self, method=self.method.of_cells(cells))

    def for_grid(self, grid: Grid) -> Method[Any]:
        closed: tuple[int, ...] = ()
        for patches, numbers in self.closed:
            if grid[0] * grid[1] >= patches:
                closed = numbers
        return Gated(self.method, closed) if closed else self.method

    def check(self, model: Model) -> None:
        for _, closed in self.closed:
            Gated(self.method, closed).check(model)
        self.method.check(model)

    def start(self, tokens: Tokens, model: Model) -> Any:
        return self._of(tokens).start(tokens, model)

    def at_exit(self, n: int, tokens: Tokens, state: Any, model: Model) -> tuple[Tokens, Any]:
        return self._of(tokens).at_exit(n, tokens, state, model)

    def result(self, tokens: Tokens, state: Any, model: Model) -> Result:
        return self._of(tokens).result(tokens, state, model)

    def _of(self, tokens: Tokens) -> Method[Any]:
        """That of all images, which the model has sorted."""
        method, *others = (self.for_grid(grid) for grid in tokens.grids)
        assert all(other == method for other in others), "images of one method run together"
        return method
