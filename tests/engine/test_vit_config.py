import re
from dataclasses import replace

import pytest
import torch

from tests.helpers import tiny_config
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import PRESETS, vit_config
from tokenexit.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets__build_and_name_their_patch_size(name):
    config = PRESETS[name]
    assert re.fullmatch(rf"(?:.+_patch|dinov3_vit(?:s|b|l|h|7b)){config.patch_size}(?:_reg4|plus)?", name)
    with torch.device("meta"):
        ViT(config)


@pytest.mark.parametrize(
    ("name", "millions", "hidden"),
    [
        ("dinov3_vits16", 21.6, 1536),
        ("dinov3_vits16plus", 28.7, 1536),
        ("dinov3_vitb16", 85.7, 3072),
        ("dinov3_vitl16", 303.1, 4096),
        ("dinov3_vith16plus", 840.6, 5120),
        ("dinov3_vit7b16", 6716.0, 8192),
    ],
)
def test_presets__dinov3_has_the_published_size(name, millions, hidden):
    with torch.device("meta"):
        vit = ViT(PRESETS[name])
    assert vit.blocks[0].mlp.fc2.in_features == hidden
    parameters = sum(value.numel() for value in vit.parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=2e-3)
    assert vit.pos_embed is None


def test_presets__giant_has_the_gated_width_of_dinov2():
    assert PRESETS["dinov2_giant_patch14"].mlp_hidden == 8192


def test_vit_config__changes_fields_of_a_preset():
    config = vit_config("vit_tiny_patch16", class_token=False)
    assert config == replace(PRESETS["vit_tiny_patch16"], class_token=False)
    assert config.num_prefix_tokens == 0


def test_vit_config__survives_its_own_dict():
    config = tiny_config(num_registers=2, layer_scale=0.1)
    assert type(config)(**config.to_dict()) == config


def test_vit_config__unknown_backbone_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"backbone 'resnet' is unknown: choose one of vit_tiny_patch16, "):
        vit_config("resnet")


def test_vit_config__unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"no option 'colour': see ViTConfig"):
        vit_config("vit_tiny_patch16", colour="red")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 0}, r"embed_dim must be a whole number from 1 to 8192, got 0"),
        ({"depth": -1}, r"depth must be a whole number from 1 to 128, got -1"),
        ({"num_heads": 0}, r"num_heads must be a whole number from 1 to 512, got 0"),
        ({"patch_size": 0}, r"patch_size must be a whole number from 1 to 256, got 0"),
        ({"embed_dim": 32, "num_heads": 3}, r"embed_dim must be a multiple of num_heads=3, got 32"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be a number from 0 to 1, got -0.1"),
        ({"sub_norm": True}, r"sub_norm stands behind a gate, and mlp is 'gelu': set mlp to swiglu"),
        (
            {"rope": "half", "rope_offset": 1.0},
            r"rope_offset=1.0 moves patches of a reference grid: set rope_reference",
        ),
        ({"mlp": "relu"}, r"mlp must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
        ({"pos_embed_mode": "nearest"}, r"pos_embed_mode must be one of bicubic, bilinear, got 'nearest'"),
        ({"num_registers": -1}, r"num_registers must be a whole number from 0 to 1024, got -1"),
        (
            {"pos_embed_grid": (0, 3)},
            r"pos_embed_grid must be a list of 2, each a whole .* from 1 to 1024, got \(0, 3\)",
        ),
        ({"norm_eps": -1.0}, r"norm_eps must be a number from 0 to 1, got -1.0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio must be above 0, got 0.0"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio=0.01 leaves an MLP of 0 channels"),
        ({"layer_scale": "x"}, r"layer_scale must be a number or None, got 'x'"),
        ({"layer_scale": float("nan")}, r"layer_scale must be a number or None, got nan"),
        ({"num_heads": 4.0}, r"num_heads must be a whole number from 1 to 512, got 4.0"),
        ({"depth": True}, r"depth must be a whole number from 1 to 128, got True"),
        ({"depth": 100_000}, r"depth must be a whole number from 1 to 128, got 100000"),
        ({"embed_dim": 40_000}, r"embed_dim must be a whole number from 1 to 8192, got 40000"),
        ({"patch_size": 2**31}, r"patch_size must be .* got 2147483648"),
        ({"depth": 10**5000}, r"depth must be .* got a number of more than 30 digits"),
        ({"pos_embed_grid": 14}, r"pos_embed_grid must be a list of 2"),
        ({"qkv_bias": 1}, r"qkv_bias must be true or false, got 1"),
    ],
)
def test_vit_config__impossible_values_are_refused_by_name_and_value(changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(**changes)
