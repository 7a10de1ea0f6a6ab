"""The recipes of both papers, against the tables of their specifications written down once more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tokenexit import reducers
from tokenexit.data.registry import dataset_labels
from tokenexit.methods import Dense, DoViT, DToP, Reduced, as_method, build_method
from tokenexit.outputs.ledger import dense_ops, dtop_convention_gmacs
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.annealing import fades
from tokenexit.training.config import TrainConfig, flat
from tokenexit.training.optim import learning_rate
from tokenexit.training.parsing import RECIPES as RECIPES_FOLDER
from tokenexit.training.parsing import parse_train
from tokenexit.training.plan import plan, skeleton
from tokenexit.training.recipes import scene_recipe

CONFIGS = RECIPES_FOLDER
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
PUBLISHED = [name for name in RECIPES if name.startswith(("dtop/", "dovit/"))]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIZES = {"small": 384, "base": 768, "large": 1024}
CLASSES = {"ade20k": 150, "cityscapes": 19, "pascal_context59": 59, "coco_stuff10k": 171}


@pytest.fixture(autouse=True)
def in_a_folder_without_data_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def recipe(name: str) -> TrainConfig:
    return parse_train(["--config", str(CONFIGS / name)], lambda parser: None)[0]


def model_of(run: TrainConfig) -> ExitSegmenter:
    labels = dataset_labels(run.data.name)
    assert labels is not None
    model = skeleton(run, labels)
    assert model is not None
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_recipes__can_be_planned_without_data_and_weights(name: str, tmp_path: Path) -> None:
    run = recipe(name)
    assert ("not there yet" in plan(run)) == (run.data.name != "scenes"), "scenes are drawn, not read"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes__begin_with_what_is_known_of_them(name: str) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    known = ("Published", "is known beyond its abstract", "others report", "No published figure is known")
    assert any(words in "\n".join(head) for words in known)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes__start_from_fetchable_weights_of_their_size_or_a_recipe(name: str) -> None:
    model = recipe(name).model
    if model.init_from is not None:
        base = recipe(f"{model.init_from.removeprefix('runs/')}.yaml")
        assert (base.out, model.weights) == (model.init_from, None)
        fine_tuned = replace(base.optim, decay_end=recipe(name).steps)  # the rate falls to zero at its last step
        assert (base.data, fine_tuned) == (recipe(name).data, recipe(name).optim)
    else:
        size = next(size for size in SIZES if size in model.backbone)
        assert model.weights == f"hf-hub:timm/vit_{size}_patch16_384.augreg_in21k_ft_in1k"
        assert model.options["pos_embed_grid"] == [384 // 16, 384 // 16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes__predict_at_the_size_that_they_train_at(name: str) -> None:
    data = recipe(name).data
    assert data.resize_base is not None
    assert data.resize == (None if data.name == "cityscapes" else min(data.resize_base))
    assert data.window == data.crop
    assert recipe(name).validate_every == recipe(name).checkpoint_every
    assert recipe(name).keep == "last"  # as published


@pytest.mark.parametrize("name", RECIPES)
def test_recipes__ask_no_processor_for_what_it_may_not_have(name: str) -> None:
    assert recipe(name).precision in ("auto", "fp32")


def test_recipes_page__names_every_recipe_and_none_that_is_not_there() -> None:
    text = PAGE.read_text()
    named = {f"{name}.yaml" for name in re.findall(r"(?:--config |`)((?:dtop|dovit|eomt)/\w+)", text)}
    dynamic = {name for name in PUBLISHED if "_dense" not in name}
    assert named == dynamic | {f"eomt/{name}.yaml" for name in EOMT}
    assert "None of them was trained here" in text


EOMT: dict[str, dict[str, Any]] = {
    "ade20k_large": {"steps": 31 * 1262, "size": 512, "lr": 1e-4, "decay": 0.8, "miou": "58.4"},
    "cityscapes_large": {"steps": 107 * 186, "size": 1024, "lr": 1e-4, "decay": 0.8, "miou": "84.2"},
    "ade20k_large_dinov3": {"steps": 16 * 1263, "size": 512, "lr": 2e-4, "decay": 1.0, "miou": "59.5"},
}
FADES = {
    "ade20k_large": ([6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),
    "cityscapes_large": ([3317, 6634, 9951, 13268], [6634, 9951, 13268, 16585]),
    "ade20k_large_dinov3": ([0, 6520, 9780, 13040], [3000, 9780, 13040, 16300]),
}


@pytest.mark.parametrize("name", EOMT)
def test_eomt_recipes__hold_the_published_values(name: str) -> None:
    run, published = recipe(f"eomt/{name}.yaml"), EOMT[name]
    optim, size = run.optim, (published["size"],) * 2
    assert f"Published: {published['miou']} mIoU" in (CONFIGS / f"eomt/{name}.yaml").read_text()
    assert run.steps == pytest.approx(published["steps"], abs=40)
    assert run.batch_size == 16
    assert (tuple(run.data.crop), run.data.window, run.data.ratio) == (size, size, (0.5, 2.0))
    assert run.data.stride == "even"
    assert (optim.lr, optim.layer_decay, optim.head_lr_factor) == (published["lr"], published["decay"], 1.0)
    assert (optim.warmup_steps, optim.backbone_warmup_steps) == ((2000, 3000) if "dinov3" in name else (500, 1000))
    assert (optim.weight_decay, optim.decay_all, optim.clip_grad_norm, optim.power) == (0.05, True, 0.01, 0.9)
    assert (run.ignored_pixels, run.masks.points) == ("counted", 12544)
    assert list(zip(*FADES[name])) == list(fades(run.masks, 4, run.steps))


@pytest.mark.parametrize("name", EOMT)
def test_eomt_recipes__give_the_last_four_of_24_blocks_to_100_queries(name: str) -> None:
    model = model_of(recipe(f"eomt/{name}.yaml"))
    backbone, head = model.config.backbone, model.config.decode_head
    assert (backbone.depth, backbone.patch_size, backbone.num_registers) == (20, 16, 4)
    assert {key: head[key] for key in ("layers", "queries", "steps", "prefix")} == {
        "layers": 4, "queries": 100, "steps": 2, "prefix": 5,
    }  # fmt: skip
    assert backbone.rope_rescale == (2.0 if "dinov3" in name else 1.0)
    assert recipe(f"eomt/{name}.yaml").data.mean == IMAGENET[0]


def test_recipes__are_all_that_were_published() -> None:
    """DToP: 4 base and 4 pruned. DoViT: 11 and one distilled; both decoders at three sizes on two datasets, dense."""
    dtop = {f"dtop/{name}{end}.yaml" for name in DTOP for end in ("", "_prune")}
    dovit = {f"dovit/{name}.yaml" for name in (*DOVIT, "setr_cityscapes_base_distill")}
    dense = {f"dovit/{name}.yaml" for name in DENSE}
    assert set(PUBLISHED) == dtop | dovit | dense | {"dtop/setr_ade20k_base.yaml"}
    assert (len(dtop), len(dovit), len(dense)) == (8, 12, 12)


ALGM = {  # spec of the rivals, 2.1: threshold, second block, dense GMACs of one crop as published
    "ade20k_tiny": (0.9, 5, 12.8),
    "ade20k_small": (0.88, 5, 38.6),
    "ade20k_base": (0.94, 5, 130),
    "ade20k_large": (0.95, 7, 672),
    "cityscapes_small": (0.955, 5, 116),
    "pascal_context59_small": (0.88, 5, 32.1),
}
IMAGES = {"ade20k": 64 * 20_210, "cityscapes": 216 * 2_975, "pascal_context59": 256 * 4_996}
"""Seen in training: published epochs times images."""


def test_algm_recipes__are_those_that_were_published() -> None:
    assert [name for name in RECIPES if name.startswith("algm/")] == sorted(
        f"algm/segmenter_{name}.yaml" for name in ALGM
    )


@pytest.mark.parametrize("name", ALGM)
def test_algm_recipes__merge_where_the_release_does_on_a_model_of_the_published_cost(name: str) -> None:
    threshold, block, gmacs = ALGM[name]
    run = recipe(f"algm/segmenter_{name}.yaml")
    model = model_of(run)
    (method,) = run.methods
    assert as_method(method) == Reduced(Dense(), reducers.ALGM(threshold, local_block=1, global_block=block))
    grid = model.backbone.patch_embed.grid(*run.data.crop)
    found = dense_ops(model.backbone, model.decode_head, grid).macs / 1e9
    assert found == pytest.approx(gmacs, rel=0.013 if "tiny" in name else 0.006), "the table has three digits"
    assert run.steps * run.batch_size == pytest.approx(IMAGES[run.data.name], rel=0.001)


# ------------------------------------------------------------------------------------------- value by value

CERTAINTY = {
    "released": "read in the file of the authors' release that is named",
    "framework": "inherited from mmsegmentation: its base file, its own configuration, or the default of its class",
    "inferred": "follows from what is named",
    "ours": "our choice, or a deviation, which the recipe's head or the page says",
}


class Row(NamedTuple):
    """One published value. value: JSON; null also stands for a key that a recipe does not have."""

    recipe: str
    key: str
    value: str
    certainty: str
    source: str


@cache
def published() -> dict[str, dict[str, Row]]:
    """Rows of `published.tsv`, a line for every value of every recipe, by recipe and key."""
    first, *lines = (Path(__file__).parent / "published.tsv").read_text().splitlines()
    assert tuple(first.split("\t")) == Row._fields
    table: dict[str, dict[str, Row]] = {}
    for line in lines:
        row = Row(*line.split("\t"))
        assert row.key not in table.setdefault(row.recipe, {}), line
        table[row.recipe][row.key] = row
    return table


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every value below mappings, and below lists of mappings, by its dotted key."""
    if isinstance(value, dict):
        return {key: leaf for name, inner in value.items() for key, leaf in leaves(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return leaves(dict(enumerate(value)), prefix)
    return {prefix.removesuffix("."): value}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes__hold_every_published_value_and_no_other(name: str) -> None:
    rows = published()[name.removesuffix(".yaml")]
    written = leaves(yaml.safe_load((CONFIGS / name).read_text()))
    assert written.keys() - rows.keys() == set(), "keys without a row"
    held = leaves(json.loads(json.dumps(flat(recipe(name)))))
    wrong = {key: (held.get(key), row.value) for key, row in rows.items() if held.get(key) != json.loads(row.value)}
    assert wrong == {}


def test_published_values__are_those_of_the_recipes_and_each_says_where_it_is_from() -> None:
    assert {f"{name}.yaml" for name in published()} == set(PUBLISHED)
    homes = ("DToP ", "DoViT ", "mmsegmentation 1.0 ", "mmsegmentation 0.25 ")
    for row in (row for rows in published().values() for row in rows.values()):
        assert row.certainty in CERTAINTY, row
        assert row.source, row
        if row.certainty in ("released", "framework"):
            assert row.source.startswith(homes), row
            assert re.search(r"\w\.(py|sh)\b", row.source), row
            assert row.source.startswith("mmseg") == (row.certainty == "framework"), row


# ----------------------------------------------------------------------------------------------------------- DToP

DTOP: dict[str, tuple[Any, ...]] = {
    # size, attention heads, exits, crop, resize, stride, drop path, steps, fine-tuning steps, p0, mean and std, GMACs
    "ade20k_base": ("base", 6, [6, 8], 512, (2048, 512), 341, 0.1, 40_000, 40_000, 0.90, IMAGENET, 109.86),
    "ade20k_large": ("large", 8, [8, 16], 640, (2560, 640), 320, 0.3, 160_000, 40_000, 0.95, HALF, 616.98),
    "pascal_context59_large": ("large", 16, [8, 16], 480, (2048, 520), 320, 0.3, 160_000, 40_000, 0.95, HALF, 315.36),
    "coco_stuff10k_large": ("large", 16, [8, 16], 512, (2048, 512), 341, 0.3, 160_000, 20_000, 0.95, HALF, 366.86),
}


@pytest.mark.parametrize("name", DTOP)
def test_dtop_recipes__hold_the_constants_of_the_specification(name: str) -> None:
    size, heads, exits, crop, base, stride, drop_path, steps, finetune, p0, norm, _ = DTOP[name]
    dense, prune = recipe(f"dtop/{name}.yaml"), recipe(f"dtop/{name}_prune.yaml")
    head = {"kind": "atm", "layers": 3, "num_heads": heads, "dropout": 0.1}
    assert (dense.model.backbone, dense.model.exits) == (f"vit_{size}_patch16", exits)
    assert dense.model.exit_head == dense.model.decode_head == head
    assert dense.model.options == {
        "class_token": False,
        "final_norm": False,
        "drop_path": drop_path,
        "drop_path_attention": False,
        "pos_embed_grid": [24, 24],
        "pos_embed_mode": "bicubic",
        "pos_embed_antialias": False,
    }
    assert (prune.model.init_from, prune.model.options) == (
        dense.out,
        {"drop_path": drop_path, "drop_path_attention": False},
    )
    assert dense.methods == ["dense"]
    (method,) = (build_method(spec) for spec in prune.methods)
    assert method == DToP(threshold=p0, keep_per_class=5, finish="presence_last")
    assert (dense.steps, prune.steps) == (steps, finetune)
    for run in (dense, prune):
        assert run.data.name == name.rpartition("_")[0]
        assert (run.data.crop, run.data.ratio, run.data.resize_base) == ((crop, crop), (0.5, 2.0), base)
        assert (run.data.window, run.data.stride) == ((crop, crop), (stride, stride))
        assert (run.data.mean, run.data.std) == norm
        assert run.data.cat_max_ratio == 0.75
        assert (run.batch_size, run.aux_weight, run.precision, run.freeze) == (16, 1.0, "fp32", "none")
        assert (run.optim.name, run.optim.lr, run.optim.head_lr_factor) == ("adamw", 2e-5, 10.0)
        assert (run.optim.betas, run.optim.weight_decay, run.optim.decay_all) == ((0.9, 0.999), 0.01, True)
        assert run.optim.clip_grad_norm is None
        assert run.validate_every == 4000


FIGURES: dict[str, tuple[str, str, str, str]] = {
    # README of the release: mIoU and GFLOPs, dense and with exits
    "ade20k_base": ("49.6", "109.9", "49.8", "86.8"),
    "ade20k_large": ("53.3", "617.0", "52.8", "412.8"),
    "pascal_context59_large": ("63.0", "315.4", "62.7", "224.3"),
    "coco_stuff10k_large": ("47.4", "366.9", "47.1", "276.2"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_dtop_recipes__and_their_page_say_what_was_published(name: str) -> None:
    miou, gflops, pruned_miou, pruned_gflops = FIGURES[name]
    dense, prune = ((CONFIGS / "dtop" / f"{name}{end}.yaml").read_text() for end in ("", "_prune"))
    assert f"# Published: {miou} mIoU at {gflops} GFLOPs" in dense
    assert f"# Published: {pruned_miou} mIoU at {pruned_gflops} GFLOPs, base {miou} mIoU at {gflops} GFLOPs" in prune
    (row,) = (line for line in PAGE.read_text().splitlines() if f"| `dtop/{name}` |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    threshold = f"{DTOP[name][9]:.2f}"
    assert cells[2:] == [miou, gflops, f"`dtop/{name}_prune`", threshold, pruned_miou, pruned_gflops]


@pytest.mark.parametrize("name", DTOP)
def test_dtop_recipes__cost_what_the_paper_prints(name: str) -> None:
    """As it counts: patch embedding, blocks, one head and two upsamplings of one crop."""
    run = recipe(f"dtop/{name}.yaml")
    model = model_of(run)
    assert round(dtop_convention_gmacs(model.backbone, model.decode_head, run.data.crop), 2) == DTOP[name][-1]
    assert model.config.num_classes == CLASSES[run.data.name]


def test_dtop_recipes__have_the_setr_baseline_of_the_paper() -> None:
    """Heads after 4, 7, 10 and 12 blocks, weighted 0.4, with class token and final norm; 107.7 GFLOPs."""
    run = recipe("dtop/setr_ade20k_base.yaml")
    assert (run.model.backbone, run.model.exits) == ("vit_base_patch16", [4, 7, 10])
    assert run.model.exit_head == run.model.decode_head == "setr_naive"
    assert (run.model.options["class_token"], run.model.options["final_norm"]) == (True, True)
    assert (run.model.options["pos_embed_mode"], run.data.stride) == ("bicubic", (480, 480))
    assert (run.aux_weight, run.methods, run.ignored_pixels) == (0.4, ["dense"], "counted")
    model = model_of(run)
    assert round(dtop_convention_gmacs(model.backbone, model.decode_head, run.data.crop), 1) == 107.7
    model.check(DToP(threshold=0.98))


# ---------------------------------------------------------------------------------------------------------- DoViT

DOVIT: dict[str, tuple[Any, ...]] = {
    # thresholds, warm-up share, final norm
    "setr_cityscapes_small": (0.985, 0.0, True),
    "setr_cityscapes_base": (0.985, 0.0, True),
    "setr_cityscapes_large": (0.985, 0.0, True),
    "setr_ade20k_small": ((0.96, 0.955, 0.95), 0.0, False),
    "setr_ade20k_base": ((0.96, 0.955, 0.95), 0.0, False),
    "setr_ade20k_large": (0.98, 0.0, True),
    "segmenter_cityscapes_small": (0.985, 70_000 / 80_000, True),
    "segmenter_cityscapes_base": (0.985, 70_000 / 80_000, True),
    "segmenter_cityscapes_large": (0.985, 70_000 / 80_000, True),
    "segmenter_ade20k_small": (0.96, 140_000 / 160_000, True),
    "segmenter_ade20k_base": (0.96, 140_000 / 160_000, True),
}

SETTINGS: dict[str, tuple[Any, ...]] = {
    # crop, resize, stride, mean and std, steps, images per step, lr, head factor
    "setr_cityscapes": (768, (2049, 1025), 512, IMAGENET, 80_000, 8, 0.01, 10.0),
    "setr_ade20k": (512, (2048, 512), 341, IMAGENET, 160_000, 16, 0.01, 10.0),
    "segmenter_cityscapes": (768, (2049, 1025), 512, IMAGENET, 80_000, 8, 0.01, 1.0),
    "segmenter_ade20k": (512, (2048, 512), 480, HALF, 160_000, 8, 0.001, 1.0),
    "segmenter_ade20k_large": (640, (2048, 640), 608, HALF, 160_000, 8, 0.001, 1.0),
}


def check_settings(run: TrainConfig, setting: str, images: int | None = None) -> None:
    crop, base, stride, norm, steps, batch, lr, factor = SETTINGS[setting]
    assert run.data.name == setting.split("_")[1]
    assert (run.data.crop, run.data.ratio, run.data.resize_base) == ((crop, crop), (0.5, 2.0), base)
    assert (run.data.window, run.data.stride) == ((crop, crop), (stride, stride))
    assert (run.data.mean, run.data.std) == norm
    assert run.data.cat_max_ratio == 0.75
    assert (run.steps, run.batch_size) == (steps, images or batch)
    assert (run.optim.name, run.optim.lr, run.optim.head_lr_factor) == ("sgd", lr, factor)
    assert (run.optim.momentum, run.optim.weight_decay, run.optim.clip_grad_norm) == (0.9, 0.0, None)
    assert (run.precision, run.freeze, run.ignored_pixels) == ("fp32", "none", "counted")
    assert (run.aux_weight, run.sync_batch_norm) == (0.4, bool(run.model.exits))


def check_model(run: TrainConfig, name: str, exits: list[int], final_norm: bool) -> None:
    decoder, _, size = name.split("_")[:3]
    assert (run.model.backbone, run.model.exits) == (f"vit_{size}_patch16", exits)
    up = {"kind": "setr_pup", "steps": 2, "kernel": 1, "up": 4} if "ade20k_large" in name else "setr_naive"
    mask_transformer = {"kind": "mask_transformer", "layers": 2, "drop_path": 0.1}
    heads = {"setr": (up, "setr_naive"), "segmenter": ("fcn", mask_transformer)}
    assert (run.model.exit_head, run.model.decode_head) == heads[decoder]
    segmenter = decoder == "segmenter"
    assert run.model.options["class_token"] is True
    assert run.model.options["final_norm"] is final_norm
    assert run.model.options["pos_embed_mode"] == ("bicubic" if segmenter else "bilinear")
    assert run.model.options["pos_embed_antialias"] is False
    assert run.model.options["drop_path"] == (0.1 if segmenter else 0.0)
    assert run.model.options["drop_path_attention"] is False
    model = model_of(run)
    assert model.config.num_classes == CLASSES[run.data.name]
    # the squeezed width of SETR's and FCN heads, and the width of the mask transformer
    width = model.decode_head.patch_proj.out_features if segmenter else model.decode_head.proj.out_features  # type: ignore[union-attr]
    assert width == (SIZES[size] if segmenter else 256)


@pytest.mark.parametrize("name", [*DOVIT, "setr_cityscapes_base_distill"])
def test_dovit_recipes__hold_the_constants_of_the_specification(name: str) -> None:
    threshold, warmup, final_norm = DOVIT[name.removesuffix("_distill")]
    run = recipe(f"dovit/{name}.yaml")
    check_settings(run, name.rpartition("_")[0].removesuffix("_base"))
    check_model(run, name, [6, 12, 18] if "large" in name else [2, 5, 8], final_norm)
    (method,) = (build_method(spec) for spec in run.methods)
    assert method == DoViT(threshold=threshold, threshold_warmup=warmup)
    assert (method.min_improvement, method.blend_trigger, method.blend_weight) == (None, 0.1, 0.5)
    assert (method.batch_mode, method.detach_aux) == ("exact", False)


@pytest.mark.parametrize(
    ("name", "delta"),
    [
        ("setr_ade20k_small", "0.02"),
        ("setr_ade20k_large", "0.02"),
        ("segmenter_cityscapes_small", "0.0"),
        ("segmenter_ade20k_small", "0.02"),
        ("segmenter_ade20k_base", "0.02"),
        ("setr_cityscapes_large", None),
        ("segmenter_cityscapes_base", None),
    ],
)
def test_dovit_recipes__say_what_the_second_criterion_was(name: str, delta: str | None) -> None:
    """It compares with zero in the release: at 0.02 it stops every token until scores of 150 classes have risen, at 0.0
    none. Here it is off, and the head of the file says so."""
    text = " ".join((CONFIGS / "dovit" / f"{name}.yaml").read_text().replace("\n#", "").split())
    words = {
        None: "second criterion is off, as published",
        "0.0": "second criterion at 0.0, where it never stops a token",
        "0.02": "second criterion at 0.02: the score that it compares with is never updated in the release",
    }
    assert words[delta] in text
    assert ("every token at the start of the training" in text) is (delta == "0.02")
    assert "inert" not in text


def test_dovit_recipes__distil_as_released() -> None:
    """Half the squared difference of features and the whole divergence, after the head's upsampling, from the dense
    model of that size."""
    run, alone = (recipe(f"dovit/setr_cityscapes_base{end}.yaml") for end in ("_distill", ""))
    assert run.distill.teacher == recipe("dovit/setr_cityscapes_base_dense.yaml").out
    assert (run.distill.features, run.distill.logits, run.distill.exits) == (0.5, 1.0, 0.0)
    assert (run.distill.temperature, run.distill.upsampled) == (1.0, True)
    assert (run.model, run.data, run.optim, run.methods) == (alone.model, alone.data, alone.optim, alone.methods)


DENSE: dict[str, int] = {
    # images per step: where the release says so twice those of the dynamic twin
    "setr_cityscapes_small_dense": 16,
    "setr_cityscapes_base_dense": 8,
    "setr_cityscapes_large_dense": 8,
    "setr_ade20k_small_dense": 16,
    "setr_ade20k_base_dense": 16,
    "setr_ade20k_large_dense": 16,
    "segmenter_cityscapes_small_dense": 16,
    "segmenter_cityscapes_base_dense": 16,
    "segmenter_cityscapes_large_dense": 16,
    "segmenter_ade20k_small_dense": 8,
    "segmenter_ade20k_base_dense": 8,
    "segmenter_ade20k_large_dense": 8,
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_baselines__have_heads_at_block_outputs_or_none_and_their_twins_settings(name: str) -> None:
    """SETR: outputs of blocks 2, 5, 8 counted from zero, and of 9, 14, 19 in ViT-L. Segmenter: no auxiliary heads."""
    run, twin = recipe(f"dovit/{name}.yaml"), name.removesuffix("_dense")
    setting = twin if twin == "segmenter_ade20k_large" else twin.rpartition("_")[0]
    check_settings(run, setting, DENSE[name])
    exits = [] if twin.startswith("segmenter") else [10, 15, 20] if "large" in name else [3, 6, 9]
    final_norm = twin.startswith("segmenter") or "cityscapes" in twin
    check_model(run, twin, exits, final_norm)
    assert run.methods == ["dense"]


ENCODERS = {("512", "small"): 31.7, ("512", "base"): 107.0, ("512", "large"): 362.0} | {
    ("768", "small"): 98.6,
    ("768", "base"): 295.1,
    ("768", "large"): 959.0,
}


@pytest.mark.parametrize("name", DOVIT)
def test_dovit_recipes__have_encoders_of_the_specified_cost(name: str) -> None:
    """Patch embedding, and blocks of `12 N D^2 + 2 N^2 D` each, on one crop."""
    run = recipe(f"dovit/{name}.yaml")
    backbone = model_of(run).backbone
    side = run.data.crop[0] // 16
    macs = backbone.embed_ops((side, side)).macs + backbone.block_ops(side**2 + 1).macs * backbone.config.depth
    assert macs / 1e9 == pytest.approx(ENCODERS[str(run.data.crop[0]), name.split("_")[2]], abs=0.06)


# ---------------------------------------------------------------------------------------------------------- rates


def rates(run: TrainConfig, head: bool, steps: list[int]) -> list[float]:
    initial = run.optim.lr * (run.optim.head_lr_factor if head else 1.0)
    return [learning_rate(initial, step, run.steps, run.optim) for step in steps]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("dtop/")])
def test_dtop_recipes__have_the_rates_of_the_specification(name: str, head: bool) -> None:
    """2e-5 and 2e-4, linear from 1e-6 of it over 1500 iterations, then poly 0.9 to zero: at 160k of the base models, at
    the last step where they are fine-tuned with exits."""
    peak, run = 2e-4 if head else 2e-5, recipe(name)
    end = run.steps if "prune" in name else 160_000

    def expected(step: int) -> float:
        if step < 1500:
            return peak * (1e-6 + (1 - 1e-6) * step / 1500)
        return float(peak * (1 - (step - 1500) / (end - 1500)) ** 0.9)

    steps = [0, 1, 750, 1499, 1500, 1501, run.steps // 2, run.steps - 1]
    assert rates(run, head, steps) == pytest.approx([expected(step) for step in steps])
    assert rates(run, head, [1500]) == [pytest.approx(peak)]
    at_end = rates(run, head, [run.steps])[0]
    assert at_end == (pytest.approx(0.78 * peak, rel=0.01) if name == "dtop/ade20k_base.yaml" else 0.0)


def test_dtop_recipes__are_within_one_step_of_what_mmengine_computes() -> None:
    """It multiplies the rate step by step, and its spans count one step less: from the first to the last, inclusive."""

    def factor(step: int) -> float:
        if step < 1500:  # LinearLR, start_factor 1e-6, over steps 0 to 1499
            return 1 + (1 - 1e-6) / (1499 * 1e-6 + (step - 1) * (1 - 1e-6))
        if step == 1500:
            return 1.0
        return float((1 - 1 / (158_499 - (step - 1500) + 1)) ** 0.9)  # PolyLR, over steps 1500 to 159 999

    theirs = list(accumulate(range(1, 160_000), lambda rate, step: rate * factor(step), initial=2e-5 * 1e-6))
    steps = [1, 2, 750, 1498, 1499, 1500, 1501, 20_000, 39_999, 80_000, 159_000, 159_998]
    for step, rate in zip(steps, rates(recipe("dtop/ade20k_large.yaml"), False, steps)):
        near = theirs[step - 1 : step + 2]
        assert min(near) * (1 - 1e-9) <= rate <= max(near) * (1 + 1e-9), step


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("dovit/")])
def test_dovit_recipes__decay_every_group_to_the_same_rate(name: str, head: bool) -> None:
    """No warm-up; mmcv's poly policy, `(base - min) * (1 - i / max) ** 0.9 + min`, group by group."""
    run, last = recipe(name), 160_000 if "ade20k" in name else 80_000
    peak = {"setr": 0.1 if head else 0.01, "segmenter": 0.001 if "ade20k" in name else 0.01}[name[6:].split("_")[0]]
    steps = [0, 1, last // 2, last - 1]
    expected = [(peak - 1e-4) * (1 - step / last) ** 0.9 + 1e-4 for step in steps]
    assert rates(run, head, steps) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "warmup"), [(1500, 30), (300, 30), (60, 6), (3, 1)])
def test_scene_recipe__warms_up_for_a_tenth_of_a_short_training(tmp_path: Path, steps: int, warmup: int) -> None:
    assert scene_recipe(tmp_path, steps, "fp32", 0).optim.warmup_steps == warmup
