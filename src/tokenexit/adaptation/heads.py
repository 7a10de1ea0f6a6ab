"""Fitted exit heads after every block, kept on disk one by one, so that a call that was interrupted goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tokenexit.adaptation.features import Features, record_features
from tokenexit.adaptation.fit import FittedHead, fit_head
from tokenexit.adaptation.options import Options, Progress, places
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.targets import Budget, CalibrationTarget
from tokenexit.errors import CheckpointError
from tokenexit.heads import Head, build_head
from tokenexit.runtime.atomic import write_or_refuse
from tokenexit.runtime.notebook import Notebook
from tokenexit.segmenter import ExitSegmenter


def settings(
    dense: ExitSegmenter, paths: Sequence[Path], target: CalibrationTarget, options: Options
) -> dict[str, Any]:
    """Return what decides features and fitted heads, so that another call does not go on with these."""
    photos = hashlib.sha256()
    for path in paths:
        photos.update(f"{path} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    kind = "budget" if isinstance(target, Budget) else f"{target.what}={target.value:g} at {target.confidence:g}"
    return {
        "source": dense.fingerprint(),
        "photos": photos.hexdigest()[:16],
        "split_for": kind,
        "exit_head": options.exit_head,
        "seed": options.seed,
        "precision": options.precision,
    }


def fitted_heads(
    photos: CalibrationSet,
    work: Path,
    notebook: Notebook,
    options: Options,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[int, FittedHead]:
    """Return the fitted head of every place, from the disk where an earlier call has fitted it.

    Raises:
        ConfigError: if the disk is full.
        CheckpointError: for a head on the disk that is damaged.
    """
    dense = photos.model
    blocks = places(dense, options.held)
    features = record_features(photos, blocks, work / "features", seed=options.seed)
    heads: dict[int, FittedHead] = {}
    before: Head | None = None
    for block in progress("fitting exit heads")(blocks):
        heads[block] = _fitted_head(features, block, before, work, notebook, options)
        before = heads[block].head
    shares = ", ".join(f"{block}: {one.agreement:.1%}" for block, one in heads.items())
    say(f"tokens answered as the dense model does, by block: {shares}")
    for one in heads.values():
        one.head.to(dense.device)
    return heads


def _fitted_head(
    features: Features, block: int, before: Head | None, work: Path, notebook: Notebook, options: Options
) -> FittedHead:
    path = work / f"head{block:03}.safetensors"

    def fit() -> dict[str, Any]:
        one = fit_head(features, block, options.exit_head, start=before, seed=options.seed)
        with write_or_refuse(path, notebook.cure) as unfinished:
            unfinished.write_bytes(save(one.head.state_dict()))
        return {name: value for name, value in vars(one).items() if name != "head"}

    figures = notebook.once(f"head {block}", fit)
    head = build_head(options.exit_head, features.channels, features.classes)
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        raise CheckpointError(f"{path} is missing or damaged: delete {work}, and adapt again.") from None
    return FittedHead(head.eval(), **figures)
