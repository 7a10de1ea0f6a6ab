"""What is trained, in which parts, and which weights come out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

import tokenexit.training.loop as loop
from tests.heads.test_eomt import eomt
from tests.helpers import random_image, tiny_segmenter
from tests.training.test_loop import run, run_until
from tests.training.tiny import (
    EVERYBODY_LEAVES,
    HEADS,
    nearly_same_weights,
    same_weights,
    silent,
    tiny_run,
    weights,
    write_dataset,
)
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import ConfigError
from tokenexit.methods import DToP, build_method
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import TrainConfig
from tokenexit.training.freeze import FROZEN, training_mode
from tokenexit.training.loop import train

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that somebody already has."""
    out = tmp_path_factory.mktemp("saved")
    run(tiny_run(data, out, methods=["dense"], steps=2, seed=7))
    return out


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process that is connected as several are."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def changed(before: Weights, after: Weights) -> set[str]:
    """The parts of a model in which anything, a buffer included, is not bit for bit what it was."""
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --------------------------------------------------------------------------------------------------------- freezing


def frozen_run(data: Path, out: Path, saved: Path, freeze: Any, **changes: Any) -> TrainConfig:
    config = tiny_run(data, out, freeze=freeze, validate_every=2, val_limit=1, **changes)
    config.model = replace(config.model, init_from=str(saved), options={"drop_path": 0.2})
    return config


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("none", {"backbone", "exit_heads", "decode_head"}),
        ("backbone", {"exit_heads", "decode_head"}),
        ("all_but_exit_heads", {"exit_heads"}),
    ],
)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_is_trained(
    freeze: str, trained: set[str], ema_decay: float | None, data: Path, tmp_path: Path, saved: Path
) -> None:
    config = frozen_run(data, tmp_path, saved, freeze, ema_decay=ema_decay)
    config.optim = replace(config.optim, weight_decay=0.1, decay_all=True)
    after = run(config)
    before = weights(ExitSegmenter.from_pretrained(saved))
    assert changed(before, after) == trained
    weight = "exit_heads.0.classifier.weight"
    assert not torch.equal(before[weight], after[weight])


def test_exits_on_a_model_somebody_has_leave_its_dense_prediction_bit_for_bit(
    data: Path, tmp_path: Path, saved: Path
) -> None:
    config = frozen_run(data, tmp_path, saved, "all_but_exit_heads", methods=["dense"])
    config.model = replace(config.model, new_exits=True, exits=[2], exit_head={"kind": "linear"})
    lines: list[str] = []
    train(config, say=lines.append, progress=False)
    assert lines[0].startswith("training 0.0 M of 0.0 M parameters on 6 images")
    original, extended = ExitSegmenter.from_pretrained(saved), ExitSegmenter.from_pretrained(tmp_path)
    assert original.config.exits == (1, 2)
    assert extended.config.exits == (2,)
    images = random_image(24, 32)[None]
    assert torch.equal(original(images).logits, extended(images).logits)
    leaving = extended(images, DToP(threshold=0.0, keep_per_class=0))
    assert bool((leaving.exit_index[0] == 0).all())


@pytest.mark.parametrize("freeze", ["backbone", "all_but_exit_heads"])
@pytest.mark.parametrize("method", ["dense", "dtop", "dovit"])
def test_no_gradient_and_no_chance_goes_through_a_frozen_backbone(freeze: Any, method: str) -> None:
    model = tiny_segmenter("linear", drop_path=0.5)
    training_mode(model, freeze)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outputs.append(model(random_image(12, 16)[None], build_method(method)))
    seen = [output.exit_records[-1].seen.x for output in outputs]
    assert not seen[0].requires_grad
    assert torch.equal(seen[0], seen[1])
    segmentation_loss(outputs[0], torch.randint(0, 5, (1, 12, 16)), 255, 0.4).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(FROZEN[freeze]), name


@pytest.mark.parametrize(
    ("freeze", "weights", "words"),
    [("backbone", None, "random weights"), ("all_but_exit_heads", "w.pth", "a random decode head")],
)
def test_freezing_what_nobody_has_trained_is_refused(
    freeze: Any, weights: str | None, words: str, data: Path, tmp_path: Path
) -> None:
    config = tiny_run(data, tmp_path, freeze=freeze)
    config.model.weights = weights
    with pytest.raises(ConfigError, match=rf"^freeze={freeze} would keep {words}: give model\."):
        run(config)


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^freeze=all_but_exit_heads leaves nothing to train"):
        training_mode(tiny_segmenter("fcn", exits=()), "all_but_exit_heads")


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_processes_agree_on_gradients_whatever_is_frozen_and_whoever_leaves(freeze: Any, head: str) -> None:
    """Parameters without a gradient would end the second step with an error (DistributedDataParallel)."""
    model = tiny_segmenter(head, drop_path=0.3)
    model.backbone.grad_checkpointing = True
    training_mode(model, freeze)
    wrapped = DistributedDataParallel(model)
    methods = EVERYBODY_LEAVES[: 1 if head == "atm" else 2]
    for spec in ["dense", *methods, "dense"]:
        output = wrapped(random_image(12, 16)[None], build_method(spec))
        segmentation_loss(output, torch.randint(0, 5, (1, 12, 16)), 255, 0.4).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained)
        model.zero_grad()


# ---------------------------------------------------------------------------------------------------- parts of a step


def without_batch_norm(data: Path, out: Path, **changes: Any) -> TrainConfig:
    """Every image has as many judged pixels, and nothing but the images decides what is learnt."""
    config = tiny_run(data, out, methods=["dense"], batch_size=4, steps=3, **changes)
    config.model = replace(config.model, exit_head="linear", decode_head="linear")
    config.model.options["drop_path"] = 0.0
    config.data.ratio = (1.0, 1.0)
    config.optim = replace(config.optim, name="sgd", lr=0.05)
    return config


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_in_parts_is_a_step_of_the_whole_batch(clip: float | None, data: Path, tmp_path: Path) -> None:
    results = []
    for parts in (1, 2, 4):
        config = without_batch_norm(data, tmp_path / str(parts), accumulate=parts)
        config.optim.clip_grad_norm = clip
        results.append(run(config))
    untrained = run(without_batch_norm(data, tmp_path / "half", accumulate=4, seed=5))
    assert all(nearly_same_weights(result, results[0]) for result in results)
    assert not nearly_same_weights(untrained, results[0])


def test_parts_that_are_not_equal_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size must be a multiple of 1 processes x accumulate=4, got 2:"):
        run(tiny_run(data, tmp_path, accumulate=4))


# ------------------------------------------------------------------------------------------------ blocks computed twice


@pytest.mark.parametrize("method", ["dense", {"name": "dtop", "threshold": 0.5}, {"name": "dovit", "threshold": 0.5}])
def test_joint_blocks_computed_twice_give_the_same_loss_and_gradients(method: Any) -> None:
    results, calls = [], [0, 0]
    for again in (False, True):
        model = eomt().train()
        model.backbone.grad_checkpointing = model.decode_head.grad_checkpointing = again
        for block in (*model.backbone.blocks, *model.decode_head.blocks):  # type: ignore[misc]
            block.register_forward_pre_hook(lambda *_, again=again: calls.__setitem__(again, calls[again] + 1))
        torch.manual_seed(3)
        images = torch.stack([random_image(12, 16, seed) for seed in range(2)])
        output = model(images, build_method(method), mask_shares=(1.0, 0.5))
        loss = segmentation_loss(output, torch.randint(0, 5, (2, 12, 16)), 255, 0.4, points=50)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert calls == [6, 12]
    assert all(torch.equal(kept, computed) for kept, computed in zip(*results))


@pytest.mark.parametrize("method", ["dense", {"name": "dtop", "threshold": 0.5}, {"name": "dovit", "threshold": 0.5}])
def test_blocks_computed_twice_give_the_same_loss_and_gradients(method: Any) -> None:
    results, calls = [], [0, 0]
    for again in (False, True):
        model = tiny_segmenter("fcn", drop_path=0.5).train()
        model.backbone.grad_checkpointing = again
        for block in model.backbone.blocks:
            block.register_forward_pre_hook(lambda *_, again=again: calls.__setitem__(again, calls[again] + 1))
        torch.manual_seed(3)
        images = torch.stack([random_image(12, 16, seed) for seed in range(4)])
        loss = segmentation_loss(model(images, build_method(method)), torch.randint(0, 5, (4, 12, 16)), 255, 0.4)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert calls == [4, 8]
    assert all(torch.equal(kept, computed) for kept, computed in zip(*results))


def test_a_run_may_compute_its_blocks_twice_from_some_step_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = run(tiny_run(data, tmp_path / "never"))
    run_until(4, tiny_run(data, tmp_path / "killed"), monkeypatch)
    assert same_weights(run(tiny_run(data, tmp_path / "killed", checkpoint_blocks=True)), never)


# ----------------------------------------------------------------------------------------------- average of the weights


def test_the_saved_model_is_the_average_of_the_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps by hand: a1 = w1, a2 = 0.8 a1 + 0.2 w2, a3 = 0.8 a2 + 0.2 w3."""
    after_steps: list[Weights] = []
    original = loop.train_step

    def watched(*args: Any) -> float:
        loss = original(*args)
        after_steps.append(weights(args[-1].model))
        return loss

    monkeypatch.setattr(loop, "train_step", watched)
    final = run(tiny_run(data, tmp_path, steps=3, ema_decay=0.8))
    saved = ExitSegmenter.from_pretrained(tmp_path)
    assert same_weights(weights(saved), final)
    w1, w2, w3 = ({name: value.double() for name, value in step.items()} for step in after_steps)
    for name, _ in saved.named_parameters():
        expected = 0.8 * (0.8 * w1[name] + 0.2 * w2[name]) + 0.2 * w3[name]
        torch.testing.assert_close(final[name].double(), expected, rtol=1e-5, atol=1e-7)
    for name, value in saved.named_buffers():
        assert torch.equal(value, after_steps[-1][name])
    assert not same_weights(final, after_steps[-1])


def test_an_average_does_not_change_the_training_and_is_what_is_validated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[Weights] = []

    def noted(model: ExitSegmenter, *rest: Any) -> dict[str, float]:
        validated.append(weights(model))
        return {"miou": 0.0}

    plain = run(tiny_run(data, tmp_path / "plain"))
    monkeypatch.setattr(loop, "validate", noted)
    final = run(tiny_run(data, tmp_path / "averaged", ema_decay=0.9, validate_every=6))
    state = torch.load(tmp_path / "averaged" / "checkpoints" / "step-0000006" / "state.pt", weights_only=True)
    assert same_weights(state["model"], plain)
    assert same_weights(validated[-1], final)


@pytest.mark.parametrize("kill", [5, 8])
def test_runs_with_an_average_and_parts_resume_exactly(
    kill: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"ema_decay": 0.7, "accumulate": 2, "batch_size": 4}
    never = run(tiny_run(data, tmp_path / "never", **changes))
    config = tiny_run(data, tmp_path / "killed", **changes)
    run_until(kill, config, monkeypatch)  # in the first part of step 3, in the second of step 4
    assert same_weights(run(config), never)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step-0000006" / "state.pt", weights_only=True)
        for name in ("never", "killed")
    ]
    for part in ("model", "average"):
        assert same_weights(*(state[part] for state in states))


# --------------------------------------------------------------------------------------------------------- processes


def test_a_loss_that_is_no_number_on_another_process_ends_all_before_anything_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another(self: Accelerator, loss: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return (loss + float("inf")) / 2

    monkeypatch.setattr(Accelerator, "reduce", with_another)
    with pytest.raises(ConfigError, match=r"^the loss became inf at step 1"):
        run(tiny_run(data, tmp_path, checkpoint_every=1))
    assert not (tmp_path / "checkpoints").exists()


def test_processes_that_found_different_checkpoints_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "gather", lambda step: [step, 4])
    with pytest.raises(ConfigError, match=r"at steps 0, 4: choose an out that all machines share\.$"):
        run(tiny_run(data, tmp_path))


def test_another_number_of_processes_is_said_when_a_run_continues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(4, tiny_run(data, tmp_path), monkeypatch)
    path = tmp_path / "checkpoints" / "step-0000002" / "run.json"
    saved = json.loads(path.read_text())
    assert saved["processes"] == 1
    path.write_text(json.dumps(saved | {"processes": 2}))
    lines: list[str] = []
    run(tiny_run(data, tmp_path), say=lines.append)
    assert lines[0] == f"resuming {tmp_path} after step 2 of 6, processes: 1, before 2"


def test_a_run_begun_before_a_key_existed_continues_with_its_default_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(4, tiny_run(data, tmp_path), monkeypatch)
    path = tmp_path / "checkpoints" / "step-0000002" / "run.json"
    saved = json.loads(path.read_text())
    del saved["config"]["accumulate"], saved["processes"]
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"holds a run with accumulate=1, not 2"):
        run(tiny_run(data, tmp_path, accumulate=2))
    lines: list[str] = []
    train(tiny_run(data, tmp_path), say=lines.append, progress=False)
    assert lines[0] == f"resuming {tmp_path} after step 2 of 6"


# ---------------------------------------------------------------------------------------------------------- new exits


def test_new_exits_keep_backbone_and_decode_head_and_nothing_of_the_old_exits(
    data: Path, tmp_path: Path, saved: Path
) -> None:
    config = tiny_run(data, tmp_path, steps=1)
    model = replace(
        config.model,
        init_from=str(saved),
        new_exits=True,
        exits=[1],
        exit_head=HEADS["fcn"],
        options={"drop_path": 0.3},
    )
    built, _ = loop.build_model(model, config.data, loop.build_dataset(config.data, "train").labels)
    original = ExitSegmenter.from_pretrained(saved)
    assert changed(weights(original.backbone), weights(built.backbone)) == set()
    assert changed(weights(original.decode_head), weights(built.decode_head)) == set()
    assert len(built.exit_heads) == 1
    made, old = (weights(of.exit_heads[0])["classifier.weight"] for of in (built, original))
    assert not torch.equal(made, old)
    assert built.config == replace(original.config, exits=(1,), exit_heads=(HEADS["fcn"],))
    assert built.preprocessing == original.preprocessing
    assert [block.drop_path for block in built.backbone.blocks] == pytest.approx([0.0, 0.15, 0.3])


def test_new_exits_need_a_saved_model(data: Path, tmp_path: Path) -> None:
    config = tiny_run(data, tmp_path)
    config.model.new_exits = True
    with pytest.raises(ConfigError, match=r"^model\.new_exits puts exits on a saved model"):
        train(config, say=silent, progress=False)


@pytest.mark.parametrize("new_exits", [False, True])
def test_a_calibration_does_not_outlive_the_weights_it_was_made_for(
    new_exits: bool, data: Path, tmp_path: Path, saved: Path
) -> None:
    calibrated = ExitSegmenter.from_pretrained(saved)
    calibrated.calibration = Calibration(model=calibrated.fingerprint(), method={"name": "dtop", "threshold": 0.9})
    calibrated.save_pretrained(tmp_path)
    config = tiny_run(data, tmp_path / "run")
    model = replace(config.model, init_from=str(tmp_path), new_exits=new_exits, options={})
    built, _ = loop.build_model(model, config.data, loop.build_dataset(config.data, "train").labels)
    assert built.calibration is None
