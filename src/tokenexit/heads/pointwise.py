"""Heads that look at one token at a time: linear, DINOv2 linear, FCN (1x1 convolutions), one-step SETR-naive."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops
from tokenexit.engine.recurring_rows import in_recurring_rows, pads_rows
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.heads.base import Head, HeadOutput, TokenBatchNorm, check_head_options, init_linear


class PointwiseHead(Head):
    """The base of heads that look at one token at a time."""

    pointwise = True

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Return class logits `(P, K)` of features `(P, C)`, each row by itself."""

    def forward(self, tokens: Tokens) -> HeadOutput:
        recur = not self.training and pads_rows(tokens)  # which BatchNorm must not see in training
        logits = in_recurring_rows(self.classify, tokens) if recur else self.classify(tokens.x)
        return HeadOutput(logits, tokens.packing)


class LinearHead(PointwiseHead):
    """The head is one linear classifier per token."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__(num_classes)
        self.classifier = nn.Linear(embed_dim, num_classes)
        init_linear(self)

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(x)  # type: ignore[no-any-return]

    def ops(self, tokens: int, grid: Grid) -> Ops:
        return ops.linear(tokens, self.classifier.in_features, self.classifier.out_features)


class DINOv2LinearHead(LinearHead):
    """BatchNorm precedes one linear classifier per token (DINOv2's linear evaluation on the last block)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__(embed_dim, num_classes)
        self.norm = TokenBatchNorm(embed_dim)

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(x))  # type: ignore[no-any-return]


class FCNHead(PointwiseHead):
    """The head applies a 1x1 convolution, BatchNorm, ReLU and a 1x1 classifier (DoViT's exit heads on Segmenter).

    channels: width of the hidden layer, 256 in both papers.
    """

    def __init__(self, embed_dim: int, num_classes: int, channels: int = 256) -> None:
        super().__init__(num_classes)
        check_head_options("fcn", channels=channels)
        self.input_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(embed_dim, channels, bias=False)
        self.norm = TokenBatchNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)
        init_linear(self)

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.norm(self.proj(self.input_norm(x))), inplace=True))  # type: ignore[no-any-return]

    def ops(self, tokens: int, grid: Grid) -> Ops:
        dim, channels, classes = (
            self.proj.in_features,
            self.proj.out_features,
            self.classifier.out_features,
        )
        return ops.linear(tokens, dim, channels) + ops.linear(tokens, channels, classes)


class SETRNaiveHead(FCNHead):
    """The head applies LayerNorm, a 1x1 convolution, BatchNorm, ReLU, bilinear x4 and a 1x1 classifier.

    SETR-naive has this head, and so have DoViT's exits on it.

    The classifier is linear and bilinear weights sum to one, so classifying before the upsampling gives the same
    logits to rounding for 16 times fewer multiply-adds; `upscale` tells the caller to interpolate afterwards.
    """

    upscale = 4

    def __init__(self, embed_dim: int, num_classes: int, channels: int = 256) -> None:
        super().__init__(embed_dim, num_classes, channels)
        self.input_norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def ops(self, tokens: int, grid: Grid) -> Ops:
        return ops.layer_norm(tokens, self.proj.in_features) + super().ops(tokens, grid)
