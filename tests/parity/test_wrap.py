"""Modules of timm and transformers are wrapped and give their own features; other modules of theirs are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import distance, random_image
from tests.parity import test_dinov3, test_timm, test_transformers
from tests.parity.compare import TOLERANCE, randomise
from tokenexit.conversion.wrap import wrap
from tokenexit.errors import TokenExitError
from tokenexit.methods import DoViT
from tokenexit.segmenter import ExitSegmenter

timm = pytest.mark.library("timm", "torchvision")
transformers = pytest.mark.library("transformers")

HEAD = nn.Sequential(nn.Conv2d(48, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 5, 2, stride=2))


def check(module: nn.Module, features: Any, patch: int, share: bool) -> ExitSegmenter:
    """The wrapped model gives the features and the answers of the module and its head."""
    model = wrap(module, HEAD, share=share)
    for grid in ((4, 4), (6, 5)):
        image = random_image(grid[0] * patch, grid[1] * patch)
        with torch.no_grad():
            theirs: Tensor = features(module, image[None])[0]
            tokens = model.backbone.embed([image])
            ours = model.backbone.norm(model.backbone.run(tokens, 0, 4).patches().x)
            cells = grid[0] * grid[1]
            assert distance(ours, theirs[-cells:]) <= TOLERANCE
            expected = HEAD(theirs[-cells:].mT.unflatten(1, grid)[None])[0]
            assert distance(model([image]).grid_logits[0], expected) <= TOLERANCE
    return model


@timm
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", test_timm.FAMILIES)
def test_timm__is_wrapped_and_gives_the_librarys_features(family: str, share: bool) -> None:
    name, changes = test_timm.FAMILIES[family]
    module = test_timm.library_model(name, **changes)
    model = check(module, lambda m, x: m.forward_features(x), module.patch_embed.patch_size[0], share)
    assert model.preprocessing.mean == tuple(module.pretrained_cfg["mean"])
    assert model.config.backbone.num_heads == 4


@timm
def test_timm__of_one_size_with_registers_in_the_table_and_other_widths_is_wrapped() -> None:
    import timm as library
    from timm.models.vision_transformer import VisionTransformer

    made: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for changes in ({}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"mlp_ratio": 2.5}):
        module = VisionTransformer(**made, **changes)
        randomise(module)
        assert wrap(module, HEAD).config.backbone.num_heads == 3
    module = library.create_model("vit_tiny_patch16_224", num_classes=0)  # as it is made by most people
    assert wrap(module, num_classes=5).config.backbone.depth == 12


@transformers
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", test_transformers.FAMILIES)
def test_transformers__is_wrapped_and_gives_the_librarys_features(family: str, share: bool) -> None:
    module = test_transformers.library_model(family)
    resizes = {"interpolate_pos_encoding": True} if type(module).__name__ == "ViTModel" else {}
    model = check(module, lambda m, x: m(x, **resizes).last_hidden_state, 8, share)
    assert model.config.backbone.norm_eps == module.config.layer_norm_eps


@timm
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_timm__dinov3_is_wrapped_and_gives_the_librarys_features(gated: bool, share: bool) -> None:
    model = check(test_dinov3.timm_model(gated), lambda m, x: m.forward_features(x), 4, share)
    config = model.config.backbone
    assert (config.rope, config.rope_theta, config.k_bias, config.num_heads) == ("half", 100.0, False, 3)
    assert config.pos_embed_grid == (14, 14), "the module's size is no part of a model without table"


@timm
def test_timm__dinov3_of_other_periods_and_pairs_or_of_one_size_is_wrapped() -> None:
    from timm.models.eva import Eva

    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    made = sizes | {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "num_reg_tokens": 4}
    made |= {"init_values": 1.0, "num_classes": 0}
    for dynamic in (False, True):
        module = Eva(**made, rope_temperature=50, use_fc_norm=False, dynamic_img_size=dynamic).eval()
        test_dinov3.sharpen(module)
        config = wrap(module, HEAD).config.backbone
        assert (config.rope, config.rope_theta) == ("interleaved", 50.0)


@transformers
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_transformers__dinov3_is_wrapped_and_gives_the_librarys_features(gated: bool, share: bool) -> None:
    module = test_dinov3.transformers_model(gated)
    model = check(module, lambda m, x: m(x).last_hidden_state, 4, share)
    assert (model.config.backbone.rope, model.config.backbone.rope_theta) == ("half", 100.0)


@transformers
def test_transformers__dinov3_of_another_activation_is_refused() -> None:
    module = test_dinov3.transformers_model(False)
    module.config.hidden_act = "relu"
    assert "has the activation relu" in refusal(module)


@transformers
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_registers"])
def test_transformers__the_encoder_of_an_image_classifier_is_wrapped_and_runs_with_exits(family: str) -> None:
    module = test_transformers.library_model(family, "ForImageClassification")
    base = wrap(module, HEAD)
    model = ExitSegmenter(base.config.backbone, 5, (1, 2), "linear", base.decode_head).eval()
    model.backbone = base.backbone
    with torch.no_grad():
        assert model([random_image(32, 32)], DoViT(0.0)).ledger.share_of_dense[0] < 1


@transformers
def test_transformers__deit_is_wrapped() -> None:
    import transformers as library

    sizes = {**test_transformers.SHRUNK, "intermediate_size": 96}
    module = library.DeiTModel(library.DeiTConfig(**sizes)).eval()
    randomise(module)
    assert wrap(module, HEAD).config.backbone.num_registers == 1


def refusal(module: nn.Module) -> str:
    with pytest.raises(TokenExitError) as caught:
        wrap(module, num_classes=5)
    message = str(caught.value)
    assert "\n" not in message
    return message


@timm
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "is a Swin Transformer"),
        ("swinv2_tiny_window8_256", "is a Swin Transformer"),
        ("convnext_atto", "is a ConvNeXt"),
        ("resnet18", "is a ResNet"),
        ("beit_base_patch16_224", "relative positions"),
        ("vit_tiny_r_s16_p8_224", "is a hybrid"),
        ("eva02_enormous_patch14_clip_224", "another generation than EVA-02"),
        ("vit_medium_patch16_rope_reg1_gap_256", "rotary"),
        ("samvit_base_patch16", "windows and relative positions"),
        ("vit_base_patch16_clip_224", "a norm before its first block|activation"),
        ("pvt_v2_b0", "is a SegFormer"),
        ("vit_small_patch16_36x1_224", ""),
    ],
)
def test_timm__other_architectures_are_refused_in_one_sentence(name: str, message: str) -> None:
    import re

    import timm as library

    with torch.device("meta"):
        module = library.create_model(name)
    if name == "vit_small_patch16_36x1_224":  # a plain ViT of a depth that no preset has
        assert wrap(library.create_model(name, depth=3, img_size=64), num_classes=5).config.backbone.depth == 3
        return
    assert re.search(message, refusal(module))


@timm
def test_timm__blocks_that_compute_something_else_are_found_by_their_features() -> None:
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    module = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, block_fn=ResPostBlock)
    randomise(module)
    assert "are off by" in refusal(module)


@transformers
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Swin", "is a Swin Transformer"),
        ("Segformer", "is a SegFormer"),
        ("Beit", "lack pos_embed: only plain ViTs with a position table"),
        ("ConvNext", "is a ConvNeXt"),
        ("CLIPVision", "CLIPVision"),
    ],
)
def test_transformers__other_architectures_are_refused_in_one_sentence(name: str, message: str) -> None:
    import transformers as library

    config = getattr(library, f"{name}Config")()
    with torch.device("meta"):
        module = getattr(library, f"{name}Model")(config)
    assert message in refusal(module)
