"""A method whose tokens are merged or dropped by a reducer, too: every combination of exits with merging.

`Reduced(Dense(), ALGM())` is ALGM, `Reduced(DToP(0.95), ALGM())` is ALGM with exits, and so on. Each image is reduced
by itself, whatever is beside it in the batch. A token that exits, exits with all cells that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.methods.base import Method, ModelView
from tokenexit.methods.wrapper import Wrapper
from tokenexit.reducers.base import Reducer, Site
from tokenexit.reducers.mpm import MPM


@dataclass(frozen=True)
class Reduced(Wrapper):
    """A method on tokens that a reducer merges or drops.

    Exits see merged tokens as they are, each of them one token, in DToP's k and in a cap, too; thresholds and
    temperatures that were calibrated without the reducer are not those that suit it. In training it works likewise:
    what merges is decided without a gradient, means carry it, and losses are taken on the maps of all cells.

    Attributes:
        method: the method inside, which may have closed exits.
        by: what merges or drops tokens between exits.

    Raises:
        ConfigError: for one `Reduced` in another, and for what is no reducer.
    """

    name: ClassVar[str] = "reduced"
    title: ClassVar[str] = "Reduced"

    by: Reducer = field(default_factory=MPM)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.by, Reducer):
            raise ConfigError(f"by must be a reducer, got {self.by!r}: give one, such as tokenexit.ALGM(0.9).")
        if isinstance(self.method, Reduced):
            raise ConfigError("one reducer works at a time: choose one of the two.")

    @property
    def label(self) -> str:
        return f"{self.method.label} + {self.by.label}"

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[object]]]:
        """Yield the runs of the method inside."""
        return ((run, replace(self, method=each)) for run, each in self.method.runs(grids, max_tokens))

    def at(self, progress: float) -> Self:
        return replace(self, method=self.method.at(progress), by=self.by.at(progress))

    def check(self, model: ModelView) -> None:
        if not self.batch_independent:
            raise ConfigError("batch_mode='mean' counts the tokens of complete grids: merge with batch_mode='exact'.")
        if model.decode_head.kind == "masks":
            raise ConfigError("the decode head 'eomt' takes no merged tokens yet: run this model with exits alone.")
        self.by.check(model.backbone)
        super().check(model)
        back = min((site.after for site in self.method.sites(model.backbone.depth)), default=model.backbone.depth)
        last = max((site.after for site in self.by.sites(model.backbone.depth)), default=0)
        if self.by.splits and last >= back:
            raise ConfigError(
                f"after must be below {back}, the number of blocks before tokens that left come back, got {last}: what "
                "has left is not split."
            )

    def for_export(self) -> NoReturn:
        raise ConfigError("a graph holds no reducer of tokens yet: export the method inside.")

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        return self.by.embed(images, backbone)

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        return self.by.embed_ops(grid, backbone)

    def sites(self, depth: int) -> tuple[Site, ...]:
        return (*self.method.sites(depth), *self.by.sites(depth))

    def at_site(self, site: Site, tokens: Tokens, state: Any, qkv: Tensor | None) -> Tokens:
        if site.rejoins:
            return self.method.at_site(site, tokens, state, qkv)
        return self.by.reduce(site, tokens, qkv)

    def site_ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return Ops() if site.rejoins else self.by.ops(site, live, grid, backbone)


def parted(method: Method[Any]) -> tuple[Method[Any], Reducer | None]:
    """Return the method inside and its reducer, or a method as it is and None."""
    return (method.method, method.by) if isinstance(method, Reduced) else (method, None)
