"""DINOv3 of timm, of transformers and under its release's names gives the features of our backbone in every block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.engine.test_cuda_graphs import Recorder
from tests.parity.compare import TOLERANCE, Reference, largest_distance, phases_of_others, randomise
from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.conversion.convert import ConversionReport, convert
from tokenexit.engine.vit import ViT

SIZES = ((32, 32), (20, 48))
HEADS = {"num_heads": 3}
EXITS = pytest.mark.parametrize("exits", [(), (1, 2)], ids=["full", "exits"])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])


def sharpen(model: nn.Module) -> None:
    """Queries and keys three times as long, so that features depend on place; LayerScale near 1."""
    randomise(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            dim = value.shape[-1]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(3.0)
            elif name.endswith("qkv.weight"):
                value[: 2 * dim].mul_(3.0)
            elif name.endswith(("gamma_1", "gamma_2")):
                value.normal_(1.0, 0.1)


def timm_model(gated: bool, qkv_bias: bool = True) -> Any:
    from timm.models.eva import Eva

    model = Eva(
        img_size=32,
        patch_size=4,
        embed_dim=48,
        depth=4,
        num_heads=3,
        qkv_bias=qkv_bias,
        dynamic_img_size=True,
        init_values=1e-5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        num_classes=0,
        **({"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}),
    ).eval()
    sharpen(model)
    return model


def timm_reference(model: Any) -> Reference:
    phases: list[Tensor] = []

    def embed(images: Tensor) -> Tensor:
        x, rope = model._pos_embed(model.patch_embed(images))
        phases[:] = [rope]
        return model.norm_pre(x)

    def step(block: Any) -> Any:
        return lambda x, mask: block(x, rope=phases[0], attn_mask=mask)

    return Reference(embed, [step(block) for block in model.blocks], model.norm)


def transformers_model(gated: bool) -> Any:
    import transformers

    config = transformers.DINOv3ViTConfig(
        patch_size=4,
        hidden_size=48,
        intermediate_size=128 if gated else 192,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=32,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        attn_implementation="eager",
    )
    model = transformers.DINOv3ViTModel(config).eval()
    sharpen(model)
    return model


def transformers_reference(model: Any) -> Reference:
    phases: list[Any] = []

    def embed(images: Tensor) -> Tensor:
        phases[:] = [model.rope_embeddings(images)]
        return model.embeddings(images)

    def step(layer: Any) -> Any:
        def run(x: Tensor, mask: Tensor) -> Tensor:
            out = layer(x, attention_mask=mask, position_embeddings=phases[0])
            return out[0] if isinstance(out, tuple) else out

        return run

    return Reference(embed, [step(layer) for layer in model.model.layer], model.norm)


def converted(state: dict[str, Tensor], folder: Path) -> tuple[ViT, ConversionReport]:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "theirs.safetensors")
    return loaded(convert(folder / "theirs.safetensors", folder / "ours.safetensors", options=HEADS))


def loaded(report: ConversionReport) -> tuple[ViT, ConversionReport]:
    model = ViT(report.backbone).eval()
    result = load_backbone(model, read_state_dict(report.destination))
    assert not result.missing
    assert not result.unexpected
    return model, report


def compare(ours: ViT, theirs: Reference, exits: tuple[int, ...], record: Any) -> None:
    """At two sizes, and with exits also in padded graphs; phases of other tokens must be seen."""
    for size in SIZES:
        found = largest_distance(ours, theirs, size, exits)
        record(f"{size}", found)
        assert found <= TOLERANCE, f"{found:.1e} at {size}"
        if exits and ours.config.rope is not None:
            assert largest_distance(ours, theirs, size, exits, phases_of_others) > 0.01
    if exits:
        recorder = Recorder()
        ours.capture_blocks(step=8, record=recorder)
        for size in SIZES:
            found = largest_distance(ours, theirs, size, exits)
            record(f"{size} in graphs", found)
            assert found <= TOLERANCE, f"{found:.1e} at {size} in graphs"
        assert recorder.replayed >= len(SIZES) * ours.config.depth


@pytest.mark.library("timm", "torchvision")
@GATED
@EXITS
def test_timm__every_block_gives_the_librarys_features_at_two_sizes(gated, exits, tmp_path, record_property):
    model = timm_model(gated)
    ours, report = converted(model.state_dict(), tmp_path)
    assert report.kind == "dinov3_timm"
    assert (report.backbone.rope, report.backbone.pos_embed, report.backbone.norm_eps) == ("half", False, 1e-5)
    assert (report.backbone.mlp, report.backbone.num_registers) == ("swiglu" if gated else "gelu", 4)
    compare(ours, timm_reference(model), exits, record_property)


@pytest.mark.library("timm", "torchvision")
def test_timm__weights_without_biases_give_its_features(tmp_path, record_property):
    model = timm_model(False, qkv_bias=False)
    ours, report = converted(model.state_dict(), tmp_path)
    assert not report.backbone.qkv_bias
    compare(ours, timm_reference(model), (1, 2), record_property)


@pytest.mark.library("transformers")
@GATED
@EXITS
def test_transformers__a_saved_folder_gives_the_librarys_features_at_two_sizes(gated, exits, tmp_path, record_property):
    model = transformers_model(gated)
    model.save_pretrained(tmp_path / "theirs")
    ours, report = loaded(convert(tmp_path / "theirs", tmp_path / "ours.safetensors"))
    assert report.kind == "dinov3_huggingface"
    assert report.beside == ("config.json",)
    assert report.assumed == {}
    compare(ours, transformers_reference(model), exits, record_property)


@pytest.mark.library("timm", "torchvision")
@GATED
@EXITS
def test_release__its_own_names_give_what_timm_makes_of_them(gated, exits, tmp_path, record_property):
    model = timm_model(gated)
    ours, report = converted(own_names(model.state_dict()), tmp_path)
    assert report.kind == "dinov3"
    assert {name.split(".")[0] for name, _ in report.unused} == {"mask_token", "rope_embed", "local_cls_norm"}
    assert all("unknown" not in reason for _, reason in report.unused)
    compare(ours, timm_reference(model), exits, record_property)


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the release: biases of keys are there, and a mask says that they do not count."""
    dim = state["cls_token"].shape[-1]
    released = {
        "mask_token": torch.zeros(1, dim),
        "rope_embed.periods": torch.ones(4).bfloat16(),
        "local_cls_norm.weight": torch.ones(dim),
    }
    swaps = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    gates = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    swaps |= gates if "blocks.0.mlp.fc1_g.weight" in state else {}
    for key, value in state.items():
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            front = key.removesuffix("q_bias")
            released[f"{front}qkv.bias"] = torch.cat([value, torch.randn(dim), state[f"{front}v_bias"]])
            mask = torch.ones(3, dim)
            mask[1] = 0.0
            released[f"{front}qkv.bias_mask"] = mask.flatten()
            continue
        for theirs, own in swaps.items():
            key = key.replace(theirs, own)
        released[key] = value.clone()
    return released
