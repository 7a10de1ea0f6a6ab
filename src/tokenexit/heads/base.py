"""The base of all heads, which turn token features into class logits.

A *token head* works on any subset of an image's tokens; a *grid head* needs the complete grid and says so through
`needs_grid`. Heads keep nothing on `self` between calls.

Legend: P patch tokens of the batch, B images, C channels, K classes, h x w patches of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine.attention import segment_matmul
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Packing, Tokens
from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import Between, check

ScoreKind = Literal["softmax", "atm", "masks"]


@dataclass(frozen=True)
class MaskPrediction:
    """What the queries of a head of masks predict for a batch of images of one grid.

    Attributes:
        logits: `(B, Q, s h, s w)` mask logits, before the sigmoid.
        classes: `(B, Q, K + 1)` class logits, the last for "no object".
    """

    logits: Tensor
    classes: Tensor


@dataclass(frozen=True)
class HeadOutput:
    """The logits that a head gives for its tokens.

    Attributes:
        logits: `(P, K)`, one row per token; a grid head with `scale` s gives s x s rows per patch, in raster order of
            the finer grid. Softmax heads: class logits. ATM heads: mask logits, before the sigmoid. Heads of masks:
            logits of the masks of Q queries, `(P, Q)`.
        packing: which rows belong to which image.
        presence: ATM heads: `(B, K, 2)` logits of "class is present" and "class is absent". Heads of masks:
            `(B, Q, K + 1)` logits of each query's class, the last for "no object".
        earlier: heads of masks, in training: what the queries predict before each of the joint blocks.
    """

    logits: Tensor
    packing: Packing
    presence: Tensor | None = None
    earlier: tuple[MaskPrediction, ...] = ()


class Head(nn.Module, ABC):
    """The base of all heads.

    Attributes:
        kind: how logits become scores: "softmax" over classes, "atm", presence times sigmoid, or "masks", sums over
            queries.
        takes_backdrop: whether the head, though it needs the grid, can do with live tokens and the features with which
            the others left.
        takes_prefix: whether the head sees class token and registers, too, and the tokens as the last block left them.
        needs_grid: whether the head mixes neighbours and must see every patch of an image.
        pointwise: whether the head looks at one token at a time, so that a token's logits do not depend on the others.
        scale: number of logit cells per patch side.
        upscale: factor of the bilinear step that belongs to the head and is still to be applied to its logits.
        joint_blocks: number of the backbone's last blocks that the head holds, as `blocks`, with its final norm as
            `norm`; they are trained as the rest of the backbone.
        grad_checkpointing: whether these blocks are computed again in the backward pass, for less memory.
    """

    kind: ClassVar[ScoreKind] = "softmax"
    needs_grid: ClassVar[bool] = False
    takes_prefix: ClassVar[bool] = False
    takes_backdrop: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False
    scale: int = 1
    upscale: int = 1
    joint_blocks: int = 0
    grad_checkpointing: bool = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @property
    def takes_live_tokens(self) -> bool:
        """Whether the head can do without the tokens that have left, as DToP asks of it."""
        return self.takes_backdrop or not self.needs_grid

    @abstractmethod
    def forward(self, tokens: Tokens) -> HeadOutput:
        """Classify tokens: patches alone (`Tokens.patches()`) unless `takes_prefix`, any subset unless `needs_grid`."""

    @abstractmethod
    def ops(self, tokens: int, grid: Grid) -> Ops:
        """Count the work on one image of which the head sees this many tokens."""


class TokenBatchNorm(nn.BatchNorm1d):
    """This is BatchNorm over packed tokens `(P, C)`.

    In training its statistics are those of the tokens the head is given: live tokens in DToP, the whole grid in
    DoViT. Fewer than two tokens have no variance; they are normalised with the running statistics instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.shape[0] < 2:
            return _with_running_statistics(self, input)
        return super().forward(input)


class GridBatchNorm(nn.BatchNorm2d):
    """This is BatchNorm over maps `(b, C, h, w)` of one size, with the same guard.

    A training batch that mixes sizes is normalised size by size, and updates the running statistics as often.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() < 2 * input.shape[1]:
            return _with_running_statistics(self, input)
        return super().forward(input)


def _with_running_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d, input: Tensor) -> Tensor:
    return F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


MAX_SIZES = {"channels": 8192, "layers": 32, "steps": 8, "up": 16, "queries": 1024, "rows": 256, "columns": 256}
"""Sizes of heads, with room beyond any published one."""


def check_head_options(head: str, **options: int) -> None:
    """Reject sizes below 1 or above `MAX_SIZES`."""
    for name, value in options.items():
        check(f"{name} of head '{head}'", value, Annotated[int, Between(1, MAX_SIZES[name])])


def _is_whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_head_rate(head: str, name: str, rate: float) -> None:
    """Reject a probability outside [0, 1)."""
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise ConfigError(f"head '{head}' has {name}={rate}: choose a value in [0, 1).")


def attention_heads(head: str, channels: int, num_heads: int | None) -> int:
    """Return the number of attention heads: as given, else 64 channels each where that divides the width, else one."""
    if num_heads is None:
        return channels // 64 if channels % 64 == 0 else 1
    if not _is_whole_number(num_heads) or num_heads < 1 or channels % num_heads:
        raise ConfigError(
            f"head '{head}' has channels={channels}, no multiple of num_heads={num_heads}: change one of the two."
        )
    return num_heads


def init_linear(module: nn.Module) -> None:
    """Start weights from a truncated normal of 0.02 and biases from zero; norms keep 1 and 0.

    Segmenter and DToP's release (`PruneHead`) do the same.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=0.02)


def presence_probability(presence: Tensor) -> Tensor:
    """Turn logits `(B, K, 2)` into the probability that each class is present, `(B, K)` in fp32."""
    return presence.float().softmax(dim=-1)[..., 0]


def query_classes(presence: Tensor) -> Tensor:
    """Turn logits `(B, Q, K + 1)` into each query's probabilities of the classes, `(B, Q, K)` in fp32."""
    return presence.float().softmax(dim=-1)[..., :-1]


def class_scores(kind: ScoreKind, logits: Tensor, presence: Tensor | None, image: Tensor | None) -> Tensor:
    """Return scores of the classes, fp32: softmax, for ATM heads presence times sigmoid, for masks a sum over queries.

    The second is the score of DToP's release (`PruneHead`). The third is EoMT's, cell by cell: each query's probability
    of the class times its mask; it may exceed 1.

    logits: `(P, K)`, masks `(P, Q)`; presence: `(B, K, 2)`, masks `(B, Q, K + 1)`, or None; image: `(P,)` image of each
    row, in order; None for softmax.
    """
    if kind == "softmax":
        return logits.softmax(dim=-1, dtype=torch.float32)
    assert presence is not None and image is not None, "ATM heads always give presence logits"  # noqa: PT018
    if kind == "masks":
        lengths = torch.bincount(image, minlength=len(presence)).tolist()
        return segment_matmul(
            torch.sigmoid(logits.float()), query_classes(presence).transpose(1, 2), Packing.of(lengths, logits.device)
        )
    return presence_probability(presence).index_select(0, image) * torch.sigmoid(logits.float())
