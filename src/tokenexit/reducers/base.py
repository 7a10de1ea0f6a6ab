"""A reducer is a frozen value that merges, drops or splits tokens at sites in the network: the base of all of them.

A method decides at exits, with heads; a reducer decides between, and inside, blocks, from features alone. What it drops
stays answered: the cover of `Tokens` names, for every cell, the token that stands for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError

COSINES = (0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Thresholds of likeness that calibration tries, around those that were published."""


@dataclass(frozen=True)
class Site:
    """A place in the network where tokens are reduced. Where an exit stands at the same place, the exit comes first.

    Attributes:
        after: number of blocks before it, as exits are counted.
        inside: whether it lies further on, behind the attention of the next block and before its MLP.
        rejoins: whether tokens that had left come back there, which is a method's own site, see `rejoin_sites`.
        weighed: whether, in the attention of the block that it lies inside of, a token counts as a key as many times as
            it stands for cells.
    """

    after: int
    inside: bool = False
    rejoins: bool = False
    weighed: bool = False


@dataclass(frozen=True)
class Reducer(ABC):
    """The base of all reducers.

    Attributes:
        name: its name in YAML, JSON and on the command line.
        title: its name in tables and figures.
        main_option: the option that `--merge NAME:VALUE` sets.
        trials: values of that option that calibration tries, from merging little to much; none where it sets no amount.
        splits: whether tokens come apart at its sites, and not together.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    main_option: ClassVar[str]
    trials: ClassVar[tuple[Any, ...]] = ()
    splits: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name in a table row: the reducer, its main option, and others that differ from their defaults."""
        default = type(self)()
        others = [name for name in option_names(self) if name != self.main_option]
        named = [name for name in others if getattr(self, name) != getattr(default, name)]
        return " ".join([self.name, *(f"{name}={_text(getattr(self, name))}" for name in (self.main_option, *named))])

    def check(self, backbone: ViTConfig) -> None:
        """Raise `ConfigError`, in one sentence, for a backbone that has no such sites."""
        last = max((site.after for site in self.sites(backbone.depth)), default=0)
        if last >= backbone.depth:
            raise ConfigError(
                f"'{self.name}' reduces tokens at block {last + 1} and this backbone has {backbone.depth}: name blocks "
                "that it has."
            )

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        """Return the tokens of images `(3, H, W)` before the first block, which most reducers leave as they are."""
        return backbone.embed(images)

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        """Count what `embed` does beside the backbone's own, on one image."""
        return Ops()

    def at(self, progress: float) -> Self:
        """Return the reducer to train with after a share `progress` in [0, 1] of the training."""
        return self

    @abstractmethod
    def sites(self, depth: int) -> tuple[Site, ...]:
        """Return where a network of so many blocks is reduced, in order; nowhere if `embed` does it all."""

    @abstractmethod
    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        """Return the tokens that go on.

        qkv: queries, keys and values `(T, 3, N, H)` of the block that the site lies inside of, None between blocks.
        """

    @abstractmethod
    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        """Count the comparisons of a site on one image that arrives with so many live patch tokens."""


@dataclass(frozen=True)
class Adjustable(Reducer):
    """The base of reducers whose main option sets how much merges.

    Attributes:
        idle: the value of that option from which curricula start, at which nothing merges but what is equal.
        warmup: share of the training over which the option goes from `idle` to its value, linearly, as thresholds of
            exits fall.

    Raises:
        ConfigError: for a share out of range.
    """

    idle: ClassVar[float]

    warmup: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_number("warmup", self.warmup, 0, 1, "it is a share of the training")

    def at(self, progress: float) -> Self:
        if progress >= self.warmup:
            return self
        done, value = progress / self.warmup, getattr(self, self.main_option)
        several = value if isinstance(value, tuple) else (value,)
        now = tuple(self.idle + done * (one - self.idle) for one in several)
        changed: dict[str, Any] = {self.main_option: now if isinstance(value, tuple) else now[0]}
        return replace(self, **changed)


def option_names(reducer: Reducer | type[Reducer]) -> list[str]:
    """Return the names of a reducer's options, those that it shares with others last."""
    return [f.name for f in sorted(fields(reducer), key=lambda f: f.kw_only is True)]


def check_number(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Reject a number out of bounds. meaning: what an extreme value does, a clause."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}: {meaning}.")


def check_block(name: str, value: int | None) -> None:
    """Reject a number of a block, 1 the first, that no network has."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}: it counts blocks, 1 is the first.")


def _text(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
