"""Exit heads are fitted to the dense model's own answers, on features of one dense pass; the backbone stays as it is.

A head learns the scores that the dense model ends with (soft targets: Hinton et al., Distilling the Knowledge in a
Neural Network, 2015), a token at a time. Tokens of rare classes weigh more, so that these classes have confident tokens
and may leave, too. A head is done when it no longer improves on photos that it was not fitted on.

Legend: N tokens, C channels, K classes, P tokens of one step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenexit.adaptation.features import SLICE, Features, slices
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.heads import Head, HeadSpec, build_head

STEP, STEPS = 2048, 16
"""Tokens of one step, and steps of a pass at least: fewer tokens at a time where there are few."""
LEARNING_RATE, WEIGHT_DECAY, COOLING, COOLINGS = 2e-3, 1e-2, 0.25, 2
"""The learning rate falls by the factor `COOLING` when a head no longer improves, so many times."""
IMPROVED = 2e-3
"""Share by which the held-out loss must fall for a pass over the tokens to count as progress."""
MOST_PASSES = 40
CLASS_BALANCE = 0.5
"""Power of a class's share in the weight of its tokens: 0 weighs all alike, 1 makes all classes count the same."""


@dataclass(frozen=True)
class FittedHead:
    """A head with how well it answers on photos that it was not fitted on.

    Attributes:
        head: the head, in evaluation mode.
        agreement: share of held-out tokens to which it gives the dense model's class.
        mean_agreement: the mean over classes of that share.
        loss: its cross-entropy to the dense scores there, weighted by class.
        passes: number of passes over the tokens.
    """

    head: Head
    agreement: float
    mean_agreement: float
    loss: float
    passes: int


def fit_head(
    features: Features,
    block: int,
    spec: HeadSpec,
    *,
    start: Head | None = None,
    class_balance: float = CLASS_BALANCE,
    seed: int = 0,
    passed: Callable[[int, float], None] = lambda number, loss: None,
) -> FittedHead:
    """Fit one head to the features after `block` blocks.

    Args:
        features: of a dense pass.
        block: number of blocks before the head.
        spec: a head that looks at one token at a time.
        start: a head of the same kind to begin with, such as that of the place before.
        class_balance: power of the classes' shares in the weights of tokens.
        seed: seed of the head and of the order of tokens.
        passed: told after every pass over the tokens its number and the held-out loss.
    """
    rows, answers = features.rows(block), features.answers()
    fitted_on = features.tokens - features.held_out
    step = min(STEP, math.ceil(fitted_on / STEPS))
    weight = class_weights(features, class_balance)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        head = build_head(spec, features.channels, features.classes) if start is None else copy.deepcopy(start)
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def read(rows_of: slice) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(rows[rows_of].astype("float32")), torch.from_numpy(answers[rows_of].astype("float32"))

    def held_out_loss() -> float:
        head.eval()
        with torch.no_grad():
            parts = [
                soft_cross_entropy(_logits(head, x), said, weight) * len(x)
                for x, said in map(read, _shifted(slices(features.held_out, SLICE), fitted_on))
            ]
        return float(sum(parts)) / features.held_out

    best, best_loss, coolings, passes = copy.deepcopy(head.state_dict()), held_out_loss(), 0, 0
    while passes < MOST_PASSES and coolings <= COOLINGS:
        head.train()
        for part in slices(fitted_on, SLICE):
            x, said = read(part)
            order = torch.randperm(len(x), generator=generator)
            for some in order.tensor_split(math.ceil(len(x) / step)):
                optimizer.zero_grad()
                soft_cross_entropy(_logits(head, x[some]), said[some], weight).backward()
                optimizer.step()
        passes += 1
        loss = held_out_loss()
        passed(passes, loss)
        improved = loss < best_loss * (1 - IMPROVED)
        if loss < best_loss:
            best, best_loss = copy.deepcopy(head.state_dict()), loss
        if not improved:
            coolings += 1
            head.load_state_dict(best)
            for group in optimizer.param_groups:
                group["lr"] *= COOLING
    head.load_state_dict(best)
    head.eval()
    answered: list[Tensor] = []
    wanted: list[Tensor] = []
    with torch.no_grad():
        for x, target in map(read, _shifted(slices(features.held_out, SLICE), fitted_on)):
            answered.append(_logits(head, x).argmax(1))
            wanted.append(target.argmax(1))
    right, mean_right = agreement(torch.cat(answered), torch.cat(wanted), features.classes)
    return FittedHead(head, right, mean_right, best_loss, passes)


def class_weights(features: Features, class_balance: float) -> Tensor:
    """Return the weight of tokens by the class that the dense model gives them, `(K,)`, with mean 1 over tokens."""
    share = features.class_shares
    weight = torch.where(share > 0, share.clamp(min=1e-6) ** -class_balance, 0.0)
    return (weight / (share * weight).sum()).float()


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted cross-entropy of logits `(P, K)` to scores `(P, K)`, the mean over tokens.

    weight: `(K,)`, of the class with the highest score.
    """
    loss = -(target * logits.log_softmax(dim=1)).sum(1)
    return (loss * weight[target.argmax(1)]).mean()


def agreement(said: Tensor, wanted: Tensor, classes: int) -> tuple[float, float]:
    """Return the share of tokens whose classes `(N,)` are equal, and its mean over the classes of `wanted`."""
    right = (said == wanted).double()
    total = torch.bincount(wanted, minlength=classes)
    by_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, wanted, right)
    there = total > 0
    return right.mean().item(), (by_class[there] / total[there]).mean().item()


def _logits(head: Head, x: Tensor) -> Tensor:
    """Run a head on loose tokens `(P, C)`, as if they were one image of one row."""
    count = len(x)
    tokens = Tokens(x, torch.arange(count), Packing.of([count], x.device), ((1, count),), 0)
    return head(tokens).logits  # type: ignore[no-any-return]


def _shifted(parts: Iterator[slice], by: int) -> Iterator[slice]:
    return (slice(part.start + by, part.stop + by) for part in parts)
