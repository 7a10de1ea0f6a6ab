"""What a run would do, from its configuration alone: no data is read, no weights, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenexit.cost import GIGA
from tokenexit.data.registry import dataset_labels
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import label_of
from tokenexit.ledger import dense_ops
from tokenexit.methods import build_method
from tokenexit.segmenter import CONFIG_FILE, ExitSegmenter
from tokenexit.training.config import ModelConfig, TrainConfig
from tokenexit.training.freeze import check_start

NOT_THERE = "not there yet"


def plan(config: TrainConfig) -> str:
    """The run in a few lines. Raises `ConfigError` for what cannot be built, `DataError` for an unknown dataset."""
    methods = [label_of(build_method(spec)) for spec in config.methods]
    check_start(config.freeze, config.model)
    labels = dataset_labels(config.data.name)
    classes = None if labels is None else labels.num_classes
    if classes is not None and config.class_weights is not None and len(config.class_weights) != classes:
        raise ConfigError(f"class_weights has {len(config.class_weights)} values for {classes} classes: one for each.")
    data, optim = config.data, config.optim
    lines = {
        "model": _model_line(config, classes),
        "data": f"{data.name} in {_place(data.root)}, {classes or 'its own'} classes, crops of "
        f"{data.crop[0]}x{data.crop[1]}",
        "methods": ", ".join(methods),
        "steps": f"{config.steps} of {config.batch_size} pictures, {optim.name} at {optim.lr:g}, heads "
        f"{optim.head_lr_factor:g} times that, decay to {optim.min_lr:g} at step {optim.decay_end or config.steps}",
        "writes": config.out,
    }
    if config.distill.teacher is not None:
        lines["teacher"] = _place(config.distill.teacher)
    return "\n".join(f"{name + ':':<9}{text}" for name, text in lines.items())


def _model_line(config: TrainConfig, classes: int | None) -> str:
    model = config.model
    if model.init_from is not None and not model.new_exits:
        if not (Path(model.init_from) / CONFIG_FILE).exists():
            return f"all of {model.init_from} ({NOT_THERE})"
        return f"all of {model.init_from}; {_figures(ExitSegmenter.from_pretrained(model.init_from), config)}"
    start = "fresh weights" if model.weights is None else model.weights
    if classes is None:
        return f"{model.backbone}, {start}"
    return f"{start}; {_figures(skeleton(model, classes), config)}"


def skeleton(model: ModelConfig, num_classes: int) -> ExitSegmenter:
    """The architecture without memory for its weights."""
    with torch.device("meta"):
        return ExitSegmenter(
            model.backbone, num_classes, model.exits, model.exit_head, model.decode_head, **model.options
        )


def _figures(model: ExitSegmenter, config: TrainConfig) -> str:
    crop = config.data.crop
    ops = dense_ops(model.backbone, model.decode_head, model.backbone.patch_embed.grid(*crop))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exits = ", ".join(map(str, model.config.exits)) or "no"
    return (
        f"{parameters / 1e6:.1f} M parameters, exits after {exits} of {model.config.backbone.depth} blocks, "
        f"{ops.macs / GIGA:.2f} GMACs for a crop without exits"
    )


def _place(path: str | None) -> str:
    if path is None:
        return "memory, as it is drawn"
    return path if Path(path).exists() else f"{path} ({NOT_THERE})"
