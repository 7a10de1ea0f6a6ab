"""A model with one method is cut into stages for runtimes that know no shapes that depend on values.

*embed* turns an image of one size into tokens, *spans* of blocks lie between exits, *exits* score tokens, and *finish*
makes the map. Each stage holds fixed numbers of tokens, its buckets; the rows behind the live tokens are padding. What
depends on values (who leaves, gathering, the canvas) is left to a host loop, `staged.py`.

Rows are tokens in the engine's order: prefix tokens, then live patches in raster order, then padding.

Legend: L rows of all tokens, b rows of a bucket, P patches among them, C channels, K classes, h x w patches, p prefix
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.engine.tokens import Grid, Packing, PaddedPacking, Tokens
from tokenexit.errors import ConfigError
from tokenexit.heads import Head, class_scores
from tokenexit.methods import DoViT, DToP, Method, ModelView
from tokenexit.methods.base import all_stay, decode_grid
from tokenexit.methods.dtop import canvas_value
from tokenexit.methods.thresholded import per_class
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.segmentation import resize_maps
from tokenexit.segmenter import ExitSegmenter

StagedMethod = DToP | DoViT


@dataclass(frozen=True)
class Stage:
    """A stage at one number of tokens.

    Attributes:
        name: `embed`, `span1`, `exit1`, ..., `decode`, `finish`; those that hold the same weights have one name.
        tokens: number of patch tokens that it holds; None where there is one file, for all of them.
        module: what is traced.
        inputs: examples by name, in the order of the module's arguments.
        outputs: names.
        facts: what the manifest says of the stage beside its files.
    """

    name: str
    tokens: int | None
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    facts: Mapping[str, Any]


def staged_method(model: ExitSegmenter, method: Method[Any]) -> StagedMethod:
    """Return the method as one that stages can hold. Raises `ConfigError`, in one sentence, for any other."""
    model.check(method)
    method = method.for_export()
    if not isinstance(method, DToP | DoViT) or type(method) not in (DToP, DoViT):  # others of their kind differ
        raise ConfigError(
            f"stages are for exits of dtop and dovit, got '{method.name}': name one of these with --method, or export "
            "to onnx."
        )
    if isinstance(method, DoViT) and method.rejoin is not None:
        raise ConfigError("stages hold no tokens that come back: leave rejoin out, or export to onnx.")
    if isinstance(method, DoViT) and model.config.stage_adapter:
        raise ConfigError("stages hold no stage adapters, which run on as many tokens as stopped: export to onnx.")
    if isinstance(method, DToP) and method.context_weight:
        raise ConfigError("stages know no weights of keys: leave context_weight at 0, or export to onnx.")
    if isinstance(method, DToP) and method.frozen_context:
        raise ConfigError("stages hold no frozen keys: leave frozen_context at 0, or export to onnx.")
    if model.decode_head.kind == "masks":
        raise ConfigError("stages hold no decode head of masks (eomt), whose queries pass through blocks: use onnx.")
    if model.preprocessing.window is not None:
        raise ConfigError("stages are for images taken whole, and this model takes windows: export to onnx.")
    return method


def stages(model: ExitSegmenter, method: StagedMethod, size: Size, buckets: Sequence[Sequence[int]]) -> Iterator[Stage]:
    """Yield the stages in the order in which they run, a larger bucket after a smaller one.

    Args:
        model: the segmenter, in evaluation mode.
        method: of `staged_method`.
        size: height and width of all images.
        buckets: for every exit behind which the network goes on, numbers of patch tokens, of which the last is that of
            all patches.
    """
    backbone, view, exits = model.backbone, model.view(), model.config.exits
    grid = backbone.patch_embed.grid(*size)
    prefix, width = backbone.config.num_prefix_tokens, backbone.config.embed_dim
    cells = grid[0] * grid[1]
    image = torch.zeros(1, 3, *size)
    everything = torch.zeros(prefix + cells, width)
    phases = backbone.embed([image[0]]).phases
    yield Stage("embed", None, _Embed(model), {"image": image}, ("tokens",), {})

    held: Sequence[Sequence[int]] = ((cells,), *buckets)
    last = len(exits) if method.last_exit is None else method.last_exit
    for n, (start, stop) in enumerate(zip((0, *exits), (*exits, backbone.config.depth))):
        if n > last:
            break
        for count in held[n]:
            rows = torch.zeros(prefix + count, width)
            some = {} if n == 0 else {"live": _all(rows), **({} if phases is None else {"place": _places(rows)})}
            yield Stage(
                f"span{n + 1}",
                count,
                _Span(model, start, stop, phases),
                {"tokens": rows, **some},
                ("next_tokens",),
                {"blocks": [start, stop]},
            )
        if n < len(exits):
            yield from _exits(model, method, n, grid, held[n])
    if isinstance(method, DToP) and method.last_exit is None:
        module, outputs = _Decode(model, method, grid), ["rows", *_presence(view, method)]
        for count in held[len(exits)]:
            inputs = _inputs(view.decode_head, prefix, count, width)
            yield Stage("decode", count, module, inputs, tuple(outputs), {})

    maps = ("labels", "grid_logits")
    if isinstance(method, DoViT):
        yield Stage("finish", None, _FinishFeatures(model, size), {"tokens": everything}, maps, {})
    else:
        presence = {name: torch.zeros(1, view.num_classes, 2) for name in _presence(view, method)}
        canvas = {"canvas": torch.zeros(cells, view.num_classes), **presence}
        yield Stage("finish", None, _FinishCanvas(model, size), canvas, maps, {})


def _exits(model: ExitSegmenter, method: StagedMethod, n: int, grid: Grid, held: Sequence[int]) -> Iterator[Stage]:
    """Yield the stages of exit `n`: on live tokens, or on the whole grid where the method scores that."""
    head = model.view().exit_heads[n]
    prefix, width = model.backbone.config.num_prefix_tokens, model.backbone.config.embed_dim
    name, module = f"exit{n + 1}", _Exit(model, method, n, grid)
    if method.scores_grid:
        everything = torch.zeros(prefix + grid[0] * grid[1], width)
        yield Stage(name, None, module, {"tokens": everything}, module.outputs, {})
        return
    for count in held:
        inputs = _inputs(head, prefix, count, width)
        if n == 0:
            inputs.pop("live", None)
        yield Stage(name, count, module, inputs, module.outputs, {})


def _inputs(head: Head, prefix: int, count: int, width: int) -> dict[str, Tensor]:
    """Return examples of a head's inputs; only one that mixes tokens has to know which of them are padding."""
    rows = torch.zeros(prefix + count, width)
    return {"tokens": rows} if head.pointwise else {"tokens": rows, "live": _all(rows)}


def _presence(view: ModelView, method: StagedMethod) -> list[str]:
    """Name what the last head says of the presence of classes, if the finish weighs all tokens by it."""
    if not isinstance(method, DToP) or view.decode_head.kind != "atm":
        return []
    return ["presence"] if canvas_value(view, method.finish) == "logits" else []


def _all(rows: Tensor) -> Tensor:
    return torch.tensor([len(rows)], dtype=torch.int32)


def _places(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), dtype=torch.int32)


class _Embed(nn.Module):
    def __init__(self, model: ExitSegmenter) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, image: Tensor) -> Tensor:
        """Turn `(1, 3, H, W)` into tokens `(L, C)`."""
        return self.backbone.embed([image[0]]).x


class _Span(nn.Module):
    """Blocks `start` to `stop`; padding is set to zero, so that it may hold anything, and is not attended to."""

    phases: Tensor | None

    def __init__(self, model: ExitSegmenter, start: int, stop: int, phases: Tensor | None) -> None:
        super().__init__()
        self.blocks = model.backbone.blocks[start:stop]
        self.register_buffer("phases", phases)

    def forward(self, tokens: Tensor, live: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """Run `(b, C)`, of which the first `live (1,)` are no padding, all if not given.

        place: `(b,)`, with rotary positions the row of each token among all L.
        """
        x, packing, phases = tokens, Packing.of([len(tokens)], tokens.device), self.phases
        if live is not None:
            there = torch.arange(len(x), dtype=torch.int32) < live
            x = torch.where(there[:, None], x, 0.0)
            packing = PaddedPacking(packing.lengths, x.device, there)
            if place is not None:
                assert phases is not None, "places are asked for where positions are rotary"
                phases = phases.index_select(0, torch.where(there, place, 0).long())
        for block in self.blocks:
            x = block(x, packing, phases)
        return x


def _patches(tokens: Tensor, live: Tensor | None, prefix: int, grid: Grid) -> Tokens:
    """Return the patches among `(b, C)` as heads take them; padding is zero where `live (1,)` is given."""
    x = tokens[prefix:]
    position, packing = torch.arange(len(x)), Packing.of([len(x)], x.device)
    if live is not None:
        there = torch.arange(prefix, len(tokens), dtype=torch.int32) < live
        x = torch.where(there[:, None], x, 0.0)
        packing = PaddedPacking(packing.lengths, x.device, there)
    return Tokens(x, position, packing, (grid,), 0)


class _Exit(nn.Module):
    """An exit head with its scores, and for DToP what it writes to the canvas."""

    def __init__(self, model: ExitSegmenter, method: StagedMethod, n: int, grid: Grid) -> None:
        super().__init__()
        self.head = model.view().exit_heads[n]
        self.method, self.n, self.grid, self.prefix = method, n, grid, model.backbone.config.num_prefix_tokens
        self.writes: Callable[[Any], tuple[Tensor, ...]] | None = None
        names = ["score"]
        if isinstance(method, DToP):
            ends = n == method.last_exit
            self.writes = _canvas_rows(model.view(), method, self.head.kind, ends)
            names += ["label", "rows", *(_presence(model.view(), method) if ends else [])]
        elif per_class(method.threshold):
            names.append("label")
        self.outputs = tuple(names)

    def forward(self, tokens: Tensor, live: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return of `(b, C)` scores `(P,)`, and what else `outputs` names: classes `(P,)`, rows `(P, K)`."""
        patches = _patches(tokens, live, self.prefix, self.grid)
        out = self.head(patches)
        score, label = self.method.grade(self.n, self.head, out, patches.grids)
        found = (score, label.int()) if "label" in self.outputs else (score,)
        return found if self.writes is None else (*found, *self.writes(out))


class _Decode(nn.Module):
    """DToP's decode head, which sees live tokens."""

    def __init__(self, model: ExitSegmenter, method: DToP, grid: Grid) -> None:
        super().__init__()
        self.head, self.norm = model.decode_head, model.backbone.norm
        self.grid, self.prefix = grid, model.backbone.config.num_prefix_tokens
        self.writes = _canvas_rows(model.view(), method, self.head.kind, True)

    def forward(self, tokens: Tensor, live: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return of `(b, C)` rows of the canvas `(P, K)` and, where the finish needs it, presence `(1, K, 2)`."""
        patches = _patches(tokens, live, self.prefix, self.grid)
        return self.writes(self.head(patches.with_x(self.norm(patches.x))))


def _canvas_rows(view: ModelView, method: DToP, kind: Any, ends: bool) -> Callable[[Any], tuple[Tensor, ...]]:
    """Return the function from a head's output to what DToP's canvas holds of it; `ends`: with the last presence."""
    value, presence = canvas_value(view, method.finish), bool(_presence(view, method)) and ends

    def rows(out: Any) -> tuple[Tensor, ...]:
        logits = out.logits.float()
        if value == "scores":
            logits = class_scores(kind, out.logits, out.presence, out.packing.image_index())
        return (logits, out.presence) if presence else (logits,)

    return rows


class _Finish(nn.Module):
    """From values on the decode head's grid to labels of the image's size."""

    def __init__(self, model: ExitSegmenter, size: Size) -> None:
        super().__init__()
        self.head, self.norm = model.decode_head, model.backbone.norm
        self.view = model.view()
        self.grid, self.size = model.backbone.patch_embed.grid(*size), size
        self.patch, self.prefix = model.backbone.config.patch_size, model.backbone.config.num_prefix_tokens

    def maps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Turn `(h s w s, K)` into labels `(1, H, W)` int32 and the maps `(1, K, h s, w s)`."""
        h, w = (side * self.head.scale for side in self.grid)
        maps = values.view(1, h, w, -1).permute(0, 3, 1, 2).float().contiguous()
        full = resize_maps(maps, self.grid, self.patch, self.head.upscale, self.size)
        return full.argmax(dim=1).int(), maps


class _FinishCanvas(_Finish):
    def forward(self, canvas: Tensor, presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finish DToP from the canvas `(h w, K)`; with the last head's presence `(1, K, 2)` it is weighed by it."""
        if presence is not None:
            image = torch.zeros(len(canvas), dtype=torch.int64)
            canvas = class_scores("atm", canvas, presence, image)
        return self.maps(canvas)


class _FinishFeatures(_Finish):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Finish DoViT from all tokens `(L, C)`, those that left with the features with which they left."""
        cells = len(tokens) - self.prefix
        position = torch.cat([torch.full((self.prefix,), -1), torch.arange(cells)])
        whole = Tokens(tokens, position, Packing.of([len(tokens)], tokens.device), (self.grid,), self.prefix)
        view = replace(self.view, norm=self.norm, decode_head=self.head)
        return self.maps(decode_grid(whole, (), all_stay(whole, view.num_exits), view).logits)
