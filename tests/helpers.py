"""Small models, images and comparisons that many tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.methods import Answer
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Tokens
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.heads import Head, HeadOutput, StageAdapter
from tokenexit.methods import ModelView
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.segmenter import ExitSegmenter

PATCH = 4
MARGIN = 1e-5
"""Decisions closer than this to tipping over are drawn again."""

SMALL_HEADS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "dinov2_linear": {"kind": "dinov2_linear"},
    "fcn": {"kind": "fcn", "channels": 24},
    "setr_naive": {"kind": "setr_naive", "channels": 24},
    "atm": {"kind": "atm", "channels": 16, "layers": 2, "num_heads": 2},
    "mask_transformer": {"kind": "mask_transformer", "channels": 24, "layers": 2, "num_heads": 3},
    "setr_pup": {"kind": "setr_pup", "channels": 12, "steps": 2, "kernel": 3, "up": 2},
    "eomt": {"kind": "eomt", "layers": 1, "queries": 5, "steps": 1, "prefix": 0, "num_heads": 2},
    "cropr": {"kind": "cropr", "rows": 3, "columns": 4},
}
TOKEN_HEADS = ("linear", "dinov2_linear", "fcn", "setr_naive", "atm", "mask_transformer")
SOFTMAX_TOKEN_HEADS = ("linear", "dinov2_linear", "fcn", "setr_naive", "mask_transformer")


def tiny_config(**changes: Any) -> ViTConfig:
    values: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "patch_size": PATCH,
        "mlp_ratio": 2.0,
        "pos_embed_grid": (3, 4),
    }
    return ViTConfig(**(values | changes))


def head_spec(head: str | dict[str, Any]) -> dict[str, Any]:
    """A small head by name; a full specification passes through."""
    return dict(SMALL_HEADS[head]) if isinstance(head, str) else dict(head)


def tiny_segmenter(
    exit_head: Any = "fcn",
    decode_head: Any = None,
    *,
    exits: Sequence[int] = (1, 3),
    num_classes: int = 5,
    seed: int = 0,
    stage_adapter: bool = False,
    **backbone: Any,
) -> ExitSegmenter:
    """A model with lively random weights, in evaluation mode: scores spread over (0, 1), so that tokens do leave."""
    first = exit_head[0] if isinstance(exit_head, list | tuple) else exit_head
    if decode_head is None:
        decode_head = "fcn" if first == "cropr" else first  # which is for exits alone
    decode_head = head_spec(decode_head)
    exit_head = [head_spec(h) for h in exit_head] if isinstance(exit_head, list | tuple) else head_spec(exit_head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ExitSegmenter(
            tiny_config(**backbone), num_classes, tuple(exits), exit_head, decode_head, stage_adapter=stage_adapter
        )
        enliven(model)
    return model.eval()


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Weights of ordinary size everywhere, where fresh models have near-constant features and timid scores."""
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("queries.weight"):
            value.normal_()  # classes that are alike would leave nothing but rounding to their normalised masks
        elif value.ndim > 1:
            fan_in = value[0].numel() if value.shape[0] > 1 else 1
            value.normal_(std=fan_in**-0.5)
            if name.endswith(("classifier.weight", "presence.weight")):
                value.mul_(3.0)
            if name.endswith((".q.weight", "mask_norm.weight")):
                value.mul_(2.0)
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight", "gamma")):
            value.normal_(1.0, 0.2)
        else:
            value.normal_(std=0.1)
    for name, value in module.state_dict().items():
        if name.endswith("mask_norm.weight"):
            value.mul_(3.0)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise `(3, H, W)`: no two patches alike."""
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def gently_varied(height: int, width: int, seed: int = 0) -> Tensor:
    """A dark-to-bright image with a little noise, whose neighbouring patches are alike."""
    ramp = torch.linspace(-1, 1, width).expand(3, height, width)
    return ramp + 0.1 * random_image(height, width, seed)


def between_scores(scores: Tensor, share: float) -> float:
    """A threshold that about this share of the scores exceeds, midway in the widest gap nearby."""
    if len(scores) == 0:
        return 0.5
    n = scores.numel()
    points = torch.cat([scores.flatten(), torch.tensor([0.0, 1.0], dtype=scores.dtype)]).sort().values
    at = round((1.0 - share) * n)  # n - at scores are above the gap behind point `at`
    near = range(at, at + 1) if share in (0.0, 1.0) else range(max(at - 1, 0), min(at + 2, n + 1))
    best = max(near, key=lambda i: (points[i + 1] - points[i]).item())
    return ((points[best] + points[best + 1]) / 2).item()


def choose_thresholds(run: Callable[[Sequence[float]], Sequence[Answer]], shares: Sequence[float]) -> tuple[float, ...]:
    """Thresholds at which about these shares of the tokens leave, exit by exit, away from every score of an oracle."""
    chosen: list[float] = []
    for n, share in enumerate(shares):
        answers = run([*chosen, *[1.0] * (len(shares) - n)])
        chosen.append(between_scores(torch.cat([answer.scores[n] for answer in answers]), share))
    return tuple(chosen)


def distance(a: Tensor, b: Tensor) -> float:
    """`max |a - b| / max(1, max |b|)`, the measure in which all equalities are stated."""
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert distance(a, b) <= tolerance, f"{distance(a, b):.2e} apart, allowed {tolerance:.0e}"


def assert_answers(out: SegmentationOutput, expected: Sequence[Answer]) -> None:
    """Hold a call to an oracle's answers: the exits, the grid where the decode head has one, and the map."""
    for i, answer in enumerate(expected):
        assert torch.equal(out.exit_index[i], answer.stage)
        if answer.grid is not None:
            assert_close(out.grid_logits[i], answer.grid)
        assert_close(out[i].logits[0], answer.full)


class FixedHead(Head):
    """Says what a table says, whatever the features: `(cells, K)` logits by canvas position, for exact decisions."""

    pointwise = True

    def __init__(self, table: Tensor) -> None:
        super().__init__(table.shape[1])
        self.register_buffer("table", table)

    def forward(self, tokens: Tokens) -> HeadOutput:
        return HeadOutput(self.table.index_select(0, tokens.position), tokens.packing)

    def ops(self, tokens: int, grid: Grid) -> Ops:
        return Ops()


def fix_exit(model: ExitSegmenter, n: int, confidence: Sequence[float], label: Sequence[int] | None = None) -> None:
    """Make exit `n` say these things of the batch's tokens: a probability for a class, the rest spread evenly."""
    classes = model.config.num_classes
    table = torch.empty(len(confidence), classes)
    for i, p in enumerate(confidence):
        table[i] = math.log((1 - p) / (classes - 1))
        table[i, 0 if label is None else label[i]] = math.log(p)
    model.exit_heads[n] = FixedHead(table)


def call_view(model: ExitSegmenter, with_records: bool = False) -> ModelView:
    """What a method is told of the model in a call."""
    return ModelView(
        exits=model.config.exits,
        exit_heads=[head for head in model.exit_heads if isinstance(head, Head)],
        decode_head=model.decode_head,
        norm=model.backbone.norm,
        backbone=model.config.backbone,
        num_classes=model.config.num_classes,
        has_class_token=model.config.backbone.class_token,
        with_records=with_records,
        stage_adapters=[adapter for adapter in model.stage_adapters if isinstance(adapter, StageAdapter)],
    )
