"""Any trained plain-ViT segmenter is opened by one call, and everything else refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conversion import foreign
from tests.conversion.foreign import part, under
from tests.conversion.test_convert import MMSEG, build, kinds, save
from tests.heads.own_heads import Plain
from tests.heads.test_module import own_segmenter
from tests.helpers import random_image, tiny_segmenter
from tokenexit.conversion import open_source
from tokenexit.conversion.convert import convert
from tokenexit.errors import CheckpointError, ConfigError, TokenExitError
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.segmenter import ExitSegmenter

IMAGES = [random_image(16, 20), random_image(9, 12)]


def same(a: ExitSegmenter, b: ExitSegmenter) -> bool:
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(a(IMAGES).grid_logits, b(IMAGES).grid_logits))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(TokenExitError) as caught:
        open_source(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_open_source__a_model_is_opened_as_it_is() -> None:
    model = tiny_segmenter("fcn")
    assert open_source(model) is model
    assert not open_source(model.train()).training


def test_open_source__a_saved_model_is_loaded(tmp_path: Path) -> None:
    model = tiny_segmenter("fcn")
    model.records = {"training.json": {"step": 3}, "evaluation.json": {"about": {}}}
    model.save_pretrained(tmp_path)
    opened = open_source(tmp_path)
    assert opened.fingerprint() == model.fingerprint()
    assert opened.records == model.records
    assert open_source(str(tmp_path), exits=()).records == {"training.json": {"step": 3}}


@pytest.mark.parametrize("name", ["Plain", None])
def test_open_source__exits_may_be_left_out_and_weights_are_those_of_the_source(name: str | None) -> None:
    model = tiny_segmenter("fcn") if name is None else own_segmenter(name)
    opened = open_source(model, exits=())
    assert (opened.config.exits, len(opened.exit_heads)) == ((), 0)
    assert model.config.exits == (1, 3)
    assert opened.backbone is model.backbone
    assert same(opened, model)
    assert open_source(opened, exits=()) is opened


def test_open_source__another_preprocessing_leaves_the_source_alone() -> None:
    model, given = tiny_segmenter("fcn"), Preprocessing(resize=64)
    opened = open_source(model, preprocessing=given)
    assert opened.preprocessing == given
    assert model.preprocessing != given
    assert opened.fingerprint() == model.fingerprint()
    assert same(opened, model)


def test_open_source__a_head_of_the_users_own_is_named(tmp_path: Path) -> None:
    model = own_segmenter("Plain")
    model.save_pretrained(tmp_path)
    assert same(open_source(tmp_path, head=Plain), model)
    assert "nothing is imported unasked" in refusal(tmp_path)


@pytest.mark.parametrize("decode", ["linear", "setr_pup", "mask_transformer", "atm"])
def test_open_source__a_checkpoint_that_convert_reads_is_what_convert_writes(decode: str, tmp_path: Path) -> None:
    model = build(MMSEG, decode, "fcn")
    path = save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path)
    options: dict[str, Any] = {"exits": (1,)}
    convert(path, tmp_path / "model", **options)
    opened, written = open_source(path, **options), ExitSegmenter.from_pretrained(tmp_path / "model")
    assert not opened.training
    assert opened.config == written.config
    assert opened.preprocessing == written.preprocessing
    assert opened.fingerprint() == written.fingerprint()
    alone = open_source(path, **options | {"exits": ()})
    assert alone.config.exits == ()
    assert same(alone, written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "theirs.safetensors"], "nothing else is written"


def test_open_source__a_folder_of_another_library_is_told_from_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 2}))
    state = build(MMSEG, "linear").state_dict()
    save(foreign.huggingface(part(state, "backbone.")), tmp_path, "model.safetensors")
    assert "hold a backbone alone: give a segmenter with its decode head" in refusal(tmp_path)


def test_open_source__of_the_hub_ours_and_others_are_told_apart(tmp_path: Path, monkeypatch: Any) -> None:
    from tokenexit.conversion import opening

    model, asked = tiny_segmenter("fcn"), []
    model.save_pretrained(tmp_path / "ours")
    save(foreign.mmseg(build(MMSEG, "linear").state_dict(), {"decode_head": "linear"}), tmp_path)

    def fetched(source: str) -> Path:
        asked.append(source)
        if source == "hf-hub:me/ours/config.json":
            return tmp_path / "ours" / "config.json"
        if source == "hf-hub:you/theirs":
            return tmp_path / "theirs.safetensors"
        raise CheckpointError("no such file.")

    monkeypatch.setattr(opening, "resolve_weights", fetched)
    monkeypatch.setattr("tokenexit.conversion.convert.resolve_weights", fetched)
    monkeypatch.setattr("tokenexit.pretrained.resolve_folder", lambda path, patterns: tmp_path / "ours")
    assert open_source("hf-hub:me/ours").fingerprint() == model.fingerprint()
    assert open_source("hf-hub:you/theirs").config.decode_head == {"kind": "linear"}
    assert asked[0] == "hf-hub:me/ours/config.json"


# ----------------------------------------------------------------------------------------------------------- refusals

W = torch.zeros(2, 2)
OTHERS: dict[str, tuple[str, str]] = {
    "swin of timm": (
        "a Swin Transformer",
        "patch_embed.proj.weight "
        "layers.0.blocks.0.attn.qkv.weight "
        "layers.0.blocks.0.attn.relative_position_bias_table "
        "layers.1.downsample.reduction.weight",
    ),
    "swin of transformers": (
        "a Swin Transformer",
        "swin.embeddings.patch_embeddings.projection.weight "
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table "
        "decode_head.conv_seg.weight",
    ),
    "swin of mmsegmentation": (
        "a Swin Transformer",
        "backbone.patch_embed.projection.weight "
        "decode_head.conv_seg.weight "
        "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table",
    ),
    "segformer of transformers": (
        "a SegFormer",
        "segformer.encoder.patch_embeddings.0.proj.weight "
        "decode_head.classifier.weight "
        "segformer.encoder.block.0.0.attention.self.sr.weight",
    ),
    "segformer of mmsegmentation": (
        "a SegFormer",
        "backbone.layers.0.0.projection.weight "
        "backbone.layers.0.1.0.attn.sr.weight "
        "backbone.layers.0.1.0.attn.attn.in_proj_weight "
        "decode_head.conv_seg.weight",
    ),
    "segformer of its release": ("a SegFormer", "patch_embed1.proj.weight block1.0.attn.sr.weight"),
    "u-net": ("a U-Net", "inc.double_conv.0.weight down1.maxpool_conv.1.double_conv.0.weight up1.conv.0.weight"),
    "u-net of a package": ("a U-Net", "encoder.layer1.0.conv1.weight decoder.blocks.0.conv1.0.weight"),
    "u-net, another": ("a U-Net", "encoder1.enc1conv1.weight decoder1.dec1conv1.weight upconv1.weight"),
    "convnext": ("a ConvNeXt", "stem.0.weight stages.0.blocks.0.conv_dw.weight"),
    "resnet": ("a ResNet", "backbone.conv1.weight backbone.layer1.0.conv1.weight classifier.0.weight"),
    "beit": ("relative positions", "patch_embed.proj.weight blocks.0.attn.relative_position_bias_table"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_open_source__another_architecture_is_named_and_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    title, names = OTHERS[name]
    path = save({key: W.clone() for key in names.split()}, tmp_path)
    message = refusal(path)
    assert title in message
    assert "tokens can leave plain ViTs alone" in message
    with pytest.raises(CheckpointError, match=r"tokens can leave plain ViTs alone"):
        convert(path, tmp_path / "out")


def test_open_source__a_backbone_alone_is_refused(tmp_path: Path) -> None:
    state = part(build(MMSEG, "linear").state_dict(), "backbone.") | under("head.", {"weight": torch.zeros(3, 128)})
    assert "hold a backbone alone: give a segmenter with its decode head." in refusal(save(state, tmp_path))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (nn.Conv2d(3, 5, 1), {}, "a Conv2d is no source by itself: give tokenexit.wrap"),
        (3, {}, "a int is no source"),
        ("no/such/file.pth", {}, "no/such/file.pth"),
        (tiny_segmenter("fcn"), {"kind": "timm"}, "kind is for weights of other libraries"),
        (tiny_segmenter("fcn"), {"exits": (1,)}, "exits is for weights of other libraries"),
        (tiny_segmenter("fcn"), {"head": Plain}, "head is for a model that is loaded"),
    ],
)
def test_open_source__what_is_no_source_is_refused(source: Any, options: dict[str, Any], message: str) -> None:
    assert message in refusal(source, **options)


def test_open_source__a_head_for_weights_of_others_is_refused(tmp_path: Path) -> None:
    path = save(foreign.mmseg(build(MMSEG, "linear").state_dict(), {"decode_head": "linear"}), tmp_path)
    with pytest.raises(ConfigError, match="head is for models saved by tokenexit"):
        open_source(path, head=Plain)
