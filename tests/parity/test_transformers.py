"""Hugging Face's ViT and DINOv2 give the features of our backbone in every block, from folders and from modules."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.compare import TOLERANCE, Reference, largest_distance, randomise
from tokenexit.checkpoints import load_backbone, read_state_dict
from tokenexit.conversion.convert import ConversionReport, convert
from tokenexit.engine.vit import ViT

pytestmark = pytest.mark.library("transformers")

SHRUNK = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {"intermediate_size": 192}),
    "vit_without_qkv_bias": ("ViT", {"intermediate_size": 96, "qkv_bias": False}),
    "dinov2": ("Dinov2", {}),
    "dinov2_giant": ("Dinov2", {"use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegisters", {}),
    "dinov2_registers_giant": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
}


def library_model(family: str, part: str = "Model") -> Any:
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHRUNK, **changes, attn_implementation="eager")
    model = getattr(transformers, f"{name}{part}")(config).eval()
    randomise(model)
    return model


def reference(model: Any) -> Reference:
    def embed(images: Tensor) -> Tensor:
        vit = type(model).__name__ == "ViTModel"
        return model.embeddings(images, **({"interpolate_pos_encoding": True} if vit else {}))

    def step(layer: Any) -> Any:
        def run(x: Tensor, mask: Tensor) -> Tensor:
            out = layer(x, mask)
            return out[0] if isinstance(out, tuple) else out

        return run

    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    return Reference(embed, [step(layer) for layer in layers], model.layernorm)


def loaded(report: ConversionReport) -> ViT:
    model = ViT(report.backbone).eval()
    result = load_backbone(model, read_state_dict(report.destination))
    assert not result.missing
    assert not result.unexpected
    return model


def compare(model: Any, report: ConversionReport, exits: tuple[int, ...]) -> None:
    ours = loaded(report)
    for size in ((32, 32), (48, 40)):
        found = largest_distance(ours, reference(model), size, exits)
        assert found <= TOLERANCE, f"{found:.1e} at {size}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exits", [(), (1, 2)], ids=["full", "exits"])
def test_transformers__a_saved_folder_gives_the_librarys_features_at_two_sizes(family, exits, tmp_path):
    model = library_model(family)
    model.save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert report.kind == "huggingface"
    assert report.beside == ("config.json",)
    assert report.assumed == {}
    assert report.backbone.norm_eps == model.config.layer_norm_eps
    compare(model, report, exits)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers__the_names_of_modules_and_no_configuration_serve_as_well(family, tmp_path):
    model = library_model(family)
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    report = convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", options={"num_heads": 4})
    assert report.beside == ()
    compare(model, report, (1,))


def test_transformers__a_classifier_and_what_pre_training_left_are_named(tmp_path):
    library_model("dinov2", "ForImageClassification").save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert report.unused == (
        ("classifier.bias", "an image classifier or projection head"),
        ("classifier.weight", "an image classifier or projection head"),
        ("dinov2.embeddings.mask_token", "used in pre-training alone"),
    )
