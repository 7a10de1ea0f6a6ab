"""`Wrapper` is the base of methods around another method, whose facts and steps are those of the method inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.methods.base import Method, ModelView, Result, Thresholds
from tokenexit.reducers.base import Site


@dataclass(frozen=True)
class Wrapper(Method[Any]):
    """The base of the wrappers; each says itself what differs from the method inside.

    Attributes:
        method: the method inside.
        outermost: whether it may not stand inside another wrapper.

    Raises:
        ConfigError: around a wrapper that must be the outermost one.
    """

    outermost: ClassVar[bool] = False

    method: Method[Any]

    def __post_init__(self) -> None:
        if isinstance(self.method, Wrapper) and self.method.outermost:
            raise ConfigError(f"method '{self.method.name}' must be the outermost one: put '{self.name}' inside of it.")

    @property
    def inner(self) -> Method[Any]:
        return self.method.inner

    @property
    def batch_independent(self) -> bool:
        return self.method.batch_independent

    @property
    def min_live(self) -> int:
        return self.method.min_live

    @property
    def last_exit(self) -> int | None:
        return self.method.last_exit

    @property
    def same_exits(self) -> bool:
        return self.method.same_exits

    @property
    def thresholds(self) -> Thresholds | None:
        return self.method.thresholds

    def with_thresholds(self, thresholds: Thresholds) -> Self:
        return replace(self, method=self.method.with_thresholds(thresholds))

    def at(self, progress: float) -> Self:
        return replace(self, method=self.method.at(progress))

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        return self.method.embed(images, backbone)

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        return self.method.embed_ops(grid, backbone)

    def sites(self, depth: int) -> tuple[Site, ...]:
        return self.method.sites(depth)

    def at_site(self, site: Site, tokens: Tokens, state: Any, qkv: Tensor | None) -> Tokens:
        return self.method.at_site(site, tokens, state, qkv)

    def site_ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return self.method.site_ops(site, live, grid, backbone)

    def check(self, model: ModelView) -> None:
        self.method.check(model)

    def start(self, tokens: Tokens, model: ModelView) -> Any:
        return self.method.start(tokens, model)

    def at_exit(self, n: int, tokens: Tokens, state: Any, model: ModelView) -> tuple[Tokens, Any]:
        return self.method.at_exit(n, tokens, state, model)

    def result(self, tokens: Tokens, state: Any, model: ModelView) -> Result:
        return self.method.result(tokens, state, model)
