"""A library's model beside ours with the same weights, block by block.

Exited tokens are masked as keys in the library's blocks and their rows ignored, which is what leaving means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.helpers import distance, random_image
from tokenexit.engine.tokens import Tokens
from tokenexit.engine.vit import ViT

TOLERANCE = 1e-5

Step = Callable[[Tensor, Tensor], Tensor]
"""A block on `(1, N, C)` with an additive mask `(1, 1, N, N)`."""


@dataclass
class Reference:
    """A library's backbone: images to embedded tokens, its blocks, its last norm."""

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[Step]
    norm: Callable[[Tensor], Tensor]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of ordinary size everywhere; LayerScale near 1, as its usual 1e-5 would hide what stands behind it."""
    for name, value in model.named_parameters():
        if name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight")):
            value.normal_(1.0, 0.1)
        elif value.ndim in (2, 4) and "token" not in name:
            value.normal_(std=value[0].numel() ** -0.5)
        else:
            value.normal_(std=0.3)


def unchanged(tokens: Tokens) -> Tokens:
    return tokens


def phases_of_others(tokens: Tokens) -> Tokens:
    """The mistake that comparisons must see: every patch has the phases of its neighbour among the live."""
    assert tokens.phases is not None
    rolled = tokens.phases.clone()
    rolled[tokens.num_prefix :] = tokens.phases[tokens.num_prefix :].roll(1, 0)
    return replace(tokens, phases=rolled)


@torch.no_grad()
def largest_distance(
    ours: ViT,
    theirs: Reference,
    size: tuple[int, int],
    exits: Sequence[int] = (),
    change: Callable[[Tokens], Tokens] = unchanged,
) -> float:
    """Over embedding, every block and the last norm; after each of `exits` a random part of the patches leaves.

    change: what happens to our tokens whenever some have left.
    """
    image = random_image(*size, seed=size[0])
    tokens = ours.embed([image])
    x = theirs.embed(image[None])
    found = [distance(tokens.x, x[0])]
    prefix = tokens.num_prefix
    alive = torch.ones(x.shape[1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(7)
    for i, block in enumerate(theirs.blocks):
        if i in exits:
            stays = torch.rand(int(alive[prefix:].sum()), generator=generator) < 0.6
            tokens = change(tokens.keep(stays))
            alive[prefix:] = alive[prefix:].masked_scatter(alive[prefix:], stays)
        mask = torch.zeros(1, 1, len(alive), len(alive)).masked_fill(~alive, -torch.inf)
        x = block(x, mask)
        tokens = ours.run(tokens, i, i + 1)
        found.append(distance(tokens.x, x[0, alive]))
    assert not exits or alive[prefix:].sum() < len(alive) - prefix, "nothing has left"
    found.append(distance(ours.norm(tokens.x), theirs.norm(x)[0, alive]))
    return max(found)
