"""Reference lines: the same engine with exits decided from outside.

`Imposed` lets every token leave at a given exit and is otherwise DToP. From it follow the lines that every result is
read against: random exits at matched counts, and the dense-pass agreement oracle.

Legend: cells = all patches of all images, P live patch tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods.base import Model, Stage
from tokenexit.methods.dtop import DToP, DToPState
from tokenexit.tokens import Packing, Tokens


@dataclass(frozen=True, eq=False)
class Imposed(DToP):
    """Every token leaves where it is told to, whatever its score; nobody is retained.

    exit_stage: `(cells,)` int64 over the batch's flat canvas; `num_exits` is "stays to the end".
    """

    name: ClassVar[str] = "imposed"

    exit_stage: Tensor | None = None

    def of_cells(self, cells: slice) -> Imposed:
        return self if self.exit_stage is None else replace(self, exit_stage=self.exit_stage[cells])

    def leaves(self, n: int, score: Tensor, patches: Tokens, state: DToPState, model: Model) -> Tensor:
        assert self.exit_stage is not None, "Imposed is made with the stages it imposes"
        return self.exit_stage.to(patches.position.device).index_select(0, patches.position) == n


def random_exits(exit_stage: Tensor, generator: torch.Generator) -> Tensor:
    """The exits of one image in random places: as many tokens leave at each exit, but not the same ones."""
    order = torch.randperm(exit_stage.numel(), generator=generator).to(exit_stage.device)
    return exit_stage.flatten()[order].view_as(exit_stage)


def agreement_exits(stages: tuple[Stage, ...], cells: Sequence[int]) -> Tensor:
    """The dense-pass agreement oracle: each token's earliest exit whose class is the final one there and at all
    later exits.

    stages: of a dense pass with every exit's map recorded, the decode head's last. cells: patches of each image.
    Returns `(cells,)` int64. It knows the final answer, so it is a reference line and no method; nor is it a bound.
    Raises `ConfigError` for heads with more than one logit per token.
    """
    if any(stage.scale > 1 for stage in stages):
        raise ConfigError("the agreement oracle needs heads with one answer per token: use token heads.")
    labels = torch.stack([_stage_labels(stage, cells) for stage in stages])  # (exits + 1, cells)
    agrees = (labels[:-1] == labels[-1]).long()
    to_the_end = agrees.flip(0).cumprod(0).sum(0)  # consecutive exits, counted from the last, that agree
    return len(agrees) - to_the_end


def _stage_labels(stage: Stage, cells: Sequence[int]) -> Tensor:
    assert stage.logits is not None, "the oracle is judged on a pass with stages"
    image = Packing.of(cells, stage.logits.device).image_index()
    return class_scores(stage.kind, stage.logits, stage.presence, image).argmax(dim=1)
