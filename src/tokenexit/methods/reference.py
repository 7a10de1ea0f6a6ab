"""Reference lines run the same engine with prescribed exits.

`PrescribedExits` lets every token leave at a given exit and is otherwise DToP. From it follow the lines that every
result is compared with: random exits at matched counts, and the dense-pass agreement oracle.

Legend: cells = all patches of all images, P live patch tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing
from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods.base import ExitRecord, Method
from tokenexit.methods.dtop import DToP
from tokenexit.methods.thresholded import Graded


@dataclass(frozen=True, eq=False)
class PrescribedExits(DToP):
    """Every token leaves at a prescribed exit, whatever its score; none is retained.

    Attributes:
        exit_index: `(cells,)` int64 over the batch's flat canvas; `num_exits` means "stays to the end".
    """

    name: ClassVar[str] = "imposed"
    title: ClassVar[str] = "Prescribed exits"
    calibrates: ClassVar[bool] = False
    may_gate: ClassVar[bool] = False

    exit_index: Tensor | None = None

    def for_export(self) -> Method[Any]:
        raise ConfigError("exits imposed from outside are no method to export: choose another, such as dtop.")

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[Any]]]:
        """Yield runs of images, each with its own cells of the canvas."""
        first_cell = [0, *accumulate(h * w for h, w in grids)]
        for run, _ in super().runs(grids, max_tokens):
            cells = slice(first_cell[run.start], first_cell[run.stop])
            yield run, self if self.exit_index is None else replace(self, exit_index=self.exit_index[cells])

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        if n == self.last_exit:
            return live
        assert self.exit_index is not None, "PrescribedExits is made with the exits it prescribes"
        assert graded.position is not None, "exits run on live tokens alone"
        return self.exit_index.to(graded.position.device).index_select(0, graded.position) == n


def random_counterpart(method: Method[Any]) -> PrescribedExits | None:
    """Return DToP with exits still to be prescribed, for the line of random exits.

    Other methods have none (None): their carriers and results differ.
    """
    return PrescribedExits(finish=method.finish, stop=method.stop) if type(method) is DToP else None


def random_exits(exit_index: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle the exits of one image: as many tokens leave at each exit, but not the same ones."""
    order = torch.randperm(exit_index.numel(), generator=generator).to(exit_index.device)
    return exit_index.flatten()[order].view_as(exit_index)


def agreement_exits(records: tuple[ExitRecord, ...], cells: Sequence[int]) -> Tensor:
    """Return each token's earliest exit from which on its class is the final one: the dense-pass agreement oracle.

    records: of a dense pass with every exit's map recorded, the decode head's last. cells: patches of each image.
    Returns `(cells,)` int64. It knows the final answer, so it is a reference line and no method; nor is it a bound.
    Raises `ConfigError` for heads with more than one logit per token.
    """
    if any(record.scale > 1 for record in records):
        raise ConfigError(
            "the agreement oracle (references) needs heads with one answer per token, and the decode head has more: "
            "leave it out."
        )
    labels = torch.stack([_record_labels(record, cells) for record in records])  # (exits + 1, cells)
    agrees = (labels[:-1] == labels[-1]).long()
    to_the_end = agrees.flip(0).cumprod(0).sum(0)  # consecutive exits, counted from the last, that agree
    return len(agrees) - to_the_end


def _record_labels(record: ExitRecord, cells: Sequence[int]) -> Tensor:
    assert record.logits is not None, "the oracle is judged on a pass with exit records"
    image = Packing.of(cells, record.logits.device).image_index()
    return class_scores(record.kind, record.logits, record.presence, image).argmax(dim=1)
