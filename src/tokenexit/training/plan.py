"""What a run would do: all that can be said and refused without its data and weights. Nothing is fetched or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tokenexit.cost import GIGA
from tokenexit.data.registry import check_dataset, dataset_labels
from tokenexit.ledger import dense_ops
from tokenexit.methods import build_method
from tokenexit.preprocessing import Labels, Preprocessing
from tokenexit.pretrained import CONFIG_FILE
from tokenexit.runtime.folder import current
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.build import build_dataset, build_model, build_preprocessing, build_transform, check_start
from tokenexit.training.checkpoint import LATEST
from tokenexit.training.config import DataConfig, TrainConfig, check_class_weights, check_parts
from tokenexit.training.distill import load_teacher
from tokenexit.training.freeze import check_freeze

NOT_THERE = "not there yet"


def plan(config: TrainConfig) -> str:
    """The run in a few lines.

    Raises what the run itself would, a `TokenExitError`, for a configuration that cannot work.
    """
    data = config.data
    check_parts(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_start(config.model)
    check_freeze(config.freeze, config.model)
    for split in (data.train_split, data.val_split) if config.validate_every else (data.train_split,):
        check_dataset(data.name, data.root, split, **data.options)
    build_transform(data)
    methods = [build_method(spec) for spec in config.methods]
    labels = _labels(data)
    model = None
    if labels is not None:
        check_class_weights(config, labels.num_classes)
        model = skeleton(config, labels)
    if model is not None:
        for method in methods:
            model.check(method)
        if _saved(config.distill.teacher):
            load_teacher(config.distill, model)
    preprocessing = build_preprocessing(data, None) if model is None else model.preprocessing
    lines = {
        "model": ", ".join([_start(config), *_figures(model, config)]),
        "data": ", ".join(_data(data, labels)),
        "methods": ", ".join(method.label for method in methods),
        "steps": ", ".join(_steps(config)),
        "predicts": ", ".join(_pictures(preprocessing)),
        "teacher": "" if config.distill.teacher is None else _model_place(config.distill.teacher),
        "writes": ", ".join(_written(config)),
    }
    return "\n".join(f"{name + ':':<10}{text}" for name, text in lines.items() if text)


def skeleton(config: TrainConfig, labels: Labels) -> ExitSegmenter | None:
    """The model that the run would build: a new one without memory for its weights, a saved one if it is there."""
    if config.model.init_from is None:
        with torch.device("meta"):
            return build_model(replace(config.model, weights=None), config.data, labels)[0]
    return build_model(config.model, config.data, labels)[0] if _saved(config.model.init_from) else None


def _labels(data: DataConfig) -> Labels | None:
    """Classes of the dataset; None for one that brings its own and is not there."""
    known = dataset_labels(data.name)
    if known is None and data.root is not None and Path(data.root).is_dir():
        return build_dataset(data, data.train_split).labels
    return known


# ------------------------------------------------------------------------------------------------------- in words


def _start(config: TrainConfig) -> str:
    model = config.model
    if model.init_from is not None:
        return f"{'new exits for' if model.new_exits else 'all of'} {_model_place(model.init_from)}"
    if model.weights is None:
        return f"{model.backbone} with random weights"
    return f"{model.backbone} from {model.weights if ':' in model.weights else _place(model.weights)}"


def _figures(model: ExitSegmenter | None, config: TrainConfig) -> Iterator[str]:
    if model is not None:
        ops = dense_ops(model.backbone, model.decode_head, model.backbone.patch_embed.grid(*config.data.crop))
        yield f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
        yield f"exits after {_exits(model)} of {model.config.backbone.depth} blocks"
        yield f"{ops.macs / GIGA:.2f} GMACs for a crop without exits"


def _exits(model: ExitSegmenter) -> str:
    *first, last = map(str, model.config.exits or ("none",))
    return " and ".join([", ".join(first), last]) if first else last


def _data(data: DataConfig, labels: Labels | None) -> Iterator[str]:
    yield data.name if data.root is None else f"{data.name} in {_place(data.root)}"
    if data.root is None:
        yield "drawn when needed"
    yield f"{labels.num_classes if labels else 'its own'} classes"
    yield f"crops of {_size(data.crop)}"


def _steps(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    yield f"{config.steps} of {config.batch_size} pictures"
    yield f"{optim.name} at {optim.lr:g}, heads {optim.head_lr_factor:g} times that"
    if optim.warmup_steps:
        yield f"warm-up over {optim.warmup_steps}"
    yield f"decay to {optim.min_lr:g} at step {optim.decay_end or config.steps}"
    if config.validate_every:
        yield f"validated on {config.data.val_split} after every {config.validate_every}"


def _pictures(preprocessing: Preprocessing) -> Iterator[str]:
    """How the model later takes the pictures it is given."""
    if isinstance(preprocessing.resize, int):
        yield f"pictures with a shortest side of {preprocessing.resize}"
    elif isinstance(preprocessing.resize, tuple):
        yield f"pictures of {_size(preprocessing.resize)}"
    if preprocessing.window and preprocessing.stride:
        yield f"windows of {_size(preprocessing.window)} every {_size(preprocessing.stride)}"


def _written(config: TrainConfig) -> Iterator[str]:
    checkpoints = Path(config.out) / "checkpoints"
    yield f"{config.out}, its model and checkpoints"
    if config.resume and (checkpoints / LATEST).exists():
        yield f"going on from {(checkpoints / LATEST).read_text()}"


def _saved(folder: str | None) -> bool:
    return folder is not None and current(Path(folder), CONFIG_FILE).is_file()


def _model_place(folder: str) -> str:
    return folder if _saved(folder) else f"{folder} ({NOT_THERE})"


def _place(path: str) -> str:
    return path if Path(path).exists() else f"{path} ({NOT_THERE})"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
