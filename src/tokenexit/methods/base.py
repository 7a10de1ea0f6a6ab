"""A method is a frozen value that decides, exit by exit, which tokens leave, and assembles the result.

The segmenter owns the loop; a method supplies `start`, `at_exit` and `result`, and hands its state through as a value,
so that one model serves many methods and threads at once.

Legend: cells = all patches of all images, P live patch tokens, B images, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Packing, Tokens, cell_packing, rows_where, scatter
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.heads import (
    EoMTHead,
    Head,
    HeadOutput,
    MaskPrediction,
    ScoreKind,
    StageAdapter,
    class_scores,
    query_classes,
)
from tokenexit.heads.eomt import prediction
from tokenexit.reducers.base import Site

Value = Literal["logits", "scores", "masks"]
"""The kind of values in a result: class logits, scores in [0, 1] (ATM heads, mixed heads), or logits of masks."""


@dataclass(frozen=True)
class Canvas:
    """One row for each cell of the batch, where heads write in turn; a later head's row takes the place of an earlier.

    An exit only notes what it writes: rows are put in place when the canvas is read, all at once.

    Attributes:
        rows: `(cells, ...)`, what is in place.
        noted: what is still to be written, in order: cells `(P,)` int64 and their rows `(P, ...)`, or one number for
            all of them.
    """

    rows: Tensor
    noted: tuple[tuple[Tensor, Tensor | int], ...] = ()

    def write(self, position: Tensor, value: Tensor | int) -> Canvas:
        """Return the canvas with `value` written to the cells `position (P,)`."""
        return Canvas(self.rows, (*self.noted, (position, value)))

    def read(self) -> Tensor:
        """Return all rows, `(cells, ...)`. Gradients flow into what was written and into rows that stay."""
        rows = self.rows
        for n, (position, value) in enumerate(self.noted):
            own = n > 0 and not torch.is_grad_enabled()  # a copy of the first step, which nobody else has seen
            if isinstance(value, int):
                rows = rows.index_fill_(0, position, value) if own else rows.index_fill(0, position, value)
            else:
                value = value.to(rows.dtype)
                rows = rows.index_copy_(0, position, value) if own else rows.index_copy(0, position, value)
        return rows

    def settled(self) -> Canvas:
        """Return the canvas with all rows in place."""
        return Canvas(self.read())

    def detached(self) -> Canvas:
        """Return the canvas without the gradients of what was written."""
        noted = ((at, value if isinstance(value, int) else value.detach()) for at, value in self.noted)
        return Canvas(self.rows.detach(), tuple(noted))


@dataclass(frozen=True)
class ModelView:
    """The part of a model that a method may know, for one call.

    Attributes:
        exits: number of blocks before each exit.
        exit_heads: heads of the exits, in order.
        decode_head: head at the end of the network.
        norm: the backbone's final LayerNorm.
        backbone: the backbone's configuration.
        num_classes: number K of classes.
        has_class_token: whether the first prefix token is a class token.
        with_records: record the full map of every exit, for losses and studies.
        mask_shares: in training of a decode head of masks, see `EoMTHead.forward`.
        stage_adapters: for each exit what takes the place of the final norm for tokens that stopped there; none for a
            model without them.
    """

    exits: tuple[int, ...]
    exit_heads: Sequence[Head]
    decode_head: Head
    norm: Callable[[Tensor], Tensor]
    backbone: ViTConfig
    num_classes: int
    has_class_token: bool
    with_records: bool
    mask_shares: tuple[float, ...] = ()
    stage_adapters: Sequence[StageAdapter] = ()

    @property
    def num_exits(self) -> int:
        """Number of exits."""
        return len(self.exit_heads)


@dataclass(frozen=True)
class ExitRecord:
    """The record of one exit in one call.

    Attributes:
        head_tokens: number of patch tokens that the exit head ran on, per image; empty if it did not run.
        logits: with records, the full map at this exit `(cells scale^2, K)`: tokens that exited earlier as stored, the
            rest from this head; else None.
        presence: the head's presence logits `(B, K, 2)` (ATM).
        kind: how logits become scores, see `Head`.
        scale: logit cells per patch side.
        upscale: factor of the bilinear step that is still to be applied to `logits`.
        seen: with records, the tokens that the decode head ran on, after the final norm, for losses on features; only
            some methods record them of exit heads.
        masks: with records, of a head of masks on images of one size, its predictions, the last that of its end; losses
            of all are summed.
        work: of an exit that decides without its head's map, what that takes of each image; else the head's counts.
        beside: of each image, work beside the head's: that of stage adapters in front of the decode head.
    """

    head_tokens: tuple[int, ...] = ()
    logits: Tensor | None = None
    presence: Tensor | None = None
    kind: ScoreKind = "softmax"
    scale: int = 1
    upscale: int = 1
    seen: Tokens | None = None
    masks: tuple[MaskPrediction, ...] = ()
    work: tuple[Ops, ...] = ()
    beside: tuple[Ops, ...] = ()

    def answer(self, grids: tuple[Grid, ...]) -> HeadOutput:
        """Return the recorded map as the output of the head on complete grids."""
        assert self.logits is not None, "the call was made with records"
        rows = [h * w * self.scale**2 for h, w in grids]
        return HeadOutput(self.logits, Packing.of(rows, self.logits.device), self.presence)


@dataclass(frozen=True)
class Result:
    """The finished map.

    Attributes:
        logits: `(cells scale^2, K)`, class logits or scores as `value` says; masks `(cells scale^2, Q)`.
        value: the kind of values in `logits`.
        exit_records: one for each exit, and last the decode head's, whose `logits` are those its loss is taken on;
            empty for a head that did not run.
        exit_index: `(cells,)` int64, the exit at which each token left, `num_exits` for those that stayed.
        queries: with masks, each query's probabilities of the classes, `(B, Q, K)` fp32.
        frozen: with masks, `(cells, K)` scores that stand in place of theirs where tokens have exited; None where masks
            answer for all.
    """

    logits: Tensor
    value: Value
    exit_records: tuple[ExitRecord, ...]
    exit_index: Tensor
    queries: Tensor | None = None
    frozen: Tensor | None = None


Threshold = float | Sequence[float] | Tensor
"""The threshold of an exit: one for all classes, or one for each. A tensor, `()` or `(K,)`, is an exported graph's
input, whose values cannot be checked."""

Thresholds = float | Sequence[Threshold]
"""One threshold for all exits, or for each exit a number or one for each class."""

PerExit = float | Sequence[float]
"""A number for all exits, or one for each."""

State = TypeVar("State")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), kw_only: bool = False) -> Any:
    """Declare a field of a method that users set: on the command line, in YAML and in Python under the same name.

    The command line reads `help` and `choices` from the source, without importing torch: both must be literals.

    Args:
        default: value of the field.
        help: a noun phrase.
        choices: the words it takes, where these are all.
        kw_only: whether the field is a keyword argument only.

    Returns:
        The field of a dataclass.
    """
    return field(default=default, kw_only=kw_only, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """The base of all methods. `State` is what travels from exit to exit within one call.

    A method supplies `check`, `start`, `at_exit` and `result`; everything else is a fact about it that others read.

    Attributes:
        name: its name in YAML, JSON and on the command line.
        title: its name in tables and figures.
        has_exits: whether tokens may leave.
        calibrates: whether it has thresholds that calibration may choose.
        may_gate: whether its exits may be closed where they do not pay.
        always_named: options that the label names at their defaults, too.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    has_exits: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False
    may_gate: ClassVar[bool] = False
    offered: ClassVar[bool] = False
    """Whether the page of `tokenexit serve` offers it; its HTTP API takes every method."""
    always_named: ClassVar[tuple[str, ...]] = ()

    @property
    def inner(self) -> Method[Any]:
        """The method itself, or the one that a wrapper wraps."""
        return self

    @property
    def label(self) -> str:
        """The name of a table row: the method and the options that differ from their defaults."""
        default = type(self)()
        options = [f.name for f in fields(self)]
        named = [name for name in options if name in self.always_named or getattr(self, name) != getattr(default, name)]
        return " ".join([self.name, *map(self.option_label, named)])

    def option_label(self, name: str) -> str:
        """Return how the label names an option."""
        return f"{name}={getattr(self, name)}"

    @property
    def batch_independent(self) -> bool:
        """Whether an image's result does not depend on the images beside it."""
        return True

    @property
    def min_live(self) -> int:
        """Number of patch tokens that stay live at every exit, whatever the scores."""
        return 0

    @property
    def last_exit(self) -> int | None:
        """The exit, 0 the first, at which all tokens that are left leave; None where tokens may go on to the end.

        The network ends there: `at_exit` of later exits is not called, and `result` follows that of the last one.
        """
        return None

    @property
    def input_scale(self) -> float:
        """The factor on both sides of an image by which it is resized before it is embedded."""
        return 1.0

    @property
    def same_exits(self) -> bool:
        """Whether all images meet the same exits, whatever their sizes."""
        return True

    @property
    def thresholds(self) -> Thresholds | None:
        """The thresholds of the exits, None for a method without any."""
        return None

    def with_thresholds(self, thresholds: Thresholds) -> Self:
        """Return the method with other thresholds.

        Args:
            thresholds: one for all exits, or for each exit a number or one for each class.

        Raises:
            ConfigError: for a method without thresholds.
        """
        raise ConfigError(f"method '{self.name}' has no thresholds: leave threshold and compute out.")

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Return the methods, from dear to cheap, of a curve of this one; none where thresholds decide the cost."""
        return ()

    def for_export(self) -> Method[Any]:
        """Return the method that an exported graph can hold. Raises `ConfigError`, in its own sentence, without one."""
        return self

    def at(self, progress: float) -> Self:
        """Return the method after this share of the training, in [0, 1]: thresholds may warm up."""
        return self

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[Any]]]:
        """Yield consecutive images that run together, and the method for them.

        Args:
            grids: (rows, columns) of patches of all images of the call.
            max_tokens: most patches of one run; a larger image runs alone. Without it, and for most methods, all images
                run together with the method itself.
        """
        return ((run, self) for run in packs([h * w for h, w in grids], max_tokens))

    def embed(self, images: Sequence[Tensor], backbone: ViT) -> Tokens:
        """Return the tokens of images `(3, H, W)` before the first block; see `Reducer.embed`."""
        return backbone.embed(images)

    def embed_ops(self, grid: Grid, backbone: ViTConfig) -> Ops:
        """Count what `embed` does beside the backbone's own, on one image."""
        return Ops()

    def sites(self, depth: int) -> tuple[Site, ...]:
        """Return where tokens are merged or dropped beside exits, or come back, in a network of so many blocks."""
        return ()

    def at_site(self, site: Site, tokens: Tokens, state: State, qkv: Tensor | None) -> Tokens:
        """Return the tokens that go on from one of `sites`; see `Reducer.reduce`."""
        return tokens

    def site_ops(self, site: Site, live: int, grid: Grid, backbone: ViTConfig) -> Ops:
        """Count what a site's decision costs one image with so many live patch tokens."""
        return Ops()

    @abstractmethod
    def check(self, model: ModelView) -> None:
        """Raise `ConfigError`, in one sentence, for a model that the method cannot run on."""

    @abstractmethod
    def start(self, tokens: Tokens, model: ModelView) -> State:
        """Return the state before the first block; `tokens` are all tokens."""

    @abstractmethod
    def at_exit(self, n: int, tokens: Tokens, state: State, model: ModelView) -> tuple[Tokens, State]:
        """Run exit `n`, 0 the first: score tokens, store results; return the tokens that go on and the new state."""

    @abstractmethod
    def result(self, tokens: Tokens, state: State, model: ModelView) -> Result:
        """Return the map of the whole grid after the last block; `tokens` are those still live."""


def packs(tokens: Sequence[int], max_tokens: int | None) -> list[range]:
    """Return consecutive images to run at once: as many as have `max_tokens` together, at least one; all if None."""
    starts, held = [0], 0
    for n, count in enumerate(tokens):
        if held and max_tokens is not None and held + count > max_tokens:
            starts.append(n)
            held = 0
        held += count
    return [range(start, stop) for start, stop in pairwise([*starts, len(tokens)])]


def all_stay(tokens: Tokens, num_exits: int) -> Tensor:
    """Return `exit_index` before any token has left, `(cells,)` int64."""
    return torch.full((tokens.cells,), num_exits, dtype=torch.int64, device=tokens.x.device)


LeftAt = tuple[int, Tokens]
"""An exit, and the tokens that left there."""


def exits_of(left: Sequence[LeftAt], tokens: Tokens, num_exits: int) -> Tensor:
    """Return `exit_index` from the tokens that each exit let go, `(cells,)` int64, as they are spread over groups."""
    exit_index = all_stay(tokens, num_exits)
    for n, gone in left:
        exit_index.index_fill_(0, gone.position, n)
    return tokens.spread(exit_index)


def rejoined(left: Sequence[LeftAt], tokens: Tokens) -> Tokens:
    """Return live tokens and all that left, in raster order."""
    for _, gone in left:
        tokens = tokens.insert(gone)
    return tokens


def check_rejoin(rejoin: int | None) -> None:
    """Reject a number of last blocks, before which tokens that had left come back, that no network has."""
    if rejoin is not None and rejoin < 1:
        raise ConfigError(f"rejoin must be at least 1, got {rejoin}: it counts the last blocks.")


def check_rejoin_place(rejoin: int | None, model: ModelView) -> None:
    """Reject a return of tokens before the last exit."""
    most = model.backbone.depth - max(model.exits, default=0)
    if rejoin is not None and rejoin > most:
        raise ConfigError(
            f"rejoin must be at most {most}, the number of blocks behind the last exit, got {rejoin}: a token comes "
            "back once."
        )


def rejoin_sites(rejoin: int | None, depth: int) -> tuple[Site, ...]:
    """Return the site at which tokens that had left come back, if they do: before so many last blocks."""
    return () if rejoin is None else (Site(depth - rejoin, rejoins=True),)


def record_of(
    head: Head, tokens: Tokens, out: HeadOutput, logits: Tensor | None, seen: Tokens | None = None
) -> ExitRecord:
    """Return the record of one run of `head` on `tokens`, with the map its loss is taken on."""
    masks: tuple[MaskPrediction, ...] = ()
    if head.kind == "masks" and seen is not None and len(set(tokens.grids)) == 1:
        masks = (*out.earlier, prediction(out, tokens.grids, head.scale))
    return ExitRecord(tokens.live, logits, out.presence, head.kind, head.scale, head.upscale, seen, masks)


def on_all_cells(head: Head, patches: Tokens) -> tuple[HeadOutput, Tokens]:
    """Run a head on tokens that stand for the whole grid, none of which has left.

    Of merged tokens the logits are copied to the cells; a head that needs the grid, or answers on a finer one, runs on
    their features copied to the cells. Returns the output for all cells, and the tokens that the head ran on.
    """
    if patches.cover is None:
        return head(patches), patches
    if head.needs_grid or head.scale > 1:
        patches = patches.unmerged()
        return head(patches), patches
    out = head(patches)
    canvas = scatter(out.logits.new_zeros(patches.cells, out.logits.shape[1]), patches.position, out.logits)
    return replace(out, logits=patches.spread(canvas), packing=cell_packing(patches)), patches


def adapted(
    seen: Tokens, normed: Tensor, exit_index: Tensor, adapters: Sequence[StageAdapter]
) -> tuple[Tensor, tuple[Ops, ...]]:
    """Put the adapters' rows in the place of the final norm's, for tokens that stopped at their exits.

    seen: tokens of all cells. normed: `(T, C)` behind the final norm. exit_index: `(cells,)`. Returns the rows `(T, C)`
    and the work on each image, in a graph none. One host read, of the counts.
    """
    rows, images, stages = seen.patch_index(), len(seen.grids), len(adapters) + 1
    numbers: list[list[int]] | None = None
    if not torch.compiler.is_compiling():  # a graph finds its counts when it runs, and nobody asks it for the work
        image = cell_packing(seen).image_index()
        numbers = torch.bincount(image * stages + exit_index, minlength=images * stages).view(images, stages).tolist()
    work = [Ops()] * images
    for n, adapter in enumerate(adapters):
        here = exit_index == n
        if numbers is None:
            own = here.nonzero().squeeze(1)
            torch._check(own.shape[0] <= here.shape[0])
        else:
            own = rows_where(here, sum(number[n] for number in numbers))
            work = [done + adapter.ops(number[n]) for done, number in zip(work, numbers)]
        own = rows.index_select(0, own)
        normed = normed.index_copy(0, own, adapter(seen.x.index_select(0, own)).to(normed.dtype))
    return normed, tuple(work)


def decode_grid(
    tokens: Tokens,
    records: tuple[ExitRecord, ...],
    exit_index: Tensor,
    model: ModelView,
    backdrop: Tensor | None = None,
    stale: bool = False,
) -> Result:
    """Run the decode head for the complete grid, as an ordinary segmenter does: final norm, head, scores for ATM.

    tokens: all tokens of all images, with prefix; with a backdrop, see `EoMTHead.forward`, live ones. stale: whether
        tokens have the features of the exit that `exit_index` says, where a model with stage adapters uses these.
    """
    head = model.decode_head
    seen = tokens if head.takes_prefix else tokens.patches()
    normed, beside = model.norm(seen.x), tuple[Ops, ...]()
    if stale and model.stage_adapters:
        normed, beside = adapted(seen, normed, exit_index, model.stage_adapters)
    seen = seen.with_x(normed)
    if isinstance(head, EoMTHead):
        out = head(seen, model.mask_shares, backdrop)
    else:
        out, seen = on_all_cells(head, seen)
    final = replace(record_of(head, seen, out, out.logits, seen if model.with_records else None), beside=beside)
    if head.kind == "softmax":
        return Result(out.logits, "logits", (*records, final), exit_index)
    if head.kind == "masks":
        assert out.presence is not None, "heads of masks always give class logits"
        return Result(out.logits, "masks", (*records, final), exit_index, query_classes(out.presence))
    scores = class_scores(head.kind, out.logits, out.presence, out.packing.image_index())
    return Result(scores, "scores", (*records, final), exit_index)
