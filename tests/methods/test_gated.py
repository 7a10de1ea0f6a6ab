"""Closed exits: nobody leaves there, their heads do not run, and the others go on as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import picture, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Gated, Method
from tokenexit.segmenter import ExitSegmenter

IMAGES = [picture(24, 32, seed=1), picture(16, 20, seed=2)]


def without_first_exit(model: ExitSegmenter) -> ExitSegmenter:
    """The oracle: the same weights, built with the second exit alone."""
    alone = tiny_segmenter(exits=model.config.exits[1:])
    state = {
        name.replace("exit_heads.1.", "exit_heads.0."): value
        for name, value in model.state_dict().items()
        if not name.startswith("exit_heads.0.")
    }
    alone.load_state_dict(state)
    return alone.eval()


@pytest.mark.parametrize(
    "method",
    [
        lambda *taus: DToP(threshold=taus, keep_per_class=1),
        lambda *taus: DoViT(threshold=taus),
        lambda *taus: DoViT(threshold=taus, min_improvement=0.0),
    ],
    ids=["dtop", "dovit", "dovit with improvement"],
)
@torch.no_grad()
def test_gated__answers_as_a_model_built_without_the_closed_exits(method: Any) -> None:
    model = tiny_segmenter()
    gated = model(IMAGES, Gated(method(0.1, 0.25), (0,)))
    alone = without_first_exit(model)(IMAGES, method(0.25))
    assert any((stage == 1).any() for stage in gated.exit_stage), "some leave at the second exit"
    for ours, theirs in zip(gated.grid_logits, alone.grid_logits):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gated.exit_stage, alone.exit_stage):
        assert torch.equal(ours, theirs + 1)
    assert gated.ledger.macs == alone.ledger.macs


@torch.no_grad()
def test_gated__with_all_exits_closed_computes_and_costs_what_dense_does() -> None:
    model = tiny_segmenter()
    gated, dense = model(IMAGES, Gated(DToP(threshold=0.0), (0, 1))), model(IMAGES, Dense())
    for ours, theirs in zip(gated.grid_logits, dense.grid_logits):
        torch.testing.assert_close(ours, theirs.float())
    assert gated.ledger.macs == dense.ledger.macs


@torch.no_grad()
def test_gated__with_no_exit_closed_is_the_method() -> None:
    model, method = tiny_segmenter(), DToP(threshold=0.25)
    assert torch.equal(model(IMAGES, Gated(method)).grid_logits[0], model(IMAGES, method).grid_logits[0])


@pytest.mark.parametrize("closed", [(2,), (-1,)])
def test_gated__refuses_exits_that_are_not_there(closed: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="names exits that are not there: this model has 2"):
        tiny_segmenter().check(Gated(DToP(), closed))


def test_gated__refuses_to_record_stages_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="closed exits leave no map"):
        tiny_segmenter()(IMAGES, Gated(DToP(), (0,)), with_stages=True)


def test_gated__checks_the_method_inside() -> None:
    method: Method[Any] = Gated(DToP(threshold=(0.1, 0.2, 0.3)), (0,))
    with pytest.raises(ConfigError, match="3"):
        tiny_segmenter().check(method)
