"""Fine-tuning without labels: a model with exits goes on learning, as it will run, from its own frozen dense twin.

Exit heads that are fitted to a frozen backbone cannot win back the context that tokens lose when others leave. Here all
weights learn, with the exits on: the loss is the distance to the dense model in features, in the decode head's answers
and in those of every exit (`tokenexit.training.distill`). It is one run of the training loop on the dataset `photos`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from tokenexit.errors import ConfigError
from tokenexit.hub.fetch import resolve_folder
from tokenexit.inputs.images import load_image, open_image
from tokenexit.inputs.preprocessing import Preprocessing, resized_size
from tokenexit.inputs.sources import list_images
from tokenexit.methods import Dense, Gated, Method, Truncated, spec_of
from tokenexit.methods.thresholded import NEVER, per_exit
from tokenexit.pretrained import MODEL_FILES, SegmenterConfig, read_config
from tokenexit.training.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, TrainConfig
from tokenexit.training.loop import Say, speak, train

Size = tuple[int, int]

CROP_SHARE, LARGEST_CROP = 0.75, 512
"""Side of a crop: a share of the shorter side of the images, and no more pixels than this."""
LARGE_CROP, IMAGES_PER_STEP, LARGE_IMAGES_PER_STEP = 352, 8, 4
"""Images in a step, and in one of crops with a longer side than `LARGE_CROP`."""
RATIO, RATIO_OF_ONE_SIZE = (0.5, 2.0), (0.75, 2.0)
"""Range of the random resize; where all photos have one size, objects keep nearer to theirs."""
CHECKPOINT_EVERY = 50


def finetune(
    model_folder: Path,
    dense_folder: Path,
    photos: Sequence[Path],
    method: Method[Any],
    *,
    steps: int,
    out: Path,
    batch_size: int | None = None,
    crop: Size | None = None,
    class_balance: float = 0.0,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resume: bool = True,
    say: Say = speak,
    progress: bool = True,
) -> Path:
    """Fine-tune a model with exits on photos without labels, against a dense model.

    All weights change, those of backbone and decode head too: the dense prediction of the tuned model is no longer that
    of the source, and its calibration is gone, as thresholds belong to the weights they were chosen for. A call that
    was killed at any moment and is made again goes on, and ends with the weights of one that was not, bit for bit.

    Args:
        model_folder: the model with exits to start from.
        dense_folder: the teacher; its exits, if any, are not run. It may be `model_folder` itself.
        photos: images, folders of them, and lists, see `tokenexit.inputs.sources.list_images`.
        method: the method that the model will run with; see `training_method` for what of it is trained.
        steps: optimiser steps.
        out: folder of the checkpoints and of the tuned model.
        batch_size: images per step; if not given 8, and 4 for crops of more than 352 pixels.
        crop: height and width of training crops in pixels; if not given the largest square of whole patches within
            three quarters of the photos' shorter side (the median, at the size that the model resizes images to), 512
            pixels and the model's window.
        class_balance: see `DistillConfig`; above 0, rare classes count more.
        seed: random seed of order and augmentation.
        precision: precision; auto takes what the processor is fast in.
        resume: whether a run in `out` goes on; false starts anew and overwrites it.
        say: shows one line per event.
        progress: show a progress bar.

    Returns:
        The folder of the tuned model, `out`.

    Raises:
        ConfigError: for options that cannot work, for a folder of a run with another configuration, for a model
            without exits, and for one whose exit heads answer in another way than its decode head.
        DataError: for photos that are missing or cannot be read.
        CheckpointError: for folders without a model.
    """
    config = finetune_config(
        *(model_folder, dense_folder, photos, method),
        steps=steps,
        out=out,
        batch_size=batch_size,
        crop=crop,
        class_balance=class_balance,
        seed=seed,
        precision=precision,
        resume=resume,
    )
    train(config, say, progress)
    return out


def finetune_config(
    model_folder: Path,
    dense_folder: Path,
    photos: Sequence[Path],
    method: Method[Any],
    *,
    steps: int,
    out: Path,
    batch_size: int | None = None,
    crop: Size | None = None,
    class_balance: float = 0.0,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resume: bool = True,
) -> TrainConfig:
    """Return the training run of `finetune`, which has the same arguments."""
    model, preprocessing = read_config(resolve_folder(model_folder, MODEL_FILES))
    _check(model, model_folder)
    paths = [Path(os.path.abspath(path)) for path in list_images(photos)]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    seen = [resized_size(size, preprocessing.resize) for size in map(size_of, paths)]
    crop = crop or crop_of(seen, model.backbone.patch_size, preprocessing)
    if batch_size is None:
        batch_size = IMAGES_PER_STEP if max(crop) <= LARGE_CROP else LARGE_IMAGES_PER_STEP
    scale: float = getattr(method, "input_scale", 1.0)
    low, high = RATIO_OF_ONE_SIZE if len({(min(size), max(size)) for size in seen}) == 1 else RATIO
    return TrainConfig(
        out=str(out),
        model=ModelConfig(init_from=str(model_folder), options={"drop_path": 0.1}),
        data=DataConfig(
            name="photos",
            root=str(root),
            options={"files": [path.relative_to(root).as_posix() for path in paths]},
            crop=crop,
            ratio=(min(low, scale), max(high, scale)),
            resize_base=resize_base(seen, preprocessing),
            cat_max_ratio=1.0,  # without labels no crop is better than another
        ),
        optim=OptimConfig(
            lr=1e-4, head_lr_factor=5.0, weight_decay=0.05, warmup_steps=min(50, steps // 4), clip_grad_norm=1.0
        ),
        distill=DistillConfig(str(dense_folder), features=0.5, logits=1.0, exits=0.5, class_balance=class_balance),
        methods=[spec_of(training_method(method, len(model.exits)))],
        steps=steps,
        batch_size=batch_size,
        aux_weight=0.0,
        seed=seed,
        precision=precision,
        keep="last",
        checkpoint_every=CHECKPOINT_EVERY,
        resume=resume,
    )


def training_method(method: Method[Any], num_exits: int) -> Method[Any]:
    """Return what of a method is trained: the method inside all wrappers, with every exit recorded.

    Exits that `Gated` closes, and those behind a stop, never fire: their threshold is 1. A stop itself is lifted, and
    a truncated network is trained as `Dense`, so that later heads learn, too. `GatedBySize` closes no exit here, as its
    exits are open at some sizes.
    """
    never: set[int] = set()
    for wrapper in _wrappers(method):
        if isinstance(wrapper, Gated):
            never |= set(wrapper.closed)
    inner = method.inner
    if isinstance(inner, Truncated):
        return Dense()
    stop = getattr(inner, "stop", None)
    if stop is not None:
        never |= set(range(stop, num_exits))
        inner = replace(cast(Any, inner), stop=None)
    if not never or inner.thresholds is None:
        return inner
    thresholds = per_exit(inner.thresholds, num_exits)
    return inner.with_thresholds(tuple(NEVER if n in never else tau for n, tau in enumerate(thresholds)))


def crop_of(sizes: Sequence[Size], patch_size: int, preprocessing: Preprocessing) -> Size:
    """Return the side of a square crop, twice: whole patches, at least one.

    sizes: (height, width) of the images as the model sees them.
    """
    shorter = statistics.median(min(size) for size in sizes)
    limits = [CROP_SHARE * shorter, LARGEST_CROP, *(preprocessing.window or ())]
    side = max(int(min(limits)) // patch_size, 1) * patch_size
    return side, side


def resize_base(sizes: Sequence[Size], preprocessing: Preprocessing) -> Size | None:
    """Return the box, long and short side, into which all images fit at the size that the model resizes them to."""
    if preprocessing.resize == "none":
        return None
    return max(max(size) for size in sizes), min(min(size) for size in sizes)


def size_of(path: Path) -> Size:
    """Read the height and width of an image, as it lies in its file. Raises `DataError` for one that cannot be read."""
    try:
        with open_image(path) as image:
            return image.height, image.width
    except Exception:  # decoders raise nearly everything: `load_image` has a sentence for it
        image = load_image(path)
        return image.height, image.width


def _wrappers(method: Method[Any]) -> Iterator[Method[Any]]:
    """Yield the methods around the one inside, the outermost first."""
    while method is not method.inner:
        yield method
        method = cast(Any, method).method


def _check(model: SegmenterConfig, folder: Path) -> None:
    """Reject models whose exits cannot learn from the decode head."""
    if not model.exits:
        raise ConfigError(f"{folder} has no exits to fine-tune with: give a model that has some.")
    if len({head["kind"] == "atm" for head in (*model.exit_heads, model.decode_head)}) > 1:
        raise ConfigError(
            f"{folder} mixes ATM and softmax heads, whose answers have no distance to learn from: leave fine-tuning "
            "out, or give exits the kind of the decode head."
        )
