"""EVA-02, the Perception Encoder and SigLIP 2 of timm, and EVA-02 under its release's names, block by block."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity import test_timm
from tests.parity.test_dinov3 import EXITS, compare, converted, sharpen, timm_reference
from tokenexit.conversion.wrap import wrap
from tokenexit.engine.vit import ViT

pytestmark = pytest.mark.library("timm", "torchvision")

MADE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 0,
    "dynamic_img_size": True,
    "use_rot_pos_emb": True,
}
EVA02: dict[str, Any] = {"mlp_ratio": 8 / 3, "swiglu_mlp": True, "ref_feat_shape": (16, 16)}
PE: dict[str, Any] = {
    "attn_type": "rope",
    "use_pre_transformer_norm": True,
    "ref_feat_shape": (8, 8),
    "rope_grid_offset": 1.0,
    "rope_grid_indexing": "xy",
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02_small": ("eva02_timm", EVA02),
    "eva02_large": ("eva02_timm", EVA02 | {"qkv_fused": False, "scale_mlp": True}),
    "eva02_clip": (
        "eva02_timm",
        EVA02 | {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
    ),
    "pe_spatial": ("pe_spatial", PE | {"use_post_transformer_norm": False, "use_fc_norm": False}),
    "pe_spatial_gigantic": (
        "pe_spatial",
        PE
        | {"use_post_transformer_norm": False, "use_fc_norm": False, "init_values": 0.1}
        | {"class_token": False, "rope_grid_offset": 0.0},
    ),
    "pe_core": ("pe_core", PE | {"global_pool": "map", "attn_pool_num_heads": 4}),
}
NO_TRACE = {"rope": "interleaved", "rope_theta": 10000.0}


def library_model(family: str) -> Any:
    from timm.models.eva import Eva

    model = Eva(**MADE, **FAMILIES[family][1]).eval()
    sharpen(model)
    return model


def siglip() -> Any:
    import timm

    shrunk = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 4, "mlp_ratio": 2.0}
    model = timm.create_model("vit_so400m_patch16_siglip_256", dynamic_img_size=True, **shrunk).eval()
    sharpen(model)
    return model


@EXITS
@pytest.mark.parametrize("family", FAMILIES)
def test_timm__every_block_gives_the_librarys_features_at_two_sizes(family, exits, tmp_path, record_property):
    model = library_model(family)
    ours, report = converted(model.state_dict(), tmp_path)
    assert report.kind == FAMILIES[family][0]
    assert report.assumed.items() >= NO_TRACE.items()
    assert report.assumed["rope_reference"] == (16.0 if family.startswith("eva02") else 8.0)
    config = report.backbone
    assert config.sub_norm == (family in ("eva02_large", "eva02_clip"))
    assert config.attn_norm == (family == "eva02_clip")
    assert config.norm_pre == config.rope_column_first == family.startswith("pe")
    assert config.final_norm == (family in ("eva02_clip", "pe_core"))
    assert all("unknown" not in reason for _, reason in report.unused)
    compare(ours, timm_reference(model), exits, record_property)


@EXITS
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("eva02")])
def test_release__its_own_names_give_what_timm_makes_of_them(family, exits, tmp_path, record_property):
    model = library_model(family)
    ours, report = converted(own_names(model.state_dict()), tmp_path)
    assert report.kind == "eva02"
    assert all("unknown" not in reason for _, reason in report.unused)
    assert "rope.freqs_cos" in dict(report.unused)
    compare(ours, timm_reference(model), exits, record_property)


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the release."""
    separate = "blocks.0.attn.q_proj.weight" in state
    swaps = {r"mlp\.fc1_g": "mlp.w1", r"mlp\.fc1_x": "mlp.w2", r"mlp\.norm": "mlp.ffn_ln", r"mlp\.fc2": "mlp.w3"}
    swaps |= {r"mlp\.fc1\.": "mlp.w12.", r"attn\.norm": "attn.inner_attn_ln"}
    swaps |= {r"attn\.([qv])_proj\.bias": r"attn.\1_bias"} if separate else {}
    released = {"rope.freqs_cos": torch.ones(4, 4), "blocks.0.attn.rope.freqs_sin": torch.ones(4, 4)}
    for key, value in state.items():
        for theirs, own in swaps.items():
            key = re.sub(theirs, own, key)
        released[key] = value.clone()
    return released


@pytest.mark.parametrize("family", FAMILIES)
def test_wrap__a_module_is_read_with_its_own_settings(family):
    model = library_model(family)
    config = wrap(model, num_classes=5).config.backbone
    assert config.num_heads == 3
    assert config.rope_reference == FAMILIES[family][1]["ref_feat_shape"][0]
    assert config.rope_offset == FAMILIES[family][1].get("rope_grid_offset", 0.0)


def test_wrap__a_reference_that_weights_alone_would_not_tell_is_read():
    from timm.models.eva import Eva

    model = Eva(**MADE, **(EVA02 | {"ref_feat_shape": (7, 7), "rope_temperature": 50.0})).eval()
    sharpen(model)
    config = wrap(model, num_classes=5).config.backbone
    assert (config.rope_reference, config.rope_theta) == (7.0, 50.0)


@EXITS
def test_siglip__every_block_gives_the_librarys_features_at_two_sizes(exits, tmp_path, record_property):
    model = siglip()
    ours, report = converted(model.state_dict(), tmp_path)
    assert report.kind == "siglip"
    assert report.assumed["mlp"] == "gelu"  # the width and the patch of so400m have the approximation
    approximate = converted_as("gelu_tanh", model, tmp_path)
    assert (ours.config.class_token, ours.config.num_prefix_tokens) == (False, 0)
    compare(approximate, test_timm.reference(model), exits, record_property)
    assert wrap(model, num_classes=5).config.backbone.mlp == "gelu_tanh"


def converted_as(mlp: str, model: Any, folder: Path) -> ViT:
    from tests.parity.test_dinov3 import loaded
    from tokenexit.conversion.convert import convert

    options = {"num_heads": 3, "mlp": mlp}
    return loaded(convert(folder / "theirs.safetensors", folder / "tanh.safetensors", options=options))[0]


PUBLISHED = {
    "eva02_tiny_patch14_224": "eva02_tiny_patch14",
    "eva02_small_patch14_224": "eva02_small_patch14",
    "eva02_base_patch14_224": "eva02_base_patch14",
    "eva02_large_patch14_224": "eva02_large_patch14",
    "vit_pe_spatial_tiny_patch16_512": "pe_spatial_tiny_patch16",
    "vit_pe_spatial_small_patch16_512": "pe_spatial_small_patch16",
    "vit_pe_spatial_base_patch16_512": "pe_spatial_base_patch16",
    "vit_pe_spatial_large_patch14_448": "pe_spatial_large_patch14",
    "vit_pe_core_base_patch16_224": "pe_core_base_patch16",
    "vit_pe_core_large_patch14_336": "pe_core_large_patch14",
    "vit_so400m_patch16_siglip_256": "siglip2_so400m_patch16",
    "vit_small_patch16_dinov3_qkvb": "dinov3_vits16",
    "vit_small_plus_patch16_dinov3_qkvb": "dinov3_vits16plus",
    "vit_base_patch16_dinov3_qkvb": "dinov3_vitb16",
    "vit_huge_plus_patch16_dinov3_qkvb": "dinov3_vith16plus",
    "vit_7b_patch16_dinov3": "dinov3_vit7b16",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset__is_what_the_weights_of_its_name_in_timm_are_read_as(name):
    """On tensors without memory: shapes and names alone."""
    import timm

    from tokenexit.conversion.families import SOURCES, detect
    from tokenexit.conversion.infer import backbone_config, preset_of
    from tokenexit.conversion.rename import under

    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    kind = detect(state)
    assert kind is not None
    renamed = SOURCES[kind].rename(state)
    settings = SOURCES[kind].settings(without_values(renamed))
    config, _ = backbone_config(under(renamed, "backbone."), settings)
    assert preset_of(config) == PUBLISHED[name]
    with torch.device("meta"):
        ours = ViT(config).state_dict()
    assert {key: value.shape for key, value in under(renamed, "backbone.").items() if key in ours} == {
        key: value.shape for key, value in ours.items()
    }


def without_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The biases of keys are read by value: zeros stand for them."""
    return {key: torch.zeros(value.shape) if key.endswith("qkv.bias") else value for key, value in state.items()}
