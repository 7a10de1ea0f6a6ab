"""Weights of other code bases become models that answer as the originals do, and what finds no place is named."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion import foreign
from tests.conversion.foreign import State, part, under
from tests.helpers import assert_close, enliven, random_image
from tokenexit.checkpoints import load_backbone
from tokenexit.conversion.convert import ConversionReport, convert
from tokenexit.conversion.families import HALF, IMAGENET
from tokenexit.conversion.opening import open_source
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig, vit_config
from tokenexit.errors import CheckpointError, ConfigError, TokenExitError
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import DoViT, DToP
from tokenexit.segmenter import ExitSegmenter

CLASSES = 5
BODY = ViTConfig(embed_dim=128, depth=4, num_heads=2, patch_size=4, mlp_ratio=2.0, pos_embed_grid=(3, 3))
MMSEG = replace(BODY, pos_embed_antialias=False)
SETR_BODY = replace(MMSEG, pos_embed_mode="bilinear", final_norm=False)
DEEP: dict[str, Any] = {"embed_dim": 64, "num_heads": 1, "mlp_ratio": 1.0}
"""For models of many blocks."""

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "dinov2_linear": {"kind": "dinov2_linear"},
    "fcn": {"kind": "fcn", "channels": 24},
    "setr_naive": {"kind": "setr_naive", "channels": 24},
    "setr_pup": {"kind": "setr_pup", "channels": 8, "steps": 4, "kernel": 3, "up": 2},
    "setr_two": {"kind": "setr_pup", "channels": 8, "steps": 2, "kernel": 1, "up": 4},
    "setr_aux": {"kind": "setr_pup", "channels": 8, "steps": 1, "kernel": 3, "up": 4},
    "mask_transformer": {"kind": "mask_transformer", "channels": 64, "layers": 2, "num_heads": 1},
    "atm": {"kind": "atm", "channels": 64, "layers": 2, "num_heads": 1},
}


def build(config: ViTConfig, decode: str, *exit_heads: str, exits: tuple[int, ...] = ()) -> ExitSegmenter:
    specs = [HEADS[name] for name in exit_heads]
    exits = exits or tuple(range(1, len(specs) + 1))
    model = ExitSegmenter(config, CLASSES, exits, specs, HEADS[decode])
    enliven(model)
    return model.eval()


def kinds(model: ExitSegmenter) -> dict[str, str]:
    named = {f"exit_heads.{n}": spec["kind"] for n, spec in enumerate(model.config.exit_heads)}
    return {**named, "decode_head": model.config.decode_head["kind"]}


def save(state: State, folder: Path, name: str = "theirs.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return folder / name


def assert_same(model: ExitSegmenter, report: ConversionReport, *methods: Any) -> None:
    """The converted model is the original: same architecture, same answers, with every method."""
    converted = ExitSegmenter.from_pretrained(report.destination)
    config = replace(converted.config.backbone, layer_scale=model.config.backbone.layer_scale)
    assert config == model.config.backbone
    assert converted.config.exits == model.config.exits
    images = [random_image(12, 12), random_image(17, 22)]
    with torch.no_grad():
        for method in (None, *methods):
            theirs, ours = model(images, method), converted(images, method)
            assert all(torch.equal(a, b) for a, b in zip(theirs.grid_logits, ours.grid_logits))


# mmsegmentation


@pytest.mark.parametrize("decode", ["setr_naive", "setr_pup", "setr_two"])
def test_setr_of_mmsegmentation__with_auxiliary_heads_as_exits(decode, tmp_path):
    model = build(SETR_BODY, decode, "setr_naive", "setr_two", "setr_aux")
    report = convert(
        save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path), tmp_path / "ours", exits=(1, 2, 3)
    )
    assert report.kind == "mmseg"
    assert report.unused == ()
    assert report.decode_head == HEADS[decode]
    assert report.num_classes == CLASSES
    assert_same(model, report, DoViT(threshold=0.6))


def test_setr_of_mmsegmentation__its_auxiliary_heads_stand_where_the_published_configurations_have_them(tmp_path):
    model = build(replace(SETR_BODY, **DEEP, depth=24), "setr_naive", *["setr_naive"] * 3, exits=(10, 15, 20))
    report = convert(save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path), tmp_path / "ours")
    assert report.exits == (10, 15, 20)
    assert report.assumed["exits"] == (10, 15, 20)
    assert_same(model, report)


def test_segmenter_of_mmsegmentation__its_unused_classifier_is_named(tmp_path):
    model = build(MMSEG, "mask_transformer")
    report = convert(save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path), tmp_path / "ours")
    reason = "made by the framework, never used by this head"
    assert set(report.unused) == {("decode_head.conv_seg.weight", reason), ("decode_head.conv_seg.bias", reason)}
    assert report.assumed == {"num_heads": 2, "decode_head.num_heads": 1, "mean": HALF[0], "std": HALF[1]}
    assert_same(model, report)


@pytest.mark.parametrize("head", ["linear", "fcn"])
def test_pointwise_heads_of_mmsegmentation(head, tmp_path):
    model = build(MMSEG, head, head)
    report = convert(save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path), tmp_path / "ours", exits=[1])
    assert_same(model, report, DToP(threshold=0.7))


def test_a_single_auxiliary_head_carries_no_number(tmp_path):
    model = build(MMSEG, "fcn", "fcn")
    state = foreign.mmseg(model.state_dict(), kinds(model))
    state = {key.replace("auxiliary_head.0.", "auxiliary_head."): value for key, value in state.items()}
    assert_same(model, convert(save(state, tmp_path), tmp_path / "ours", exits=[1]))


def test_counters_of_batch_norm_may_be_missing(tmp_path):
    model = build(MMSEG, "fcn")
    state = foreign.mmseg(model.state_dict(), kinds(model))
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert_same(model, convert(save(state, tmp_path), tmp_path / "ours"))


def test_class_names_and_colours_that_the_framework_saved_come_along(tmp_path):
    model = build(MMSEG, "fcn")
    names, palette = ["a", "b", "c", "d", "e"], [[n, n, 0] for n in range(5)]
    for n, meta in enumerate(
        ({"CLASSES": names, "PALETTE": palette}, {"dataset_meta": {"classes": names, "palette": palette}})
    ):
        state = foreign.mmseg(model.state_dict(), kinds(model))
        torch.save({"meta": meta, "state_dict": state, "optimizer": {"step": 3}}, tmp_path / f"{n}.pth")
        report = convert(tmp_path / f"{n}.pth", tmp_path / f"ours{n}")
        labels = ExitSegmenter.from_pretrained(report.destination).preprocessing.labels
        assert labels is not None
        assert labels.names == tuple(names)
        assert labels.palette[2] == (2, 2, 0)


# DToP and DoViT


@pytest.mark.parametrize(("depth", "exits"), [(12, (6, 8)), (24, (8, 16))])
def test_dtop__runs_without_class_token_and_says_so(depth, exits, tmp_path):
    body = replace(MMSEG, **DEEP, class_token=False, final_norm=False, depth=depth)
    model = build(body, "atm", "atm", "atm", exits=exits)
    state = model.state_dict()
    table = state["backbone.pos_embed"]
    state = foreign.mmseg(
        state
        | {"backbone.cls_token": torch.randn(1, 1, 64), "backbone.pos_embed": torch.cat([table[:, :1], table], 1)},
        kinds(model),
    )
    report = convert(save(state, tmp_path), tmp_path / "ours")
    assert report.kind == "dtop"
    assert report.exits == exits
    reason = "this model runs without class token"
    assert report.unused == (("cls_token", reason), ("pos_embed[:, :1]", reason))
    assert_same(model, report, DToP(threshold=1.0), DToP(threshold=0.5, keep_per_class=2))


def dtop_as_saved(heads: int = 1, num_classes: int = CLASSES, channels: int = 64) -> tuple[ExitSegmenter, State]:
    """A model, and its weights under the names that DToP's code saves: each loss is a part of its head."""
    body = replace(MMSEG, **DEEP, class_token=False, final_norm=False, depth=12)
    spec = {"kind": "atm", "channels": channels, "layers": 1, "num_heads": heads}
    model = ExitSegmenter(body, num_classes, (6, 8), [spec, spec], spec).eval()
    enliven(model)
    state = foreign.mmseg(without_class_token(model), kinds(model))
    for head in ("decode_head", "auxiliary_head.0", "auxiliary_head.1"):
        state[f"{head}.loss_decode.criterion.empty_weight"] = torch.tensor([1.0, 0.1])
    return model, state


CONFIG_TEXT = """
checkpoint = open('https://elsewhere')
model = dict(
    type='EncoderDecoderPrune',
    backbone=dict(type='ViT_prune', embed_dims=64, num_heads={backbone}, drop_path_rate=0.1),
    decode_head=dict(type='PruneHead', channels=64, num_heads={heads}, thresh=1.0),
    auxiliary_head=[
        dict(type='PruneHead', channels=64, num_heads={heads}, in_index=0),
        dict(type='PruneHead', channels=64, num_heads={heads}, in_index=1),
    ])
"""


def save_as_mmengine_does(state: State, path: Path, monkeypatch: pytest.MonkeyPatch, **meta: Any) -> Path:
    """With the logs that its runner keeps beside the weights, whose class is then out of reach."""
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._count_history = np.arange(3.0), np.ones(3)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    hub = {"log_scalars": OrderedDict({"train/loss": HistoryBuffer()}), "runtime_info": OrderedDict(iter=40_000)}
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"meta": {"iter": 40_000, **meta}, "state_dict": state, "message_hub": hub}, path)
    return path


def test_dtop__a_checkpoint_as_the_official_code_saves_it_is_read(tmp_path, monkeypatch):
    model, state = dtop_as_saved()
    report = convert(save_as_mmengine_does(state, tmp_path / "iter_40000.pth", monkeypatch), tmp_path / "ours")
    assert report.kind == "dtop"
    dropped = {name for name, reason in report.unused if reason == "a constant of the loss, used in training alone"}
    assert dropped == {
        f"{n}.loss_decode.criterion.empty_weight" for n in ("decode_head", "exit_heads.0", "exit_heads.1")
    }
    assert_same(model, report, DToP(threshold=0.5, keep_per_class=2))
    assert "mmengine" not in sys.modules


def test_dtop__a_state_dict_saved_alone_is_read_too(tmp_path):
    model, state = dtop_as_saved()
    assert_same(model, convert(save(state, tmp_path), tmp_path / "ours"), DToP(threshold=0.5, keep_per_class=2))


def test_atm__a_number_of_attention_heads_that_is_assumed_is_warned_about(tmp_path):
    model, state = dtop_as_saved(heads=4)
    source = save(state, tmp_path)
    report = convert(source, tmp_path / "assumed")
    assert report.assumed["decode_head.num_heads"] == 1
    (warning,) = report.warnings
    assert "how many attention heads ATM decoders have: 1 assumed" in warning
    assert "--head-options num_heads=16" in warning
    assert report.summary().endswith(f"WARNING: {warning}")
    said = convert(source, tmp_path / "said", head_options={"num_heads": 4})
    assert said.warnings == ()
    assert "WARNING" not in said.summary()
    assert_same(model, said)
    images = [random_image(12, 12)]
    wrong, right = (ExitSegmenter.from_pretrained(tmp_path / name)(images).logits for name in ("assumed", "said"))
    assert not torch.allclose(wrong, right, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "classes", "heads"), [(384, 150, 6), (512, 150, 8), (512, 59, 16), (512, 171, 16)]
)
def test_atm__dtops_published_models_have_the_attention_heads_of_its_configurations(channels, classes, heads, tmp_path):
    model, state = dtop_as_saved(heads, classes, channels)
    report = convert(save(state, tmp_path), tmp_path / "ours")
    assert {report.assumed[f"{name}.num_heads"] for name in ("decode_head", "exit_heads.0", "exit_heads.1")} == {heads}
    assert len(report.warnings) == 1
    assert_same(model, report)


@pytest.mark.parametrize("key", ["cfg", "config"])
def test_atm__the_configuration_inside_a_checkpoint_says_the_number_and_is_not_run(key, tmp_path, monkeypatch):
    model, state = dtop_as_saved(heads=4)
    meta = {key: CONFIG_TEXT.format(backbone=1, heads=4)}
    report = convert(save_as_mmengine_does(state, tmp_path / "it.pth", monkeypatch, **meta), tmp_path / "ours")
    assert (report.warnings, "decode_head.num_heads" in report.assumed, "num_heads" in report.assumed) == (
        (),
        False,
        False,
    )
    assert_same(model, report)


@pytest.mark.parametrize(
    "text", ["model = dict(", "model = 3", "(" * 2000, "x = 1", "model = dict(decode_head=4)", "\0"]
)
def test_atm__a_configuration_that_says_nothing_is_passed_over(text, tmp_path, monkeypatch):
    _, state = dtop_as_saved()
    report = convert(save_as_mmengine_does(state, tmp_path / "it.pth", monkeypatch, cfg=text), tmp_path / "ours")
    assert len(report.warnings) == 1


@pytest.mark.parametrize(
    ("decode", "auxiliary", "body"),
    [("setr_naive", "setr_naive", replace(SETR_BODY, final_norm=True)), ("mask_transformer", "fcn", MMSEG)],
)
@pytest.mark.parametrize(("depth", "exits"), [(12, (2, 5, 8)), (24, (6, 12, 18))])
def test_dovit__keeps_its_auxiliary_heads_inside_the_backbone(decode, auxiliary, body, depth, exits, tmp_path):
    model = build(replace(body, **DEEP, depth=depth), decode, *[auxiliary] * 3, exits=exits)
    state = foreign.mmseg(model.state_dict(), kinds(model), "backbone.auxiliary_head.", fused_qkv=True)
    report = convert(save(state, tmp_path), tmp_path / "ours")
    assert report.kind == "dovit"
    assert report.exits == exits
    assert_same(model, report, DoViT(threshold=0.6))


# Segmenter, DINOv2


@pytest.mark.parametrize("head", ["mask_transformer", "linear"])
def test_segmenters_release(head, tmp_path):
    body = replace(MMSEG, norm_eps=1e-5, pos_embed_mode="bilinear")
    model = build(body, head)
    torch.save(
        {"model": foreign.segmenter(model.state_dict()), "n_cls": CLASSES, "epoch": 3}, tmp_path / "checkpoint.pth"
    )
    (tmp_path / "variant.yml").write_text(
        "net_kwargs:\n  n_heads: 2\n  normalization: deit\n  image_size: !!python/tuple\n  - 12\n  - 12\n"
    )
    report = convert(tmp_path, tmp_path / "ours")
    assert report.kind == "segmenter"
    assert report.beside == ("variant.yml",)
    assert "num_heads" not in report.assumed
    assert {name for name, _ in report.unused} == {"encoder.head.weight", "encoder.head.bias"}
    assert_same(model, report)
    preprocessing = ExitSegmenter.from_pretrained(report.destination).preprocessing
    assert (preprocessing.mean, preprocessing.std) == IMAGENET


def dinov2_files(folder: Path, width: int = 1) -> tuple[ExitSegmenter, Path, Path]:
    body = replace(BODY, layer_scale=1.0, pos_embed_antialias=False, pos_embed_offset=0.1)
    model = build(body, "dinov2_linear")
    backbone = part(model.state_dict(), "backbone.") | {"mask_token": torch.zeros(1, 128)}
    head = foreign.dinov2_linear(part(model.state_dict(), "decode_head."))
    if width > 1:
        head = {
            key: torch.cat([value] * width) if key.startswith("bn.") and value.ndim else value
            for key, value in head.items()
        }
        head["conv_seg.weight"] = torch.cat([head["conv_seg.weight"]] * width, 1)
    head = under("decode_head.", head)
    torch.save({"meta": {}, "state_dict": head}, folder / "head.pth")
    return model, folder / "head.pth", save(backbone, folder, "backbone.safetensors")


@pytest.mark.parametrize("front", ["segmentation_model.1.", "1.", ""])
def test_dinov3s_linear_head__joins_the_backbone_of_another_file(front, tmp_path):
    body = replace(BODY, layer_scale=1.0, rope="half", pos_embed=False, k_bias=False, norm_eps=1e-5, num_registers=2)
    model = build(replace(body, pos_embed_grid=(14, 14)), "dinov2_linear")
    backbone = part(model.state_dict(), "backbone.")
    backbone["storage_tokens"] = backbone.pop("reg_token")
    for i in range(body.depth):
        backbone[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * body.embed_dim)
    head = foreign.dinov3_linear(part(model.state_dict(), "decode_head."))
    torch.save({"model": under(front, head)}, tmp_path / "head.pth")
    body_file = save(backbone, tmp_path, "backbone.safetensors")
    report = convert(tmp_path / "head.pth", tmp_path / "ours", backbone=body_file)
    assert report.kind == "dinov3_head"
    assert report.decode_head == {"kind": "dinov2_linear"}
    assert_same(model, report)
    opened, image = open_source(tmp_path / "head.pth", backbone=body_file), random_image(12, 17)
    with torch.no_grad():
        assert torch.equal(opened([image]).grid_logits[0], model([image]).grid_logits[0])


def test_dinov2s_linear_head__joins_the_backbone_of_another_file(tmp_path):
    model, head, backbone = dinov2_files(tmp_path)
    report = convert(head, tmp_path / "ours", backbone=backbone)
    assert report.decode_head == {"kind": "dinov2_linear"}
    assert report.unused == (("mask_token", "used in pre-training alone"),)
    assert "train them on the frozen backbone" in report.summary()
    assert_same(model, report)


def test_dinov2s_linear_head__replaces_the_heads_beside_the_backbone_which_are_named(tmp_path):
    model, head, backbone = dinov2_files(tmp_path)
    state = load_file(backbone) | under(
        "decode_head.", foreign.conv_seg({"classifier.weight": torch.ones(3, 7), "classifier.bias": torch.ones(3)})
    )
    report = convert(head, tmp_path / "ours", backbone=save(state, tmp_path))
    assert ("decode_head.classifier.weight", "a head, left out as asked") in report.unused
    assert_same(model, report)


def test_dinov2s_linear_head__in_one_file_with_its_backbone_and_chunks_of_blocks(tmp_path):
    model, head, _ = dinov2_files(tmp_path)
    state = torch.load(head)["state_dict"]
    for key, value in part(model.state_dict(), "backbone.").items():
        state["backbone." + key.replace("blocks.", "blocks.0.")] = value
    assert_same(model, convert(save(state, tmp_path), tmp_path / "ours"))


def test_dinov2s_linear_head__alone_asks_for_its_backbone(tmp_path):
    _, head, _ = dinov2_files(tmp_path)
    with pytest.raises(CheckpointError, match="hold a head alone: give the weights of its backbone"):
        convert(head, tmp_path / "ours")


def test_dinov2s_linear_head__of_four_blocks_is_refused_in_one_sentence(tmp_path):
    _, head, backbone = dinov2_files(tmp_path, width=4)
    with pytest.raises(CheckpointError, match=r"reads the last four blocks at once \(512 = 4 x 128 channels\)"):
        convert(head, tmp_path / "ours", backbone=backbone)


# Backbones alone


def features(model: ViT) -> torch.Tensor:
    with torch.no_grad():
        return model.norm(model.run(model.embed([random_image(12, 12), random_image(17, 22)]), 0, model.config.depth).x)


def assert_same_backbone(model: ViT, report: ConversionReport) -> None:
    config = replace(report.backbone, layer_scale=model.config.layer_scale)
    converted = ViT(config).eval()
    result = load_backbone(converted, load_file(report.destination))
    assert (result.missing, result.unexpected, result.resized) == ((), (), ())
    assert_close(features(converted), features(model), 1e-6)


DINOV2 = replace(BODY, layer_scale=1.0, pos_embed_antialias=False)
REGISTERS = replace(BODY, layer_scale=1.0, num_registers=3)


@pytest.mark.parametrize("front", ["", "vit."])
@pytest.mark.parametrize(
    ("config", "split"),
    [
        (replace(BODY, norm_eps=1e-12, pos_embed_antialias=False), False),
        (DINOV2, False),
        (replace(DINOV2, mlp="swiglu", mlp_ratio=3.0), False),
        (replace(DINOV2, mlp="swiglu", mlp_ratio=3.0), True),
        (REGISTERS, False),
    ],
    ids=["vit", "dinov2", "giant", "giant_in_halves", "registers"],
)
def test_hugging_face__query_key_and_value_are_fused(config, split, front, tmp_path):
    model = ViT(config).eval()
    enliven(model)
    state = foreign.huggingface(model.state_dict(), front, split)
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert report.kind == "huggingface"
    assert report.unused == ()
    # With registers, the class token's row of the table is added to it: the presets have it so.
    assert report.backbone.pos_embed_prefix == (config.num_registers == 0)
    assert_same_backbone(model, report)


def test_hugging_face__the_configuration_beside_the_weights_is_read(tmp_path):
    model = ViT(replace(BODY, num_heads=4, norm_eps=1e-5, pos_embed_antialias=False, pos_embed_grid=(2, 6))).eval()
    enliven(model)
    save(foreign.huggingface(model.state_dict()), tmp_path, "model.safetensors")
    beside = {"num_attention_heads": 4, "layer_norm_eps": 1e-5, "image_size": [8, 24], "patch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    report = convert(tmp_path, tmp_path / "ours.safetensors")
    assert report.assumed == {}
    assert_same_backbone(model, report)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu', tokenexit has gelu"),
        ({"num_attention_heads": "many"}, "holds an impossible value"),
        ({"image_size": 12, "patch_size": 0}, "holds an impossible value"),
    ],
)
def test_hugging_face__an_impossible_configuration_is_refused(beside, words, tmp_path):
    save(foreign.huggingface(ViT(BODY).state_dict()), tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(beside))
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path, tmp_path / "ours.safetensors")


def test_hugging_face__of_a_hub_model_the_files_beside_it_are_fetched_too(tmp_path, monkeypatch):
    save(foreign.huggingface(ViT(replace(BODY, num_heads=4)).state_dict()), tmp_path, "weights.safetensors")
    (tmp_path / "elsewhere.json").write_text(json.dumps({"num_attention_heads": 4}))
    files = {
        "hf-hub:owner/name@main": tmp_path / "weights.safetensors",
        "hf-hub:owner/name@main/config.json": tmp_path / "elsewhere.json",
    }

    def fetch(source):
        if source not in files:
            raise CheckpointError("the hub has no such file.")
        return files[source]

    monkeypatch.setattr("tokenexit.conversion.convert.resolve_weights", fetch)
    report = convert("hf-hub:owner/name@main", tmp_path / "ours.safetensors")
    assert report.backbone.num_heads == 4
    assert report.beside == ("config.json",)


def test_distilled_deit__its_second_token_becomes_a_register(tmp_path):
    model = ViT(replace(BODY, num_registers=1, pos_embed_prefix=False)).eval()
    enliven(model)
    state, rows = model.state_dict(), torch.randn(1, 2, 128)
    state["dist_token"] = state.pop("reg_token") - rows[:, 1:]
    state["cls_token"] = state["cls_token"] - rows[:, :1]
    state["pos_embed"] = torch.cat([rows, state["pos_embed"]], 1)
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert report.backbone.num_registers == 1
    assert_same_backbone(model, report)


def test_the_real_vit_tiny_is_its_preset(vit_tiny_weights, tmp_path):
    report = convert(vit_tiny_weights, tmp_path / "ours.safetensors")
    assert report.preset == "vit_tiny_patch16"
    assert report.loaded == 150
    assert {name for name, _ in report.unused} == {"head.weight", "head.bias"}


def test_a_backbone_becomes_a_file_with_timms_names(tmp_path):
    model = build(BODY, "linear")
    state = part(model.state_dict(), "backbone.") | {
        "head.weight": torch.ones(3, 128),
        "fc_norm.weight": torch.ones(128),
    }
    report = convert(save(state, tmp_path), tmp_path / "new" / "ours.safetensors")
    assert report.kind == "timm"
    written = load_file(report.destination)
    assert set(written) == set(state) - {"head.weight", "fc_norm.weight"}
    assert all(torch.equal(value, state[key]) for key, value in written.items())
    assert {name for name, _ in report.unused} == {"head.weight", "fc_norm.weight"}
    assert list((tmp_path / "new").iterdir()) == [report.destination], "no unfinished file stays"


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit3_small_patch16", "dinov2_small_patch14_reg4"])
def test_the_preset_is_recognised(name, tmp_path):
    config = vit_config(name, depth=1)
    state = part(ExitSegmenter(config, 2, (), [], "linear").state_dict(), "backbone.")
    whole = {key.replace("blocks.0", f"blocks.{i}"): value.clone() for i in range(12) for key, value in state.items()}
    report = convert(save(whole, tmp_path), tmp_path / "ours.safetensors")
    assert report.preset == name
    assert f"backbone: {name}" in report.summary()


def test_masked_pre_training__its_decoder_is_named_and_counted(tmp_path):
    extra = {
        "mask_token": torch.ones(1),
        "decoder_pos_embed": torch.ones(1),
        "decoder_blocks.0.norm1.weight": torch.ones(1),
    }
    state = part(build(BODY, "linear").state_dict(), "backbone.") | extra
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert {name for name, _ in report.unused} == set(extra)
    assert "not used (the decoder of masked pre-training): " in report.summary()


def test_a_teacher_of_dino_is_taken_before_its_student(tmp_path):
    state = part(build(BODY, "linear").state_dict(), "backbone.")
    teacher = under("module.backbone.", state) | {"module.head.mlp.0.weight": torch.ones(2)}
    student = {key: value + 1 if value.is_floating_point() else value for key, value in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    report = convert(tmp_path / "dino.pth", tmp_path / "ours.safetensors")
    assert torch.equal(load_file(report.destination)["cls_token"], state["cls_token"])
    assert [name for name, _ in report.unused] == ["head.mlp.0.weight"]


def test_what_nobody_knows_is_named(tmp_path):
    state = part(build(BODY, "linear").state_dict(), "backbone.") | {"logit_scale": torch.ones(1)}
    report = convert(save(state, tmp_path), tmp_path / "ours.safetensors")
    assert report.unused == (("logit_scale", "unknown to tokenexit"),)
    assert "not used (unknown to tokenexit): logit_scale" in report.summary()


def test_heads_are_left_out_as_asked_and_named(tmp_path):
    model = build(MMSEG, "fcn", "fcn")
    source = save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path)
    report = convert(source, tmp_path / "ours.safetensors", backbone_only=True)
    assert {reason for _, reason in report.unused} == {"a head, left out as asked"}
    assert len(report.unused) == 16
    report = convert(source, tmp_path / "ours", exits=())
    assert report.exits == ()
    assert {name.split(".")[0] for name, _ in report.unused} == {"exit_heads"}


# What is known better


def test_options_and_preprocessing_that_are_given_win(tmp_path):
    model = build(replace(MMSEG, num_heads=4, norm_eps=1e-5), "mask_transformer")
    given = Preprocessing(mean=(0.1, 0.2, 0.3))
    report = convert(
        save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path),
        tmp_path / "ours",
        options={"num_heads": 4, "norm_eps": 1e-5},
        head_options={"num_heads": 1},
        preprocessing=given,
    )
    assert report.assumed == {}
    assert_same(model, report)
    assert ExitSegmenter.from_pretrained(report.destination).preprocessing.mean == given.mean


def test_a_table_that_is_not_square_needs_its_grid(tmp_path):
    model = build(replace(MMSEG, pos_embed_grid=(2, 6)), "fcn")
    source = save(foreign.mmseg(model.state_dict(), kinds(model)), tmp_path)
    with pytest.raises(CheckpointError, match=r"has 13 rows, no square grid"):
        convert(source, tmp_path / "ours")
    assert_same(model, convert(source, tmp_path / "ours", options={"pos_embed_grid": (2, 6)}))


def test_configurations_beside_timms_weights_give_mean_and_std(tmp_path):
    _, head, backbone = dinov2_files(tmp_path)
    folder = tmp_path / "timm"
    folder.mkdir()
    state = {key: value for key, value in load_file(backbone).items() if key != "mask_token"}
    save(state, folder, "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}))
    report = convert(head, tmp_path / "ours", backbone=folder)
    assert report.beside == ("config.json",)
    assert ExitSegmenter.from_pretrained(report.destination).preprocessing.std == (0.2, 0.2, 0.2)


# Refusals: one sentence, nothing written


def refusal(state: State, folder: Path, **options: Any) -> str:
    source, target = save(state, folder), folder / "ours"
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        convert(source, target, **options)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert not target.exists()
    return message


def mmseg_state(decode: str = "fcn", *exit_heads: str) -> State:
    model = build(MMSEG, decode, *exit_heads)
    return foreign.mmseg(model.state_dict(), kinds(model))


def test_names_of_no_source_are_refused_with_the_sources(tmp_path):
    message = refusal({"stem.conv.weight": torch.ones(1), "fc.weight": torch.ones(1)}, tmp_path)
    assert "names of no source that is known" in message
    assert "mmseg" in message


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    assert "kind 'keras' is unknown: choose auto or one of eomt" in refusal(mmseg_state(), tmp_path, kind="keras")


def test_a_kind_that_does_not_fit_finds_no_plain_vit(tmp_path):
    assert "only plain ViTs with a position table can be read" in refusal(mmseg_state(), tmp_path, kind="segmenter")


def test_auxiliary_heads_at_unknown_places_ask_for_exits(tmp_path):
    assert "hold 2 auxiliary heads and do not say after which" in refusal(mmseg_state("fcn", "fcn", "fcn"), tmp_path)
    assert "for 2 auxiliary heads" in refusal(mmseg_state("fcn", "fcn", "fcn"), tmp_path, exits=[1])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"decode_head.conv_cat.conv.weight": torch.ones(1)}, r"has parts that tokenexit lacks (conv_cat.conv.weight)"),
        ({"decode_head.convs.1.conv.weight": torch.ones(1)}, r"has parts that tokenexit lacks (convs.1.conv.weight)"),
        ({"backbone.layers.0.ffn.gamma2.weight": torch.ones(1)}, "hold parts this backbone lacks"),
        ({"backbone.patch_embed.projection.norm.weight": torch.ones(1)}, "hold parts this backbone lacks"),
    ],
)
def test_parts_that_would_change_the_result_are_refused(extra, words, tmp_path):
    assert words in refusal(mmseg_state() | extra, tmp_path)


def test_a_convolution_of_3x3_is_no_token_head(tmp_path):
    state = mmseg_state()
    state["decode_head.convs.0.conv.weight"] = torch.ones(24, 128, 3, 3)
    assert "is of no kind that tokenexit has" in refusal(state, tmp_path)


def segvit_state(stages: int = 3, outputs: int = CLASSES + 1) -> tuple[ExitSegmenter, State]:
    """As SegViT's release saves it: no class token in use, a projection, norm and decoder for every stage."""
    model = build(replace(MMSEG, class_token=False, final_norm=False, pos_embed_prefix=False), "atm")
    state = foreign.mmseg(without_class_token(model), kinds(model))
    head = part(state, "decode_head.")
    state = {key: value for key, value in state.items() if not key.startswith("decode_head.")}
    for key, value in head.items():
        name, _, rest = key.partition(".")
        if name in ("input_proj", "proj_norm", "decoder"):
            state |= {f"decode_head.{name}_{n}.{rest}": value.clone() for n in range(1, stages + 1)}
        else:
            state[f"decode_head.{key}"] = value
    state["decode_head.class_embed.weight"] = torch.ones(outputs, 64)
    state["decode_head.class_embed.bias"] = torch.ones(outputs)
    return model, state


def without_class_token(model: ExitSegmenter) -> State:
    """The weights of a model without class token, with the one that such code bases make and never use."""
    state = model.state_dict()
    table = state["backbone.pos_embed"]
    width = table.shape[2]
    unused = {"backbone.cls_token": torch.randn(1, 1, width)}
    return state | unused | {"backbone.pos_embed": torch.cat([torch.randn(1, 1, width), table], 1)}


def test_segvits_own_head_over_three_levels_is_refused_and_its_backbone_is_read_as_it_runs(tmp_path):
    model, state = segvit_state()
    message = refusal(state, tmp_path)
    assert "is SegViT's own, which joins 3 stages" in message
    assert "convert the backbone alone (backbone_only, --backbone-only)" in message
    report = convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", backbone_only=True)
    assert report.kind == "segvit"
    assert not report.backbone.class_token
    assert_same_backbone(model.backbone, report)


def test_a_shrunk_segvit_is_refused(tmp_path):
    _, state = segvit_state(stages=2)
    state["decode_head.atm.class_embed.weight"] = state.pop("decode_head.class_embed.weight")
    assert "is that of a shrunk SegViT, whose backbone halves its grid on the way" in refusal(state, tmp_path)


def test_segvits_own_head_with_a_class_distribution_per_query_is_refused(tmp_path):
    state = mmseg_state("atm")
    state["decode_head.class_embed.weight"] = torch.ones(CLASSES + 1, 64)
    assert "one of 6 classes for each of its 5 queries" in refusal(state, tmp_path)


def test_heads_of_different_classes_are_refused(tmp_path):
    state = mmseg_state("fcn", "fcn")
    state["auxiliary_head.0.conv_seg.weight"] = torch.ones(7, 24, 1, 1)
    assert "predict {'exit_heads.0': 7, 'decode_head': 5} classes" in refusal(state, tmp_path, exits=[1])


def test_a_missing_part_of_a_head_is_named(tmp_path):
    state = mmseg_state()
    del state["decode_head.convs.0.bn.running_var"]
    assert "lacks (norm.running_var)" in refusal(state, tmp_path)


def test_options_that_no_head_has_are_refused(tmp_path):
    assert "head_options names 'colour'" in refusal(mmseg_state(), tmp_path, head_options={"colour": 1})
    assert "no option 'colour'" in refusal(mmseg_state(), tmp_path, options={"colour": 1})


def test_a_model_of_ours_is_called_so(tmp_path):
    assert "those of a tokenexit model" in refusal(build(BODY, "fcn").state_dict(), tmp_path)


def test_the_destination_must_be_what_is_written(tmp_path):
    heads = save(mmseg_state(), tmp_path)
    backbone = save(part(build(BODY, "fcn").state_dict(), "backbone."), tmp_path, "backbone.safetensors")
    for source, target, words in (
        (heads, tmp_path / "a.safetensors", "is a file: name a folder, or set backbone_only"),
        (backbone, tmp_path / "a", "is no .safetensors file"),
        (heads, tmp_path, "is where the source lies"),
        (backbone, backbone, "is the source"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ConfigError, match=words):
            convert(source, target)
        assert sorted(tmp_path.iterdir()) == before


def test_a_destination_below_a_file_is_refused(tmp_path):
    heads = save(mmseg_state(), tmp_path)
    with pytest.raises(ConfigError, match=r"ours' cannot be written \(.+\): choose another"):
        convert(heads, heads / "ours")


def test_a_damaged_configuration_beside_the_weights_is_named(tmp_path):
    state = part(build(BODY, "fcn").state_dict(), "backbone.")
    save(state, tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json beside the weights is damaged"):
        convert(tmp_path, tmp_path / "ours.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors, pytorch_model\.bin, checkpoint\.pth"):
        convert(tmp_path, tmp_path / "ours")


DAMAGES = {
    "missing": None,
    "a vector": torch.ones(3),
    "five axes": torch.ones(1, 1, 1, 2, 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("source", ["setr", "segmenter", "atm", "huggingface", "release"])
def test_whatever_is_wrong_with_one_entry__it_is_one_sentence_or_no_matter(source, damage, tmp_path):
    body = replace(SETR_BODY, **DEEP, depth=1)
    states = {
        "setr": lambda: foreign.mmseg((m := build(body, "setr_pup")).state_dict(), kinds(m)),
        "segmenter": lambda: foreign.mmseg((m := build(body, "mask_transformer")).state_dict(), kinds(m)),
        "atm": lambda: foreign.mmseg((m := build(body, "atm")).state_dict(), kinds(m)),
        "huggingface": lambda: foreign.huggingface(ViT(replace(REGISTERS, **DEEP, depth=1)).state_dict()),
        "release": lambda: foreign.segmenter(build(body, "mask_transformer").state_dict()),
    }
    state, value = states[source](), DAMAGES[damage]
    for name in state:
        damaged = {key: kept for key, kept in state.items() if key != name}
        if value is not None:
            damaged[name] = value.clone()
        message = outcome(damaged, tmp_path, tmp_path / ("ours.safetensors" if source == "huggingface" else "ours"))
        assert message.endswith("."), name
        assert "\n" not in message, name


def outcome(state: State, folder: Path, target: Path) -> str:
    """The refusal, if it is one of ours; anything else is not caught."""
    try:
        convert(save(state, folder), target)
    except TokenExitError as error:
        return str(error)
    return "It was no matter."
