"""Runs that repeat, that are killed and go on, and that end in one sentence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenexit.training.loop as loop
from tests.training.driver import drive, ended
from tests.training.tiny import (
    nearly_same_weights,
    same_weights,
    silent,
    steady_run,
    tiny_run,
    weights,
    write_dataset,
)
from tokenexit.errors import CheckpointError, ConfigError, DataError
from tokenexit.heads import EoMTHead
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.runtime import precision as inference
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import MaskConfig, TrainConfig
from tokenexit.training.log import is_row
from tokenexit.training.loop import draw_method, train

Weights = dict[str, torch.Tensor]


class Killed(Exception):
    """Ends a run from inside."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of the run that nobody killed."""
    return run(tiny_run(data, tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def steady(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The same of the run that other processes begin."""
    return run(steady_run(data, tmp_path_factory.mktemp("steady")))


def run(config: TrainConfig, **options: Any) -> Weights:
    given: dict[str, Any] = {"say": silent, "progress": False} | options
    return weights(train(config, **given))


def run_until(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and end by an exception in the middle of a step, after the gradient was taken."""
    calls = 0
    original = loop.segmentation_loss

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args)
        if calls == step:
            loss.backward(retain_graph=True)
            raise Killed
        return loss

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "segmentation_loss", counted)
        run(config)


# ----------------------------------------------------------------------------------------------------- repetition


def test_two_runs_of_one_configuration_give_the_same_weights(data: Path, tmp_path: Path, whole: Weights) -> None:
    torch.manual_seed(999)  # what the caller drew before must not matter
    assert same_weights(run(tiny_run(data, tmp_path)), whole)


def test_another_seed_gives_other_weights(data: Path, tmp_path: Path, whole: Weights) -> None:
    assert not same_weights(run(tiny_run(data, tmp_path, seed=1)), whole)


def test_loading_processes_do_not_change_the_weights(data: Path, tmp_path: Path, whole: Weights) -> None:
    config = tiny_run(data, tmp_path)
    config.data.workers = 1
    assert same_weights(run(config), whole)


def test_validation_and_checkpoints_beside_the_training_do_not_change_the_weights(
    data: Path, tmp_path: Path, whole: Weights
) -> None:
    config = tiny_run(data, tmp_path, validate_every=2, val_limit=1, checkpoint_every=1)
    assert same_weights(run(config), whole)


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = tiny_run(data, tmp_path, steps=40, methods=["dense"], validate_every=10, checkpoint_every=0)
    train(config, say=lines.append, progress=False)
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [10, 20, 30, 40]
    assert history[-1]["miou"] > history[0]["miou"]
    assert history[-1]["loss"] < history[0]["loss"]


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_killed_in_any_step_and_resumed_ends_with_the_weights_of_one_that_was_not(
    step: int, data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(step, tiny_run(data, tmp_path), monkeypatch)
    lines: list[str] = []
    assert same_weights(run(tiny_run(data, tmp_path), say=lines.append), whole)
    saved = (step - 1) // 2 * 2  # one checkpoint every two steps
    assert (f"resuming {tmp_path} after step {saved} of 6" in lines) == (saved > 0)


def test_a_run_killed_again_and_again_gets_there(
    data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(data, tmp_path, checkpoint_every=1)
    for _ in range(5):
        run_until(2, config, monkeypatch)  # each time one step further
    assert same_weights(run(config), whole)


@pytest.mark.parametrize("head", ["atm", "setr_pup", "eomt"])
def test_other_heads_resume_exactly_too(head: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["dense", "dovit"] if head == "setr_pup" else ["dense", "dtop"]
    never = run(tiny_run(data, tmp_path / "never", head, methods=methods, steps=4))
    config = tiny_run(data, tmp_path / "killed", head, methods=methods, steps=4)
    run_until(4, config, monkeypatch)
    assert same_weights(run(config), never)


def test_masks__are_attended_to_and_let_go_as_the_step_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []
    forward = EoMTHead.forward

    def spied(self: EoMTHead, tokens: Any, mask_shares: Any = (), backdrop: Any = None) -> Any:
        seen.append(tuple(mask_shares))
        return forward(self, tokens, mask_shares, backdrop)

    monkeypatch.setattr(EoMTHead, "forward", spied)
    config = tiny_run(data, tmp_path / "a", "eomt", methods=["dense"])
    config.masks = MaskConfig(fade_start=[2], fade_end=[4], points=20)
    run(config)
    assert seen == [(1.0,), (1.0,), (1.0,), (pytest.approx(0.5**0.9),), (0.0,), (0.0,)]
    seen.clear()
    config = tiny_run(data, tmp_path / "b", "eomt", methods=["dense"], steps=1)
    config.masks = MaskConfig(fade_start=[], fade_end=[])
    run(config)
    assert seen == [()]
    config = tiny_run(data, tmp_path / "c", "eomt", methods=["dense"])
    config.masks = MaskConfig(fade_start=[1, 2], fade_end=[2, 3])
    with pytest.raises(ConfigError, match="must have 1 steps, one for each joint block, got 2"):
        run(config)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_and_rates_of_the_optimiser_continue(
    name: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> TrainConfig:
        made = tiny_run(data, tmp_path / out, methods=["dense"])
        made.optim = replace(made.optim, name=name, head_lr_factor=3.0, warmup_steps=4)
        return made

    never = run(config("never"))
    run_until(4, config("killed"), monkeypatch)
    assert same_weights(run(config("killed")), never)


@pytest.mark.parametrize("when", ["step:4", "write:2", "rename", "pointer", "forget"])
def test_sigkill_at_any_moment_leaves_a_run_that_ends_with_the_same_weights(
    when: str, data: Path, tmp_path: Path, steady: Weights
) -> None:
    killed = ended(drive(data, tmp_path, when))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    latest = (tmp_path / "checkpoints" / "latest").read_text()
    assert latest == ("step-0000004" if when == "forget" else "step-0000002")
    assert not (tmp_path / "model.safetensors").exists()

    assert nearly_same_weights(run(steady_run(data, tmp_path)), steady)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-0000006"]  # neither half-written nor old ones stay behind


def test_ctrl_c_leaves_the_last_checkpoint_whole_and_says_where_it_stands(
    data: Path, tmp_path: Path, steady: Weights
) -> None:
    interrupted = ended(drive(data, tmp_path, "interrupt:4"))
    assert "KeyboardInterrupt" in interrupted.stderr
    assert interrupted.stdout.splitlines()[-1] == "interrupted after step 3; the same command continues after step 2"
    assert nearly_same_weights(run(steady_run(data, tmp_path)), steady)


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing_broken(
    data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def interrupted(*args: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "segmentation_loss", interrupted)
        run(tiny_run(data, tmp_path), say=lines.append)
    assert lines[-1].endswith("continues from the start, as no checkpoint is saved yet")
    assert list(tmp_path.iterdir()) == []
    assert same_weights(run(tiny_run(data, tmp_path)), whole)


def test_a_warmed_up_threshold_continues_from_the_saved_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(data, tmp_path, methods=[{"name": "dovit", "threshold": 0.4, "threshold_warmup": 0.5}], steps=8)
    seen: list[float] = []
    original = loop.train_step

    def watched(model: Any, optimizer: Any, batch: Any, method: Any, *rest: Any) -> float:
        seen.append(method.threshold)
        return original(model, optimizer, batch, method, *rest)

    run_until(6, config, monkeypatch)
    monkeypatch.setattr(loop, "train_step", watched)
    run(config)
    # tau(i) = 1 - min(1, i / T) (1 - tau), T = 4 steps; four steps were saved
    assert seen == pytest.approx([0.4, 0.4, 0.4, 0.4])
    seen.clear()
    run(replace(config, out=str(tmp_path / "whole")))
    assert seen == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4, 0.4, 0.4, 0.4])


# -------------------------------------------------------------------------------------------------------- methods


def test_the_method_of_a_step_is_a_function_of_seed_and_step() -> None:
    methods: list[Method[Any]] = [Dense(), DToP(), DoViT()]
    drawn = [draw_method(methods, 0, step) for step in range(60)]
    assert drawn == [draw_method(methods, 0, step) for step in range(60)]
    assert drawn != [draw_method(methods, 1, step) for step in range(60)]
    assert {method.name for method in drawn} == {"dense", "dtop", "dovit"}
    assert min(drawn.count(method) for method in methods) > 10


def test_a_single_method_is_drawn_always() -> None:
    assert {draw_method([DToP()], 0, step) for step in range(5)} == {DToP()}


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("fcn", "dense"),
        ("fcn", {"name": "dtop", "threshold": 0.0, "keep_per_class": 0}),
        ("fcn", {"name": "dovit", "threshold": 0.0}),
        ("atm", "dense"),
        ("atm", {"name": "dtop", "threshold": 0.0, "keep_per_class": 0}),
        ("setr_pup", {"name": "dovit", "threshold": 0.0}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_trains_even_when_every_token_leaves(
    head: str, method: Any, precision: Any, data: Path, tmp_path: Path
) -> None:
    config = tiny_run(data, tmp_path, head, methods=[method], steps=1, precision=precision)
    torch.manual_seed(0)
    trained = run(config)
    assert all(bool(value.isfinite().all()) for value in trained.values())
    assert all(value.dtype != torch.bfloat16 for value in trained.values())


def test_bf16_and_fp32_runs_may_follow_each_other_in_one_process(data: Path, tmp_path: Path) -> None:
    a = run(tiny_run(data, tmp_path / "a", precision="bf16", steps=2))
    b = run(tiny_run(data, tmp_path / "b", precision="fp32", steps=2))
    assert not same_weights(a, b)


# --------------------------------------------------------------------------------------- finished and other runs


def test_a_finished_run_is_not_trained_again(
    data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(data, tmp_path)
    run(config)
    monkeypatch.setattr(loop, "train_step", None)  # would be a TypeError
    lines: list[str] = []
    assert same_weights(run(config, say=lines.append), whole)
    assert lines == [f"{tmp_path} is finished: all 6 steps are done, its model is there"]
    assert same_weights(weights(ExitSegmenter.from_pretrained(tmp_path)), whole)


def test_a_run_killed_between_its_last_checkpoint_and_its_model_gets_its_model(
    data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ExitSegmenter, path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ExitSegmenter, "save_pretrained", killed)
        run(tiny_run(data, tmp_path))
    run(tiny_run(data, tmp_path))
    assert same_weights(weights(ExitSegmenter.from_pretrained(tmp_path)), whole)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"seed": 5}, "seed=4, not 5"), ({"steps": 9}, "steps=6, not 9"), ({"batch_size": 3}, "batch_size=2, not 3")],
)
def test_a_run_of_another_configuration_is_refused_by_the_key_that_differs(
    changes: dict[str, Any], key: str, data: Path, tmp_path: Path, whole: Weights
) -> None:
    run(tiny_run(data, tmp_path))
    with pytest.raises(ConfigError, match=f"^{tmp_path} holds a run with {key}: choose another out, or"):
        run(tiny_run(data, tmp_path, **changes))
    assert same_weights(weights(ExitSegmenter.from_pretrained(tmp_path)), whole)


def test_nested_keys_and_architecture_are_compared_too(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path, steps=2))
    config = tiny_run(data, tmp_path, steps=2)
    config.optim = replace(config.optim, lr=1.0)
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.005, not 1\.0"):
        run(config)
    with pytest.raises(ConfigError, match=r"model\.exit_head="):
        run(tiny_run(data, tmp_path, head="atm", methods=["dense"], steps=2))


def test_what_lies_beside_the_training_may_change_when_it_continues(
    data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(4, tiny_run(data, tmp_path / "old"), monkeypatch)
    (tmp_path / "old").rename(tmp_path / "new")
    config = tiny_run(data, tmp_path / "new", validate_every=3, val_limit=1, checkpoint_every=5)
    config.data.cache, config.data.val_split = True, "test"
    lines: list[str] = []
    assert same_weights(run(config, say=lines.append), whole)
    assert lines[0].startswith("resuming")


def test_resume_false_starts_anew_and_overwrites(data: Path, tmp_path: Path, whole: Weights) -> None:
    run(tiny_run(data, tmp_path, seed=3))
    assert same_weights(run(tiny_run(data, tmp_path, resume=False)), whole)
    assert same_weights(run(tiny_run(data, tmp_path)), whole)


def test_a_model_of_unknown_origin_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path / "a", steps=1))
    ExitSegmenter.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match="holds a model and no run to continue"):
        run(tiny_run(data, tmp_path / "b"))


# ---------------------------------------------------------------------------------------------- validation and best


def validated(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let validations find these figures, by step."""
    found = dict(enumerate(values, 1))

    def validate(self: loop.TrainingRun, *rest: Any) -> dict[str, float]:
        return {"miou": found[self.step], "gmacs": 1.0}

    original = loop.TrainingRun.validate

    def at_step(self: loop.TrainingRun, *rest: Any) -> float:
        monkeypatch.setattr(loop, "validate", lambda *args: validate(self))
        return original(self, *rest)

    monkeypatch.setattr(loop.TrainingRun, "validate", at_step)


def weights_by_step(data: Path, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """Weights after each step of a run, the first at 1."""
    seen: list[Weights] = [{}]
    original = loop.train_step

    def watched(*args: Any) -> float:
        loss = original(*args)
        seen.append(weights(args[-1].model))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        run(tiny_run(data, out, steps=steps))
    return seen


def test_validation__runs_four_times_by_default_on_a_spread_of_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def validate(*args: Any) -> dict[str, float]:
        sizes.append(len(args[-1]))
        return {"miou": 1.0}

    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr("tokenexit.training.build.AUTO_VAL_IMAGES", 1)
    lines: list[str] = []
    train(tiny_run(data, tmp_path, steps=7, validate_every="auto"), say=lines.append, progress=False)
    assert sizes == [1, 1, 1, 1]
    assert [line[:7] for line in lines if "validation mIoU 1.00" in line] == [
        "step 2:",
        "step 4:",
        "step 6:",
        "step 7:",
    ]


def test_validation__is_on_by_default_and_says_how_to_go_without(data: Path, tmp_path: Path) -> None:
    assert (TrainConfig().validate_every, TrainConfig().keep) == ("auto", "best")
    root = write_dataset(tmp_path / "set", {"train": 2})
    with pytest.raises(DataError, match=r"'val' is unknown.*data\.val_split names.*validate_every=0 trains without\.$"):
        run(tiny_run(root, tmp_path / "out", validate_every="auto"))


@pytest.mark.parametrize("kill", [None, 4, 5])
def test_best__weights_are_the_model_and_the_last_ones_stay_in_the_checkpoint(
    kill: int | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = weights_by_step(data, tmp_path / "plain", 6, monkeypatch)
    validated([10.0, 40.0, 20.0, 30.0, 39.9, 5.0], monkeypatch)
    config = tiny_run(data, tmp_path / "best", validate_every=1, keep="best")
    if kill is not None:
        run_until(kill, config, monkeypatch)
    lines: list[str] = []
    assert same_weights(run(config, say=lines.append), seen[2])
    assert same_weights(weights(ExitSegmenter.from_pretrained(config.out)), seen[2])
    assert lines[-1].startswith("the model is that of step 2, the best validation with mIoU 40.00; the same command")
    record = json.loads((tmp_path / "best" / "training.json").read_text())
    assert (record["step"], [entry["miou"] for entry in record["history"]]) == (2, [10.0, 40.0, 20.0, 30.0, 39.9, 5.0])
    assert same_weights(run(replace(config, keep="last")), seen[6])  # the same command, without a step
    assert same_weights(weights(ExitSegmenter.from_pretrained(config.out)), seen[6])
    assert same_weights(run(config), seen[2])


def test_best__is_the_last_of_equals_and_never_no_number(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = weights_by_step(data, tmp_path / "plain", 4, monkeypatch)
    validated([float("nan"), 7.0, 7.0, float("nan")], monkeypatch)
    assert same_weights(run(tiny_run(data, tmp_path / "best", steps=4, validate_every=1, keep="best")), seen[3])


def test_best__is_that_of_the_average_where_there_is_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_run(data, tmp_path / "short", ema_decay=0.8, steps=6, validate_every=0))
    validated([1.0] * 5 + [2.0], monkeypatch)
    assert same_weights(run(tiny_run(data, tmp_path / "best", ema_decay=0.8, validate_every=1, keep="best")), first)


@pytest.mark.parametrize(("begun_with", "validations"), [(0, 0), (3, 2)])
def test_a_run_begun_before_runs_validated_by_themselves_goes_on_as_it_was(
    begun_with: int, validations: int, data: Path, tmp_path: Path, whole: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint knows neither `keep` nor `log` nor a best; now all is left to the defaults."""
    run_until(4, tiny_run(data, tmp_path, validate_every=begun_with), monkeypatch)
    path = tmp_path / "checkpoints" / "step-0000002" / "run.json"
    saved = json.loads(path.read_text())
    del saved["config"]["keep"], saved["config"]["log"]
    path.write_text(json.dumps(saved))
    validated([0.0, 0.0, 9.0, 0.0, 0.0, 1.0], monkeypatch)
    monkeypatch.setattr(inference, "cpu_instructions", lambda: frozenset({"avx512_bf16", "bf16"}))
    config = tiny_run(data, tmp_path, validate_every="auto", keep="best", precision="auto")
    lines: list[str] = []
    assert same_weights(run(config, say=lines.append), whole)  # the last weights, in the fp32 it was begun in
    assert sum("mIoU" in line for line in lines) == validations


# ------------------------------------------------------------------------------------------------------- precision


def test_auto__takes_what_the_processor_is_fast_in_and_keeps_it_on_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_cpu_with(*instructions: str) -> None:
        monkeypatch.setattr(inference, "cpu_instructions", lambda: frozenset(instructions))

    on_a_cpu_with("avx512_bf16", "bf16")
    never = run(tiny_run(data, tmp_path / "never", precision="bf16"))
    config = tiny_run(data, tmp_path / "killed", precision="auto")
    run_until(4, config, monkeypatch)
    on_a_cpu_with("avx2")
    lines: list[str] = []
    assert same_weights(run(config, say=lines.append), never)
    assert lines[1].startswith("warning: precision bf16 is slow on this cpu")
    lines.clear()
    train(tiny_run(data, tmp_path / "new", precision="auto", steps=1), say=lines.append, progress=False)
    assert "on cpu in fp32" in lines[0]
    assert not any("warning" in line for line in lines)


# ------------------------------------------------------------------------------------------------------------- log


def logged(out: Path) -> list[list[str]]:
    return [line.split(",") for line in (out / "log.csv").read_text().splitlines()]


def test_log__has_a_row_for_every_step_of_a_short_run_and_mious_where_it_was_validated(
    data: Path, tmp_path: Path
) -> None:
    run(tiny_run(data, tmp_path, validate_every=3, steps=6))
    header, *rows = logged(tmp_path)
    assert header == ["step", "loss", "lr", "mIoU"]
    assert [row[0] for row in rows] == list("123456")
    assert all(float(loss) > 0 and 0 <= float(lr) <= 5e-3 for _, loss, lr, _ in rows)
    assert [bool(row[3]) for row in rows] == [False, False, True, False, False, True]


def test_log__of_a_killed_and_resumed_run_reads_as_if_nobody_had_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_run(data, tmp_path / "never", validate_every=2))
    config = tiny_run(data, tmp_path / "killed", validate_every=2, checkpoint_every=3)
    run_until(6, config, monkeypatch)
    assert len(logged(tmp_path / "killed")) == 1 + 5  # two more than the checkpoint has
    with (tmp_path / "killed" / "log.csv").open("a") as file:
        file.write("6,0.3")  # cut short
    run(config)
    assert logged(tmp_path / "killed") == logged(tmp_path / "never")
    run(config)  # finished
    assert logged(tmp_path / "killed") == logged(tmp_path / "never")


def test_log__has_about_a_thousand_rows_at_most() -> None:
    assert sum(is_row(step, 160_000) for step in range(1, 160_001)) == 1000
    assert sum(is_row(step, 1001) for step in range(1, 1002)) == 501
    assert all(is_row(step, 700) for step in range(1, 701))


def test_log__that_cannot_be_written_ends_in_one_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(ConfigError, match=r"log\.csv cannot be written \(.*\): free disk space"):
        run(tiny_run(data, tmp_path))


def test_log__for_tensorboard_needs_its_package(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenexit.training.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^log=tensorboard needs the package tensorboard: pip install"):
        run(tiny_run(data, tmp_path, log="tensorboard"))
    assert list(tmp_path.iterdir()) == []


def test_log__for_tensorboard_has_what_the_csv_has(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    begun: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            begun.append((folder, purge_step))

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None: ...

        def flush(self) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

    monkeypatch.setattr("tokenexit.training.config.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(tiny_run(data, tmp_path, log="tensorboard", validate_every=3, steps=3))
    assert begun == [(str(tmp_path / "events"), 1)]
    assert [(name, step) for name, _, step in written] == [
        *((name, step) for step in (1, 2) for name in ("loss", "lr")),
        *((name, 3) for name in ("loss", "lr", "mIoU")),
    ]
    values = [f"{value:.6g}" for _, value, _ in written]
    assert values == [cell for row in logged(tmp_path)[1:] for cell in row[1:] if cell]


def test_log__events_can_be_read_by_tensorboard(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_run(data, tmp_path, log="tensorboard", validate_every=3)
    run_until(4, config, monkeypatch)
    run(config)
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("mIoU")] == [3, 6]


# ------------------------------------------------------------------------------------------------------- failures


def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.segmentation_loss, 0

    def broken(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls == 4 else 1.0)

    monkeypatch.setattr(loop, "segmentation_loss", broken)
    with pytest.raises(ConfigError, match=r"the loss became nan at step 4: lower optim\.lr=0\.005"):
        run(tiny_run(data, tmp_path))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-0000002"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": ["nope"]}, ConfigError, "method 'nope' is unknown"),
        ({"methods": [{"name": "dtop", "treshold": 0.5}]}, ConfigError, "no option 'treshold'"),
        ({"class_weights": [1.0, 1.0]}, ConfigError, "class_weights must have 3 values, one per class, got 2"),
        ({"methods": [{"name": "dtop", "threshold": [0.1, 0.2, 0.3]}]}, ConfigError, "3 values for 2 exits"),
    ],
)
def test_impossible_options_end_in_one_sentence(
    changes: dict[str, Any], error: type[Exception], words: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(tiny_run(data, tmp_path, **changes))


def test_a_missing_validation_split_shows_before_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(data, tmp_path, validate_every=6)
    config.data.val_split = "nope"
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(DataError, match="nope"):
        run(config)


def test_a_folder_for_the_run_that_cannot_be_made_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"^out=.* cannot be made \(.*\): choose another folder\.$"):
            run(tiny_run(data, out))


def test_a_damaged_image_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "set", {"train": 2})
    (root / "images" / "train" / "p1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"p1\.png"):
        run(tiny_run(root, tmp_path / "out"))


# --------------------------------------------------------------------------------------------------------- output


def test_a_run_leaves_a_model_its_configuration_and_no_unfinished_files(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path, validate_every=3, precision="auto"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "log.csv",
        "model.safetensors",
        "training.json",
    ]
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["config"]["optim"]["lr"] == 5e-3
    assert saved["config"]["precision"] in ("fp32", "bf16")  # what auto came to
    assert [entry["step"] for entry in saved["history"]] == [3, 6]


def test_the_trained_model_comes_back_in_evaluation_mode(data: Path, tmp_path: Path) -> None:
    model = train(tiny_run(data, tmp_path, steps=1), say=silent, progress=False)
    assert not model.training


def test_where_there_is_no_terminal_progress_is_a_few_lines(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train(tiny_run(data, tmp_path, steps=45, checkpoint_every=0), say=lines.append, progress=True)
    shown = [line for line in lines if line.startswith("step ")]
    assert lines[0].startswith("training 0.0 M parameters on 6 images of folder, 45 steps of 2, on cpu in fp32")
    assert 10 <= len(shown) <= 20
    assert shown[-1].startswith("step 45 of 45: loss ")


def test_where_there_is_no_terminal_the_first_step_has_a_line_and_no_silence_is_long(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    train(tiny_run(data, tmp_path / "a", steps=45, checkpoint_every=0), say=lines.append)
    assert lines[1].startswith("step 1 of 45: loss ")
    lines.clear()
    monkeypatch.setattr(loop, "LONGEST_SILENCE", 0.0)
    train(tiny_run(data, tmp_path / "b", steps=45, checkpoint_every=0), say=lines.append)
    assert sum(line.startswith("step ") for line in lines) == 45


def test_lines_of_a_run_reach_a_pipe_at_once(data: Path, tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from tests.training.tiny import tiny_run; import tokenexit.training.loop as l\n"
        "l.train_step = lambda *args: os._exit(7)  # nothing is flushed at the end\n"
        f"l.train(tiny_run(Path({str(data)!r}), Path({str(tmp_path)!r})))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.startswith("training 0.0 M parameters on 6 images")


def test_damaged_checkpoints_end_in_one_sentence(data: Path, tmp_path: Path) -> None:
    run(tiny_run(data, tmp_path))
    state = tmp_path / "checkpoints" / "step-0000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"is damaged or foreign \(.*\): choose another out, or start anew"):
        run(tiny_run(data, tmp_path))
