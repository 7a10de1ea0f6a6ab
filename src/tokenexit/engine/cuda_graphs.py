"""CUDA graphs run a span of blocks in one launch, for any number of live tokens.

A block takes some twenty launches, and with few tokens the GPU waits for them. A graph replays a whole span in one
launch, but for fixed shapes: lengths are padded to the next bucket, and padding is masked out of attention.

Legend: B images, L tokens of each with padding, T packed tokens, C channels, N heads, H channels per head.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from tokenexit.engine.attention import padded_rows
from tokenexit.engine.recurring_rows import recurring
from tokenexit.engine.tokens import Packing

STEP = 64
"""Tokens between two buckets."""
WASTE = 0.25
"""Share of padding beyond which packed blocks are faster than padded ones."""
MAX_GRAPHS = 64
"""Number of graphs that are kept; the least recently used one makes room."""

Record: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""A function that runs a function of fixed tensors; it returns the result, and a call that recomputes it in place."""


class PaddedBlock(Protocol):
    """The part of a backbone block that this module uses."""

    def padded(self, x: Tensor, visible: Tensor, phases: Tensor | None = None) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


def cuda_graphs(device: torch.device) -> Record:
    """Return a recorder of what a function launches on `device`. Its graphs never overlap and share their memory."""
    pool = torch.cuda.graph_pool_handle()
    first, recorded = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        with torch.cuda.device(device):
            first.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(first):  # libraries choose kernels and allocate before, not while, it is recorded
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(first)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=recorded):
                out = function()
        return out, graph.replay

    return record


@dataclass(frozen=True)
class _Graph:
    """One recorded span: write its inputs, call `replay`, read `out (B, L, C)`.

    The inputs are `x (B, L, C)`, `visible (B, 1, 1, L)` and, with rotary positions, `phases (B, L, 2 H)`.
    """

    x: Tensor
    visible: Tensor
    phases: Tensor | None
    out: Tensor
    replay: Callable[[], object]


class CapturedBlocks:
    """Spans of blocks are recorded at the first use of a bucket and replayed from then on.

    Under autocast, weights of linear layers are lowered once, when the first graph of a precision is recorded: weights
    must not change afterwards. Calls must not overlap, since graphs write to fixed places.
    """

    def __init__(self, blocks: Sequence[PaddedBlock], record: Record, step: int = STEP) -> None:
        self.blocks, self.record, self.step = list(blocks), record, step
        self._lowered: dict[torch.dtype, list[PaddedBlock]] = {}
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def bucket(self, longest: int) -> int:
        return recurring(longest, self.step)

    def fits(self, packing: Packing) -> bool:
        """Return whether padding to the bucket is worth a graph; for a single image it always is."""
        padded = len(packing.lengths) * self.bucket(packing.longest)
        alone = len(packing.lengths) == 1
        return packing.total > 0 and (alone or padded <= (1 + WASTE) * packing.total)

    def run(self, x: Tensor, packing: Packing, start: int, stop: int, phases: Tensor | None = None) -> Tensor:
        """Run blocks `start` (inclusive) to `stop` (exclusive): `(T, C)` to `(T, C)`, without gradients.

        phases: `(T, 2 H)` with rotary positions.
        """
        graph = self._graph(x, packing, start, stop, phases)
        length = graph.x.shape[1]
        rows = padded_rows(packing, length)
        graph.x.zero_()  # the mask multiplies what stood in the padding by 0, which leaves NaN and infinity as they are
        graph.x.flatten(0, 1).index_copy_(0, rows, x)
        if graph.phases is not None and phases is not None:  # in the padding, those of before turn zeros and no key
            graph.phases.flatten(0, 1).index_copy_(0, rows, phases)
        ends = packing.offsets.diff()[:, None, None, None]
        graph.visible.copy_(torch.arange(length, device=x.device) < ends)
        graph.replay()
        return graph.out.flatten(0, 1).index_select(0, rows)

    def _graph(self, x: Tensor, packing: Packing, start: int, stop: int, phases: Tensor | None) -> _Graph:
        images, length = len(packing.lengths), self.bucket(packing.longest)
        lowered = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        rotated = None if phases is None else phases.dtype
        key = (start, stop, images, length, x.dtype, x.device, lowered, rotated)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        blocks = (self.blocks if lowered is None else self._lowered_to(lowered))[start:stop]
        padded = x.new_zeros(images, length, x.shape[1])
        visible = torch.ones(images, 1, 1, length, dtype=torch.bool, device=x.device)
        turns = None if phases is None else phases.new_zeros(images, length, phases.shape[1])
        out, replay = self.record(lambda: _span(blocks, padded, visible, turns))
        self._graphs[key] = _Graph(padded, visible, turns, out, replay)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _lowered_to(self, dtype: torch.dtype) -> list[PaddedBlock]:
        """Copy the blocks with weights already in `dtype`: autocast would convert them again in every replay."""
        if dtype not in self._lowered:
            copies = copy.deepcopy(self.blocks)
            for module in (module for block in copies for module in block.modules()):
                if isinstance(module, nn.Linear):
                    module.to(dtype)
            self._lowered[dtype] = copies
        return self._lowered[dtype]


def _span(blocks: Sequence[PaddedBlock], x: Tensor, visible: Tensor, phases: Tensor | None) -> Tensor:
    for block in blocks:
        x = block.padded(x, visible, phases)
    return x
