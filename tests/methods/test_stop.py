"""A method may end the network at an exit: all leave there, and nothing runs behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import TOKEN_HEADS, random_image, tiny_segmenter
from tokenexit.engine.tokens import Packing
from tokenexit.errors import ConfigError
from tokenexit.heads import class_scores
from tokenexit.methods import Dense, DToP, Gated, GatedBySize, Method, Truncated, build_method, spec_of
from tokenexit.methods.reference import random_counterpart
from tokenexit.methods.thresholded import Graded
from tokenexit.segmenter import ExitSegmenter

SIZES = ((24, 32), (4, 4), (16, 20), (9, 33))


@dataclass(frozen=True)
class ToTheEnd(DToP):
    """The oracle: all leave at an exit, and blocks and heads run on with no patch token at all."""

    name: ClassVar[str] = "to_the_end"

    everybody_at: int = 0

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        return live if n == self.everybody_at else super().decide(n, graded, live)


def images_of(*sizes: tuple[int, int]) -> list[Tensor]:
    return [random_image(*size, seed=n) for n, size in enumerate(sizes)]


def first_scores(model: ExitSegmenter, images: list[Tensor]) -> Tensor:
    """What the first exit head thinks of all tokens, `(cells,)`."""
    record = model(images, Dense(), with_records=True).exit_records[0]
    assert record.logits is not None
    image = Packing.of(record.head_tokens, record.logits.device).image_index()
    return class_scores(record.kind, record.logits, record.presence, image).amax(dim=1)


@pytest.mark.parametrize("head", TOKEN_HEADS)
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("options", [{}, {"keep_per_class": 0}, {"finish": "frozen", "keep_per_class": 1}], ids=str)
@torch.no_grad()
def test_stop__is_everybody_leaving_there_bit_for_bit(head: str, stop: int, options: dict[str, Any]) -> None:
    model, images = tiny_segmenter(head, num_registers=1), images_of(*SIZES)
    half = first_scores(model, images).median().item()
    ours = model(images, DToP(half, stop=stop, **options))
    theirs = model(images, ToTheEnd(half, everybody_at=stop - 1, **options))
    assert ours.value == theirs.value
    for i in range(len(images)):
        assert torch.equal(ours.grid_logits[i], theirs.grid_logits[i])
        assert torch.equal(ours.exit_index[i], theirs.exit_index[i])
        assert torch.equal(ours.labels[i], theirs.labels[i])
        assert (ours.exit_index[i] < stop).all()
    assert torch.cat([index.flatten() for index in ours.exit_index]).unique().tolist() == list(range(stop))
    assert ours.ledger.live == theirs.ledger.live


@pytest.mark.parametrize("method", [DToP(0.3, stop=1), Truncated(1), Gated(DToP(0.3, stop=1))], ids=repr)
@torch.no_grad()
def test_last_exit__nothing_runs_behind_it(method: Method[Any]) -> None:
    model, ran = tiny_segmenter("atm", exits=(1, 2, 3), num_registers=2), Counter[str]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    output = model(images_of((16, 20), (8, 8)), method)
    assert method.last_exit == 0
    assert ran["exit_heads.0"] == 1
    assert [ran[f"blocks.{n}"] or ran[f"backbone.blocks.{n}"] for n in range(4)] == [1, 0, 0, 0]
    assert not {"exit_heads.1", "exit_heads.2", "decode_head"} & ran.keys()
    assert [bool(record.head_tokens) for record in output.exit_records] == [True, False, False, False]
    assert output.ledger.live == ((20, 0, 0, 0), (4, 0, 0, 0))
    blocks = [model.backbone.block_ops(cells + 3).macs for cells in (20, 4)]
    assert [part.blocks for part in output.ledger.parts] == blocks
    assert all(part.decode_head == 0 for part in output.ledger.parts)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    stop=st.integers(1, 2),
    threshold=st.floats(0.2, 0.9),
    keep=st.integers(0, 2),
    head=st.sampled_from(["fcn", "atm"]),
)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_stop__a_batch_of_n_is_n_batches_of_one(
    sizes: list[tuple[int, int]], stop: int, threshold: float, keep: int, head: str
) -> None:
    model, images = tiny_segmenter(head), images_of(*sizes)
    method = DToP(threshold, keep, stop=stop)
    together = model(images, method)
    for i, image in enumerate(images):
        alone = model([image], method)
        assert torch.equal(together.exit_index[i], alone.exit_index[0])
        torch.testing.assert_close(together.grid_logits[i], alone.grid_logits[0], rtol=1e-4, atol=1e-5)
        assert together.ledger[i] == alone.ledger


@torch.no_grad()
def test_stop__goes_before_retention_guard_and_cap_and_later_thresholds_mean_nothing() -> None:
    model, images = tiny_segmenter(exits=(1, 2, 3)), images_of(*SIZES)
    held = DToP((1.0, 1.0, 1.0), keep_per_class=50, boundary_guard=True, cap=(1.0, 1.0, 1.0), stop=2)
    outputs = model(images, held)
    assert all((index == 1).all() for index in outputs.exit_index)
    for later in ((0.3, 0.0, 0.0), (0.3, 0.9, 0.5)):
        one, other = (model(images, DToP(taus, stop=2)) for taus in ((0.3, 1.0, 1.0), later))
        assert all(map(torch.equal, one.grid_logits, other.grid_logits))
        assert one.ledger == other.ledger


@torch.no_grad()
def test_stop__after_the_first_exit_is_truncated_there() -> None:
    model, images = tiny_segmenter("fcn"), images_of(*SIZES)
    ours, theirs = model(images, DToP(stop=1)), model(images, Truncated(1))
    assert all(map(torch.equal, ours.grid_logits, theirs.grid_logits))
    assert ours.ledger == theirs.ledger


def test_stop__is_refused_where_the_model_has_no_such_exit_or_is_trained() -> None:
    model = tiny_segmenter()
    with pytest.raises(ConfigError, match="stop must be at least 1, got 0"):
        DToP(stop=0)
    with pytest.raises(ConfigError, match="stop must be at most 2, the number of exits, got 3"):
        model.check(DToP(stop=3))
    with pytest.raises(ConfigError, match="a stop leaves no map at later exits"):
        model(images_of((8, 8)), DToP(stop=1), with_records=True)
    with pytest.raises(ConfigError, match=r"stop of method 'dtop' must be a whole number or None, got 1\.5"):
        build_method({"name": "dtop", "stop": 1.5})


@pytest.mark.parametrize("closed", [(1,), (0, 1)])
def test_gated__may_not_close_the_exit_where_the_method_stops(closed: tuple[int, ...]) -> None:
    model, method = tiny_segmenter(), DToP(stop=2)
    for gated in (Gated(method, closed), GatedBySize(method, ((1, ()), (20, closed)))):
        with pytest.raises(ConfigError, match="closes the exit where dtop stops: leave it open"):
            model.check(gated)
    model.check(Gated(method, (0,)))


@torch.no_grad()
def test_gated__with_a_stop_ends_there() -> None:
    model, images = tiny_segmenter(exits=(1, 2, 3)), images_of(*SIZES)
    output = model(images, Gated(DToP(0.3, stop=2), (0, 2)))
    assert all((index == 1).all() for index in output.exit_index)
    assert all(live[2:] == (0, 0) for live in output.ledger.live)


def test_stop__comes_back_from_its_specification_and_is_named_by_the_label() -> None:
    assert spec_of(DToP(stop=2)) == {"name": "dtop", "stop": 2}
    assert build_method({"name": "dtop", "stop": 2}) == DToP(stop=2)
    assert DToP(0.9, stop=2).label == "dtop 0.9 stop=2"
    assert spec_of(DToP(), whole=True)["stop"] is None


@torch.no_grad()
@pytest.mark.parametrize("method", [DToP(0.3, stop=2), DToP(0.7, 0, frozen_context=2, stop=2)], ids=["alone", "frozen"])
def test_random_exits__of_a_method_that_stops_cost_what_it_costs(method: DToP) -> None:
    model: ExitSegmenter = tiny_segmenter()
    image = images_of((24, 32))
    counterpart = random_counterpart(method)
    assert counterpart is not None
    assert counterpart.last_exit == 1
    output = model(image, method)
    again = model(image, replace(counterpart, exit_index=output.exit_index[0].flatten()))
    assert again.ledger == output.ledger
    assert torch.equal(again.grid_logits[0], output.grid_logits[0])
    assert model(image, Dense()).ledger.macs > output.ledger.macs
