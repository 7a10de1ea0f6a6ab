"""Runs on images without labels: the teacher is all there is to learn from."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenexit.training.loop as loop
from tests.helpers import tiny_segmenter
from tests.training.test_loop import Killed, run
from tests.training.tiny import HEADS, same_weights, tiny_run, write_dataset
from tokenexit.cli import main
from tokenexit.data.loader import is_unlabelled
from tokenexit.data.photos import Photos
from tokenexit.errors import CheckpointError, ConfigError, DataError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import DataConfig, DistillConfig, ModelConfig, TrainConfig, validation_steps
from tokenexit.training.plan import plan


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set") / "images" / "train"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with exits, which is the teacher, too: its exits have learned nothing."""
    folder = tmp_path_factory.mktemp("source")
    tiny_segmenter("fcn", num_classes=3).save_pretrained(folder)
    return folder


def taught(photos: Path, out: Path, source: Path, **changes: Any) -> TrainConfig:
    config = tiny_run(
        photos, out, distill=DistillConfig(str(source), exits=0.5), **({"validate_every": "auto"} | changes)
    )
    data = DataConfig(name="photos", root=str(photos), crop=(24, 32))
    model = ModelConfig(init_from=str(source), options={"drop_path": 0.2})
    return replace(config, data=data, model=model)


def run_until(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and end by an exception in the middle of a step."""
    calls, original = 0, loop.distillation_loss

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "distillation_loss", counted)
        run(config)


def test_run__learns_from_its_teacher_alone_and_says_so(photos: Path, tmp_path: Path, source: Path) -> None:
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = run(taught(photos, tmp_path, source, aux_weight=0.0, methods=["dense"]), say=lines.append)
    assert "photos have no labels: the teacher is all there is to learn from, nothing is validated" in lines[0]
    assert "of photos, 6 steps of 2" in lines[0]
    before = ExitSegmenter.from_pretrained(source)
    moved = [name for name, value in before.named_parameters() if not torch.equal(value, weights[name])]
    assert moved == [name for name, _ in before.named_parameters()]
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert not any("mIoU" in line for line in lines[1:])


@pytest.mark.parametrize("head", ["fcn", "atm", "setr_pup"])
def test_run__of_every_kind_of_head_has_a_finite_loss(head: str, photos: Path, tmp_path: Path) -> None:
    tiny_segmenter(HEADS[head], num_classes=3).save_pretrained(tmp_path / "source")
    method = {"setr_pup": "dovit"}.get(head, "dtop")
    config = taught(
        photos, tmp_path / "out", tmp_path / "source", methods=[{"name": method, "threshold": 0.4}], steps=3
    )
    lines: list[str] = []
    assert all(bool(value.isfinite().all()) for value in run(config, say=lines.append).values())


def test_run__does_not_see_what_concerns_labels_alone(photos: Path, tmp_path: Path, source: Path) -> None:
    plain = run(taught(photos, tmp_path / "plain", source))
    other = taught(photos, tmp_path / "other", source, aux_weight=3.0, loss_stride=2, ignored_pixels="counted")
    assert same_weights(run(other), plain)


@pytest.mark.parametrize("step", [2, 3, 6])
def test_run__killed_in_a_step_and_resumed_ends_with_the_weights_of_one_that_was_not(
    step: int, photos: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> TrainConfig:
        made = taught(photos, tmp_path / out, source)
        return replace(made, distill=replace(made.distill, class_balance=0.5))

    never = run(config("never"))
    assert not same_weights(run(taught(photos, tmp_path / "alike", source)), never)
    run_until(step, config("killed"), monkeypatch)
    assert same_weights(run(config("killed")), never)


def test_classes__are_those_of_the_teacher_for_a_fresh_student_too(photos: Path, tmp_path: Path, source: Path) -> None:
    config = taught(photos, tmp_path, source, steps=1)
    fresh = replace(config, model=tiny_run(photos, tmp_path).model)
    fresh = replace(fresh, distill=replace(fresh.distill, features=0.0))
    run(fresh)
    assert ExitSegmenter.from_pretrained(tmp_path).classes == ExitSegmenter.from_pretrained(source).classes


def test_classes__of_another_model_are_refused(photos: Path, tmp_path: Path, source: Path) -> None:
    tiny_segmenter("fcn", num_classes=4).save_pretrained(tmp_path / "four")
    config = taught(photos, tmp_path / "out", source)
    config.model = replace(config.model, init_from=str(tmp_path / "four"))
    with pytest.raises(ConfigError, match="predicts 4 classes, dataset photos has 3"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": DistillConfig()}, "photos have no labels to learn from: give distill.teacher"),
        ({"validate_every": 2}, "photos have no labels to validate on: leave validate_every=2 out"),
        ({"class_weights": [1.0, 1.0, 1.0]}, "photos have no labels that class_weights could weigh"),
        ({"exits": 0.0}, "photos have no labels to train exits with: make distill.exits positive"),
    ],
)
def test_run__and_its_plan_refuse_what_needs_labels(
    changes: dict[str, Any], words: str, photos: Path, tmp_path: Path, source: Path
) -> None:
    if "exits" in changes:
        changes = {"distill": DistillConfig(str(source), **changes)}
    config = replace(taught(photos, tmp_path / "out", source), **changes)
    for function in (run, plan):
        with pytest.raises(ConfigError, match=words):
            function(config)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_run__without_a_teacher_in_the_folder_ends_in_one_sentence(photos: Path, tmp_path: Path, source: Path) -> None:
    config = taught(photos, tmp_path / "out", source)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        run(replace(config, distill=replace(config.distill, teacher=str(tmp_path))))


def test_validation__is_off_by_itself(photos: Path, tmp_path: Path, source: Path) -> None:
    config = taught(photos, tmp_path, source)
    assert config.validate_every == "auto"
    assert validation_steps(config) == 0
    assert validation_steps(replace(config, data=DataConfig(name="camvid"))) > 0


def test_plan__names_classes_and_images_and_needs_neither_model(photos: Path, tmp_path: Path, source: Path) -> None:
    config = taught(photos, tmp_path / "out", source)
    said = plan(config)
    assert f"photos in {photos}, 3 classes" in said
    assert "train with 6 images" in said
    assert "validated" not in said
    config.distill.teacher = config.model.init_from = str(tmp_path / "later")
    assert "its own classes" in plan(config)


def test_evaluate__refuses_images_without_labels(photos: Path, source: Path) -> None:
    model = ExitSegmenter.from_pretrained(source)
    data = Photos(photos, "train", labels=model.classes)
    assert is_unlabelled(data)
    with pytest.raises(DataError, match="no labels to measure mIoU with"):
        evaluate(model, data, "dense")


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "sweep", "report"])
def test_commands__that_need_labels_refuse_photos_in_one_sentence(
    command: str, photos: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        "calibrate": ["--budget", "0.9"],
        "report": ["--out", str(tmp_path / "r")],
        "sweep": ["--out", str(tmp_path)],
    }
    status = main([command, str(source), "--data", "photos", "--data-root", str(photos), *extra.get(command, [])])
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert "--data photos has no labels: name a dataset that has masks" in error
    assert "\n" not in error


def test_commands__name_no_photos_by_themselves(
    photos: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(taught(photos, tmp_path, source, steps=1))
    assert main(["evaluate", str(tmp_path), "--method", "dense"]) == 2
    assert "was trained on images without labels: name a dataset with --data" in capsys.readouterr().err
