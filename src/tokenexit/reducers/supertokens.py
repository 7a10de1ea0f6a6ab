"""Supertokens: windows of patches share one token from the start, chosen from the image before the first block.

A window of 2x2, 4x4, ... patches that a policy finds alike is embedded as one patch, of the image made smaller by means
of pixels, at the mean of its patches' positions. The largest windows are looked at first, so that what they leave may
still share smaller ones. The head runs on all tokens, and its logits are copied to the cells.

Sources: CTS, content-aware token sharing (Lu, de Geus, Dubbelman; CVPR 2023; release) for the embedding and windows of
2x2; STEP, supertokens and early pruning (Proust, Szczepanski, Poreba, Haroun; VISAPP 2025, arXiv 2509.14165), of which
no code was published and no more than two abstracts could be read, for several sizes and for exits beside them:
`Reduced(DToP(0.95), Supertokens())`; APT (ICLR 2026), abstract, for going from large windows to small by entropy.

What chooses windows is not theirs. CTS and STEP train a large network for it; two of three policies need no training:

- `similarity`: the mean cosine of a window's patches as they are embedded, without positions (ALGM's rule on windows);
- `entropy`: 1 - H / log 64 for the entropy H of the window's grey levels, means of the channels in steps of 0.1 of the
  image as it was normalised. APT's levels have thresholds of their own, and its large patches a trained module;
- `net`: the probability, from a small network of the model's (`WindowPolicy`, fitted to labels by `tokenexit policy`),
  that a window holds one class. CTS's labels, without its EfficientNet and without its fixed count.

Further differences: every image has its own number of supertokens, where CTS takes a fixed one; tokens stay in raster
order, where CTS puts supertokens last, which no block can tell; windows are cut from any grid, and those that it cuts
off stay patches. With rotary positions coordinates are averaged; that is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit import Projected, ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.engine.window_policy import nested, policy_ops
from tokenexit.errors import ConfigError
from tokenexit.reducers.base import COSINES, Adjustable, Site, check_number
from tokenexit.reducers.matching import window_ops, window_similarity, windows

Policy = Literal["similarity", "entropy", "net"]
LEVELS, STEP = 64, 0.1
"""Grey levels of the entropy policy, in units of the normalised image, and symmetric about 0."""


@dataclass(frozen=True)
class Supertokens(Adjustable):
    """One token for each window of patches that are alike.

    Attributes:
        threshold: how alike a window's patches are, at most 1, from which on they share a token; above 1 none do.
        sizes: sides of windows in patches, each a multiple of the one before.
        policy: "similarity" of patches as they are embedded, the "entropy" of grey levels, as 1 minus its share of the
            largest, or the probability of one class by the "net" of a model that has one.

    Raises:
        ConfigError: for a value out of range, and for sizes that do not nest.
    """

    name: ClassVar[str] = "supertokens"
    title: ClassVar[str] = "Supertokens"
    main_option: ClassVar[str] = "threshold"
    trials: ClassVar[tuple[Any, ...]] = COSINES
    idle: ClassVar[float] = 1.0

    threshold: float = 0.95
    sizes: tuple[int, ...] = (2, 4)
    policy: Policy = "similarity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, -1, 2, "above 1 no window shares a token")
        if self.policy not in get_args(Policy):
            raise ConfigError(f"policy must be similarity, entropy or net, got '{self.policy}': choose one.")
        if not nested(self.sizes):
            raise ConfigError(f"sizes must be sides of windows that nest, got {self.sizes}: write (2, 4) or (2, 4, 8).")

    def check(self, backbone: ViTConfig) -> None:
        super().check(backbone)
        if self.policy != "net":
            return
        if not backbone.window_policy:
            raise ConfigError("policy 'net' is a network that this model lacks: fit one with `tokenexit policy`.")
        if not set(self.sizes) <= set(backbone.window_policy):
            raise ConfigError(
                f"sizes must be some of {backbone.window_policy}, which this model's network was fitted for, got "
                f"{self.sizes}: choose them, or fit another with `tokenexit policy`."
            )

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        def share(members: Sequence[int], pixels: Tensor, patches: Tensor) -> Mapping[int, Tensor]:
            found = self.alike_by_side(members, pixels, patches, backbone)
            return {side: value >= self.threshold for side, value in found.items()}

        projected = backbone.project(images)
        return share_windows(backbone.embed(images, projected), images, projected, backbone, self.sizes, share)

    def alike_by_side(
        self, images: Sequence[int], pixels: Tensor, patches: Tensor, backbone: ViT
    ) -> Mapping[int, Tensor]:
        """Return `alike` of every size that has a whole window, by side."""
        sides = [side for side in self.sizes if min(patches.shape[2:]) >= side]
        if self.policy == "net" and sides:
            assert backbone.window_policy is not None, "checked"
            with torch.no_grad():
                return {side: x.sigmoid() for side, x in backbone.window_policy(pixels, max(sides)).items()}
        return {side: self.alike(images, pixels, patches, side) for side in sides}

    def alike(self, images: Sequence[int], pixels: Tensor, patches: Tensor, side: int) -> Tensor:
        """Return how alike the patches of every whole window are, at most 1: `(b, W)`, windows in raster order.

        images: numbers of these images in the call. pixels: `(b, 3, h p, w p)`. patches: projected, `(b, C, h, w)`.
        """
        if self.policy == "similarity":
            return window_similarity(_in_windows(patches, side).flatten(0, 1)).view(len(patches), -1)
        return evenness(_in_windows(pixels.float().mean(1, keepdim=True), side * pixels.shape[2] // patches.shape[2]))

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        work = Ops()
        for side in self.sizes:
            work += embedding_ops(grid, side, backbone)
            if self.compares:
                work += window_ops(grid, side, backbone.embed_dim)
        if self.policy == "net" and (sides := [side for side in self.sizes if min(grid) >= side]):
            work += policy_ops(grid, backbone.patch_size, backbone.window_policy, max(sides))
        return work

    @property
    def compares(self) -> bool:
        """Whether the policy compares embedded patches."""
        return self.policy == "similarity"

    def sites(self, depth: int) -> tuple[Site, ...]:
        return ()

    def reduce(self, site: Site, tokens: Tokens, qkv: Tensor | None) -> Tokens:
        return tokens  # `embed` has done it all

    def ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        return Ops()


@dataclass(frozen=True, eq=False)
class LabelledSupertokens(Supertokens):
    """The reference whose policy is the truth: windows share a token by the share of their most frequent class.

    It shows how far a policy could go, and is no method; like `PrescribedExits` it holds what it was told of one call.

    Attributes:
        labels: masks `(H, W)` int64 of the call's images, at their sizes.
        ignored: the label of pixels that may be anything; a window of nothing else is of one class.

    Raises:
        ConfigError: when it runs on other images.
    """

    threshold: float = 1.0
    labels: tuple[Tensor, ...] = ()
    ignored: int = 255

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        if [tuple(image.shape[1:]) for image in images] != [tuple(mask.shape) for mask in self.labels]:
            raise ConfigError(
                "labels must be one mask for each image of the call, and as large: give those of its own."
            )
        return super().embed(images, backbone)

    def alike(self, images: Sequence[int], pixels: Tensor, patches: Tensor, side: int) -> Tensor:
        grid, patch = (patches.shape[2], patches.shape[3]), pixels.shape[2] // patches.shape[2]
        masks = torch.stack([self.labels[i] for i in images])[:, None].to(pixels.device)
        seen = _in_windows(_padded((masks != self.ignored).long(), grid, patch), side * patch)[..., 0]
        label = _in_windows(_padded(masks, grid, patch), side * patch)[..., 0]
        count = seen.new_zeros(*label.shape[:2], int(masks.max()) + 1).scatter_add(2, label, seen)
        return torch.where(seen.sum(2) > 0, count.amax(2) / seen.sum(2).clamp(min=1), 1.0)

    @property
    def compares(self) -> bool:
        return False


Chosen = Callable[[Sequence[int], Tensor, Tensor], Mapping[int, Tensor]]
"""From numbers of images of one size in the call, their pixels `(b, 3, h p, w p)` and projected patches `(b, C, h, w)`
to the whole windows that are to share a token, `(b, W)` bool in raster order, by side."""


def share_windows(
    tokens: Tokens, images: Sequence[Tensor], projected: Projected, backbone: ViT, sides: Sequence[int], chosen: Chosen
) -> Tokens:
    """Let windows of patches share one token, embedded as one patch, at their upper left cell; the largest first.

    tokens: of all patches of the images `(3, H, W)`, whose projections are `projected`. sides: of windows, each a
    multiple of the one before.
    """
    x, phases, row = tokens.x, tokens.phases, tokens.patch_index()  # the row of each cell
    cover = torch.arange(tokens.cells, device=x.device)
    free = torch.ones_like(cover, dtype=torch.bool)
    first = torch.tensor([0, *accumulate(h * w for h, w in tokens.grids)], device=x.device)

    for members, patches in projected:
        grid, patch = (patches.shape[2], patches.shape[3]), backbone.config.patch_size
        pixels = _padded(torch.stack([images[i] for i in members]), grid, patch)
        share = chosen(members, pixels, patches)
        for side in reversed(sides):
            cells = windows([grid], side, x.device)  # (W, side^2), of each of these images
            if len(cells) == 0:
                continue
            cells = (first[members][:, None, None] + cells).flatten(0, 1)  # (b W, side^2)
            corner = cells[:, 0]  # a larger window holds all of this one or nothing, and so its corner
            shares = free[corner] & share[side].flatten()
            values, places = backbone.embed_windows(pixels, side)
            x = _put(x, row[corner], shares, values.flatten(0, 2))
            if phases is not None and places is not None:
                phases = _put(phases, row[corner], shares, places.flatten(0, 1).repeat(len(members), 1))
            taken = torch.where(shares[:, None], corner[:, None], cover[cells])
            cover = cover.index_copy(0, cells.flatten(), taken.flatten())
            free = free.index_copy(0, cells.flatten(), (free[cells] & ~shares[:, None]).flatten())

    return replace(tokens, x=x, phases=phases, cover=cover).keep(cover == torch.arange(len(cover), device=x.device))


def embedding_ops(grid: Grid, side: int, backbone: ViTConfig) -> Ops:
    """Count the embedding of all whole windows of one side of an image."""
    return ops.conv2d(grid[0] // side, grid[1] // side, 3, backbone.embed_dim, backbone.patch_size)


@torch.no_grad()
def evenness(pixels: Tensor) -> Tensor:
    """Return `1 - H / log 64` for the entropy H of each window's grey levels: `(b, W, n, 1)` to `(b, W)` fp32."""
    level = (pixels[..., 0] / STEP).floor().long() + LEVELS // 2
    level = level.clamp(0, LEVELS - 1)
    count = pixels.new_zeros(*level.shape[:2], LEVELS).scatter_add(2, level, torch.ones_like(pixels[..., 0]))
    entropy: Tensor = torch.special.entr(count / level.shape[2]).sum(2)
    return 1 - entropy / math.log(LEVELS)


def _padded(maps: Tensor, grid: Grid, patch: int) -> Tensor:
    """Pad maps `(b, C, H, W)` with zeros to whole patches, as they are embedded."""
    return F.pad(maps, (0, grid[1] * patch - maps.shape[3], 0, grid[0] * patch - maps.shape[2]))


def _in_windows(maps: Tensor, side: int) -> Tensor:
    """Cut maps `(b, C, H, W)` into whole windows: `(b, W, side^2, C)`."""
    rows, columns = maps.shape[2] // side, maps.shape[3] // side
    maps = maps[:, :, : rows * side, : columns * side].unflatten(2, (rows, side)).unflatten(4, (columns, side))
    return maps.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _put(canvas: Tensor, rows: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Return rows of a canvas `(n, C)` replaced where `where` holds."""
    return canvas.index_copy(0, rows, torch.where(where[:, None], values.to(canvas.dtype), canvas[rows]))
