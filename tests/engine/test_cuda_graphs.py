"""Spans of blocks replayed on padded buckets give what packed blocks give, whatever was in a bucket before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenexit.engine.cuda_graphs as cuda_graphs
from tests.helpers import random_image, tiny_segmenter
from tokenexit.engine.block import Block
from tokenexit.engine.cuda_graphs import CapturedBlocks
from tokenexit.engine.tokens import Packing
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.runtime.precision import inference

CPU = torch.device("cpu")
HEADS = 2


class Recorder:
    """Stands in for CUDA graphs: what was recorded is computed again from the same tensors into the same place."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        out = torch.full_like(function(), torch.nan)  # what is read before a replay is seen
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            out.copy_(function())

        return out, replay


def blocks(**options: Any) -> list[Block]:
    torch.manual_seed(0)
    return [Block(16, HEADS, 32, **options).eval() for _ in range(3)]


def packed(
    own: list[Block], x: Tensor, packing: Packing, start: int, stop: int, phases: Tensor | None = None
) -> Tensor:
    for block in own[start:stop]:
        x = block(x, packing, phases)
    return x


@settings(max_examples=20, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(1, 21), min_size=1, max_size=3), min_size=1, max_size=4),
    options=st.sampled_from(
        [
            {"rope": "half"},
            {"rope": "interleaved", "mlp": "swiglu", "sub_norm": True, "attn_norm": True, "k_bias": False},
        ]
    ),
)
def test_run__rotary_positions_are_those_of_each_call(batches: list[list[int]], options: dict[str, Any]) -> None:
    own, recorder = blocks(**options), Recorder()
    graphs = CapturedBlocks(own, step=8, record=recorder)
    with torch.no_grad():
        for seed, lengths in enumerate(batches):
            packing, generator = Packing.of(lengths, CPU), torch.Generator().manual_seed(seed)
            x = 3 * torch.randn(packing.total, 16, generator=generator)
            angles = 6 * torch.rand(packing.total, 8, generator=generator)
            phases = torch.cat([angles.cos(), angles.sin()], dim=1)
            out = graphs.run(x, packing, 0, 3, phases)
            torch.testing.assert_close(out, packed(own, x, packing, 0, 3, phases))
            still = graphs.run(x, packing, 0, 3)  # a graph of its own, without rotation
            torch.testing.assert_close(still, packed(own, x, packing, 0, 3))


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 21), min_size=1, max_size=4), min_size=1, max_size=5),
    span=st.sampled_from([(0, 3), (0, 1), (1, 3)]),
    options=st.sampled_from([{}, {"mlp": "swiglu", "layer_scale": 0.3}]),
)
def test_run__gives_what_packed_blocks_give_batch_after_batch(
    batches: list[list[int]], span: tuple[int, int], options: dict[str, Any]
) -> None:
    own, recorder = blocks(**options), Recorder()
    graphs = CapturedBlocks(own, step=8, record=recorder)
    with torch.no_grad():
        for seed, lengths in enumerate(batches):
            packing = Packing.of(lengths, CPU)
            if packing.total == 0:
                assert not graphs.fits(packing)
                continue
            x = torch.randn(packing.total, 16, generator=torch.Generator().manual_seed(seed))
            # an image without tokens sees nothing, and nobody reads what it says
            torch.testing.assert_close(graphs.run(x, packing, *span), packed(own, x, packing, *span))
    keys = {(len(lengths), -(-max(lengths) // 8)) for lengths in batches if sum(lengths)}
    assert recorder.recorded == len(keys)


def test_run__what_a_broken_image_left_in_a_bucket_reaches_no_other() -> None:
    own = blocks()
    graphs = CapturedBlocks(own, step=8, record=Recorder())
    broken, x = torch.full((8, 16), torch.nan), torch.randn(5, 16)
    packing = Packing.of([5], CPU)
    with torch.no_grad():
        graphs.run(broken, Packing.of([8], CPU), 0, 3)
        torch.testing.assert_close(graphs.run(x, packing, 0, 3), packed(own, x, packing, 0, 3))


def test_fits__refuses_batches_that_are_mostly_padding() -> None:
    graphs = CapturedBlocks(blocks(), step=8, record=Recorder())
    for lengths, fits in (
        ((3,), True),
        ((8, 8), True),
        ((7, 6), True),
        ((64, 8), False),
        ((9, 9), False),
        ((0,), False),
    ):
        assert graphs.fits(Packing.of(lengths, CPU)) is fits, lengths


def test_graphs__are_bounded_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    recorder = Recorder()
    graphs = CapturedBlocks(blocks(), step=4, record=recorder)

    def run(length: int) -> int:
        graphs.run(torch.randn(length, 16), Packing.of([length], CPU), 0, 1)
        return recorder.recorded

    with torch.no_grad():
        assert [run(length) for length in (4, 8, 4, 12, 4, 8)] == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("precision", "method"),
    [
        *(("fp32", method) for method in (Dense(), DToP(threshold=0.3, keep_per_class=1), DoViT(threshold=0.3))),
        *((precision, Dense()) for precision in ("bf16", "fp16")),  # elsewhere rounding decides who leaves
    ],
)
def test_a_model_with_captured_blocks_answers_as_without(precision: Any, method: Method[Any]) -> None:
    images = [random_image(24, 32, seed=1), random_image(24, 28, seed=2)]
    model, plain, recorder = tiny_segmenter(), tiny_segmenter(), Recorder()
    model.backbone.capture_blocks(step=4, record=recorder)
    for batch in ([images[0]], images, [images[0]]):
        with inference(CPU, precision):
            ours, theirs = model(batch, method), plain(batch, method)
        assert ours.ledger.macs == theirs.ledger.macs
        for one, other in zip(ours.grid_logits, theirs.grid_logits):
            rtol, atol = (1e-4, 1e-5) if precision == "fp32" else (2e-2, 6e-2)
            torch.testing.assert_close(one.float(), other.float(), rtol=rtol, atol=atol)
    assert recorder.replayed > recorder.recorded > 0


def test_training__runs_blocks_as_they_are() -> None:
    recorder = Recorder()
    model = tiny_segmenter()
    model.backbone.capture_blocks(record=recorder)
    model([random_image(24, 32)], DToP())
    assert recorder.recorded == 0


def test_capture_blocks__needs_cuda() -> None:
    with pytest.raises(ConfigError, match="capture_blocks needs CUDA and the model is on cpu"):
        tiny_segmenter().backbone.capture_blocks()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs__answer_as_packed_blocks(precision: Any) -> None:
    device = torch.device("cuda")
    model, plain = tiny_segmenter().to(device), tiny_segmenter().to(device)
    model.backbone.capture_blocks(step=4)
    images = [random_image(24, 32, seed=seed).to(device) for seed in range(3)]
    for image in images:
        with inference(device, precision):
            ours, theirs = model([image], Dense()), plain([image], Dense())
        torch.testing.assert_close(ours.grid_logits[0].float(), theirs.grid_logits[0].float(), rtol=2e-2, atol=2e-2)
