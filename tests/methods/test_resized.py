"""A method on resized images: maps come back at the full size, and costs are compared with dense at full size."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DoViT, DToP, Gated, GatedBySize, Method, Resized, build_method, spec_of
from tokenexit.outputs.ledger import dense_ops
from tokenexit.segmenter import ExitSegmenter

SIZES = ((24, 32), (17, 20), (4, 4), (40, 13))
METHODS: list[Method[Any]] = [Dense(), DToP(0.3, 1), DToP(0.3, 1, stop=2), DoViT(0.3), Gated(DToP(0.3, 1), (0,))]


def shrunk(image: Tensor, scale: float) -> Tensor:
    """The oracle: torch's own resampling at the size that preprocessing would give."""
    size = [max(1, int(side * scale + 0.5)) for side in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def images_of(*sizes: tuple[int, int]) -> list[Tensor]:
    return [random_image(*size, seed=n) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("scale", [0.1, 0.5, 0.7, 1.0, 1.3])
@torch.no_grad()
def test_resized__is_the_model_on_the_resized_image(method: Method[Any], scale: float) -> None:
    model, images = tiny_segmenter(), images_of(*SIZES)
    ours = model(images, Resized(method, scale))
    small = [shrunk(image, scale) for image in images]
    theirs = model(small, method, targets=SIZES)
    assert ours.sizes == tuple(tuple(image.shape[1:]) for image in small)
    assert ours.targets == SIZES
    for i, size in enumerate(SIZES):
        assert torch.equal(ours.grid_logits[i], theirs.grid_logits[i])
        assert torch.equal(ours.exit_index[i], theirs.exit_index[i])
        assert ours.labels[i].shape == size
        assert torch.equal(ours.labels[i], theirs.labels[i])
        assert torch.equal(ours.scores[i], theirs.scores[i])
    assert ours.ledger.parts == theirs.ledger.parts
    assert ours.ledger.live == theirs.ledger.live
    assert ours.ledger.tokens == theirs.ledger.tokens
    assert ours.ledger.dense_macs == model(images, Dense()).ledger.macs


@torch.no_grad()
def test_resized__is_dense_on_the_smaller_image_of_preprocessing_but_for_the_resampling() -> None:
    """PIL rounds what it resampled to whole grey levels, torch does not: a few pixels at borders may differ."""
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 96), torch.linspace(0, 4, 128), indexing="ij")
    smooth = torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()], dim=2) * 100 + 120
    image = Image.fromarray(smooth.round().byte().numpy())
    model = tiny_segmenter()
    ours = model.predict(image, Resized(Dense(), 0.7)).labels
    theirs = model([model.preprocessing.to_tensor(image, 0.7)], targets=[(96, 128)]).labels
    assert ours.shape == theirs.shape == (1, 96, 128)
    assert len(theirs.unique()) > 1
    assert (ours == theirs).float().mean() >= 0.99


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
    scale=st.floats(0.01, 2.0),
    method=st.sampled_from([Dense(), DToP(0.3, 1), GatedBySize(DToP(0.3, 1), ((1, (0, 1)), (8, (0,)), (16, ())))]),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_resized__a_batch_of_n_is_n_batches_of_one(
    sizes: list[tuple[int, int]], scale: float, method: Method[Any]
) -> None:
    model, images = tiny_segmenter(), images_of(*sizes)
    together = model(images, Resized(method, scale))
    for i, image in enumerate(images):
        alone = model([image], Resized(method, scale))
        assert torch.equal(together.exit_index[i], alone.exit_index[0])
        torch.testing.assert_close(together.grid_logits[i], alone.grid_logits[0], rtol=1e-4, atol=1e-5)
        assert together.ledger[i] == alone.ledger
        assert alone.sizes == tuple(tuple(t.shape[1:]) for t in [shrunk(image, scale)])
        full = model.backbone.patch_embed.grid(*image.shape[1:])
        assert alone.ledger.dense_macs == (dense_ops(model.backbone, model.decode_head, full).macs,)


@torch.no_grad()
def test_resized__exits_closed_by_size_are_those_of_the_resized_image() -> None:
    model = tiny_segmenter()
    method = GatedBySize(DToP(0.2, 1), ((1, ()), (40, (0,))))
    (image,) = images_of((24, 32))  # 48 patches, and 12 of half the size
    whole, half = model([image], method), model([image], Resized(method, 0.5))
    assert not whole.exit_records[0].head_tokens
    assert half.exit_records[0].head_tokens == (12,)


def windowed(model: ExitSegmenter) -> ExitSegmenter:
    model.preprocessing = replace(model.preprocessing, window=(16, 20), stride=(12, 10))
    return model


@pytest.mark.parametrize("method", [Dense(), DToP(0.3, 1), GatedBySize(DToP(0.3, 1), ((1, (0,)), (7, ())))], ids=repr)
@torch.no_grad()
def test_resized__windows_are_cut_from_the_full_image_and_each_is_resized(method: Method[Any]) -> None:
    model = windowed(tiny_segmenter())
    images = images_of((24, 33), (9, 12), (16, 20))
    targets = [(25, 35), (9, 12), (16, 20)]
    output = model.segment(images, Resized(method, 0.6), targets=targets)
    crops = [
        image[:, top:bottom, left:right]
        for image, boxes in zip(images, output.boxes)
        for top, left, bottom, right in boxes
    ]
    assert output.sizes == ((24, 33), (9, 12), (16, 20))
    alone = [model([crop], Resized(method, 0.6)) for crop in crops]
    first = 0
    for i, boxes in enumerate(output.boxes):
        own = alone[first : first + len(boxes)]
        first += len(boxes)
        total = torch.zeros(5, *output.sizes[i])
        seen, exits = torch.zeros(output.sizes[i]), torch.zeros(output.sizes[i])
        for (top, left, bottom, right), window in zip(boxes, own):
            total[:, top:bottom, left:right] += window.logits[0]
            seen[top:bottom, left:right] += 1
            h, w = window.sizes[0]
            pixels = window.exit_index[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:h, :w]
            rows = ((torch.arange(bottom - top) + 0.5) * h / (bottom - top)).long()
            columns = ((torch.arange(right - left) + 0.5) * w / (right - left)).long()
            exits[top:bottom, left:right] += pixels[rows][:, columns]
        expected = F.interpolate((total / seen)[None], targets[i], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(output.logits[i], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(output.exit_index[i], (exits / seen + 0.5).floor().long())
        assert output.ledger.macs[i] == sum(window.ledger.macs[0] for window in own)
        assert output.ledger.tokens[i] == sum(window.ledger.tokens[0] for window in own)
        assert torch.equal(output[i].labels[0], output.labels[i])
    assert output.ledger.dense_macs == model.segment(images, Dense()).ledger.macs


def test_resized__comes_back_from_its_specification() -> None:
    for method, whole in product(METHODS, (False, True)):
        resized = Resized(method, 0.7)
        assert build_method(json.loads(json.dumps(spec_of(resized, whole)))) == resized
    plan = Resized(Gated(DToP((0.98, 0.9), stop=2), (0,)), 0.7)
    assert spec_of(plan) == {
        "name": "resized",
        "method": {
            "name": "gated",
            "method": {"name": "dtop", "threshold": [0.98, 0.9], "stop": 2},
            "closed": (0,),
        },
        "scale": 0.7,
    }
    assert plan.label.endswith("stop=2 gated @0.7")
    assert plan.inner == DToP((0.98, 0.9), stop=2)
    assert (plan.input_scale, plan.last_exit, plan.thresholds) == (0.7, 1, (0.98, 0.9))
    assert Gated(DToP()).input_scale == 1.0
    assert plan.with_thresholds(0.5).inner == DToP(0.5, stop=2)


@pytest.mark.parametrize("scale", [0.0, -1.0, 4.5, float("nan")])
def test_resized__refuses_scales_out_of_range(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale must be above 0 and at most 4, got"):
        Resized(Dense(), scale)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "resized", "method": "dense", "scale": "half"},
        {"name": "resized", "method": "dense"},
        {"name": "resized"},
        {"name": "resized", "method": "dense", "scale": 0.5, "closed": []},
        {"name": "gated", "method": {"name": "resized", "method": "dtop", "scale": 0.5}, "closed": [0]},
        {"name": "resized", "method": {"name": "resized", "method": "dtop", "scale": 0.5}, "scale": 0.5},
    ],
    ids=str,
)
def test_resized__refuses_specifications_that_are_none(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_method(spec)


@pytest.mark.parametrize("outer", [lambda m: Gated(m, (0,)), lambda m: GatedBySize(m), lambda m: Resized(m, 0.5)])
def test_resized__is_the_outermost_wrapper(outer: Any) -> None:
    with pytest.raises(ConfigError, match=r"method 'resized' must be the outermost one: put '.*' inside of it"):
        outer(Resized(DToP(), 0.7))


def test_resized__serves_inference_alone() -> None:
    model, images = tiny_segmenter(), images_of((8, 8), (8, 8))
    method = Resized(Dense(), 0.5)
    with pytest.raises(ConfigError, match="Resized serves inference alone"):
        model(images, method, with_records=True)
    with pytest.raises(ConfigError, match="Resized serves inference alone"):
        model(images, method, labels=torch.zeros(2, 8, 8, dtype=torch.int64))
    with pytest.raises(ConfigError, match="Resized serves inference alone"):
        model.train()(images, method)


def test_resized__checks_the_method_inside() -> None:
    with pytest.raises(ConfigError, match="stop must be at most 2"):
        tiny_segmenter().check(Resized(Gated(DToP(stop=3)), 0.5))
