from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.heads.test_eomt import CLASSES, QUERIES, eomt, images
from tests.helpers import enliven
from tokenexit.conversion.convert import converted
from tokenexit.engine.vit import ViT
from tokenexit.errors import CheckpointError
from tokenexit.methods import Dense
from tokenexit.segmenter import ExitSegmenter

NAMES = {"queries": "q", "classifier": "class_head", "mask.0": "mask_head.0", "mask.1": "mask_head.2"}
NAMES |= {"mask.2": "mask_head.4", "norm": "encoder.backbone.norm"}


def release(model: ExitSegmenter) -> dict[str, Tensor]:
    """A model's weights under the names of EoMT's release on DINOv2."""
    depth, state = model.config.backbone.depth, {}
    for name, value in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "backbone":
            rest = f"encoder.backbone.{rest}"
        elif rest.startswith("blocks."):
            _, n, rest = rest.split(".", 2)
            rest = f"encoder.backbone.blocks.{depth + int(n)}.{rest}"
        elif rest.startswith("upscale_steps."):
            _, n, layer, rest = rest.split(".", 3)
            layer = {"up": "conv1", "mix": "conv2", "norm": "norm"}[layer]
            rest = f"upscale.{n}.{layer}.{rest}"
        else:
            own, _, kind = rest.rpartition(".")
            rest = f"{NAMES[own]}.{kind}"
        state[f"network.{rest}"] = value.clone()
    return state | {"network.attn_mask_probs": torch.zeros(2), "criterion.empty_weight": torch.ones(CLASSES + 1)}


def table_of_patches(**options: Any) -> ExitSegmenter:
    return eomt(exits=(), pos_embed_prefix=False, layer_scale=1.0, num_registers=4, pos_embed_grid=(3, 3), **options)


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "eomt.safetensors")
    return folder / "eomt.safetensors"


def test_release__is_read_as_the_model_that_it_is(tmp_path: Path) -> None:
    model = table_of_patches()
    known = {"num_heads": 2, "pos_embed_antialias": model.config.backbone.pos_embed_antialias}
    again, report = converted(saved(release(model), tmp_path), options=known)
    assert report.kind == "eomt"
    assert report.decode_head is not None
    assert (report.decode_head["layers"], report.decode_head["queries"]) == (2, QUERIES)
    assert [name for name, _ in report.unused] == ["criterion.empty_weight"]
    seen = again.preprocessing
    assert (seen.resize, seen.window, seen.stride) == (12, (12, 12), "even"), "3 x 3 patches of 4 pixels, as trained"
    assert "stride=even" in report.summary()
    with torch.no_grad():
        found, wanted = (each(images((24, 24)), Dense()) for each in (again, model))
    torch.testing.assert_close(found.grid_logits[0], wanted.grid_logits[0])
    assert torch.equal(found.queries[0], wanted.queries[0])


def test_unfinished_training_differences_and_unknown_depths__are_refused_in_a_sentence(tmp_path: Path) -> None:
    state = release(table_of_patches())
    probs = "network.attn_mask_probs"
    with pytest.raises(CheckpointError, match="above 0"):
        converted(saved({**state, probs: torch.tensor([0.0, 0.3])}, tmp_path))
    with pytest.raises(CheckpointError, match="do not say how many"):
        converted(saved({name: value for name, value in state.items() if name != probs}, tmp_path))
    near_zero = {name: value * 0.01 if name.endswith("norm1.weight") else value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"are differences from DINOv3's weights: .*--backbone FILE"):
        converted(saved(near_zero, tmp_path))


# -------------------------------------------------------------------------------- differences from DINOv3's weights

ROPE: dict[str, Any] = {"rope": "half", "pos_embed": False, "k_bias": False, "norm_eps": 1e-5}
IN_A_BLOCK = {"attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
IN_A_BLOCK |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}


def on_dinov3() -> ExitSegmenter:
    return eomt(exits=(), layer_scale=1.0, num_registers=4, **ROPE)


def split(name: str, value: Tensor) -> dict[str, Tensor]:
    """One entry of a block of ours as those of transformers' DINOv3, which has queries, keys and values apart."""
    for own, theirs in IN_A_BLOCK.items():
        name = name.replace(own, theirs)
    if "attn.qkv" not in name:
        return {name: value}
    parts = zip("qkv", value.chunk(3))
    named = {name.replace("attn.qkv", f"attention.{part}_proj"): one.clone() for part, one in parts}
    return {key: one for key, one in named.items() if not key.endswith("k_proj.bias")}


def release_on_dinov3(model: ExitSegmenter) -> dict[str, Tensor]:
    """A model's weights under the names of EoMT's release on DINOv3, whose embeddings sit under `patch_embed`."""
    front, swaps = "network.encoder.backbone.", {"cls_token": "cls_token", "reg_token": "register_tokens"}
    swaps |= {f"patch_embed.proj.{kind}": f"patch_embeddings.{kind}" for kind in ("weight", "bias")}
    state: dict[str, Tensor] = {}
    for name, value in release(model).items():
        rest = name.removeprefix(front)
        if rest in swaps:
            state[f"{front}patch_embed.{swaps[rest]}"] = value
        elif rest.startswith("blocks."):
            state |= split(name, value)
        else:
            state[name] = value
    return state


def dinov3(kind: str) -> dict[str, Tensor]:
    """Random weights of a DINOv3 as its release, transformers or timm (without biases of attention) keep them."""
    torch.manual_seed(7)
    config = replace(on_dinov3().config.backbone, depth=6, final_norm=True)
    base = ViT(config)
    enliven(base)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if kind == "transformers":
            rest = name.replace("patch_embed.proj", "embeddings.patch_embeddings").replace("blocks.", "layer.")
            rest = rest.replace("cls_token", "embeddings.cls_token").replace("reg_token", "embeddings.register_tokens")
            named |= split(rest, value)
        elif kind == "release":
            named[name.replace("reg_token", "storage_tokens")] = value
            if name.endswith("qkv.bias"):
                named[f"{name}_mask"] = torch.ones_like(value)
        elif not name.endswith("qkv.bias"):
            named[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    return named


def differences(model: ExitSegmenter, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the release keeps: the encoder less its base, everything else as it is.

    base: in transformers' names, where what is not there is zero.
    """
    front, kept = "network.encoder.backbone.", {}
    for name, value in release_on_dinov3(model).items():
        rest = name.removeprefix(front).replace("blocks.", "layer.").replace("patch_embed.", "embeddings.")
        less = base.get(rest) if name.startswith(front) else None
        kept[name] = value if less is None else value - less
    return kept


@pytest.mark.parametrize("kind", ["release", "transformers", "timm"])
def test_differences__are_added_to_the_weights_that_they_belong_to(kind: str, tmp_path: Path) -> None:
    model, base = on_dinov3(), dinov3("transformers")
    if kind == "timm":  # of which biases of attention are zero
        base = {name: value for name, value in base.items() if not name.endswith(("q_proj.bias", "v_proj.bias"))}
    save_file({k: v.contiguous() for k, v in dinov3(kind).items()}, tmp_path / "dinov3.safetensors")
    source, options = saved(differences(model, base), tmp_path), {"num_heads": 2}
    again, report = converted(source, backbone=tmp_path / "dinov3.safetensors", options=options)
    assert report.kind == "eomt"
    assert "dinov3.safetensors" in report.summary().splitlines()[0]
    assert again.config.backbone.depth == 4
    assert again.preprocessing.window is None, "the size that it was trained at is not in the weights"
    with torch.no_grad():
        found, wanted = (each(images((20, 24)), Dense()) for each in (again, model))
    torch.testing.assert_close(found.grid_logits[0], wanted.grid_logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.queries[0], wanted.queries[0], rtol=1e-4, atol=1e-5)


def test_differences__from_other_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    base = dinov3("transformers")
    source = saved(differences(on_dinov3(), base), tmp_path)

    def refused(other: dict[str, Tensor]) -> str:
        save_file({name: value.contiguous() for name, value in other.items()}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="are not those that these differences of EoMT belong to") as error:
            converted(source, backbone=tmp_path / "other.safetensors", options={"num_heads": 2})
        return str(error.value)

    top = {name.replace("layer.5", "layer.6"): value.clone() for name, value in base.items() if "layer.5" in name}
    assert "backbone.blocks.6." in refused(base | top)
    assert "backbone.blocks.5." in refused({name: value for name, value in base.items() if "layer.5" not in name})
    wide = {name: torch.cat([value, value]) if name == "norm.weight" else value for name, value in base.items()}
    assert "backbone.norm.weight" in refused(wide)
