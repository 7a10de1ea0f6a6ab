from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import enliven, tiny_config
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.heads import eomt_spec
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, DoViT, DToP, FixedRatio, Truncated
from tokenexit.outputs.ledger import dense_gmacs
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.segmenter import ExitSegmenter

CLASSES, QUERIES = 5, 6


def eomt(exits: tuple[int, ...] = (1, 3), exit_head: str = "fcn", **backbone: Any) -> ExitSegmenter:
    config: ViTConfig = replace(tiny_config(**backbone), final_norm=False)
    spec = eomt_spec(config, layers=2, queries=QUERIES, steps=2)
    torch.manual_seed(0)
    model = ExitSegmenter(config, CLASSES, exits, exit_head, spec)
    enliven(model)
    return model.eval()


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def slow_predictions(
    model: ExitSegmenter, features: Tensor, grid: tuple[int, int], live: Tensor | None = None, masked: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """One image, queries in front of everything as published: masks `(Q, 4 h, 4 w)` and classes before each block and
    at the end.

    features: `(prefix + h w, C)`; where not all patches are `live`, `(h w,)` bool, the others are no keys and show the
    masks the features given. masked: queries see the patches of their own mask alone.
    """
    head: Any = model.decode_head
    count, heads, prefix = QUERIES, head.blocks[0].attn.num_heads, head.prefix
    live = torch.ones(len(features) - prefix, dtype=torch.bool) if live is None else live
    backdrop = features[prefix:]
    x = torch.cat([head.queries.weight, features[:prefix], backdrop[live]])
    found = [slow_prediction(head, x, backdrop, live, grid)]
    for block in head.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if masked:
            masks = F.interpolate(found[-1][0][None], grid, mode="bilinear")[0].flatten(1)
            hidden = torch.zeros(len(x), len(x), dtype=torch.bool)
            hidden[:count, count + prefix :] = masks[:, live] <= 0
            logits = logits.masked_fill(hidden, -torch.inf)
        x = x + block.ls1(block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        found.append(slow_prediction(head, x, backdrop, live, grid))
    return found


def slow_prediction(
    head: Any, x: Tensor, backdrop: Tensor, live: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    patches = backdrop.clone()
    patches[live] = x[QUERIES + head.prefix :]
    said = head.norm(x[:QUERIES])
    vectors = head.mask[2](F.gelu(head.mask[1](F.gelu(head.mask[0](said)))))
    maps = head.norm(patches).T.unflatten(1, grid)[None]
    for step in head.upscale_steps:
        maps = step.mix(F.gelu(step.up(maps)))
        maps = F.layer_norm(maps.movedim(1, -1), maps.shape[1:2], step.norm.weight, step.norm.bias, 1e-6).movedim(-1, 1)
    return torch.einsum("qc,chw->qhw", vectors, maps[0]), head.classifier(said)


def slow_masks(model: ExitSegmenter, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return slow_predictions(model, features, grid)[-1]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_masks__are_those_of_a_slow_run_with_queries_in_front(size: tuple[int, int]) -> None:
    model = eomt()
    (image,) = images(size)
    tokens = model.backbone.run(model.backbone.embed([image]), 0, model.config.backbone.depth)
    masks, classes = slow_masks(model, tokens.x, tokens.grids[0])
    found = model([image], Dense())
    torch.testing.assert_close(found.grid_logits[0], masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.queries[0], classes.softmax(-1)[:, :-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps__resize_masks_before_the_sigmoid_and_then_sum_over_queries() -> None:
    model = eomt()
    (image,) = images((32, 48))
    found = model([image], Dense(), targets=[(50, 70)])
    masks = F.interpolate(found.grid_logits[0][None], (32, 48), mode="bilinear").sigmoid()
    scores = torch.einsum("qk,bqhw->bkhw", found.queries[0], masks)
    wanted = F.interpolate(scores, (50, 70), mode="bilinear")
    torch.testing.assert_close(found.logits, wanted)
    assert torch.equal(torch.as_tensor(found.labels), wanted.argmax(1))
    torch.testing.assert_close(found.scores, wanted.amax(1).clamp(max=1.0))


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, "half"])
def test_batch_of_unlike_images__answers_as_one_by_one(rope: str | None) -> None:
    model = eomt() if rope is None else eomt(rope=rope)
    batch = images((32, 48), (40, 24), (32, 48))
    for method in (Dense(), DoViT(0.4)):
        together = model(batch, method)
        for image, own in zip(batch, together):
            alone = model([image], method)
            torch.testing.assert_close(own.grid_logits[0], alone.grid_logits[0], rtol=1e-4, atol=1e-4)
            assert own.ledger == alone.ledger


@torch.no_grad()
def test_dovit_that_never_fires__is_dense_bit_for_bit() -> None:
    model = eomt()
    batch = images((32, 48), (40, 24))
    dense, never = model(batch, Dense()), model(batch, DoViT(1.0))
    for a, b in zip(dense.grid_logits, never.grid_logits):
        assert torch.equal(a, b)


@torch.no_grad()
def test_dovit__gives_the_joint_blocks_the_features_that_tokens_stopped_with() -> None:
    model, (image,) = eomt(exits=(2,)), images((32, 48))
    tokens = model.backbone.run(model.backbone.embed([image]), 0, 2)
    score = model.exit_heads[0](tokens.patches()).logits.softmax(-1).amax(-1)
    stays = ~(score > 0.5)
    assert 0 < stays.sum() < len(stays)
    on = model.backbone.run(tokens.keep(stays), 2, model.config.backbone.depth)
    features = tokens.x.clone()
    rows = torch.cat([torch.arange(tokens.num_prefix), stays.nonzero().squeeze(1) + tokens.num_prefix])
    features[rows] = on.x
    masks, _ = slow_masks(model, features, tokens.grids[0])
    found = model([image], DoViT(0.5, blend_weight=0.0))
    torch.testing.assert_close(found.grid_logits[0], masks, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_exit_behind_the_last_block__changes_nothing_but_the_cost() -> None:
    depth = tiny_config().depth
    model, batch = eomt(exits=(1, depth)), images((32, 48))
    method = DoViT((1.0, 0.0), blend_weight=0.0)
    found, dense = model(batch, method), model(batch, Dense())
    assert (found.exit_index[0] == 1).all()
    torch.testing.assert_close(found.grid_logits[0], dense.grid_logits[0])
    assert found.ledger.macs[0] > dense.ledger.macs[0]  # its exit heads run


@torch.no_grad()
def test_windows__are_summed_as_scores() -> None:
    model, (image,) = eomt(), images((32, 64))
    model.preprocessing = Preprocessing(window=(32, 48), stride=(32, 16), labels=model.preprocessing.labels)
    found = model.segment([image], Dense())
    left, right = (torch.as_tensor(model([part], Dense()).logits)[0] for part in (image[:, :, :48], image[:, :, 16:]))
    wanted = torch.zeros(CLASSES, 32, 64)
    wanted[:, :, :48] += left
    wanted[:, :, 16:] += right
    wanted[:, :, 16:48] /= 2
    torch.testing.assert_close(torch.as_tensor(found.logits)[0], wanted)
    assert torch.equal(torch.as_tensor(found.labels)[0], wanted.argmax(0))


def test_model__is_saved_and_loaded(tmp_path: Path) -> None:
    model, batch = eomt(exits=(1, tiny_config().depth)), images((32, 48))
    model.save_pretrained(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(batch, DoViT(0.4)).grid_logits[0], model(batch, DoViT(0.4)).grid_logits[0])


@pytest.mark.parametrize(
    ("backbone", "size", "classes", "gmacs"),
    [
        ("dinov3_vits16", 512, 150, 37),
        ("dinov3_vitb16", 512, 150, 124),
        ("dinov3_vitl16", 512, 150, 394),
        ("dinov3_vitl16", 1024, 19, 2174),
    ],
)
def test_cost__is_that_of_the_published_sizes(backbone: str, size: int, classes: int, gmacs: float) -> None:
    found = dense_gmacs(backbone, "eomt", classes, (size, size), "tokenexit")
    assert found["gmacs"] == pytest.approx(gmacs, rel=0.01)
    assert found["head"] == "eomt"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training__predicts_before_every_joint_block_with_and_without_mask_attention(share: float) -> None:
    model, batch = eomt().train(), images((32, 48), (32, 48))
    final = model(batch, Dense(), mask_shares=(share, share)).exit_records[-1]
    assert len(final.masks) == 3
    for i, image in enumerate(batch):
        with torch.no_grad():
            tokens = model.backbone.run(model.backbone.embed([image]), 0, model.config.backbone.depth)
            wanted = slow_predictions(model, tokens.x, tokens.grids[0], masked=share == 1.0)
        for found, (masks, classes) in zip(final.masks, wanted):
            torch.testing.assert_close(found.logits[i], masks, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.classes[i], classes, rtol=1e-4, atol=1e-4)


def test_training__reaches_every_parameter_and_without_shares_learns_from_the_end_alone() -> None:
    model, batch = eomt().train(), torch.stack(images((32, 48), (32, 48)))
    labels = torch.arange(32)[:, None].expand(32, 48).remainder(CLASSES).expand(2, 32, 48)
    output = model(batch, Dense(), mask_shares=(1.0, 0.5))
    segmentation_loss(output, labels, points=50).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []
    assert len(model(batch, Dense()).exit_records[-1].masks) == 1
    with pytest.raises(ConfigError, match="mask_shares has 3 values for 2 blocks"):
        model(batch, Dense(), mask_shares=(1.0, 1.0, 1.0))


def test_whole_backbone__gives_its_last_blocks_and_norm_to_the_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = ViT(tiny_config(depth=5)).eval()
    enliven(whole)
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    spec = {"kind": "eomt", "layers": 2, "queries": QUERIES}
    model = ExitSegmenter(whole.config, CLASSES, (1, 3), "fcn", spec, weights=tmp_path / "vit.safetensors").eval()
    assert model.config.backbone.depth == 3
    assert model.config.decode_head["layers"] == 2
    assert model.load_report is not None
    assert not model.load_report.missing
    head: Any = model.decode_head
    (image,) = images((32, 48))
    with torch.no_grad():
        tokens = model.backbone.run(model.backbone.embed([image]), 0, 3)
        x = tokens.x
        for block in head.blocks:  # without queries it is the ViT that it was
            x = block(x, tokens.packing)
        wanted = whole.run(whole.embed([image]), 0, 5)
        assert torch.equal(head.norm(x), whole.norm(wanted.x))
    model.save_pretrained(tmp_path / "saved")
    assert ExitSegmenter.from_pretrained(tmp_path / "saved").config == model.config
    with pytest.raises(ConfigError, match="layers of head 'eomt' must be below 5"):
        ExitSegmenter(whole.config, CLASSES, (1,), "fcn", spec | {"layers": 5})


# ------------------------------------------------------------------------------------------------- DToP on masks


def dtop_by_hand(model: ExitSegmenter, image: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One exit after block 2, no token kept: features with the backdrop, which tokens are live, and exit scores."""
    tokens = model.backbone.run(model.backbone.embed([image]), 0, 2)
    scores = model.exit_heads[0](tokens.patches()).logits.softmax(-1)
    live = scores.amax(-1) <= threshold
    on = model.backbone.run(tokens.keep(live), 2, model.config.backbone.depth)
    features = tokens.x.clone()
    features[: tokens.num_prefix] = on.x[: tokens.num_prefix]
    features[tokens.num_prefix :][live] = on.x[tokens.num_prefix :]
    return features, live, scores, on.x


@torch.no_grad()
@pytest.mark.parametrize("finish", ["frozen", "masks"])
def test_dtop__shows_queries_live_tokens_and_masks_the_backdrop(finish: Any) -> None:
    model, (image,) = eomt(exits=(2,)), images((32, 48))
    features, live, scores, _ = dtop_by_hand(model, image, 0.5)
    assert 0 < live.sum() < len(live)
    grid = (32 // model.config.backbone.patch_size, 48 // model.config.backbone.patch_size)
    masks, classes = slow_predictions(model, features, grid, live)[-1]
    found = model([image], DToP(0.5, keep_per_class=0, finish=finish))
    torch.testing.assert_close(found.grid_logits[0], masks, rtol=1e-4, atol=1e-4)
    inside = F.interpolate(masks[None], (32, 48), mode="bilinear").sigmoid()[0]
    wanted = torch.einsum("qk,qhw->khw", classes.softmax(-1)[:, :-1], inside)
    if finish == "frozen":
        canvas = F.interpolate(scores.T.unflatten(1, grid)[None], (32, 48), mode="bilinear")[0]
        exited = F.interpolate((~live).float().view(1, 1, *grid), (32, 48), mode="nearest")[0, 0] > 0
        wanted = torch.where(exited, canvas, wanted)
    torch.testing.assert_close(torch.as_tensor(found.logits)[0], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.as_tensor(found.labels)[0], torch.as_tensor(found.logits)[0].argmax(0))


@torch.no_grad()
@pytest.mark.parametrize("finish", ["auto", "masks"])
def test_dtop_that_never_fires__is_dense_bit_for_bit(finish: Any) -> None:
    model, batch = eomt(exits=(1, tiny_config().depth)), images((32, 48), (40, 24))
    dense, never = model(batch, Dense()), model(batch, DToP(1.0, finish=finish))
    for a, b, c, d in zip(dense.grid_logits, never.grid_logits, dense.logits, never.logits):
        assert torch.equal(a, b)
        assert torch.equal(c, d)


@torch.no_grad()
def test_dtop__of_a_batch_of_unlike_images_answers_as_one_by_one_and_costs_less() -> None:
    model, batch = eomt(rope="half"), images((32, 48), (40, 24), (32, 48))
    for method in (DToP(0.4), DToP(0.4, finish="masks"), FixedRatio((0.5, 0.2)), DToP(0.0, keep_per_class=0)):
        together = model(batch, method)
        for image, own in zip(batch, together):
            alone = model([image], method)
            torch.testing.assert_close(own.maps(0)(slice(None)), alone.maps(0)(slice(None)), rtol=1e-4, atol=1e-4)
            assert own.ledger == alone.ledger
        dense = model(batch, Dense()).ledger
        assert all(a.decode_head < b.decode_head for a, b in zip(together.ledger.parts, dense.parts))


def test_dtop__trains_on_masks_beside_class_maps_of_exits() -> None:
    model, batch = eomt().train(), torch.stack(images((32, 48), (32, 48)))
    labels = torch.arange(32)[:, None].expand(32, 48).remainder(CLASSES).expand(2, 32, 48)
    output = model(batch, DToP(0.4), mask_shares=(1.0, 0.0))
    assert [record.kind for record in output.exit_records] == ["softmax", "softmax", "masks"]
    assert len(output.exit_records[-1].masks) == 3
    segmentation_loss(output, labels, points=50).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_what_masks_are_not_for__is_refused_in_a_sentence() -> None:
    model, (image,) = eomt(), images((32, 48))
    with pytest.raises(ConfigError, match="before a decode head of masks"):
        model([image], DToP(0.9, stop=1))
    with pytest.raises(ConfigError, match="no exit answers in masks as this decode head does, name another method"):
        model([image], Truncated(1))
    with pytest.raises(ConfigError, match="final_norm must be off"):
        replace(model.config, backbone=replace(model.config.backbone, final_norm=True))
    with pytest.raises(ConfigError, match="another than eomt"):
        ExitSegmenter(model.config.backbone, CLASSES, (1,), model.config.decode_head, "fcn")
    with pytest.raises(ConfigError, match=r"between 1 and \d+"):
        eomt(exits=(1, tiny_config().depth + 1))
    with pytest.raises(ConfigError, match="prefix of head 'eomt' must be"):
        spec = {**model.config.decode_head, "prefix": 3}
        ExitSegmenter(model.config.backbone, CLASSES, (1,), "fcn", spec).eval()([image])
