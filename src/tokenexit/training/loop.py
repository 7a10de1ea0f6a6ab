"""The training loop: data, forward, loss, backward, step, log, evaluate, save, in that order.

Everything random in a step is a function of (seed, step, part of the batch), so that a run that was killed and resumed
ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from tokenexit.checkpoints.load import LoadReport
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import ResumableSampler, TrainingBatch, TrainingSet, collate_training, note_of
from tokenexit.errors import ConfigError
from tokenexit.methods import Method, build_method
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.pretrained import TRAINING_FILE, WEIGHTS_FILE
from tokenexit.runtime.distributed import all_or_none, gather
from tokenexit.runtime.folder import current
from tokenexit.runtime.precision import slow_precision, training_precision
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.annealing import fades, mask_shares
from tokenexit.training.batch_norm import synchronise_batch_norms
from tokenexit.training.build import (
    build_dataset,
    build_model,
    build_transform,
    check_adapters,
    open_validation,
    taught_labels,
)
from tokenexit.training.checkpoint import (
    CHECKPOINTS,
    Best,
    CheckpointParts,
    Progress,
    begun_with,
    load_checkpoint,
    save_checkpoint,
    settled,
)
from tokenexit.training.config import (
    TrainConfig,
    check_class_weights,
    check_run,
    check_taught_exits,
    is_unlabelled,
    validation_steps,
)
from tokenexit.training.distill import distillation_loss, load_teacher
from tokenexit.training.expected_macs import check_macs_weight, expected_share
from tokenexit.training.freeze import training_mode
from tokenexit.training.log import Row, is_row, open_log
from tokenexit.training.optim import build_optimizer, learning_rate

Say = Callable[[str], None]

LOGGED_LINES, LONGEST_SILENCE = 20, 60.0
"""Progress without a terminal: smallest number of lines in a run, and most seconds between two."""


def speak(line: str) -> None:
    """Print a line and flush, so that files and pipes get it at once."""
    print(line, flush=True)


def train(config: TrainConfig, say: Say = speak, progress: bool = True) -> ExitSegmenter:
    """Train a model as configured, and save it in `config.out`.

    The model is validated meanwhile, and the weights of the best validation are kept, see `validate_every` and `keep`.
    A second call with the same configuration continues from the last checkpoint.

    Args:
        config: model, data, methods, schedule and the folder of the results.
        say: shows one line per event.
        progress: show a progress bar.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ConfigError: for options that cannot work, and for a folder of a training with another configuration, except
            for the keys in `FREE_KEYS`.
        DataError: for a dataset that cannot be used.
        CheckpointError: for weights or checkpoints that cannot be read.
    """
    # On a CPU several processes find each other only if it is asked for. Autocast is ours, as accelerate would fix the
    # precision of the whole process.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    with all_or_none():
        begun = begun_with(Path(config.out) / CHECKPOINTS) if config.resume else None
        config = settled(config, begun, accelerator.device)
        run, report = _set_up(config, accelerator, say if accelerator.is_main_process else _silent)
        resumed = load_checkpoint(run.checkpoints, run.parts, config) if config.resume else None
    _check_same_step(run, resumed)
    if resumed is None:
        notes = [report.summary() if report else "", run.headline(), note_of(run.data), _note_on_labels(config)]
        run.say("\n".join(filter(None, notes)))
    else:
        run.step, run.saved, run.history, run.best = resumed.step, resumed.step, resumed.history, resumed.best
        if resumed.step == config.steps:
            run.say(f"{run.out} is finished: all {config.steps} steps are done, its model is there")
        else:
            run.say(f"resuming {run.out} after step {run.step} of {config.steps}" + _other_processes(run, resumed))
    warning = slow_precision(training_precision(config.precision, accelerator.device), accelerator.device)
    if warning is not None and run.step < config.steps:
        run.say(f"warning: {warning}")
    try:
        _run_steps(run, progress)
        run.share_buffers()
    except KeyboardInterrupt:
        after = f"after step {run.saved}" if run.saved else "from the start, as no checkpoint is saved yet"
        run.say(f"interrupted after step {run.step}; the same command continues {after}")
        raise
    except RuntimeError as error:
        if accelerator.num_processes > 1 and _lost_connection(error):
            raise ConfigError(
                "another process of this run has ended: its own message says why; the same command continues from the "
                "last checkpoint."
            ) from None
        raise
    if accelerator.is_main_process and run.saved < run.step:
        run.save()
    kept = run.restore_kept()
    if accelerator.is_main_process:
        if run.best is not None and kept != run.step:
            run.say(
                f"the model is that of step {kept}, the best validation with mIoU {run.best.miou:.2f}; the same "
                "command with --keep last saves the last weights instead"
            )
        run.result.records = {TRAINING_FILE: {"config": asdict(config), "history": run.history, "step": kept}}
        run.result.save_pretrained(run.out)
    accelerator.wait_for_everyone()
    return run.result.eval()


def _set_up(config: TrainConfig, accelerator: Accelerator, say: Say) -> tuple[TrainingRun, LoadReport | None]:
    """Set up a run before its first step; also return the report of the loaded weights, if any."""
    check_run(config, accelerator.num_processes)
    methods = [build_method(spec) for spec in config.methods]
    check_macs_weight(config.macs_weight, methods)
    torch.manual_seed(config.seed)
    data = build_dataset(config.data, config.data.train_split, taught_labels(config))
    check_class_weights(config, data.labels.num_classes)
    model, report = build_model(config.model, config.data, data.labels)
    model.to(accelerator.device)
    model.backbone.grad_checkpointing = model.decode_head.grad_checkpointing = config.checkpoint_blocks
    if _syncs(config, accelerator):
        synchronise_batch_norms(model)
    training_mode(model, config.freeze)
    check_taught_exits(config, model.config.exits)
    check_adapters(model, methods, accelerator.num_processes)
    fades(config.masks, model.decode_head.joint_blocks, config.steps)  # which checks them
    run = TrainingRun(
        config=config,
        out=_checked_out(config),
        accelerator=accelerator,
        model=model,
        optimizer=build_optimizer(model, config.optim),
        average=None if config.ema_decay is None else average_of(model, config.ema_decay),
        teacher=load_teacher(config.distill, model),
        methods=methods,
        data=data,
        say=say,
    )
    return run, report


@dataclass
class TrainingRun:
    """A training run and its progress: `step` steps are done, the checkpoint holds `saved` of them."""

    config: TrainConfig
    out: Path
    accelerator: Accelerator
    model: ExitSegmenter
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    teacher: ExitSegmenter | None
    methods: list[Method[Any]]
    data: SegmentationDataset
    say: Say
    step: int = 0
    saved: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None

    @property
    def checkpoints(self) -> Path:
        return self.out / CHECKPOINTS

    @property
    def parts(self) -> CheckpointParts:
        """The parts that a checkpoint holds."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        return parts if self.average is None else parts | {"average": self.average}

    @property
    def result(self) -> ExitSegmenter:
        """The model that is validated and saved: the moving average of the weights, if there is one."""
        return self.model if self.average is None else cast(ExitSegmenter, self.average.module)

    def headline(self) -> str:
        """Describe the run in one line."""
        config, processes = self.config, self.accelerator.num_processes
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        words = [
            f"training {trained / 1e6:.1f} M",
            f" of {total / 1e6:.1f} M" if trained < total else "",
            " parameters",
            f" on {len(self.data)} images of {config.data.name}, {config.steps} steps of {config.batch_size}",
            f" in {config.accumulate} parts" if config.accumulate > 1 else "",
            f", on {self.accelerator.device.type} in {config.precision}",
            f", taught by {config.distill.teacher}" if self.teacher else "",
            f", {processes} processes, {self._statistics()}" if processes > 1 else "",
        ]
        return "".join(words)

    def _statistics(self) -> str:
        if _syncs(self.config, self.accelerator):
            return "with batch statistics of all together"
        why = ", as sync_batch_norm needs CUDA" if self.config.sync_batch_norm else ""
        return f"each with batch statistics of its own{why}"

    def share_buffers(self) -> None:
        """Give all processes the batch statistics of the first, which are the ones that are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in self.result.buffers():
                torch.distributed.broadcast(buffer, 0)

    def save(self) -> None:
        progress = Progress(self.step, self.history, self.accelerator.num_processes, self.best)
        save_checkpoint(self.checkpoints, progress, self.parts, self.config)
        self.saved = self.step

    def validate(self, data: SegmentationDataset, loss: float, seconds: float) -> float:
        """Validate the current weights, log their mIoU, keep them if they are the best, and return the mIoU."""
        self.share_buffers()
        found = validate(self.result, self.config, self.methods[0], data)
        self.history.append({"step": self.step, "loss": loss, "seconds": seconds} | found)
        miou = found["miou"]
        # Of equals the later one: where the dense prediction is frozen, only the exits have learned meanwhile.
        if not math.isnan(miou) and (self.best is None or miou >= self.best.miou):
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.result.state_dict().items()}
            self.best = Best(self.step, miou, weights)
        self.say(f"step {self.step}: loss {loss:.3f}, validation mIoU {miou:.2f}")
        return miou

    def restore_kept(self) -> int:
        """Load the best or last weights into `result`, as configured, and return their step."""
        if self.config.keep == "last" or self.best is None:
            return self.step
        self.result.load_state_dict(self.best.weights)
        return self.best.step


def _run_steps(run: TrainingRun, progress: bool) -> None:
    """Run the steps that are left."""
    config, accelerator = run.config, run.accelerator
    validation, every = _validation_set(run), validation_steps(config)
    wrapped, prepared = accelerator.prepare(run.model, run.optimizer)
    log = TrainingLog(config.steps, run.step)
    with (
        _progress_bar(log, run.say, progress and accelerator.is_main_process) as advance,
        open_log(config, run.out, run.step) if accelerator.is_main_process else nullcontext(_no_row) as write,
    ):
        logged = run.step
        for batch in _loader(run):
            for group in prepared.param_groups:
                backbone = group.get("backbone", False)  # checkpoints of older versions do not say
                group["lr"] = learning_rate(group["initial_lr"], run.step, config.steps, config.optim, backbone)
            method = draw_method(run.methods, config.seed, run.step).at(run.step / config.steps)
            loss = train_step(wrapped, prepared, batch, method, run)
            if not math.isfinite(loss):  # before anything is saved
                raise ConfigError(
                    f"the loss became {loss} at step {run.step + 1}: lower optim.lr={config.optim.lr}, lengthen "
                    "optim.warmup_steps, or set optim.clip_grad_norm."
                )
            run.step += 1
            log.add(loss)
            advance()
            miou = None
            if validation is not None and (run.step % every == 0 or run.step == config.steps):
                miou = run.validate(validation, log.mean(), log.seconds())
            if miou is not None or is_row(run.step, config.steps):
                rate = learning_rate(config.optim.lr, run.step - 1, config.steps, config.optim, backbone=True)
                write(Row(run.step, log.mean(run.step - logged), rate, miou))
                logged = run.step
            due = config.checkpoint_every and run.step % config.checkpoint_every == 0
            if due and run.step < config.steps and accelerator.is_main_process:
                run.save()


def train_step(
    model: torch.nn.Module, optimizer: Any, batch: TrainingBatch, method: Method[Any], run: TrainingRun
) -> float:
    """Take one optimiser step and return the mean loss over all parts of the batch, of other processes too."""
    config, accelerator = run.config, run.accelerator
    parts = config.accumulate
    total = torch.zeros((), device=accelerator.device)
    for i, (images, masks) in enumerate(zip(batch["image"].chunk(parts), batch["mask"].chunk(parts))):
        torch.manual_seed(_seed_of_part(config.seed, run.step, accelerator.process_index * parts + i))
        with accelerator.no_sync(model) if i + 1 < parts else nullcontext():
            loss = _loss(model, images.to(total.device), masks.to(total.device), method, run) / parts
            accelerator.backward(loss)
        total += loss.detach()
    if config.optim.clip_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if run.average is not None:
        run.average.update_parameters(run.model)
    return float(accelerator.reduce(total, "mean"))


def _loss(model: torch.nn.Module, images: Tensor, masks: Tensor, method: Method[Any], run: TrainingRun) -> Tensor:
    """Compute the loss of one part of a batch."""
    config, target = run.config, None
    joint = run.model.decode_head.joint_blocks
    shares = mask_shares(config.masks, joint, run.step, config.steps) if joint else ()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(images, method, mask_shares=shares)
        if run.teacher is not None:
            with torch.no_grad():
                target = run.teacher(images, with_records=True)
    losses = []
    if not is_unlabelled(config):
        void = run.data.labels.ignore_index
        losses.append(
            segmentation_loss(
                *(output, masks, void, config.aux_weight, config.loss_stride, config.class_weights),
                *(config.ignored_pixels, config.masks.points),
            )
        )
    if target is not None:
        losses.append(distillation_loss(output, target, config.distill))
    if config.macs_weight:
        losses.append(config.macs_weight * expected_share(output, method, run.model))
    return torch.stack(losses).sum()


def _note_on_labels(config: TrainConfig) -> str:
    if not is_unlabelled(config):
        return ""
    return (
        f"{config.data.name} have no labels: the teacher is all there is to learn from, nothing is validated, and the "
        "last weights are the model"
    )


def average_of(model: ExitSegmenter, decay: float) -> AveragedModel:
    """Make an exponential moving average of a model's weights, from those after the first step on; its buffers are
    the model's own."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def draw_method(methods: list[Method[Any]], seed: int, step: int) -> Method[Any]:
    """Return the method of this step: the only one, or one drawn from (seed, step), the same on all processes."""
    if len(methods) == 1:
        return methods[0]
    return methods[int(np.random.default_rng([seed, step]).integers(len(methods)))]


def validate(
    model: ExitSegmenter, config: TrainConfig, method: Method[Any], data: SegmentationDataset
) -> dict[str, float]:
    """Return mIoU and compute of `method` on the validation split; leaves the model in training mode."""
    from tokenexit.evaluation.evaluate import evaluate

    (result,) = evaluate(
        model.eval(),
        data,
        [method],
        limit=config.val_limit,
        precision=training_precision(config.precision, model.device),
    )
    training_mode(model, config.freeze)
    return {"miou": result.scores.miou, "gmacs": result.gmacs_mean}


def _validation_set(run: TrainingRun) -> SegmentationDataset | None:
    """Open the validation split before the first step, so that a fault does not show hours later."""
    if not validation_steps(run.config):
        return None
    from tokenexit.evaluation.evaluate import check_classes

    data = open_validation(run.config)
    check_classes(run.model, data)
    return data


def _loader(run: TrainingRun) -> DataLoader[Any]:
    """Make the loader of batches from the run's step to the end; each process reads its own part of every batch."""
    config = run.config
    transform = build_transform(config.data, run.data.labels.ignore_index)
    sampler = ResumableSampler(
        len(run.data),
        config.batch_size,
        config.seed,
        start_step=run.step,
        stop_step=config.steps,
        rank=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    return DataLoader(
        TrainingSet(run.data, transform, run.model.preprocessing, config.seed),
        batch_sampler=sampler,
        collate_fn=collate_training,
        num_workers=config.data.workers,
    )


def _checked_out(config: TrainConfig) -> Path:
    """Make the run's folder, and check that it can be written to, before any work is done."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made ({error.strerror}): choose another folder.") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"out={out} cannot be written to: choose another folder.")
    if config.resume and current(out, WEIGHTS_FILE).exists() and not (out / CHECKPOINTS).exists():
        raise ConfigError(
            f"out={out} holds a model and no run to continue: choose another out, or overwrite it with resume=false."
        )
    return out


def _check_same_step(run: TrainingRun, resumed: Progress | None) -> None:
    """Reject processes at different steps: machines without a shared folder would wait for each other forever."""
    steps = sorted(set(gather(resumed.step if resumed else 0)))
    if len(steps) > 1:
        raise ConfigError(
            f"processes found {run.checkpoints} at steps {', '.join(map(str, steps))}: choose an out that all machines "
            "share."
        )


def _other_processes(run: TrainingRun, resumed: Progress) -> str:
    now = run.accelerator.num_processes
    return f", processes: {now}, before {resumed.processes}" if now != resumed.processes else ""


def _lost_connection(error: RuntimeError) -> bool:
    """Return whether an error is a lost connection; gloo, which connects processes on CPUs, has no own type for it."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _syncs(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Return whether batch statistics are taken over all processes, for which torch needs CUDA."""
    return config.sync_batch_norm and accelerator.device.type == "cuda" and accelerator.num_processes > 1


def _seed_of_part(seed: int, step: int, part: int) -> int:
    """Return the random seed of a part of a batch.

    part: counted over all processes, so that randomness does not depend on which of them takes it.
    """
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _silent(line: str) -> None:
    """Print nothing, as all processes but the first do."""


def _no_row(row: Row) -> None:
    """Write no row, as all processes but the first do."""


class TrainingLog:
    """Running loss and seconds per step, for the progress line. done: steps that were done before."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.started = total, done, time.monotonic()
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    @property
    def step(self) -> int:
        return self.done + len(self.losses)

    def mean(self, last: int = 50) -> float:
        recent = self.losses[-last:]
        return sum(recent) / len(recent)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def pace(self) -> float:
        """Seconds per step."""
        return self.seconds() / len(self.losses)

    def line(self) -> str:
        return f"loss {self.mean():.3f}, {self.pace():.2f} s/step"

    def long_line(self) -> str:
        left = timedelta(seconds=round(self.pace() * (self.total - self.step)))
        return f"step {self.step} of {self.total}: {self.line()}, {left} left"


@contextmanager
def _progress_bar(log: TrainingLog, say: Say, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every step: it moves a bar on a terminal, or prints a line at intervals."""
    if not shown or log.done == log.total:
        yield lambda: None
    elif not sys.stderr.isatty():
        every, said = math.ceil(log.total / LOGGED_LINES), -math.inf  # the first step has a line, so that all is seen

        def line_if_due() -> None:
            nonlocal said
            if log.step % every == 0 or log.step == log.total or log.seconds() - said > LONGEST_SILENCE:
                say(log.long_line())
                said = log.seconds()

        yield line_if_due
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[text]}")
        # A terminal shows both streams: lines that are printed meanwhile go above the bar.
        with Progress(*columns, text, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task("training", total=log.total, completed=log.done, text="")
            yield lambda: bar.update(task, advance=1, text=log.line())
