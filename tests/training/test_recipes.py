"""The recipes of both papers, against the tables of their specifications written down once more."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenexit.cli import main
from tokenexit.data.registry import dataset_labels
from tokenexit.ledger import dtop_convention_gmacs
from tokenexit.methods import DoViT, DToP, build_method
from tokenexit.training.config import TrainConfig
from tokenexit.training.optim import learning_rate
from tokenexit.training.parsing import parse_train
from tokenexit.training.plan import plan, skeleton

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SMALL, BASE, LARGE = "vit_small_patch16", "vit_base_patch16", "vit_large_patch16"


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@cache
def recipe(name: str) -> TrainConfig:
    return parse_train(["--config", str(CONFIGS / name)], lambda parser: None)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__can_be_planned_without_data_and_weights(name: str) -> None:
    text = plan(recipe(name))
    assert text.count("\n") >= 4


def test_recipes__are_all_that_were_published() -> None:
    dtop = [name for name in RECIPES if name.startswith("dtop/") and "setr" not in name]
    assert sum(name.endswith("_prune.yaml") for name in dtop) == 4
    assert len(dtop) == 8
    dovit = [name for name in RECIPES if name.startswith("dovit/") and "dense" not in name]
    assert sum("distill" in name for name in dovit) == 1
    assert len(dovit) == 12


DTOP: dict[str, tuple[Any, ...]] = {
    # backbone, attention heads, exits, crop, resize, stride, drop path, steps, fine-tuning steps, p0, mean and std
    "ade20k_base": (BASE, 6, [6, 8], 512, (2048, 512), 341, 0.1, 40_000, 40_000, 0.90, IMAGENET),
    "ade20k_large": (LARGE, 8, [8, 16], 640, (2560, 640), 320, 0.3, 160_000, 40_000, 0.95, HALF),
    "pascal_context59_large": (LARGE, 16, [8, 16], 480, (2048, 520), 320, 0.3, 160_000, 40_000, 0.95, HALF),
    "coco_stuff10k_large": (LARGE, 16, [8, 16], 512, (2048, 512), 341, 0.3, 160_000, 20_000, 0.95, HALF),
}


@pytest.mark.parametrize("name", DTOP)
def test_dtop_recipes__hold_the_constants_of_the_specification(name: str) -> None:
    backbone, heads, exits, crop, base, stride, drop_path, steps, finetune, p0, norm = DTOP[name]
    dense, prune = recipe(f"dtop/{name}.yaml"), recipe(f"dtop/{name}_prune.yaml")
    head = {"kind": "atm", "layers": 3, "num_heads": heads, "dropout": 0.1}
    assert (dense.model.backbone, dense.model.exits) == (backbone, exits)
    assert dense.model.exit_head == dense.model.decode_head == head
    assert (dense.model.options["class_token"], dense.model.options["final_norm"]) == (False, False)
    assert prune.model.init_from == dense.out
    assert [build_method(spec) for spec in prune.methods] == [
        DToP(threshold=p0, keep_per_class=5, finish="presence_last")
    ]
    assert dense.methods == ["dense"]
    assert (dense.steps, prune.steps) == (steps, finetune)
    for run in (dense, prune):
        assert run.model.options["drop_path"] == drop_path
        assert (tuple(run.data.crop), tuple(run.data.ratio)) == ((crop, crop), (0.5, 2.0))
        assert run.data.resize_base == base
        assert (run.data.window, run.data.stride) == ((crop, crop), (stride, stride))
        assert (tuple(run.data.mean), tuple(run.data.std)) == norm
        assert run.data.cat_max_ratio == 0.75
        assert (run.batch_size, run.aux_weight, run.precision) == (16, 1.0, "fp32")
        assert (run.optim.name, run.optim.decay_all, run.optim.weight_decay) == ("adamw", True, 0.01)
        assert run.optim.clip_grad_norm is None


@pytest.mark.parametrize("name", DTOP)
def test_dtop_recipes__have_the_rates_of_the_specification(name: str) -> None:
    """b.1: 2e-5 and 2e-4, linear from 1e-6 of it over 1500 iterations, then poly 0.9 to zero at 160k."""
    run = recipe(f"dtop/{name}.yaml")

    def oracle(initial: float, step: int) -> float:
        if step < 1500:
            return initial * (1e-6 + (1 - 1e-6) * step / 1500)
        return float(initial * (1 - (step - 1500) / (160_000 - 1500)) ** 0.9)

    for factor in (1.0, run.optim.head_lr_factor):
        for step in (0, 1, 750, 1499, 1500, 20_000, 39_999):
            rate = learning_rate(run.optim.lr * factor, step, run.steps, run.optim)
            assert rate == pytest.approx(oracle(2e-5 if factor == 1 else 2e-4, step), rel=1e-9), step
    assert learning_rate(1.0, 40_000, 40_000, run.optim) == pytest.approx(0.78, abs=0.005)  # f.3


PRINTED = {
    "ade20k_base": 109.86,
    "ade20k_large": 616.98,
    "pascal_context59_large": 315.36,
    "coco_stuff10k_large": 366.86,
}


@pytest.mark.parametrize("name", DTOP)
def test_dtop_recipes__cost_what_the_paper_prints(name: str) -> None:
    run = recipe(f"dtop/{name}.yaml")
    model = model_of(run)
    gmacs = dtop_convention_gmacs(model.backbone, model.decode_head, tuple(run.data.crop))
    assert round(gmacs, 2) == PRINTED[name]


DOVIT: dict[str, tuple[Any, ...]] = {
    # backbone, thresholds, warm-up share, final norm, batch, lr, head factor, stride, mean and std
    "setr_cityscapes_small": (SMALL, 0.985, 0.0, True, 8, 1e-2, 10.0, 512, IMAGENET),
    "setr_cityscapes_base": (BASE, 0.985, 0.0, True, 8, 1e-2, 10.0, 512, IMAGENET),
    "setr_cityscapes_large": (LARGE, 0.985, 0.0, True, 8, 1e-2, 10.0, 512, IMAGENET),
    "setr_ade20k_small": (SMALL, (0.96, 0.955, 0.95), 0.0, False, 16, 1e-2, 10.0, 341, IMAGENET),
    "setr_ade20k_base": (BASE, (0.96, 0.955, 0.95), 0.0, False, 16, 1e-2, 10.0, 341, IMAGENET),
    "setr_ade20k_large": (LARGE, 0.98, 0.0, True, 16, 1e-2, 10.0, 341, IMAGENET),
    "segmenter_cityscapes_small": (SMALL, 0.985, 7 / 8, True, 8, 1e-2, 1.0, 512, IMAGENET),
    "segmenter_cityscapes_base": (BASE, 0.985, 7 / 8, True, 8, 1e-2, 1.0, 512, IMAGENET),
    "segmenter_cityscapes_large": (LARGE, 0.985, 7 / 8, True, 8, 1e-2, 1.0, 512, IMAGENET),
    "segmenter_ade20k_small": (SMALL, 0.96, 7 / 8, True, 8, 1e-3, 1.0, 480, HALF),
    "segmenter_ade20k_base": (BASE, 0.96, 7 / 8, True, 8, 1e-3, 1.0, 480, HALF),
    "setr_cityscapes_base_distill": (BASE, 0.985, 0.0, True, 8, 1e-2, 10.0, 512, IMAGENET),
}


@pytest.mark.parametrize("name", DOVIT)
def test_dovit_recipes__hold_the_constants_of_the_specification(name: str) -> None:
    backbone, threshold, warmup, norm, batch, lr, factor, stride, mean_std = DOVIT[name]
    run, city, setr = recipe(f"dovit/{name}.yaml"), "cityscapes" in name, name.startswith("setr")
    assert (run.model.backbone, run.model.exits) == (backbone, [6, 12, 18] if backbone == LARGE else [2, 5, 8])
    assert run.model.options["final_norm"] is norm
    assert run.model.options["pos_embed_mode"] == ("bilinear" if setr else "bicubic")
    assert run.model.options["drop_path"] == (0.0 if setr else 0.1)
    assert setr or run.model.options["drop_path_attention"] is False
    assert run.model.decode_head == ("setr_naive" if setr else {"kind": "mask_transformer", "layers": 2})
    (method,) = (build_method(spec) for spec in run.methods)
    assert method == DoViT(threshold=threshold, threshold_warmup=warmup)
    assert (method.min_improvement, method.blend_trigger, method.blend_weight) == (None, 0.1, 0.5)
    crop = 768 if city else 512
    assert (tuple(run.data.crop), run.data.resize_base) == ((crop, crop), (2049, 1025) if city else (2048, 512))
    assert (run.data.window, run.data.stride) == ((crop, crop), (stride, stride))
    assert (tuple(run.data.mean), tuple(run.data.std)) == mean_std
    assert (run.steps, run.batch_size) == (80_000 if city else 160_000, batch)
    assert (run.optim.name, run.optim.lr, run.optim.head_lr_factor) == ("sgd", lr, factor)
    assert (run.optim.weight_decay, run.optim.momentum, run.optim.warmup_steps) == (0.0, 0.9, 0)
    assert (run.aux_weight, run.sync_batch_norm) == (0.4, True)


def test_dovit_recipes__decay_every_group_to_the_same_rate() -> None:
    """mmcv's poly policy: (base - min) * (1 - i / max) ** 0.9 + min, group by group."""
    run = recipe("dovit/setr_cityscapes_base.yaml")
    for initial in (1e-2, 1e-1):
        for step in (0, 40_000, 79_999):
            expected = (initial - 1e-4) * (1 - step / 80_000) ** 0.9 + 1e-4
            assert learning_rate(initial, step, run.steps, run.optim) == pytest.approx(expected)


def test_dovit_recipes__distil_as_released() -> None:
    distill = recipe("dovit/setr_cityscapes_base_distill.yaml").distill
    assert distill.teacher == recipe("dovit/setr_cityscapes_base_dense.yaml").out
    assert (distill.features, distill.logits, distill.exits, distill.temperature) == (0.5, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("setr_ade20k_small", 31.7),
        ("setr_ade20k_base", 107.0),
        ("setr_ade20k_large", 362.0),
        ("segmenter_cityscapes_small", 98.6),
        ("segmenter_cityscapes_base", 295.1),
        ("segmenter_cityscapes_large", 959.0),
    ],
)
def test_dovit_recipes__have_encoders_of_the_specified_cost(name: str, gmacs: float) -> None:
    """C.3: patch embedding, and blocks of `12 N D^2 + 2 N^2 D` each, on one crop."""
    run = recipe(f"dovit/{name}.yaml")
    backbone = model_of(run).backbone
    side = run.data.crop[0] // 16
    macs = backbone.embed_ops((side, side)).macs + backbone.block_ops(side**2 + 1).macs * backbone.config.depth
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("dovit/") and "dense" in name])
def test_dense_baselines__have_their_heads_at_block_outputs_and_their_twins_data(name: str) -> None:
    run = recipe(name)
    assert run.methods == ["dense"]
    assert run.model.exits == ([10, 15, 20] if run.model.backbone == LARGE else [3, 6, 9])
    twin = CONFIGS / name.replace("_dense", "")
    if twin.exists():
        other = recipe(name.replace("_dense", ""))
        assert (run.data, run.steps, run.optim) == (other.data, other.steps, other.optim)
        assert run.model.options["final_norm"] == other.model.options["final_norm"]


def model_of(run: TrainConfig) -> Any:
    labels = dataset_labels(run.data.name)
    assert labels is not None
    return skeleton(run.model, labels.num_classes)


def test_plan__builds_no_weights() -> None:
    model = model_of(recipe("dtop/ade20k_large.yaml"))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_dry_run__says_what_would_be_done_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "dtop" / "ade20k_base.yaml")
    out = tmp_path / "run"
    assert main(["train", "--config", config, "--dry-run", "--out", str(out), "--steps", "123"]) == 0
    text = capsys.readouterr().out
    for word in ("109.51 GMACs", "150 classes", "123 of 16 pictures", str(out), "data/ade20k (not there yet)"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.name", "nothing"], "nothing"),
        (["--model.exits", "[40]"], "exits"),
        (["--class_weights", "[1.0]"], "class_weights has 1"),
        (["--freeze", "all_but_exit_heads"], "init_from"),
    ],
)
def test_dry_run__refuses_what_a_run_would_refuse(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", *options]) != 0
    assert message in capsys.readouterr().err
