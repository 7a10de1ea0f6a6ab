"""Checkpoints of a run: everything in one folder per step, complete or absent.

A checkpoint is written to a temporary folder, renamed, and only then named by the file `latest`; a run killed at any
moment finds the last complete one. Nothing that `latest` names is ever changed or removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.runtime.precision import training_precision
from tokenexit.runtime.schema import read_bytes
from tokenexit.training.config import TrainConfig, as_begun, differing_key, flat, saved_config

CHECKPOINTS, LATEST = "checkpoints", "latest"
STATE, RUN = "state.pt", "run.json"
LONGEST_VALUE = 200
"""Most characters of a value in a message."""

CheckpointParts = Mapping[str, nn.Module | torch.optim.Optimizer]
"""Modules and optimiser of a run, by name."""


@dataclass(frozen=True)
class Best:
    """The weights with the best validation so far: after `step` steps, with this mIoU in percent."""

    step: int
    miou: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """The progress of a run: `step` steps are done by `processes` processes; `history` holds what was logged so far.

    best: None before the first validation."""

    step: int
    history: list[dict[str, Any]]
    processes: int
    best: Best | None = None


def save_checkpoint(folder: Path, progress: Progress, parts: CheckpointParts, config: TrainConfig) -> None:
    """Write a checkpoint of `parts`, and remove all others, finished or not."""
    step = progress.step
    unfinished = folder / f".step-{step:07d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        state: dict[str, Any] = {"step": step} | {name: part.state_dict() for name, part in parts.items()}
        if progress.best is not None:
            state["best"] = vars(progress.best)
        torch.save(state, unfinished / STATE)
        run = {"config": flat(config), "history": progress.history, "processes": progress.processes}
        (unfinished / RUN).write_text(json.dumps(run))
        final = _free_name(folder / f"step-{step:07d}")
        os.replace(unfinished, final)
        pointer = folder / f".{LATEST}"
        pointer.write_text(final.name)
        os.replace(pointer, folder / LATEST)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {folder} ({_reason(error)}): free disk space; the "
            "same command then continues from the one before."
        ) from None
    for other in (*folder.glob("step-*"), *folder.glob(".step-*")):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(folder: Path, parts: CheckpointParts, config: TrainConfig) -> Progress | None:
    """Restore `parts` from the last complete checkpoint; None if there is none.

    Raises `ConfigError` if it belongs to a run of another configuration, `CheckpointError` if it is damaged.
    """
    if not (folder / LATEST).is_file():
        return None
    path, run = _read_run(folder)
    check_same_run(folder, run["config"], config)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        best = Best(**state["best"]) if "best" in state else None
        return Progress(int(state["step"]), run["history"], run["processes"], best)
    except Exception as error:  # a cut or foreign file ends in any of a dozen types
        raise _damaged(path, error) from None


def begun_with(folder: Path) -> dict[str, Any] | None:
    """Return the configuration, as `flat`, of the run that has checkpoints in a folder; None if there is none.

    It holds only the keys that were written. Raises `CheckpointError` if the checkpoint is damaged."""
    return _read_run(folder)[1]["config"] if (folder / LATEST).is_file() else None


def run_is_whole(folder: Path) -> bool:
    """Return whether there is a checkpoint whose configuration can be read."""
    try:
        return (folder / (folder / LATEST).read_text().strip() / RUN).is_file()
    except (OSError, ValueError):
        return False


def settled(config: TrainConfig, begun: dict[str, Any] | None, device: torch.device) -> TrainConfig:
    """Return the configuration with which a run begins or continues, in the precision that suits the device."""
    config = config if begun is None else as_begun(config, begun)
    return replace(config, precision=training_precision(config.precision, device))


def steps_done(folder: Path) -> int | None:
    """Return the number of steps of the last checkpoint in a folder, by its name; None if there is none."""
    try:
        found = re.match(r"step-(\d+)", (folder / LATEST).read_text())
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def check_same_run(folder: Path, begun: dict[str, Any], config: TrainConfig) -> None:
    """Raise `ConfigError` if the run in a folder, begun with these values, is not one of `config`."""
    saved = saved_config(begun)
    key = differing_key(saved, config)
    if key is not None:
        raise ConfigError(
            f"{folder.parent} holds a run with {key}={_brief(saved.get(key))}, not {_brief(flat(config)[key])}: choose "
            "another out, or overwrite that run with resume=false."
        )


def _read_run(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder that `latest` names, and its configuration, as written, history and number of processes."""
    path = folder
    try:
        path = folder / (folder / LATEST).read_text().strip()
        run = json.loads(read_bytes(path / RUN))  # NaN, which losses may be, included
        return path, {
            "config": dict(run["config"]),
            "history": list(run["history"]),
            "processes": int(run.get("processes", 1)),
        }
    except RecursionError:
        raise _damaged(path, ValueError("it nests too deeply")) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is damaged or foreign ({_reason(error)}): choose another out, or start anew with "
        "resume=false."
    )


def _brief(value: object) -> str:
    """Write the beginning of what may be a list of thousands of files."""
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _reason(error: Exception) -> str:
    """Write what went wrong on one line, to stand in brackets."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _free_name(path: Path) -> Path:
    """Return `path`, with a number behind it if it exists: the existing one may be what `latest` names."""
    names = (path.with_name(f"{path.name}-{n}") if n else path for n in count())
    return next(name for name in names if not name.exists())
