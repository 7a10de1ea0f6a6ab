"""EVA-02 and the Perception Encoder are read by the names of release and timm, and what is assumed is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversion.test_convert import save
from tests.helpers import enliven, random_image
from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.conversion.convert import convert
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import CheckpointError

EVA02 = ViTConfig(
    embed_dim=128,
    depth=2,
    num_heads=2,
    patch_size=4,
    mlp="swiglu",
    mlp_ratio=1.0,
    k_bias=False,
    final_norm=False,
    rope="interleaved",
    rope_theta=1e4,
    rope_reference=16.0,
    pos_embed_grid=(4, 4),
)
LARGE = replace(EVA02, sub_norm=True)
CLIP = replace(LARGE, attn_norm=True, final_norm=True)
PE = ViTConfig(
    embed_dim=128,
    depth=2,
    num_heads=2,
    patch_size=4,
    mlp_ratio=1.0,
    norm_pre=True,
    norm_eps=1e-5,
    rope="interleaved",
    rope_theta=1e4,
    rope_reference=4.0,
    rope_offset=1.0,
    rope_column_first=True,
    pos_embed_grid=(4, 4),
)


def lively(config: ViTConfig) -> ViT:
    torch.manual_seed(0)
    model = ViT(config).eval()
    enliven(model)
    return model


def theirs(model: ViT, release: bool) -> dict[str, Tensor]:
    """The names of EVA-02's release or of timm: large models keep queries, keys, values and both gates apart."""
    apart = model.config.sub_norm
    ends = {"norm": "ffn_ln", "fc1": "w12", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"} if release else {}
    out: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        front, _, leaf = key.rpartition(".")
        if ".mlp." in key:
            block, _, layer = front.rpartition(".")
            parts = (
                {"fc1_g": value.chunk(2)[0], "fc1_x": value.chunk(2)[1]} if apart and layer == "fc1" else {layer: value}
            )
            out |= {f"{block}.{ends.get(name, name)}.{leaf}": part for name, part in parts.items()}
        elif front.endswith("attn.qkv") and leaf == "bias":
            attn, (q, _, v) = front.removesuffix(".qkv"), value.chunk(3)
            timm_apart = apart and not release
            out |= {f"{attn}.{n}_proj.bias" if timm_apart else f"{attn}.{n}_bias": b for n, b in (("q", q), ("v", v))}
        elif front.endswith("attn.qkv") and apart:
            attn = front.removesuffix(".qkv")
            out |= {f"{attn}.{name}_proj.weight": part for name, part in zip("qkv", value.chunk(3))}
        elif front.endswith("attn.norm") and release:
            out[f"{front.removesuffix('norm')}inner_attn_ln.{leaf}"] = value
        else:
            out[key] = value
    return out


def assert_same(model: ViT, path: Path, config: ViTConfig) -> None:
    assert config == model.config
    again = ViT(config).eval()
    load_backbone(again, read_state_dict(path))
    for size in ((16, 16), (9, 23)):
        with torch.no_grad():
            first, second = (m.run(m.embed([random_image(*size)]), 0, 2).x for m in (model, again))
        assert torch.equal(first, second)


@pytest.mark.parametrize("front", ["", "backbone.", "visual."])
@pytest.mark.parametrize("release", [True, False], ids=["release", "timm"])
@pytest.mark.parametrize("config", [EVA02, LARGE, CLIP], ids=["small", "large", "clip"])
def test_eva02__is_read_and_what_leaves_no_trace_is_said(config, release, front, tmp_path):
    model = lively(config)
    state = {front + key: value for key, value in theirs(model, release).items()}
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert report.kind == ("eva02" if release else "eva02_timm")
    assert report.unused == ()
    for said in ("num_heads=2", "rope=interleaved", "rope_theta=10000.0", "rope_reference=16.0"):
        assert said in report.summary()
    assert_same(model, report.destination, report.backbone)


def test_eva02__what_the_user_says_is_not_assumed(tmp_path):
    model = lively(replace(EVA02, rope_reference=7.0))
    options = {"rope_reference": 7.0, "num_heads": 2}
    report = convert(save(theirs(model, True), tmp_path), tmp_path / "ours.safetensors", options=options)
    assert report.assumed == {"rope": "interleaved", "rope_theta": 10000.0}
    assert_same(model, report.destination, report.backbone)


def test_eva02__pretrained_and_segmenting_files_leave_out_what_has_no_place(tmp_path):
    model = lively(EVA02)
    more = {"mask_token": torch.zeros(1, 128), "norm.weight": torch.ones(128), "norm.bias": torch.ones(128)}
    more |= {"lm_head.weight": torch.ones(3, 128), "fc_norm.weight": torch.ones(128), "fpn1.0.weight": torch.ones(2)}
    more |= {"rope.freqs_cos": torch.ones(4), "blocks.1.attn.rope.freqs_sin": torch.ones(4)}
    report = convert(save(theirs(model, True) | more, tmp_path), tmp_path / "ours.safetensors")
    assert len(report.unused) == len(more)
    assert all("unknown" not in reason for _, reason in report.unused)
    assert_same(model, report.destination, report.backbone)


@pytest.mark.parametrize("front", ["", "backbone."])
def test_eva02__the_norm_of_pooled_patches_is_a_last_norm_where_that_is_asked_for(front, tmp_path):
    model = lively(replace(EVA02, final_norm=True))
    state = theirs(model, True)
    state |= {f"fc_norm.{leaf}": state.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    source = save({front + key: value for key, value in state.items()}, tmp_path)
    report = convert(source, tmp_path / "ours.safetensors", options={"final_norm": True})
    assert report.unused == ()
    assert torch.equal(read_state_dict(report.destination)["norm.weight"], model.norm.weight)
    assert not convert(source, tmp_path / "ours.safetensors").backbone.final_norm


@pytest.mark.parametrize(("core", "class_token"), [(True, True), (False, True), (False, False)])
def test_perception__is_read_and_what_leaves_no_trace_is_said(core, class_token, tmp_path):
    changes: dict[str, Any] = (
        {} if class_token else {"class_token": False, "pos_embed_prefix": False, "rope_offset": 0.0}
    )
    model = lively(replace(PE, final_norm=core, **changes))
    state = model.state_dict() | ({"attn_pool.latent": torch.ones(1, 1, 128)} if core else {})
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert report.kind == ("pe_core" if core else "pe_spatial")
    assert report.assumed["rope_reference"] == 4.0
    assert report.assumed["rope_offset"] == float(class_token)
    assert_same(model, report.destination, report.backbone)


def refusal(state: dict[str, Tensor], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(save(state, folder), folder / "ours.safetensors")
    assert not (folder / "ours.safetensors").exists()
    return str(caught.value)


def test_refused__an_eva_without_gates_and_the_tower_of_clip(tmp_path):
    ungated = theirs(lively(replace(EVA02, mlp="gelu")), False)
    assert "of another generation than EVA-02" in refusal(ungated, tmp_path)
    assert "is CLIP's, whose activation no name tells" in refusal(lively(PE).state_dict(), tmp_path)
