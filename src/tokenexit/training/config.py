"""Configuration of a training run as dataclasses; a YAML file of them is a recipe.

This module imports no torch, so that the command line can build its parser quickly. The text under a field is what
`tokenexit train --help` says about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

from tokenexit.data.registry import UNLABELLED
from tokenexit.errors import ConfigError
from tokenexit.inputs.labels import IgnoredPixels


@dataclass
class ModelConfig:
    """The model."""

    backbone: str = "vit_tiny_patch16"
    """A preset of `tokenexit.engine.vit_config.PRESETS`."""
    exits: list[int] = field(default_factory=lambda: [3, 6, 9])
    """Exits, each by the number of blocks before it."""
    exit_head: Any = "fcn"
    """Head of all exits: a name, a mapping of `kind` and its options, or a list with one for each exit."""
    decode_head: Any = "fcn"
    """Head at the end: a name, or a mapping of `kind` and its options."""
    weights: str | None = None
    """Backbone weights to start from: a .safetensors or .pth file, or hf-hub:OWNER/NAME."""
    init_from: str | None = None
    """Folder of a saved model to fine-tune; architecture, preprocessing and classes are taken from it."""
    new_exits: bool = False
    """Fresh exit heads, at `exits` and as `exit_head` says, on backbone and decode head of init_from."""
    stage_adapter: bool = False
    """An adapter (norm and linear layer) for each exit, through which the decode head of DoViT and PAUMER reads tokens
    that stopped there; new ones are put on a saved model without them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `ViTConfig` to change, such as drop_path; with init_from, drop_path, drop_path_attention and
    rope_rescale alone."""


@dataclass
class DataConfig:
    """Dataset and augmentation, and the preprocessing of the trained model."""

    name: str = "scenes"
    """A registered dataset, such as scenes (drawn by a program), camvid, ade20k, cityscapes, folder, or photos (without
    masks, for a run with a teacher)."""
    root: str | None = None
    """Folder of the dataset; null for scenes."""
    train_split: str = "train"
    """Training split."""
    val_split: str = "val"
    """Validation split."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the dataset, such as size of scenes."""
    crop: tuple[int, int] = (352, 352)
    """Height and width of training crops, in pixels."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the random resize."""
    resize_base: tuple[int, int] | None = None
    """Long and short side, in pixels, of a random resize by 1; the image's own if not given."""
    cat_max_ratio: float = 0.75
    """Largest share of one class in a crop; other crops are drawn again, as in mmsegmentation."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of pixels in 0..1, red, green and blue, which is subtracted; AugReg weights need 0.5."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of pixels in 0..1, by which they are divided; AugReg weights need 0.5."""
    resize: int | tuple[int, int] | None = None
    """Shortest side, or height and width, in pixels, to which the trained model resizes images; their own if not
    given."""
    window: tuple[int, int] | None = None
    """Height and width of the windows in which the trained model segments; the whole image if not given."""
    stride: tuple[int, int] | Literal["even"] | None = None
    """Distance between these windows; even: as few as cover the image, at equal distances; they touch if not given."""
    workers: int = 0
    """Worker processes that load images; 0 loads them between the steps."""
    cache: bool = False
    """Cache of decoded images in memory, up to 2 GiB."""

    def __post_init__(self) -> None:
        _at_least("data", self, workers=0)
        _in_range("data", self, 0.0, 1.0, "cat_max_ratio")


@dataclass
class OptimConfig:
    """Optimiser and learning rate schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Name of the optimiser."""
    lr: float = 1e-4
    """Learning rate of the backbone."""
    head_lr_factor: float = 10.0
    """Learning rate of the heads, as a multiple of that of the backbone."""
    layer_decay: float = 1.0
    """Learning rate of each block of the backbone as a share of that of the next (layer-wise decay); embeddings learn
    as the first block, the last block and the final norm at lr."""
    weight_decay: float = 0.01
    """Weight decay of weight matrices; see decay_all."""
    decay_all: bool = False
    """Weight decay of norms, biases and embeddings too, as in DToP."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    momentum: float = 0.9
    """Momentum of SGD."""
    warmup_steps: int = 100
    """Steps of the linear warm-up."""
    backbone_warmup_steps: int = 0
    """Steps of a later warm-up of the backbone alone, which stands still during warmup_steps and decays after its own;
    0 for one warm-up of all."""
    warmup_start: float = 1e-6
    """Learning rate of the first step of a warm-up, as a share of lr."""
    power: float = 0.9
    """Power of the polynomial decay."""
    decay_start: int = 0
    """Step at which the decay begins; 0 includes the warm-up, as in mmcv 0.x."""
    decay_end: int | None = None
    """Step at which the decay would end; the last of the run if not given."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, the same for backbone and heads."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient (gradient clipping); no limit if not given."""

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "head_lr_factor", "layer_decay")
        _at_least("optim", self, weight_decay=0, warmup_steps=0, power=0, min_lr=0, decay_start=0)
        _at_least("optim", self, backbone_warmup_steps=0)
        if self.decay_end is not None:
            _at_least("optim", self, decay_end=self.decay_start + 1)
        _in_range("optim", self, 0.0, 1.0, "momentum", "warmup_start", "layer_decay")
        if self.min_lr > self.lr:
            raise ConfigError(f"optim.min_lr must be at most optim.lr={self.lr}, got {self.min_lr}: lower it.")
        if self.clip_grad_norm is not None:
            _positive("optim", self, "clip_grad_norm")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"optim.betas must lie in [0, 1), got {list(self.betas)}: choose values such as 0.9 and 0.999."
            )


@dataclass
class DistillConfig:
    """Distillation from a dense model, beside the labels or instead of them."""

    teacher: str | None = None
    """Folder of the saved model to learn from, run without exits; null for no distillation."""
    features: float = 0.5
    """Weight of the squared difference of the features that the decode heads read."""
    logits: float = 1.0
    """Weight of the divergence of the decode heads' logits."""
    exits: float = 0.0
    """Weight of the divergence of every exit's logits from the teacher's decode head."""
    temperature: float = 1.0
    """Temperature by which logits are divided; divergences are multiplied by its square."""
    class_balance: float = 0.0
    """Power by which rare classes count more in divergences: a cell's weight is the share that the teacher's class has
    in the batch to the minus this, with a mean of 1; 0 for equal weights, 1 for equal classes."""
    upsampled: bool = False
    """Comparison of logits after the bilinear upsampling of a SETR head, as in DoViT's release, instead of before
    it."""

    def __post_init__(self) -> None:
        _at_least("distill", self, features=0, logits=0, exits=0)
        _in_range("distill", self, 0.0, 1.0, "class_balance")
        _positive("distill", self, "temperature")
        if self.teacher is not None and not (self.features or self.logits or self.exits):
            raise ConfigError("distill.teacher has nothing to teach: make one of features, logits and exits positive.")


@dataclass
class MaskConfig:
    """Losses and mask attention of decode heads that predict masks (eomt)."""

    points: int = 12544
    """Points of an image at which queries are matched, and points of every mask at which its losses are taken."""
    fade_start: list[int] | None = None
    """Step, for each of n joint blocks, from which on its queries see beyond their own masks, more and more of them; at
    1, 2, .. n of n + 2 parts of the run if not given, as EoMT is published; [] for no mask attention."""
    fade_end: list[int] | None = None
    """Step, for each joint block, from which on all its queries see everything; one part later if not given."""

    def __post_init__(self) -> None:
        _at_least("masks", self, points=1)
        if (self.fade_start is None) != (self.fade_end is None):
            raise ConfigError("masks.fade_start and masks.fade_end go together: give both, or neither.")
        starts, ends = self.fade_start or [], self.fade_end or []
        if len(starts) != len(ends):
            raise ConfigError(
                f"masks.fade_start has {len(starts)} steps and masks.fade_end {len(ends)}: give one of each for every "
                "joint block."
            )
        for start, end in zip(starts, ends):
            if not 0 <= start <= end:
                raise ConfigError(
                    f"masks.fade_end must not be before masks.fade_start, got {start} and {end}: raise the end."
                )


Freeze = Literal["none", "backbone", "all_but_exit_heads"]


@dataclass
class TrainConfig:
    """A training run."""

    out: str = "runs/train"
    """Folder of the run, for checkpoints and the trained model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    freeze: Freeze = "none"
    """Frozen parts: none, the backbone, or all_but_exit_heads, which keeps the dense prediction as it was."""
    methods: list[Any] = field(default_factory=lambda: ["dense"])
    """Methods of the forward pass, as names or mappings of `name` and options; one is drawn for each step, so that
    one model serves them all, and the first is validated."""
    steps: int = 1000
    """Optimiser steps; the learning rate schedule ends with them."""
    batch_size: int = 8
    """Images per step, over all processes."""
    accumulate: int = 1
    """Gradient accumulation: number of equal parts of a process's images of a step, run one after the other to save
    memory; each has batch statistics of its own."""
    checkpoint_blocks: bool = False
    """Activation checkpointing: blocks computed again in the backward pass, for less memory; same result."""
    sync_batch_norm: bool = False
    """Batch statistics over all processes (synchronised batch norm); CUDA only."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is validated and saved; no average if not
    given."""
    aux_weight: float = 0.4
    """Weight of every exit's loss on labels; 0.4 is usual for softmax heads, 1 for ATM heads."""
    macs_weight: float = 0.0
    """Weight of the multiply-adds that tokens expect to take behind exits, as a share of dense, for methods with
    thresholds; 0.3 saves a point or two of dense. 0 as published."""
    loss_stride: int = 1
    """Stride in pixels, on both axes, at which losses are taken; 1 as published, 2 is much faster on a CPU."""
    class_weights: list[float] | None = None
    """Factor on the cross-entropy of each class, averaging to one over pixels; lifts rare classes. ATM heads ignore
    it."""
    ignored_pixels: IgnoredPixels = "left_out"
    """Ignored pixels in losses. left_out: they take part in no loss; counted, as in the authors' releases:
    cross-entropy divides by the number of all pixels, and mask losses of ATM heads take them as negatives of every
    class."""
    seed: int = 0
    """Random seed of weights, order and augmentation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto: bf16 where the processor multiplies it fast, else fp32. A run keeps the one it began with."""
    validate_every: Literal["auto"] | int = "auto"
    """Steps between validations, with one at the end; auto: four in a run, none without labels; 0 for none."""
    val_limit: int | None = None
    """Largest number of validation images; all if not given, with validate_every=auto at most 100, evenly spread."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 for only the last."""
    resume: bool = True
    """Continuation from the last checkpoint in `out`; false starts anew and overwrites it."""
    keep: Literal["best", "last"] = "best"
    """Weights that are saved as the model: those of the best validation, or the last. The checkpoint holds both, so
    the same command with the other word saves the others."""
    log: Literal["csv", "tensorboard"] = "csv"
    """Log of losses, learning rates and mIoU: csv writes log.csv, tensorboard events for TensorBoard, too."""

    def __post_init__(self) -> None:
        _at_least("", self, steps=1, batch_size=1, accumulate=1, loss_stride=1, seed=0, aux_weight=0, macs_weight=0)
        _at_least("", self, checkpoint_every=0)
        if 0 < min(self.data.crop) <= self.loss_stride // 2:
            raise ConfigError(
                f"loss_stride must leave pixels in a crop of {self.data.crop[0]}x{self.data.crop[1]}, got "
                f"{self.loss_stride}: choose 1, or 2 for speed."
            )
        if self.validate_every != "auto":
            _at_least("", self, validate_every=0)
        if self.val_limit is not None:
            _at_least("", self, val_limit=1)
        if self.class_weights is not None and not all(weight >= 0 for weight in self.class_weights):
            raise ConfigError(
                f"class_weights must not be negative, got {self.class_weights}: give one factor per class."
            )
        if not self.methods:
            raise ConfigError("methods must name at least one method, got none: name one, such as dense.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(
                f"ema_decay must lie between 0 and 1, got {self.ema_decay}: choose a value such as 0.999."
            )
        for name, kind in (("freeze", Freeze), ("ignored_pixels", IgnoredPixels)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"{name} must be one of {known}, got '{getattr(self, name)}': choose one.")


def check_class_weights(config: TrainConfig, num_classes: int) -> None:
    """Check that there is a weight for every class, or none at all."""
    if config.class_weights is not None and len(config.class_weights) != num_classes:
        raise ConfigError(
            f"class_weights must have {num_classes} values, one per class, got {len(config.class_weights)}: "
            "correct them."
        )


def check_run(config: TrainConfig, processes: int) -> None:
    """Reject options that exclude each other, as far as it shows without data, weights and torch."""
    check_parts(config, processes)
    check_start(config.model)
    check_freeze(config.freeze, config.model)
    if is_unlabelled(config):
        check_unlabelled(config)
    if config.log == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError("log=tensorboard needs the package tensorboard: pip install tensorboard.")


def check_start(config: ModelConfig) -> None:
    """Reject two sources of weights at once, and new exits without a saved model."""
    if config.init_from is not None and config.weights is not None:
        raise ConfigError("model.weights and model.init_from exclude each other: leave one out.")
    if config.init_from is None and config.new_exits:
        raise ConfigError("model.new_exits puts exits on a saved model: give its folder as model.init_from.")


def check_freeze(freeze: Freeze, model: ModelConfig) -> None:
    """Reject frozen parts with random weights."""
    if freeze == "backbone" and model.weights is None and model.init_from is None:
        raise ConfigError("freeze=backbone would keep random weights: give model.weights or model.init_from.")
    if freeze == "all_but_exit_heads" and model.init_from is None:
        raise ConfigError("freeze=all_but_exit_heads would keep a random decode head: give model.init_from.")


def is_unlabelled(config: TrainConfig) -> bool:
    """Return whether a run has images and no labels, so that its teacher is all there is to learn from."""
    return config.data.name in UNLABELLED


def check_unlabelled(config: TrainConfig) -> None:
    """Reject, for images without labels, what needs some, and a run without a teacher."""
    name = config.data.name
    if config.distill.teacher is None:
        raise ConfigError(f"{name} have no labels to learn from: give distill.teacher, the folder of a dense model.")
    if config.validate_every not in ("auto", 0):
        raise ConfigError(f"{name} have no labels to validate on: leave validate_every={config.validate_every} out.")
    if config.class_weights is not None:
        raise ConfigError(
            f"{name} have no labels that class_weights could weigh: leave them out; distill.class_balance lifts rare "
            "classes."
        )


def check_taught_exits(config: TrainConfig, exits: Sequence[int]) -> None:
    """Check that the exits of a model have something to learn from where there are no labels."""
    if is_unlabelled(config) and exits and not config.distill.exits:
        raise ConfigError(
            f"{config.data.name} have no labels to train exits with: make distill.exits positive, such as 0.5."
        )


def check_parts(config: TrainConfig, processes: int) -> None:
    """Check that a batch divides into equal parts for all processes."""
    if config.batch_size % (processes * config.accumulate):
        raise ConfigError(
            f"batch_size must be a multiple of {processes} processes x accumulate={config.accumulate}, got "
            f"{config.batch_size}: choose another."
        )


FREE_KEYS = {
    *("out", "resume", "validate_every", "val_limit", "checkpoint_every", "checkpoint_blocks", "keep", "log"),
    *("data.root", "data.val_split", "data.workers", "data.cache"),
}
"""Keys that may differ when a run continues: paths, and what is done beside the training.

`steps` is not among them: the schedule ends with it, so a longer run has other weights from its first step on.
"""


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return all values by their dotted key, in the types that JSON gives back."""
    flattened: dict[str, Any] = {}
    for key, value in asdict(config).items():
        if key in ("model", "data", "optim", "distill", "masks"):
            flattened |= {f"{key}.{name}": _plain(inner) for name, inner in value.items()}
        else:
            flattened[key] = _plain(value)
    return flattened


def differing_key(saved: dict[str, Any], config: TrainConfig) -> str | None:
    """Return the first key in which a run, saved as `flat`, differs from this configuration."""
    now = flat(config)
    return next((key for key in now if key not in FREE_KEYS and saved.get(key) != now[key]), None)


AUTO_VALIDATIONS, AUTO_VAL_IMAGES = 4, 100
"""Validations in a run and their largest number of images with validate_every=auto."""


def validation_steps(config: TrainConfig) -> int:
    """Return the steps from one validation to the next, 0 for none at all, as always without labels."""
    if is_unlabelled(config):
        return 0
    every = config.validate_every
    return math.ceil(config.steps / AUTO_VALIDATIONS) if every == "auto" else every


def as_begun(config: TrainConfig, saved: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with which a run continues that was begun with the values `saved`.

    What is left to this version to choose stays as it was: the precision, and for runs of versions that did not
    validate or choose by themselves, no validation and the last weights.
    """
    if config.precision == "auto" and saved.get("precision") in ("fp32", "bf16"):
        config = replace(config, precision=saved["precision"])
    if config.validate_every == "auto" and "validate_every" in saved:
        config = replace(config, validate_every=saved["validate_every"])
    return config if "keep" in saved else replace(config, keep="last")


def saved_config(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in a configuration saved as `flat`: keys that did not exist when it was written get their defaults."""
    return flat(TrainConfig()) | values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _dotted(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


def _at_least(group: str, config: object, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if not (value >= bound and math.isfinite(value)):
            raise ConfigError(f"{_dotted(group, name)} must be at least {bound}, got {value}: raise it.")


def _positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{_dotted(group, name)} must be positive, got {value}: give a number above 0.")


def _in_range(group: str, config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{_dotted(group, name)} must lie in [{low:g}, {high:g}], got {value}: choose another.")
