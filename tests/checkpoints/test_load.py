"""Mapping weights onto the backbone: what fits is used, resizing changes nothing, the rest is said or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.checkpoints.load import resize_patches
from tokenexit.engine.vit import ViT, resize_pos_embed
from tokenexit.engine.vit_config import ViTConfig, vit_config
from tokenexit.errors import CheckpointError

SMALL = ViTConfig(embed_dim=8, depth=2, num_heads=2, patch_size=4, pos_embed_grid=(3, 3))
RICH = replace(SMALL, layer_scale=0.5, num_registers=2, pos_embed_prefix=False)


def random_state(config: ViTConfig) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in ViT(config).state_dict().items()}


def features(model: ViT, size: tuple[int, int] = (12, 12)) -> Tensor:
    """Tokens `(T, C)` after all blocks for one fixed image."""
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model.run(model.embed([image]), 0, model.config.depth)
        return model.norm(tokens.x)


def refusal(config: ViTConfig, state: dict[str, Tensor]) -> str:
    """The message; and nothing of the weights may have reached the model."""
    model = ViT(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone(model, state, source="weights 'vit.pth'")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    message = str(caught.value)
    assert "weights 'vit.pth'" in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("config", [SMALL, RICH], ids=["plain", "rich"])
def test_every_tensor_of_the_same_architecture_is_loaded_exactly(config: ViTConfig) -> None:
    state, model = random_state(config), ViT(config)
    report = load_backbone(model, state)
    assert report.loaded == len(state)
    assert (report.missing, report.unexpected, report.resized) == ((), (), ())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_half_precision_weights_are_cast_to_the_models(tmp_path: Path) -> None:
    state, model = random_state(SMALL), ViT(SMALL)
    load_backbone(model, {key: value.half() for key, value in state.items()})
    assert model.pos_embed.dtype == torch.float32
    assert torch.equal(model.pos_embed, state["pos_embed"].half().float())


def test_the_state_given_is_not_changed() -> None:
    state = random_state(SMALL)
    before = {key: value.clone() for key, value in state.items()}
    load_backbone(ViT(replace(SMALL, pos_embed_grid=(5, 4), pos_embed_prefix=False)), state)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_classifier_leftovers_are_named_as_such() -> None:
    extra = {"head.weight": torch.ones(1), "head.bias": torch.ones(1), "fc_norm.weight": torch.ones(1)}
    report = load_backbone(ViT(SMALL), random_state(SMALL) | extra | {"decode_head.bias": torch.ones(1)})
    assert report.classifier == tuple(extra)
    assert report.unexpected == (*extra, "decode_head.bias")
    assert "classifier, not used: head.weight, head.bias, fc_norm.weight" in report.summary()
    assert "no place in the backbone, not used: decode_head.bias" in report.summary()


# Position tables


def test_a_table_of_another_grid_is_resized_as_at_run_time() -> None:
    """The resized table, used at its own grid, gives what the original gives when the model resizes it."""
    state = random_state(SMALL)
    original, resized = ViT(SMALL), ViT(replace(SMALL, pos_embed_grid=(5, 4)))
    load_backbone(original, state)
    report = load_backbone(resized, state)
    assert report.resized == (("pos_embed", (1, 10, 8), (1, 21, 8)),)
    assert "resized pos_embed: (1, 10, 8) to (1, 21, 8)" in report.summary()
    torch.testing.assert_close(features(resized, (20, 16)), features(original, (20, 16)))


@pytest.mark.parametrize("side", [6, 8, 3])
def test_patches_of_another_size__say_of_a_resized_patch_what_the_old_ones_said(side: int) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(7, 3, 4, 4)
    resized = resize_patches(kernel, side)
    assert resized.shape == (7, 3, side, side)
    patch = torch.randn(1, 3, 4, 4)
    if side < 4:  # what a smaller patch cannot show is lost: a plane stays a plane
        patch = torch.full_like(patch, 0.7)
    large = F.interpolate(patch, (side, side), mode="bicubic", antialias=True)
    wanted = F.conv2d(patch, kernel).flatten()
    found = F.conv2d(large, resized).flatten()
    if side > 4:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    else:  # the least-squares answer: no kernel of this size is nearer on patches drawn at random
        pixels = F.interpolate(torch.eye(16).view(-1, 1, 4, 4), (side, side), mode="bicubic", antialias=True).flatten(1)
        best = torch.linalg.lstsq(pixels.double(), kernel.double().flatten(2).flatten(0, 1).T).solution
        torch.testing.assert_close(resized.double().flatten(2).flatten(0, 1).T, best, rtol=1e-4, atol=1e-4)


def test_patches_of_another_size__are_loaded_resized_and_reported() -> None:
    state = random_state(SMALL)
    model = ViT(replace(SMALL, patch_size=8))
    report = load_backbone(model, state)
    assert [name for name, *_ in report.resized] == ["patch_embed.proj.weight"]
    wanted = resize_patches(state["patch_embed.proj.weight"], 8)
    assert torch.equal(model.patch_embed.proj.weight, wanted)


def test_the_presets_way_of_resizing_is_used() -> None:
    state = random_state(SMALL)
    config = replace(SMALL, pos_embed_grid=(2, 2), pos_embed_mode="bilinear", pos_embed_antialias=False)
    model = ViT(config)
    load_backbone(model, state)
    expected = resize_pos_embed(state["pos_embed"][:, 1:], (3, 3), (2, 2), "bilinear", False)
    assert torch.equal(model.pos_embed[:, 1:], expected)


def test_a_table_with_class_row_in_a_model_without_gives_the_same_features() -> None:
    """DINOv2 with registers and DeiT-3 keep no class row; adding it to the class token is exact."""
    state = random_state(SMALL)
    with_row, without = ViT(SMALL), ViT(replace(SMALL, pos_embed_prefix=False))
    load_backbone(with_row, state)
    report = load_backbone(without, state)
    assert report.unexpected == ()
    torch.testing.assert_close(features(without), features(with_row))


def test_a_table_without_class_row_in_a_model_with_one_gives_the_same_features() -> None:
    config = replace(SMALL, pos_embed_prefix=False)
    state = random_state(config)
    without, with_row = ViT(config), ViT(SMALL)
    load_backbone(without, state)
    load_backbone(with_row, state)
    assert torch.count_nonzero(with_row.pos_embed[:, 0]) == 0
    torch.testing.assert_close(features(with_row), features(without))


@pytest.mark.parametrize("grid", [(3, 3), (4, 4)])
def test_a_model_without_class_token_drops_it_and_its_row(grid: tuple[int, int]) -> None:
    state = random_state(SMALL)
    model = ViT(replace(SMALL, class_token=False, pos_embed_grid=grid))
    report = load_backbone(model, state)
    assert report.unexpected == ("cls_token", "pos_embed[:, :1]")
    assert torch.equal(model.pos_embed, resize_pos_embed(state["pos_embed"][:, 1:], (3, 3), grid))


def test_registers_have_no_part_in_the_table() -> None:
    state = random_state(RICH)
    model = ViT(replace(RICH, pos_embed_grid=(6, 2)))
    report = load_backbone(model, state)
    assert report.resized == (("pos_embed", (1, 9, 8), (1, 12, 8)),)
    assert torch.equal(model.reg_token, state["reg_token"])


def test_a_table_that_is_not_square_needs_its_grid() -> None:
    state = random_state(replace(SMALL, pos_embed_grid=(2, 6)))
    assert "pos_embed_grid" in refusal(SMALL, state)
    model = ViT(SMALL)
    load_backbone(model, state, pos_embed_grid=(2, 6))
    assert torch.equal(model.pos_embed[:, 1:], resize_pos_embed(state["pos_embed"][:, 1:], (2, 6), (3, 3)))


def test_a_given_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"12 rows, pos_embed_grid=\(2, 5\) needs 10"):
        load_backbone(ViT(SMALL), random_state(SMALL) | {"pos_embed": torch.ones(1, 12, 8)}, pos_embed_grid=(2, 5))


# Refusals


def test_shapes_that_do_not_fit_are_listed_with_both_shapes_and_a_count() -> None:
    message = refusal(SMALL, random_state(replace(SMALL, embed_dim=16)))
    assert "(16,) instead of (8,)" in message
    assert "cls_token (1, 1, 16) instead of (1, 1, 8)" in message
    assert message.count(" instead of ") == 5
    assert " more" in message


def test_missing_parts_are_listed() -> None:
    state = random_state(SMALL)
    del state["blocks.1.mlp.fc2.weight"]
    assert "lack blocks.1.mlp.fc2.weight" in refusal(SMALL, state)


def test_weights_of_a_shallower_model_are_refused() -> None:
    assert "blocks.1.norm1.weight" in refusal(SMALL, random_state(replace(SMALL, depth=1)))


@pytest.mark.parametrize(
    ("has", "cure"),
    [
        (replace(SMALL, class_token=False), "class_token=False"),
        (replace(SMALL, qkv_bias=False), "qkv_bias=False"),
    ],
)
def test_where_one_option_explains_what_is_missing_it_is_named(has: ViTConfig, cure: str) -> None:
    assert cure in refusal(SMALL, random_state(has))


def test_missing_registers_and_layer_scale_name_their_options() -> None:
    plain = random_state(replace(SMALL, pos_embed_prefix=False))
    assert "num_registers=0" in refusal(replace(RICH, layer_scale=None), plain)
    assert "layer_scale=None" in refusal(replace(RICH, num_registers=0), plain)


@pytest.mark.parametrize(
    "key", ["blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "patch_embed.norm.weight", "norm_pre.bias"]
)
def test_parts_that_the_backbone_would_leave_out_of_its_sums_are_refused(key: str) -> None:
    assert key in refusal(SMALL, random_state(SMALL) | {key: torch.ones(8)})


def test_weights_with_other_names_are_called_so() -> None:
    message = refusal(SMALL, {"embeddings.cls_token": torch.ones(1, 1, 8), "encoder.layer.0.bias": torch.ones(8)})
    assert "none of the names" in message
    assert "embeddings.cls_token" in message


# What may differ


def test_a_final_norm_the_weights_lack_keeps_its_start_values_and_is_reported() -> None:
    report = load_backbone(ViT(SMALL), random_state(replace(SMALL, final_norm=False)))
    assert report.missing == ("norm.weight", "norm.bias")
    assert "left at start values: norm.weight, norm.bias" in report.summary()


def test_a_shallower_model_takes_the_first_blocks() -> None:
    state = random_state(SMALL)
    model = ViT(replace(SMALL, depth=1))
    report = load_backbone(model, state)
    assert all(key.startswith("blocks.1.") for key in report.unexpected)
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])


# A real file


@pytest.mark.parametrize(
    ("changes", "loaded", "unexpected"),
    [
        ({}, 150, set()),
        ({"class_token": False}, 149, {"cls_token", "pos_embed[:, :1]"}),
        ({"pos_embed_grid": (30, 23)}, 150, set()),
    ],
)
def test_the_real_vit_tiny_loads(
    vit_tiny_weights: Path, changes: dict[str, object], loaded: int, unexpected: set[str]
) -> None:
    model = ViT(vit_config("vit_tiny_patch16", **changes))
    report = load_backbone(model, read_state_dict(vit_tiny_weights))
    assert report.loaded == loaded
    assert report.missing == ()
    assert set(report.unexpected) - set(report.classifier) == unexpected
    assert set(report.classifier) == {"head.weight", "head.bias"}
    assert features(model, (64, 48)).isfinite().all()
