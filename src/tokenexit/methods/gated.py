"""Closed exits of a method are passed over: their heads do not run and no token leaves there.

`tokenexit.calibration.gating` chooses which exits to close.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, NoReturn

from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.errors import ConfigError
from tokenexit.methods.base import ExitRecord, Method, ModelView, Result
from tokenexit.methods.baselines import Truncated
from tokenexit.methods.dense import Dense
from tokenexit.methods.reduced import Reduced
from tokenexit.methods.wrapper import Wrapper


@dataclass(frozen=True)
class _Closing(Wrapper):
    """The base of the two: what closed exits have in common."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.method, Reduced):
            raise ConfigError(f"'{self.name}' closes exits of a method by itself: put it inside of 'reduced'.")

    @property
    def label(self) -> str:
        return f"{self.method.label} gated"

    def for_export(self) -> NoReturn:
        raise ConfigError("closed exits follow from a machine and a size: export the method inside.")


@dataclass(frozen=True)
class Gated(_Closing):
    """A method without some of its exits; the others keep their thresholds.

    It serves inference alone: training needs the maps of all exits.

    Attributes:
        method: the method inside.
        closed: exits that are passed over, 0 for the first.
    """

    name: ClassVar[str] = "gated"
    title: ClassVar[str] = "Gated"

    closed: tuple[int, ...] = ()

    def check(self, model: ModelView) -> None:
        if any(not 0 <= n < model.num_exits for n in self.closed):
            raise ConfigError(f"closed={self.closed} names exits that are not there: this model has {model.num_exits}.")
        if self.closed and isinstance(self.inner, Dense | Truncated):
            raise ConfigError(
                f"closed must be empty for '{self.inner.name}', got {self.closed}: no token chooses an exit."
            )
        if self.closed and model.with_records:
            raise ConfigError("closed exits leave no map for losses and studies: run the method itself instead.")
        if self.last_exit in self.closed:
            raise ConfigError(f"closed={self.closed} closes the exit where {self.inner.name} stops: leave it open.")
        super().check(model)

    def at_exit(self, n: int, tokens: Tokens, state: Any, model: ModelView) -> tuple[Tokens, Any]:
        if n in self.closed:
            return tokens, replace(state, exit_records=(*state.exit_records, ExitRecord()))
        return super().at_exit(n, tokens, state, model)


@dataclass(frozen=True)
class GatedBySize(_Closing):
    """A method without the exits that are closed at an image's size, whatever is in it and beside it in the batch.

    Attributes:
        method: the method inside.
        closed: pairs of a number of patches, from which on (up to the next pair's), and the exits that are closed:
            `((1, (0, 1)), (97, (0,)), (400, ()))`.
    """

    name: ClassVar[str] = "gated_by_size"
    title: ClassVar[str] = "Gated by size"

    closed: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def same_exits(self) -> bool:
        return False

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[Any]]]:
        """Yield consecutive images for which the same exits are closed, and the method for them."""
        for run, _ in super().runs(grids, max_tokens):
            start = run.start
            for method, group in groupby(grids[run.start : run.stop], self.for_grid):
                stop = start + len(list(group))
                yield range(start, stop), method
                start = stop

    def for_grid(self, grid: Grid) -> Method[Any]:
        """Return the method with the exits closed that are closed on this grid."""
        closed: tuple[int, ...] = ()
        for patches, numbers in self.closed:
            if grid[0] * grid[1] >= patches:
                closed = numbers
        return Gated(self.method, closed) if closed else self.method

    def check(self, model: ModelView) -> None:
        for _, closed in self.closed:
            Gated(self.method, closed).check(model)
        super().check(model)

    def start(self, tokens: Tokens, model: ModelView) -> Any:
        return self._for_all(tokens).start(tokens, model)

    def at_exit(self, n: int, tokens: Tokens, state: Any, model: ModelView) -> tuple[Tokens, Any]:
        return self._for_all(tokens).at_exit(n, tokens, state, model)

    def result(self, tokens: Tokens, state: Any, model: ModelView) -> Result:
        return self._for_all(tokens).result(tokens, state, model)

    def _for_all(self, tokens: Tokens) -> Method[Any]:
        """Return the method of all images, which the model has sorted by it."""
        method, *others = (self.for_grid(grid) for grid in tokens.grids)
        assert all(other == method for other in others), "images of one method run together"
        return method
