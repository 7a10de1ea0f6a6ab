"""What a method is: a frozen value that decides, exit by exit, which tokens leave, and assembles the result.

The segmenter owns the loop; a method supplies `start`, `at_exit` and `result`, and hands its state through as a value,
so that one model serves many methods and threads at once.

Legend: cells = all patches of all images, P live patch tokens, B images, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from tokenexit.heads import Head, HeadKind, HeadOutput, class_scores
from tokenexit.tokens import Grid, Tokens

Value = Literal["logits", "scores"]
"""What a result holds: class logits, or scores in [0, 1] (ATM heads, mixed heads)."""


@dataclass(frozen=True)
class Model:
    """What a method may know of the model it runs on, for one call.

    norm: the backbone's final LayerNorm. with_stages: record the full map of every exit, for losses and studies.
    """

    exit_heads: Sequence[Head]
    decode_head: Head
    norm: Callable[[Tensor], Tensor]
    num_classes: int
    has_class_token: bool
    with_stages: bool

    @property
    def num_exits(self) -> int:
        return len(self.exit_heads)


@dataclass(frozen=True)
class Stage:
    """What happened at one exit.

    head_tokens: patch tokens the exit head was run on, per image; empty if it did not run.
    logits: if asked for, the full map at this stage `(cells scale^2, K)`: what exited earlier as stored, the rest
        from this head; else None.
    presence: the head's presence logits `(B, K, 2)` (ATM).
    seen: if maps are asked for, the tokens that the decode head was run on, after the final norm, for losses on
        features; of exit heads only some methods record them.
    """

    head_tokens: tuple[int, ...] = ()
    logits: Tensor | None = None
    presence: Tensor | None = None
    kind: HeadKind = "softmax"
    scale: int = 1
    upscale: int = 1
    seen: Tokens | None = None


@dataclass(frozen=True)
class Result:
    """The finished map.

    logits: `(cells scale^2, K)`, class logits or scores as `value` says.
    stages: one for each exit, and in the last place the decode head's, whose `logits` are those its loss is taken on;
        empty for a head that did not run.
    exit_stage: `(cells,)` int64, the exit at which each token left, `num_exits` for those that stayed.
    """

    logits: Tensor
    value: Value
    stages: tuple[Stage, ...]
    exit_stage: Tensor


State = TypeVar("State")


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """Base of all methods. `State` is what travels from exit to exit within one call."""

    name: ClassVar[str]

    def at(self, progress: float) -> Self:
        """The method as it stands after this share of the training, in [0, 1]."""
        return self

    def of_cells(self, cells: slice) -> Self:
        """The method for these cells of the batch's flat canvas, where the batch is run in several calls."""
        return self

    def for_grid(self, grid: Grid) -> Method[Any]:
        """What runs on images of this grid, if that depends on it. Images with different answers run apart."""
        return self

    @abstractmethod
    def check(self, model: Model) -> None:
        """Raise ConfigError, in one sentence, for a model the method cannot run on."""

    @abstractmethod
    def start(self, tokens: Tokens, model: Model) -> State:
        """State before the first block; `tokens` are all tokens."""

    @abstractmethod
    def at_exit(self, n: int, tokens: Tokens, state: State, model: Model) -> tuple[Tokens, State]:
        """Exit `n`: grade, store, and return the tokens that go on."""

    @abstractmethod
    def result(self, tokens: Tokens, state: State, model: Model) -> Result:
        """After the last block: the map of the whole grid."""


def all_stay(tokens: Tokens, num_exits: int) -> Tensor:
    """`exit_stage` before anybody left, `(cells,)`."""
    return torch.full((tokens.cells,), num_exits, dtype=torch.int64, device=tokens.x.device)


def stage_of(head: Head, tokens: Tokens, out: HeadOutput, logits: Tensor | None, seen: Tokens | None = None) -> Stage:
    """The record of one run of `head` on `tokens`, with the map its loss is taken on."""
    return Stage(tokens.live, logits, out.presence, head.kind, head.scale, head.upscale, seen)


def decode_grid(patches: Tokens, stages: tuple[Stage, ...], exit_stage: Tensor, model: Model) -> Result:
    """The decode head on the complete grid, as in every ordinary segmenter: final norm, head, scores for ATM."""
    patches = patches.with_x(model.norm(patches.x))
    head = model.decode_head
    out = head(patches)
    final = stage_of(head, patches, out, out.logits, patches if model.with_stages else None)
    if head.kind == "softmax":
        return Result(out.logits, "logits", (*stages, final), exit_stage)
    scores = class_scores(head.kind, out.logits, out.presence, out.packing.image_index())
    return Result(scores, "scores", (*stages, final), exit_stage)
