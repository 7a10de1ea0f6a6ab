"""Modules of other libraries become segmenters that answer as they do; other architectures are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokenexit
from tests.conversion.doubles import (
    DIM,
    PATCH,
    SIDE,
    DinoVisionTransformer,
    VisionTransformer,
    ViTForImageClassification,
    ViTModel,
    lively,
)
from tests.heads import own_heads
from tests.helpers import assert_close, distance, random_image
from tokenexit.conversion.wrap import wrap
from tokenexit.errors import CheckpointError, ConfigError, DataError, TokenExitError
from tokenexit.heads import ModuleHead
from tokenexit.inputs.labels import Labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, DoViT
from tokenexit.segmenter import ExitSegmenter

NATIVE, OTHER = (SIDE * PATCH, SIDE * PATCH), (3 * PATCH, 7 * PATCH)

BACKBONES: dict[str, Any] = {
    "vit": lambda: VisionTransformer(),
    "vit of one size": lambda: VisionTransformer(dynamic_img_size=False),
    "vit of no square": lambda: VisionTransformer(grid=(4, 6)),
    "average pooled": lambda: VisionTransformer(final_norm=False),
    "deit3": lambda: VisionTransformer(no_embed_class=True, scaled=True),
    "registers": lambda: VisionTransformer(no_embed_class=True, reg_tokens=3),
    "registers with positions": lambda: VisionTransformer(reg_tokens=3),
    "registers, no class": lambda: VisionTransformer(reg_tokens=2, class_token=False),
    "no prefix": lambda: VisionTransformer(class_token=False),
    "dinov2": lambda: DinoVisionTransformer(),
    "dinov2 with registers": lambda: DinoVisionTransformer(num_register_tokens=2, offset=0.0, antialias=True),
    "dinov2 in chunks": lambda: DinoVisionTransformer(chunks=True),
    "dinov2 giant": lambda: DinoVisionTransformer(gated=True),
    "transformers": lambda: ViTModel(),
    "transformers, classifier": lambda: ViTForImageClassification(),
}


def maps_of(module: Any, image: Tensor) -> Tensor:
    """The last feature map of a stand-in, `(1, C, h, w)`."""
    body = getattr(module, "vit", module).eval()
    if hasattr(body, "forward_features"):
        x = body.forward_features(image[None])
        x = x["x_norm_patchtokens"] if isinstance(x, dict) else x
    else:
        x = body(image[None], interpolate_pos_encoding=True).last_hidden_state
    grid = (image.shape[1] // PATCH, image.shape[2] // PATCH)
    return x[:, x.shape[1] - grid[0] * grid[1] :].mT.unflatten(2, grid)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(TokenExitError) as caught:
        wrap(*arguments, **options)
    assert not isinstance(caught.value, CheckpointError), "there is no file"
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_wrap__answers_as_backbone_and_head_do_at_every_size(name: str, share: bool) -> None:
    module, head = lively(BACKBONES[name]()), lively(own_heads.Up())
    model = wrap(module, head, share=share)
    assert not model.training
    assert model.config.exits == ()
    sizes = [(16, 24) if "square" in name else NATIVE] + ([] if "one size" in name else [OTHER])
    with torch.no_grad():
        for size in sizes:
            image = random_image(*size)
            expected = head.eval()(maps_of(module, image))[0]
            assert_close(model([image]).grid_logits[0], expected)


def test_wrap__reads_settings_from_the_module_and_assumes_none() -> None:
    timm = wrap(lively(VisionTransformer(eps=1e-5)), num_classes=3)
    assert (timm.config.backbone.num_heads, timm.config.backbone.norm_eps) == (4, 1e-5)
    assert (timm.preprocessing.mean, timm.preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    theirs = wrap(lively(ViTModel(eps=1e-3)), num_classes=3)
    assert (theirs.config.backbone.num_heads, theirs.config.backbone.norm_eps) == (4, 1e-3)
    assert theirs.preprocessing.mean == (0.485, 0.456, 0.406)


def test_wrap__leaves_the_modules_as_they_were() -> None:
    module, head = lively(VisionTransformer()), lively(own_heads.Up())
    module.blocks[1].eval()
    head.norm.eval()
    before = [(part, part.training) for part in (*module.modules(), *head.modules())]
    weights = copy.deepcopy([*module.state_dict().values(), *head.state_dict().values()])
    model = wrap(module, head)
    assert all(part.training == training for part, training in before)
    assert not module.norm._forward_pre_hooks
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert all(map(torch.equal, weights, [*module.state_dict().values(), *head.state_dict().values()]))


def test_wrap__is_a_public_name() -> None:
    assert tokenexit.wrap is wrap


# ------------------------------------------------------------------------------------------------------------ sharing


def shared_names(model: nn.Module, module: nn.Module) -> set[str]:
    memory = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return {name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() in memory}


def test_share__timm_gives_all_its_parameters() -> None:
    module, head = lively(VisionTransformer(scaled=True)), lively(own_heads.Plain())
    module.pos_embed.requires_grad_(False)
    model = wrap(module, head, share=True)
    theirs = dict(module.named_parameters())
    assert all(value is theirs[name] for name, value in model.backbone.named_parameters())
    assert not model.backbone.pos_embed.requires_grad
    shared, copied = model.decode_head, wrap(module, head).decode_head
    assert isinstance(shared, ModuleHead)
    assert isinstance(copied, ModuleHead)
    assert shared.module is head
    assert copied.module is not head
    assert shared_names(wrap(module, head), module) == set()


def test_share__of_transformers_queries_keys_and_values_are_copied() -> None:
    module = lively(ViTModel())
    backbone = wrap(module, num_classes=3, share=True).backbone
    copied = {name for name, _ in backbone.named_parameters()} - shared_names(backbone, module)
    assert copied == {f"blocks.{i}.attn.qkv.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    assert backbone.cls_token is module.embeddings.cls_token


def test_share__tokens_to_which_positions_are_added_are_copied() -> None:
    module = lively(VisionTransformer(reg_tokens=3))
    backbone = wrap(module, num_classes=3, share=True).backbone
    copied = {name for name, _ in backbone.named_parameters()} - shared_names(backbone, module)
    assert copied == {"cls_token", "reg_token"}


def test_share__a_shared_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = wrap(lively(VisionTransformer(reg_tokens=3)), nn.Conv2d(DIM, 4, 1), share=True)
    model.save_pretrained(tmp_path)
    assert ExitSegmenter.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_share__other_precisions_are_copied_and_not_shared() -> None:
    module = lively(VisionTransformer()).bfloat16()
    model = wrap(module, num_classes=3)
    assert model.backbone.pos_embed.dtype == torch.float32
    assert torch.equal(model.backbone.pos_embed, module.pos_embed.float())
    assert module.pos_embed.dtype == torch.bfloat16
    assert "share=True needs float32 weights, got torch.bfloat16: call .float()" in refusal(
        module, num_classes=3, share=True
    )


# -------------------------------------------------------------------------------------------------------------- heads


def batch_norm() -> nn.Module:
    norm: Any = nn.BatchNorm2d(DIM)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (lambda: nn.Linear(DIM, 4), "linear"),
        (lambda: nn.Linear(DIM, 4, bias=False), "linear"),
        (lambda: nn.Conv2d(DIM, 4, 1), "linear"),
        (lambda: nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(DIM, 4, 1)), "linear"),
        (lambda: nn.Sequential(batch_norm(), nn.Conv2d(DIM, 4, 1)), "dinov2_linear"),
        (lambda: nn.Sequential(nn.Sequential(batch_norm(), nn.Dropout(0.1)), nn.Conv2d(DIM, 4, 1)), "dinov2_linear"),
        (lambda: nn.Sequential(nn.BatchNorm2d(DIM, eps=1e-3), nn.Conv2d(DIM, 4, 1)), "module"),
        (lambda: nn.Sequential(nn.BatchNorm2d(DIM, affine=False), nn.Conv2d(DIM, 4, 1)), "module"),
        (lambda: nn.Conv2d(DIM, 4, 3, padding=1), "module"),
        (lambda: nn.Conv2d(DIM, 4, 1, groups=4), "module"),
        (lambda: nn.Sequential(nn.Conv2d(DIM, 4, 1), nn.Upsample(scale_factor=PATCH, mode="bilinear")), "module"),
    ],
)
def test_head__becomes_one_of_ours_where_it_is_one_and_answers_the_same(head: Any, kind: str, share: bool) -> None:
    module, given, image = lively(VisionTransformer()), head(), random_image(*OTHER)
    model = wrap(module, given, share=share)
    assert model.config.decode_head["kind"] == kind
    with torch.no_grad():
        maps = maps_of(module, image)
        given.eval()
        expected = given(maps.movedim(1, 3)).movedim(3, 1) if isinstance(given, nn.Linear) else given(maps)
        assert_close(model([image]).grid_logits[0], expected[0])
    memory = {p.data_ptr() for p in given.parameters()}
    weights = [p for p in model.decode_head.parameters() if p.shape[0] == 4 and p.ndim > 1]
    assert all((p.data_ptr() in memory) == share for p in weights)


def test_head__a_full_size_map_is_a_scale_of_the_patch() -> None:
    head = nn.Sequential(nn.Conv2d(DIM, 4, 1), nn.Upsample(scale_factor=PATCH, mode="bilinear"))
    model = wrap(lively(VisionTransformer()), head)
    assert model.decode_head.scale == PATCH
    with torch.no_grad():
        out = model([random_image(*OTHER)])
    assert out.grid_logits[0].shape == (4, *OTHER)
    assert torch.equal(out.labels[0], out.grid_logits[0].argmax(0))


def test_head__none_is_a_fresh_linear_layer_for_the_classes() -> None:
    model = wrap(lively(VisionTransformer()), num_classes=6, labels=["a", "b", "c", "d", "e", "f"])
    assert model.config.decode_head == {"kind": "linear"}
    assert model.classes.names[2] == "c"
    assert model.decode_head.classifier.weight.std() > 0


def test_head__reads_features_before_the_last_norm_where_that_is_said() -> None:
    module, head, image = lively(VisionTransformer()), lively(own_heads.Plain()), random_image(*OTHER)
    model = wrap(module, head, normed=False)
    assert not model.config.backbone.final_norm
    norm, module.norm = module.norm, nn.Identity()
    with torch.no_grad():
        expected = head.eval()(maps_of(module, image))[0]
        assert_close(model([image]).grid_logits[0], expected)
        module.norm = norm
        assert distance(model([image]).grid_logits[0], head(maps_of(module, image))[0]) > 1e-2


def test_head__its_options_are_saved_and_build_it_again(tmp_path: Path) -> None:
    model = wrap(lively(VisionTransformer()), own_heads.Plain(channels=7), head_options={"channels": 7})
    model.save_pretrained(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path, head=own_heads.Plain)
    assert again.fingerprint() == model.fingerprint()
    assert again.config.decode_head["options"] == {"channels": 7}


def test_head__layers_without_shapes_get_them_from_the_features() -> None:
    head = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.ReLU(), nn.LazyConv2d(4, 1))
    made: Any = wrap(lively(VisionTransformer()), head).decode_head
    assert made.module[0].in_channels == DIM


def test_wrapped__exits_may_be_added_around_its_parts_and_dovit_runs() -> None:
    base = wrap(lively(VisionTransformer()), lively(own_heads.Up()))
    head = base.decode_head
    assert isinstance(head, ModuleHead)
    model = ExitSegmenter(base.config.backbone, 5, (1, 2), "linear", head, base.preprocessing).eval()
    model.backbone = base.backbone
    images = [random_image(*NATIVE), random_image(*OTHER)]
    with torch.no_grad():
        for a, b in zip(model(images, Dense()).grid_logits, base(images).grid_logits):
            assert torch.equal(a, b)
        assert model(images, DoViT(0.0)).ledger.share_of_dense[0] < 1


# -------------------------------------------------------------------------------------------------- labels and images


def test_labels__of_the_user_stand_in_the_preprocessing() -> None:
    names = ("sky", "road", "tree")
    given = Preprocessing(resize=64)
    model = wrap(lively(VisionTransformer()), num_classes=3, labels=names, preprocessing=given)
    assert (model.preprocessing.resize, model.classes.names) == (64, names)
    labels = Labels(names, ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 254)
    assert wrap(lively(VisionTransformer()), num_classes=3, labels=labels).classes == labels
    assert "names 3 classes and num_classes=4" in refusal(lively(VisionTransformer()), num_classes=4, labels=names)
    assert "labels is 'sky': give a list of names" in refusal(lively(VisionTransformer()), num_classes=3, labels="sky")


@pytest.mark.parametrize("module", [VisionTransformer(), VisionTransformer(dynamic_img_size=False), ViTModel()])
def test_images__of_any_size_and_kind_are_compared_at_sizes_that_the_module_takes(module: nn.Module) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)
    images: Any = [photo, random_image(3, 2), "never opened: two images are compared"]
    assert wrap(lively(module), num_classes=3, images=images).config.num_classes == 3


def test_images__that_are_none_are_refused() -> None:
    module = lively(VisionTransformer())
    assert "images is empty" in refusal(module, num_classes=3, images=[])
    assert "an image has shape (20, 20)" in refusal(module, num_classes=3, images=[torch.zeros(20, 20)])
    with pytest.raises(DataError, match=r"no\.png"):
        wrap(module, num_classes=3, images=["no.png"])


# ----------------------------------------------------------------------------------------------------------- refusals


def changed(change: Any) -> Any:
    module = lively(VisionTransformer())
    change(module)
    return module


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Hidden(VisionTransformer):
    """Does what nothing outside tells."""

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images) * (1 + 1e-3)


class Failing(VisionTransformer):
    def forward_features(self, images: Tensor) -> Tensor:
        raise RuntimeError("out of\norder")


class Pooling(VisionTransformer):
    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images)[:, :5]


def named_like(*names: str) -> nn.Module:
    """A module with entries of these names."""
    root = nn.Module()
    for name in names:
        place = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, nn.Parameter(torch.zeros(2, 2)))
    return root


def whole() -> nn.Module:
    model = nn.Module()
    model.backbone, model.decode_head = VisionTransformer(), own_heads.Plain()
    return model


OTHERS: dict[str, tuple[Any, str]] = {
    "swin": (lambda: named_like("layers.0.blocks.0.attn.relative_position_bias_table"), "is a Swin Transformer"),
    "segformer": (lambda: named_like("patch_embed1.proj.weight", "block1.0.attn.sr.weight"), "is a SegFormer"),
    "u-net": (lambda: named_like("down1.conv.weight", "up1.conv.weight"), "is a U-Net"),
    "convnext": (lambda: named_like("stages.0.blocks.0.conv_dw.weight"), "is a ConvNeXt"),
    "sam": (lambda: named_like("blocks.0.attn.rel_pos_h"), "windows and relative positions"),
    "beit": (lambda: named_like("blocks.0.attn.relative_position_bias_table"), "relative positions"),
    "hybrid": (lambda: named_like("patch_embed.backbone.conv.weight"), "is a hybrid"),
    "mlp": (lambda: nn.Linear(3, 4), "Linear has names of none of these (its weights begin with weight, bias)"),
    "nothing": (lambda: nn.Identity(), "its weights begin with nothing"),
    "whole": (whole, "is a whole segmenter: give its two parts, wrap(model.backbone, model.decode_head)"),
    "segmenter": (
        lambda: named_like("encoder.patch_embed.proj.weight", "decoder.head.weight"),
        "has the names of Segmenter: convert its saved weights",
    ),
    "windows": (lambda: changed(lambda m: setattr(m.blocks[1], "window_size", 7)), "has attention in windows"),
    "rotary": (lambda: changed(lambda m: setattr(m, "rope", object())), "has rotary positions"),
    "quick gelu": (lambda: lively(VisionTransformer(act=QuickGELU())), "has the activation QuickGELU, where tokenexit"),
    "tanh gelu": (lambda: lively(VisionTransformer(act=nn.GELU("tanh"))), "has the activation GELU (tanh)"),
    "relu": (lambda: ViTModel(hidden_act="relu"), "has the activation relu"),
    "epsilons": (
        lambda: changed(lambda m: setattr(m.blocks[0].norm2, "eps", 1e-3)),
        "has norms of different epsilon (0.001, 1e-05)",
    ),
    "query norm": (
        lambda: changed(lambda m: setattr(m.blocks[0].attn, "q_norm", nn.LayerNorm(8))),
        "has normalised queries and keys (blocks.0.attn.q_norm.weight), which tokenexit's backbone lacks",
    ),
    "clip": (lambda: changed(lambda m: setattr(m, "norm_pre", nn.LayerNorm(DIM))), "has a norm before its first block"),
    "gate": (
        lambda: changed(lambda m: setattr(m.blocks[2].attn, "gate", nn.Linear(2, 2))),
        "has other parts (blocks.2",
    ),
    "no bias": (
        lambda: changed(lambda m: setattr(m.blocks[0].attn.proj, "bias", None)),
        "lacks blocks.0.attn.proj.bias",
    ),
    "no table": (lambda: changed(lambda m: setattr(m, "pos_embed", None)), "lack pos_embed: only plain ViTs"),
    "no heads": (lambda: changed(lambda m: delattr(m.blocks[0].attn, "num_heads")), "is not built as theirs are"),
    "overlap": (
        lambda: changed(lambda m: setattr(m.patch_embed, "proj", nn.Conv2d(3, DIM, PATCH, 2))),
        "has patches that overlap",
    ),
    "grey": (lambda: changed(lambda m: setattr(m.patch_embed, "proj", nn.Conv2d(1, DIM, PATCH, PATCH))), "RGB"),
    "narrow block": (
        lambda: changed(lambda m: setattr(m.blocks[1].mlp, "fc1", nn.Linear(DIM, 40))),
        "has blocks.1.mlp.fc1.weight of shape (40, 32)",
    ),
    "another computation": (lambda: lively(Hidden()), "features of the wrapped Hidden are off by"),
    "an error": (lambda: lively(Failing()), "could not be run on images of 20x20 (RuntimeError: out of): see"),
    "fewer tokens": (lambda: lively(Pooling()), "gives features (4, 32) for images of 20x20, where a plain ViT gives"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refused__with_what_is_missing_in_one_sentence(name: str) -> None:
    make, message = OTHERS[name]
    assert message in refusal(make(), num_classes=3)


def test_refused__a_difference_is_measured_and_named() -> None:
    message = refusal(lively(Hidden()), num_classes=3)
    assert "are off by 1.0e-03 of the largest one on images of 20x20, where 1e-05 is allowed" in message


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (None, {}, "wrap needs a decode head"),
        ("linear", {}, "head is 'linear': give the torch.nn.Module with its weights"),
        ({"kind": "atm"}, {}, "head is a dict: give the torch.nn.Module with its weights"),
        (nn.Conv2d(DIM, 4, 1), {"num_classes": 5}, "num_classes=5 and the head has 4"),
        (own_heads.Plain(), {"num_classes": 4}, "num_classes=4 and the head has 5"),
        (nn.Linear(9, 4), {}, "takes 9 channels and the backbone gives 32"),
        (nn.Linear(DIM, 4), {"head_options": {"a": 1}}, "head_options are given, and decode head Linear is saved as"),
        (own_heads.Plain(), {"head_options": {"a": nn.ReLU}}, "head_options must be"),
        (own_heads.Several(), {}, "reads the last feature map alone"),
        (own_heads.MultipleSelect(), {}, "reads several feature maps"),
        (own_heads.FixedSize(), {}, "maps 5x5 to 8x8 and 6x7 to 8x8"),
    ],
)
def test_refused__heads_and_options_that_do_not_fit(head: Any, options: dict[str, Any], message: str) -> None:
    assert message in refusal(lively(VisionTransformer()), head, **options)


def test_refused__what_is_no_module() -> None:
    assert "backbone is 'vit_base_patch16_224': give the torch.nn.Module" in refusal("vit_base_patch16_224")
    with pytest.raises(ConfigError, match="tokenexit's own LinearHead"):
        wrap(lively(VisionTransformer()), tokenexit.heads.build_head("linear", DIM, 3))
