"""Build dataset, transform, preprocessing and model from the configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tokenexit.checkpoints.load import LoadReport
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Cached, Spread
from tokenexit.data.registry import open_dataset
from tokenexit.data.transforms import Compose, training_transform
from tokenexit.engine.vit_config import vit_config
from tokenexit.errors import ConfigError, DataError
from tokenexit.hub.fetch import resolve_folder
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Method
from tokenexit.methods.thresholded import ThresholdMethod
from tokenexit.pretrained import MODEL_FILES, read_config
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import (
    AUTO_VAL_IMAGES,
    DataConfig,
    ModelConfig,
    TrainConfig,
    check_start,
    is_unlabelled,
)


def build_dataset(config: DataConfig, split: str, labels: Labels | None = None) -> SegmentationDataset:
    """Open a split of the dataset. labels: classes of images that have none of their own, see `taught_labels`."""
    options = config.options if labels is None else {"labels": labels, **config.options}
    dataset = open_dataset(config.name, config.root, split, **options)
    return Cached(dataset) if config.cache else dataset


def taught_labels(config: TrainConfig) -> Labels | None:
    """Return the classes of images without labels: those of the teacher; None for a dataset that has its own.

    Raises `CheckpointError` for a folder that holds no model.
    """
    if not is_unlabelled(config) or config.distill.teacher is None:
        return None
    saved, preprocessing = read_config(resolve_folder(config.distill.teacher, MODEL_FILES))
    return preprocessing.labels or default_labels(saved.num_classes)


def open_validation(config: TrainConfig) -> SegmentationDataset:
    """Open the validation images of a run. Raises `DataError`, with a way out, where there is no such split."""
    try:
        data = build_dataset(config.data, config.data.val_split)
    except DataError as error:
        if config.validate_every != "auto":
            raise
        raise DataError(
            f"{str(error).rstrip('.')}; data.val_split names the split to validate on, validate_every=0 trains without."
        ) from None
    few = config.validate_every == "auto" and config.val_limit is None
    return Spread(data, AUTO_VAL_IMAGES) if few and len(data) else data


def build_transform(config: DataConfig, ignore_index: int = 255) -> Compose:
    """Build the augmentation of an image and its mask."""
    return training_transform(
        (config.crop[0], config.crop[1]),
        ignore_index=ignore_index,
        ratio=(config.ratio[0], config.ratio[1]),
        base=config.resize_base,
        cat_max_ratio=config.cat_max_ratio,
    )


def build_preprocessing(config: DataConfig, labels: Labels | None) -> Preprocessing:
    """Build the preprocessing of the images that the trained model is given."""
    return Preprocessing(
        mean=config.mean,
        std=config.std,
        resize="none" if config.resize is None else config.resize,
        labels=labels,
        window=config.window,
        stride=config.stride,
    )


def build_model(config: ModelConfig, data: DataConfig, labels: Labels) -> tuple[ExitSegmenter, LoadReport | None]:
    """Build a model to train: fresh, with backbone weights, or all of it from a saved model.

    Returns the model, in training mode, and the report of the loaded weights, if any.
    """
    check_start(config)
    if config.init_from is not None:
        model = ExitSegmenter.from_pretrained(config.init_from)
        if model.config.num_classes != labels.num_classes:
            raise ConfigError(
                f"{config.init_from} predicts {model.config.num_classes} classes, dataset {data.name} has "
                f"{labels.num_classes}: choose a model of this dataset, or start from backbone weights."
            )
        if config.new_exits:
            model = _with_new_exits(model, config)
        if config.stage_adapter and not model.config.stage_adapter:
            model = model.with_stage_adapters()
        model.calibration = None  # thresholds belong to the weights they were chosen for
        _apply_augmentation(model, config)
        return model.train(), None
    model = ExitSegmenter(
        config.backbone,
        num_classes=labels.num_classes,
        exits=config.exits,
        exit_head=config.exit_head,
        decode_head=config.decode_head,
        preprocessing=build_preprocessing(data, labels),
        weights=config.weights,
        stage_adapter=config.stage_adapter,
        **config.options,
    )
    return model.train(), model.load_report


def check_adapters(model: ExitSegmenter, methods: Sequence[Method[Any]], processes: int) -> None:
    """Reject, in a run of several processes, methods that pass stage adapters by.

    Every process waits for the gradients of all parameters, and a step with such a method has none of these.
    """
    if processes == 1 or not model.config.stage_adapter:
        return
    for method in methods:
        if not (isinstance(method.inner, ThresholdMethod) and method.inner.adapts_stopped):
            raise ConfigError(
                f"stage adapters learn nothing from a step with '{method.label}', which {processes} processes would "
                "wait for: train with dovit or paumer alone and without rejoin, or in one process."
            )


def _with_new_exits(saved: ExitSegmenter, config: ModelConfig) -> ExitSegmenter:
    """Put fresh exit heads, where `config` wants them, on backbone, decode head and preprocessing of a saved model."""
    model = ExitSegmenter(
        saved.config.backbone,
        num_classes=saved.config.num_classes,
        exits=config.exits,
        exit_head=config.exit_head,
        decode_head=saved.config.decode_head,
        preprocessing=saved.preprocessing,
    )
    model.backbone, model.decode_head = saved.backbone, saved.decode_head
    return model.with_stage_adapters() if saved.config.stage_adapter else model


def _apply_augmentation(model: ExitSegmenter, config: ModelConfig) -> None:
    """Change what the backbone draws in training alone, which loads no weights, and reject changes of anything else."""
    unknown = set(config.options) - {"drop_path", "drop_path_attention", "rope_rescale"}
    if unknown:
        raise ConfigError(f"model.options.{min(unknown)} cannot change with init_from: it is part of the saved model.")
    asked = vit_config(model.config.backbone, **config.options)  # which checks the rate
    model.config = replace(model.config, backbone=replace(model.config.backbone, rope_rescale=asked.rope_rescale))
    model.backbone.config = model.config.backbone
    blocks: list[Any] = list(model.backbone.blocks)
    for i, block in enumerate(blocks):
        block.drop_path = asked.drop_path * i / max(len(blocks) - 1, 1)
        block.drop_path_attention = asked.drop_path_attention
