"""Closed exits: nobody leaves there, their heads do not run, and the others go on as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import (
    Cropr,
    Dense,
    DoViT,
    DToP,
    FixedRatio,
    Gated,
    GatedBySize,
    Method,
    Truncated,
    build_method,
    spec_of,
)
from tokenexit.segmenter import ExitSegmenter

IMAGES = [random_image(24, 32, seed=1), random_image(16, 20, seed=2)]


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
    assert any((stage == 1).any() for stage in gated.exit_index), "some leave at the second exit"
    for ours, theirs in zip(gated.grid_logits, alone.grid_logits):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gated.exit_index, alone.exit_index):
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


@pytest.mark.parametrize("method", [Dense(), Truncated(2)], ids=repr)
def test_gated__refuses_methods_in_which_no_token_chooses_an_exit(method: Method[Any]) -> None:
    for gated in (Gated(method, (0,)), GatedBySize(method, ((1, (0,)),))):
        with pytest.raises(ConfigError, match=f"closed must be empty for '{method.name}'"):
            tiny_segmenter().check(gated)
    tiny_segmenter().check(Gated(method))


@pytest.mark.parametrize(
    ("head", "method"),
    [("fcn", FixedRatio((0.5, 0.25))), ("fcn", FixedRatio((0.5, 0.25), rejoin=1)), ("cropr", Cropr(0.3))],
    ids=repr,
)
@torch.no_grad()
def test_gated__says_at_which_exit_tokens_left(head: str, method: Method[Any]) -> None:
    exit_index = tiny_segmenter(head, "linear")(IMAGES, Gated(method, (0,))).exit_index
    assert {int(n) for each in exit_index for n in each.unique()} == {1, 2}


def test_gated__refuses_to_record_exits_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="closed exits leave no map"):
        tiny_segmenter()(IMAGES, Gated(DToP(), (0,)), with_records=True)


def test_gated__checks_the_method_inside() -> None:
    method: Method[Any] = Gated(DToP(threshold=(0.1, 0.2, 0.3)), (0,))
    with pytest.raises(ConfigError, match="3"):
        tiny_segmenter().check(method)


SMALL, LARGE = 20, 48
BY_SIZE = GatedBySize(DToP(threshold=0.2, keep_per_class=1), ((1, (0, 1)), (SMALL, (0,)), (LARGE, ())))


@torch.no_grad()
def test_gated_by_size__every_image_meets_the_exits_of_its_size_whatever_is_beside_it() -> None:
    model = tiny_segmenter()
    images = [
        random_image(height, width, seed=n)
        for n, (height, width) in enumerate([(16, 16), (24, 32), (32, 32), (8, 60), (24, 32)])
    ]
    grids = [model.backbone.patch_embed.grid(*image.shape[1:]) for image in images]
    closed = [(0, 1) if h * w < SMALL else (0,) if h * w < LARGE else () for h, w in grids]
    assert len(set(closed)) == 3
    together = model(images, BY_SIZE, targets=[(5, 7)] * len(images))
    alone = [model([image], Gated(BY_SIZE.method, numbers)) for image, numbers in zip(images, closed)]
    for n, one in enumerate(alone):
        torch.testing.assert_close(together.grid_logits[n], one.grid_logits[0])
        assert torch.equal(together.exit_index[n], one.exit_index[0])
        assert together.ledger.macs[n] == one.ledger.macs[0]
        assert together.sizes[n] == one.sizes[0]
    assert together.labels.shape == (len(images), 5, 7)


@torch.no_grad()
def test_gated_by_size__windows_meet_the_exits_of_the_windows_size() -> None:
    model = tiny_segmenter()
    model.preprocessing = replace(model.preprocessing, window=(16, 16), stride=(16, 16))
    (windowed,), (whole,) = (run([random_image(32, 32)], BY_SIZE).exit_index for run in (model.segment, model))
    assert (windowed == 2).all()
    assert (whole < 2).any()


def test_closed_exits__come_back_from_their_specification() -> None:
    for method, whole in product((BY_SIZE, Gated(BY_SIZE.method, (0,)), Gated(DToP())), (False, True)):
        assert build_method(json.loads(json.dumps(spec_of(method, whole)))) == method
    assert spec_of(BY_SIZE)["method"] == {"name": "dtop", "threshold": 0.2, "keep_per_class": 1}


def test_gated_by_size__refuses_exits_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="names exits that are not there"):
        tiny_segmenter().check(GatedBySize(DToP(), ((1, (5,)),)))
