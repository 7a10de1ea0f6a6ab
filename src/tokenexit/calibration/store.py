"""Calibrations, made and written beside the weights they are for."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tokenexit.calibration.calibration_set import TrueRun
from tokenexit.calibration.drift import ReferenceStatistics
from tokenexit.checkpoints.calibration import CALIBRATE, CALIBRATION_FILE, Calibration
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.methods import Method, spec_of
from tokenexit.pretrained import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE
from tokenexit.runtime.folder import current, replaced_together
from tokenexit.runtime.schema import damaged
from tokenexit.segmenter import ExitSegmenter
from tokenexit.version import __version__

MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE)


def calibration_of(
    model: ExitSegmenter,
    method: Method[Any],
    run: TrueRun,
    *,
    asked: Mapping[str, Any],
    guarantee: str,
    reached: Mapping[str, Any],
    images: Mapping[str, Any],
) -> Calibration:
    """Make the calibration of a model for `method`, of which `run` is a true run on the calibration images.

    A model without exits, whose images are made smaller, has no scores to compare later images with.
    """
    return Calibration(
        asked=asked,
        guarantee=guarantee,
        method=spec_of(method),
        reached=reached,
        images=images,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        made_with={"tokenexit": __version__, "torch": torch.__version__, "machine": platform.machine()},
        model=model.fingerprint(),
        scores=ReferenceStatistics.of(run.histograms).to_dict() if model.config.exits else None,
    )


def write_calibration(calibration: Calibration, model: Path, out: Path) -> Path:
    """Write `calibration.json` to the folder `out`, with a copy of the model's files where `out` is not `model`.

    All of them change as one, so an interrupted call leaves what was there. Raises `ConfigError` for a folder that
    cannot be written, or that holds another model.
    """
    target = out / CALIBRATION_FILE
    try:
        weights = current(out, WEIGHTS_FILE)
        copied = MODEL_FILES if out.resolve() != model.resolve() else ()
        if copied and weights.exists() and not _same(weights, current(model, WEIGHTS_FILE)):
            raise ConfigError(f"{out} holds another model: choose another folder for the calibrated one.")
        with replaced_together(out) as new:
            for name in copied:
                if (source := current(model, name)).exists():
                    shutil.copyfile(source, new / name)
            (new / CALIBRATION_FILE).write_text(json.dumps(calibration.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): choose another folder.") from None
    return target


def reference_statistics_of(model: ExitSegmenter) -> ReferenceStatistics:
    """Statistics of the scores with which the model was calibrated. Raises `CheckpointError` for a damaged file."""
    assert model.calibration is not None, "asked of calibrated models"
    if model.calibration.scores is None:
        raise CheckpointError(f"{CALIBRATION_FILE} lacks 'scores', as of an earlier version: calibrate again.")
    try:
        reference = ReferenceStatistics.from_dict(model.calibration.scores)
    except KeyError as missing:
        raise CheckpointError(
            f"{CALIBRATION_FILE} lacks {missing}, as of an earlier version: calibrate again."
        ) from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged(CALIBRATION_FILE, str(error).split("\n")[0], CALIBRATE) from None
    if len(reference.mean) != len(model.config.exits):
        raise CheckpointError(f"{CALIBRATION_FILE} has scores of another model: calibrate again, or delete it.")
    return reference


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()
