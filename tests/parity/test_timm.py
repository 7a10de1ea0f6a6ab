"""timm's ViTs, and DINOv2's own names read through timm, give the features of our backbone in every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.compare import TOLERANCE, Reference, largest_distance, randomise
from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.checkpoints.load import resize_patches
from tokenexit.conversion.convert import ConversionReport, convert
from tokenexit.engine.vit import ViT

pytestmark = pytest.mark.library("timm", "torchvision")

SHRUNK: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 4, "dynamic_img_size": True}
HEADS = {"num_heads": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64}),
    "vit_average_pooled": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}),  # as MAE is fine-tuned
    "vit_patch8": ("vit_small_patch8_224", {"img_size": 32}),  # as DINO
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 64}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2_giant": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "dinov2_giant_reg4": ("vit_giant_patch14_reg4_dinov2", {"img_size": 56}),
}


def library_model(name: str, **changes: Any) -> Any:
    import timm

    model = timm.create_model(name, **{**SHRUNK, **changes}).eval()
    randomise(model)
    return model


def reference(model: Any) -> Reference:
    def embed(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def step(block: Any) -> Any:
        return lambda x, mask: block(x, attn_mask=mask)

    return Reference(embed, [step(block) for block in model.blocks], model.norm)


def converted(state: dict[str, Tensor], folder: Path, **options: Any) -> tuple[ViT, ConversionReport]:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "theirs.safetensors")
    report = convert(folder / "theirs.safetensors", folder / "ours.safetensors", options=HEADS | options)
    model = ViT(report.backbone).eval()
    loaded = load_backbone(model, read_state_dict(folder / "ours.safetensors"))
    assert not loaded.missing
    assert not loaded.unexpected
    assert not loaded.resized
    return model, report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exits", [(), (1, 2)], ids=["full", "exits"])
def test_timm__every_block_gives_the_librarys_features_at_two_sizes(family, exits, tmp_path, record_property):
    name, changes = FAMILIES[family]
    model = library_model(name, **changes)
    ours, report = converted(model.state_dict(), tmp_path)
    assert report.kind == "timm"
    side = model.patch_embed.patch_size[0]
    for size in ((4 * side, 4 * side), (6 * side, 5 * side)):
        found = largest_distance(ours, reference(model), size, exits)
        record_property(f"{family} {size}", found)
        assert found <= TOLERANCE, f"{found:.1e} at {size}"


@pytest.mark.parametrize("side", [16, 12, 32])
def test_patches_of_another_size__are_resized_as_timm_does(side):
    from timm.layers import resample_patch_embed

    torch.manual_seed(0)
    kernel = torch.randn(8, 3, 14, 14)
    torch.testing.assert_close(resize_patches(kernel, side), resample_patch_embed(kernel, [side, side]))


@pytest.mark.parametrize("family", ["dinov2", "dinov2_reg4", "dinov2_giant", "dinov2_giant_reg4"])
def test_dinov2__its_own_names_give_what_timm_makes_of_them(family, tmp_path):
    from timm.models.vision_transformer import checkpoint_filter_fn

    name, changes = FAMILIES[family]
    model = library_model(name, **changes)
    released = own_names(model.state_dict())
    model.load_state_dict(checkpoint_filter_fn(dict(released), model))
    # timm resizes tables with antialiasing, DINOv2 itself without where it has no registers.
    ours, report = converted(released, tmp_path, pos_embed_antialias=True, pos_embed_offset=0.0)
    assert report.kind == "dinov2"
    assert dict(report.unused) == {"mask_token": "used in pre-training alone"}
    for size in ((56, 56), (84, 70)):
        assert largest_distance(ours, reference(model), size, (1, 2)) <= TOLERANCE


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of DINOv2's release, with a class row in front of every position table."""
    released = {"mask_token": torch.randn(1, state["cls_token"].shape[-1])}
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    for key, value in state.items():
        if gated:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        released["register_tokens" if key == "reg_token" else key] = value.clone()
    if "register_tokens" in released:
        table = released["pos_embed"]
        released["pos_embed"] = torch.cat([torch.randn_like(table[:, :1]), table], dim=1)
    return released


def test_timm__a_tables_resizing_in_dinov2s_own_way_differs_and_is_what_its_names_bring(tmp_path):
    model = library_model(*FAMILIES["dinov2"][:1], **FAMILIES["dinov2"][1])
    _, report = converted(own_names(model.state_dict()), tmp_path)
    assert (report.backbone.pos_embed_antialias, report.backbone.pos_embed_offset) == (False, 0.1)
