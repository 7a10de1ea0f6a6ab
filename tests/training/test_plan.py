"""What a dry run says and refuses, without data, without weights, and without a trace."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import tiny_run, write_dataset
from tokenexit.cli import main
from tokenexit.data.registry import dataset_labels
from tokenexit.errors import TokenExitError
from tokenexit.runtime import precision
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.build import build_model
from tokenexit.training.config import DataConfig, DistillConfig, ModelConfig, TrainConfig
from tokenexit.training.loop import train
from tokenexit.training.parsing import shipped_recipes
from tokenexit.training.plan import plan, skeleton

RECIPE = str(shipped_recipes()["dtop/ade20k_base"])
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def said(config: TrainConfig) -> dict[str, str]:
    """The lines of a plan by their name."""
    return {name: text.strip() for name, _, text in (line.partition(":") for line in plan(config).splitlines())}


def test_dry_run__says_what_would_be_done_and_does_nothing(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "--config", RECIPE, "--dry-run", "--out", "here", "--steps", "123"]) == 0
    weights = "hf-hub:timm/vit_base_patch16_384.augreg_in21k_ft_in1k"
    assert capsys.readouterr().out.splitlines() == [
        f"model:    vit_base_patch16 from {weights}, 108.5 M parameters, exits after 6 and 8 of 12 blocks, "
        "109.51 GMACs for a crop without exits",
        "data:     ade20k in data/ade20k (not there yet), 150 classes, crops of 512x512",
        "methods:  dense",
        "steps:    123 of 16 images, adamw at 2e-05, heads 10 times that, warm-up over 1500, decay to 0 at step "
        "160000, validated on val after every 4000",
        "predicts: images with a shortest side of 512, windows of 512x512 every 341x341",
        f"machine:  {'cuda' if torch.cuda.is_available() else 'cpu'} in fp32",
        "writes:   here, its model and checkpoints",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.name", "nothing"], "dataset 'nothing' is unknown"),
        (["--data.name", "scenes"], "dataset 'scenes' needs no folder"),
        (["--data.root", "null"], "dataset 'ade20k' is read from a folder: give its root"),
        (["--data.train_split", "trian"], "split 'trian' of ADE20K is unknown: choose one of train, val"),
        (["--data.val_split", "test"], "split 'test' of ADE20K has no public masks"),
        (["--data.options", "{size: 3}"], "dataset 'ade20k' has no option 'size'"),
        (["--data.crop", "[0, 64]"], "RandomCrop size=(0, 64) is no size"),
        (["--data.ratio", "[2, 1]"], "RandomResize ratio must be (low, high) with 0 < low <= high, got (2.0, 1.0)"),
        (["--data.resize_base", "[0, 64]"], "RandomResize base must be (long, short) of at least 1 pixel, got (0, 64)"),
        (["--data.resize", "0"], "preprocessing.resize=0"),
        (["--data.stride", "[600, 600]"], "preprocessing.stride=(600, 600) is longer than preprocessing.window"),
        (["--model.exits", "[40]"], "exits=(40,) must be increasing numbers of blocks"),
        (["--model.exit_head", "fcm"], "head 'fcm' is unknown"),
        (["--model.options", "{foo: 1}"], "a backbone has no option 'foo'"),
        (["--model.init_from", "there"], "model.weights and model.init_from exclude each other"),
        (["--model.new_exits", "true"], "model.new_exits puts exits on a saved model"),
        (["--method", "dovit"], "DoViT scores tokens by class probability"),
        (["--methods", "[{name: dtop, threshold: [0.9]}]"], "threshold has 1 values for 2 exits"),
        (["--methods", "[{name: dtop, stop: 3}]"], "stop must be at most 2, the number of exits, got 3"),
        (["--methods", "[{name: dtop, stop: 1}]"], "a stop leaves no map at later exits"),
        (["--methods", "[{name: truncated}]"], "Truncated leaves no map at later exits"),
        (["--methods", "[{name: resized, method: dense, scale: 0.7}]"], "Resized serves inference alone"),
        (["--class_weights", "[1.0]"], "class_weights must have 150 values, one per class, got 1"),
        (["--freeze", "all_but_exit_heads"], "freeze=all_but_exit_heads would keep a random decode head"),
        (["--accumulate", "32"], "batch_size must be a multiple of 1 processes x accumulate=32, got 16"),
    ],
)
def test_dry_run__refuses_in_one_sentence_what_the_run_would(
    options: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["train", "--config", RECIPE, "--dry-run", *options]) in (1, 2)
    spoken = capsys.readouterr()
    assert (spoken.out, spoken.err.count("\n")) == ("", 1)
    assert spoken.err.startswith(f"tokenexit train: {message}")
    assert list(tmp_path.iterdir()) == []


def test_plan__counts_the_processes_that_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--config", RECIPE, "--dry-run"]) == 2


def test_plan__builds_a_new_model_without_memory_for_its_weights() -> None:
    config, labels = TrainConfig(model=ModelConfig(weights="nowhere.pth")), dataset_labels("scenes")
    assert labels is not None
    model = skeleton(config, labels)
    assert model is not None
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    real, _ = build_model(ModelConfig(), config.data, labels)
    assert model.config == real.config
    assert [p.shape for p in model.parameters()] == [p.shape for p in real.parameters()]
    text = said(config)
    assert text["model"].startswith("vit_tiny_patch16 from nowhere.pth (not there yet), ")
    assert text["data"] == "scenes, drawn when needed, 9 classes, crops of 352x352"
    assert "predicts" not in text
    assert said(TrainConfig())["model"].startswith("vit_tiny_patch16 with random weights, ")


def test_plan__asks_a_folder_that_is_there_for_its_classes(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "set", tmp_path / "out")
    assert said(config)["data"] == f"folder in {tmp_path / 'set'} (not there yet), its own classes, crops of 24x32"
    assert "GMACs" not in said(config)["model"]
    write_dataset(tmp_path / "set")
    assert said(config)["data"] == f"folder in {tmp_path / 'set'}, 3 classes, crops of 24x32"
    assert "exits after 1 and 2 of 3 blocks" in said(config)["model"]


def test_plan__takes_a_saved_model_as_it_is(tmp_path: Path) -> None:
    dense = tiny_run(write_dataset(tmp_path / "set"), tmp_path / "dense")
    dense.data = replace(dense.data, resize=(20, 30), window=(16, 16), stride=(8, 12))
    tuned = replace(dense, model=ModelConfig(init_from=dense.out), data=replace(dense.data, window=None, stride=None))
    assert said(tuned)["model"] == f"all of {dense.out} (not there yet)"
    labels = ExitSegmenter(num_classes=3).preprocessing.labels
    assert labels is not None
    build_model(dense.model, dense.data, labels)[0].save_pretrained(dense.out)
    assert said(tuned)["model"].startswith(f"all of {dense.out}, 0.0 M parameters, exits after 1 and 2 of 3 blocks, ")
    assert said(tuned)["predicts"] == "images of 20x30, windows of 16x16 every 8x12"
    even = replace(dense, data=replace(dense.data, stride="even"))
    assert said(even)["predicts"] == "images of 20x30, windows of 16x16, evenly spread"
    new = replace(tuned, model=ModelConfig(init_from=dense.out, new_exits=True, exits=[2]))
    assert said(new)["model"].startswith(f"new exits for {dense.out}, ")
    assert "exits after 2 of 3 blocks" in said(new)["model"]
    assert "3 values for 1 exits" in refused(replace(new, methods=[{"name": "dtop", "threshold": [0.9] * 3}]))
    assert "depth cannot change" in refused(
        replace(tuned, model=ModelConfig(init_from=dense.out, options={"depth": 4}))
    )


def refused(config: TrainConfig) -> str:
    with pytest.raises(TokenExitError) as caught:
        plan(config)
    return str(caught.value)


def test_plan__asks_a_teacher_that_is_there_whether_it_can_teach(tmp_path: Path) -> None:
    config = tiny_run(write_dataset(tmp_path / "set"), tmp_path / "out")
    config.distill = DistillConfig(teacher=str(tmp_path / "teacher"))
    assert said(config)["teacher"] == f"{tmp_path / 'teacher'} (not there yet)"
    labels = ExitSegmenter(num_classes=3).preprocessing.labels
    assert labels is not None
    build_model(config.model, DataConfig(), labels)[0].save_pretrained(tmp_path / "teacher")
    assert "other class names" in refused(config)


def test_plan__says_where_a_run_would_go_on(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "latest").write_text("step-0000200")
    config = TrainConfig(out="out")
    assert said(config)["writes"] == "out, its model and checkpoints, going on from step-0000200"
    assert said(replace(config, resume=False))["writes"] == "out, its model and checkpoints"


# ------------------------------------------------------------------------------------------- what is there already


def test_plan__says_how_many_images_there_are_and_how_they_were_split(tmp_path: Path) -> None:
    config = replace(tiny_run(write_dataset(tmp_path / "set"), tmp_path / "out"), validate_every="auto")
    assert said(config)["splits"] == "train with 6 images, val with 2 to validate on"
    assert said(replace(config, validate_every=0))["splits"] == "train with 6 images"
    assert "validated on val after every 2" in said(config)["steps"]
    drawn = tmp_path / "drawn"
    for kind in ("images", "annotations"):
        (drawn / kind).mkdir(parents=True)
        for k in range(40):
            shutil.copy(tmp_path / "set" / kind / "train" / f"p{k % 6}.png", drawn / kind / f"{k}.png")
    (drawn / "dataset.yaml").write_text((tmp_path / "set" / "dataset.yaml").read_text())
    config.data = replace(config.data, root=str(drawn))
    assert "no split is given, so images are split by file name, 80/10/10: " in said(config)["splits"]


@pytest.mark.parametrize("validate_every", ["auto", 3])
def test_plan__refuses_a_validation_split_that_is_not_there(validate_every: Any, tmp_path: Path) -> None:
    config = tiny_run(write_dataset(tmp_path / "set"), tmp_path / "out", validate_every=validate_every)
    config.data = replace(config.data, val_split="vla")
    message = refused(config)
    assert message.startswith("split 'vla' is unknown in")
    assert "there is test, train, val" in message
    assert ("validate_every=0 trains without" in message) == (validate_every == "auto")
    assert said(replace(config, validate_every=0))["data"]  # which nobody would look at


def test_plan__says_that_a_run_is_finished_and_refuses_another_one_in_its_folder(tmp_path: Path) -> None:
    config = tiny_run(write_dataset(tmp_path / "set"), tmp_path / "out", steps=2, methods=["dense"])
    train(config, say=lambda line: None, progress=False)
    assert said(config)["writes"].endswith(", finished: all 2 steps are done, nothing is left to train")
    assert "finished" not in said(replace(config, resume=False))["writes"]
    assert "holds a run with seed=4, not 5: choose another out" in refused(replace(config, seed=5))
    (tmp_path / "out" / "checkpoints" / "step-0000002" / "run.json").write_text("{")
    assert "is damaged or foreign" in refused(config)
    (tmp_path / "out" / "checkpoints" / "step-0000002" / "run.json").write_text("[" * 100_000)
    assert "is damaged or foreign (it nests too deeply): choose another out" in refused(config)


def test_plan__says_the_precision_and_warns_of_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset({"avx2"}))
    assert said(TrainConfig())["machine"] == "cpu in fp32"
    assert "warning" not in said(TrainConfig())
    assert said(TrainConfig(precision="bf16"))["warning"].startswith("precision bf16 is slow on this cpu")
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset({"avx512_bf16"}))
    assert said(TrainConfig())["machine"] == "cpu in bf16"
    assert "warning" not in said(TrainConfig(precision="bf16"))
