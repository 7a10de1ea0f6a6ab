"""Reference lines run the same engine with prescribed exits.

`PrescribedExits` lets every token leave at a given exit and is otherwise DToP. From it follow the lines that every
result is compared with: random exits at matched counts, and the dense-pass agreement oracle. `FrozenContext` is the
same with tokens that left as keys and values in all later blocks, and `LabelledExits` lets a token leave where the exit
head says the label of its patch.

Legend: cells = all patches of all images, P live patch tokens, C channels, K classes, H, W sides of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid, Packing, Tokens
from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods.base import ExitRecord, Method, ModelView, Result
from tokenexit.methods.dtop import DToP, DToPState
from tokenexit.methods.thresholded import Graded
from tokenexit.reducers.base import Site


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
        for run, _ in super().runs(grids, max_tokens):
            cells = _cells_of(run, grids)
            yield run, self if self.exit_index is None else replace(self, exit_index=self.exit_index[cells])

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        if n == self.last_exit:
            return live
        assert self.exit_index is not None, "PrescribedExits is made with the exits it prescribes"
        assert graded.position is not None, "exits run on live tokens alone"
        return self.exit_index.to(graded.position.device).index_select(0, graded.position) == n


@dataclass(frozen=True, kw_only=True)
class ContextState(DToPState):
    """The state of `FrozenContext`.

    Attributes:
        frozen: `(cells, C)` features, of tokens that have left those with which they left.
        left: `(cells,)` bool.
    """

    frozen: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class FrozenContext(PrescribedExits):
    """Prescribed exits that cost no context: tokens that left stay keys and values, with the features they left with.

    The plainest way to that result: every block runs on all tokens, and those that left are put back to what they were.
    A call's ledger counts what ran; `outputs.ledger.with_frozen_keys` is what queries of live tokens alone would take.
    """

    name: ClassVar[str] = "imposed_in_context"
    title: ClassVar[str] = "Prescribed exits in context"

    def check(self, model: ModelView) -> None:
        super().check(model)
        if model.decode_head.kind == "masks":
            raise ConfigError(
                "a decode head of masks (eomt) has blocks of its own, in which tokens that left are no keys: leave "
                "the line of frozen context out."
            )

    def sites(self, depth: int) -> tuple[Site, ...]:
        return tuple(Site(after) for after in range(1, depth))

    def start(self, tokens: Tokens, model: ModelView) -> ContextState:
        nobody = torch.zeros(tokens.cells, dtype=torch.bool, device=tokens.x.device)
        return ContextState(**vars(super().start(tokens, model)), frozen=tokens.patches().x, left=nobody)

    def at_exit(self, n: int, tokens: Tokens, state: DToPState, model: ModelView) -> tuple[Tokens, DToPState]:
        assert isinstance(state, ContextState)
        assert self.exit_index is not None, "FrozenContext is made with the exits it prescribes"
        _, seen = super().at_exit(n, tokens.keep(~state.left), state, model)
        assert isinstance(seen, ContextState)
        frozen = torch.where(state.left[:, None], state.frozen, tokens.patches().x)
        return tokens, replace(seen, frozen=frozen, left=self.exit_index.to(frozen.device) <= n)

    def at_site(self, site: Site, tokens: Tokens, state: DToPState, qkv: Tensor | None) -> Tokens:
        assert isinstance(state, ContextState)
        x = torch.where(state.left[:, None], state.frozen, tokens.patches().x)
        return tokens.with_x(tokens.x.index_copy(0, tokens.patch_index(), x))

    def result(self, tokens: Tokens, state: DToPState, model: ModelView) -> Result:
        assert isinstance(state, ContextState)
        return super().result(tokens.keep(~state.left), state, model)


@dataclass(frozen=True, eq=False)
class LabelledExits(DToP):
    """A greedy rule that sees the labels: a token leaves at the first exit whose head says its patch's label.

    Tokens that every exit head calls otherwise go through. Heads are those of the run itself, as in a method.

    Attributes:
        labels: `(cells,)` int64 over the batch's flat canvas, see `patch_labels`; a token with -1, of which nothing is
            known, leaves at the first exit.
    """

    name: ClassVar[str] = "labelled"
    title: ClassVar[str] = "Greedy by labels"
    calibrates: ClassVar[bool] = False
    may_gate: ClassVar[bool] = False

    labels: Tensor | None = None

    def for_export(self) -> Method[Any]:
        raise ConfigError("a rule that sees the labels is no method to export: choose another, such as dtop.")

    def runs(self, grids: Sequence[Grid], max_tokens: int | None = None) -> Iterator[tuple[range, Method[Any]]]:
        """Yield runs of images, each with the labels of its own cells."""
        for run, _ in super().runs(grids, max_tokens):
            yield run, self if self.labels is None else replace(self, labels=self.labels[_cells_of(run, grids)])

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        assert self.labels is not None, "LabelledExits is made with the labels it sees"
        assert graded.position is not None, "exits run on live tokens alone"
        wanted = self.labels.to(graded.position.device).index_select(0, graded.position)
        return (wanted < 0) | (graded.label == wanted)


def _cells_of(run: range, grids: Sequence[Grid]) -> slice:
    """Return the cells of consecutive images on the flat canvas of all."""
    first_cell = [0, *accumulate(h * w for h, w in grids)]
    return slice(first_cell[run.start], first_cell[run.stop])


def patch_labels(mask: Tensor, patch_size: int, num_classes: int, ignored: int) -> Tensor:
    """Return the most frequent class of each patch of a mask `(H, W)` int64, the lowest of equally frequent ones.

    Ignored pixels and those beyond the border do not count; a patch without others has -1. Returns `(cells,)` int64.
    """
    height, width = mask.shape
    padded = F.pad(mask, (0, -width % patch_size, 0, -height % patch_size), value=ignored)
    rows, columns = (side // patch_size for side in padded.shape)
    pixels = padded.view(rows, patch_size, columns, patch_size).transpose(1, 2).reshape(rows * columns, -1)
    seen = pixels != ignored
    count = torch.zeros(len(pixels), num_classes, dtype=torch.int64, device=mask.device)
    count.scatter_add_(1, pixels.masked_fill(~seen, 0), seen.long())
    return torch.where(seen.any(1), count.argmax(1), -1)


def random_counterpart(method: Method[Any]) -> PrescribedExits | None:
    """Return DToP with exits still to be prescribed, for the line of random exits; frozen keys stay where they were.

    Other methods have none (None): their carriers and results differ.
    """
    return prescribed_like(method) if type(method) is DToP else None


def prescribed_like(method: DToP) -> PrescribedExits:
    """Return a method with this one's end and frozen keys, whose exits are still to be prescribed."""
    return PrescribedExits(finish=method.finish, stop=method.stop, frozen_context=method.frozen_context)


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
