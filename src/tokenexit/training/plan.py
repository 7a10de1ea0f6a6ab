"""The plan of a run (`--dry-run`): all that can be checked without its data and weights; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import note_of
from tokenexit.data.registry import check_dataset_options, dataset_labels
from tokenexit.engine.ops import GIGA
from tokenexit.inputs.labels import Labels
from tokenexit.inputs.preprocessing import Preprocessing, windows_in_words
from tokenexit.methods import build_method
from tokenexit.outputs.ledger import dense_ops
from tokenexit.pretrained import CONFIG_FILE
from tokenexit.runtime.folder import current
from tokenexit.runtime.precision import slow_precision, training_precision
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.annealing import fades
from tokenexit.training.build import (
    build_dataset,
    build_model,
    build_preprocessing,
    build_transform,
    open_validation,
    taught_labels,
)
from tokenexit.training.checkpoint import (
    CHECKPOINTS,
    LATEST,
    begun_with,
    check_same_run,
    run_is_whole,
    settled,
    steps_done,
)
from tokenexit.training.config import (
    DataConfig,
    TrainConfig,
    check_class_weights,
    check_run,
    check_taught_exits,
    is_unlabelled,
    validation_steps,
)
from tokenexit.training.distill import load_teacher

NOT_THERE = "not there yet"


def plan(config: TrainConfig) -> str:
    """Describe the run in a few lines.

    Raises what the run itself would, a `TokenExitError`, for a configuration that cannot work.
    """
    check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = Path(config.out) / CHECKPOINTS
    begun = begun_with(checkpoints) if config.resume and run_is_whole(checkpoints) else None
    config = settled(config, begun, device)
    if begun is not None:
        check_same_run(checkpoints, begun, config)
    data = config.data
    validates = bool(validation_steps(config))
    for split in (data.train_split, data.val_split) if validates else (data.train_split,):
        check_dataset_options(data.name, data.root, split, **data.options)
    known = not is_unlabelled(config) or _saved(config.distill.teacher)
    opened = build_dataset(data, data.train_split, taught_labels(config)) if known and _is_there(data) else None
    validation = open_validation(config) if opened is not None and validates else None
    build_transform(data)
    methods = [build_method(spec) for spec in config.methods]
    labels = dataset_labels(data.name) if opened is None else opened.labels
    model = None
    if labels is not None:
        check_class_weights(config, labels.num_classes)
        model = skeleton(config, labels)
    if model is not None:
        check_taught_exits(config, model.config.exits)
        fades(config.masks, model.decode_head.joint_blocks, config.steps)  # which checks them
        for method in methods:
            method.check(model.view(with_records=True))  # as training runs it
        if _saved(config.distill.teacher):
            load_teacher(config.distill, model)
    preprocessing = build_preprocessing(data, None) if model is None else model.preprocessing
    lines = {
        "model": ", ".join([_start(config), *_figures(model, config)]),
        "data": ", ".join(_data(data, labels)),
        "splits": ", ".join(_splits(data, opened, validation)),
        "methods": ", ".join(method.label for method in methods),
        "steps": ", ".join(_steps(config)),
        "predicts": ", ".join(_images(preprocessing)),
        "machine": f"{device.type} in {config.precision}",
        "warning": slow_precision(training_precision(config.precision, device), device) or "",
        "teacher": "" if config.distill.teacher is None else _model_place(config.distill.teacher),
        "writes": ", ".join(_written(config)),
    }
    return "\n".join(f"{name + ':':<10}{text}" for name, text in lines.items() if text)


def skeleton(config: TrainConfig, labels: Labels) -> ExitSegmenter | None:
    """Build the model of the run: a new one without memory for its weights, a saved one if it is there."""
    if config.model.init_from is None:
        with torch.device("meta"):
            return build_model(replace(config.model, weights=None), config.data, labels)[0]
    return build_model(config.model, config.data, labels)[0] if _saved(config.model.init_from) else None


def _is_there(data: DataConfig) -> bool:
    return data.root is None or Path(data.root).is_dir()


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
        yield f"exits after {_exits(model)} of {model.depth} blocks"
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


def _splits(
    data: DataConfig, train: SegmentationDataset | None, validation: SegmentationDataset | None
) -> Iterator[str]:
    """Describe the splits of a dataset that is there, by their numbers of images."""
    if train is None or data.root is None:
        return
    yield f"{data.train_split} with {len(train)} images"
    if validation is not None:
        yield f"{data.val_split} with {len(validation)} to validate on"
    if note_of(train):
        yield note_of(train)


def _steps(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    yield f"{config.steps} of {config.batch_size} images"
    yield f"{optim.name} at {optim.lr:g}, heads {optim.head_lr_factor:g} times that"
    if optim.layer_decay != 1.0:
        yield f"each block {optim.layer_decay:g} times the next"
    if optim.warmup_steps:
        yield f"warm-up over {optim.warmup_steps}"
    if optim.backbone_warmup_steps:
        yield f"then of the backbone over {optim.backbone_warmup_steps}"
    yield f"decay to {optim.min_lr:g} at step {optim.decay_end or config.steps}"
    if validation_steps(config):
        yield f"validated on {config.data.val_split} after every {validation_steps(config)}"


def _images(preprocessing: Preprocessing) -> Iterator[str]:
    """Describe how the trained model resizes images."""
    if isinstance(preprocessing.resize, int):
        yield f"images with a shortest side of {preprocessing.resize}"
    elif isinstance(preprocessing.resize, tuple):
        yield f"images of {_size(preprocessing.resize)}"
    if preprocessing.window and preprocessing.stride:
        yield windows_in_words(preprocessing.window, preprocessing.stride)


def _written(config: TrainConfig) -> Iterator[str]:
    yield f"{config.out}, its model and checkpoints"
    checkpoints = Path(config.out) / CHECKPOINTS
    done = steps_done(checkpoints) if config.resume else None
    if done == config.steps:
        yield f"finished: all {done} steps are done, nothing is left to train"
    elif done is not None:
        yield f"going on from {(checkpoints / LATEST).read_text()}"


def _saved(folder: str | None) -> bool:
    return folder is not None and current(Path(folder), CONFIG_FILE).is_file()


def _model_place(folder: str) -> str:
    return folder if _saved(folder) else f"{folder} ({NOT_THERE})"


def _place(path: str) -> str:
    return path if Path(path).exists() else f"{path} ({NOT_THERE})"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
