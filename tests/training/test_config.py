"""Configurations refuse what cannot work, and know what parts two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tokenexit.errors import ConfigError
from tokenexit.training.config import (
    FREE_KEYS,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    differing_key,
    flat,
    saved_config,
)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (TrainConfig, {"steps": 0}, "steps=0 must be at least 1"),
        (TrainConfig, {"batch_size": -1}, "batch_size=-1 must be at least 1"),
        (TrainConfig, {"loss_stride": 0}, "loss_stride=0 must be at least 1"),
        (TrainConfig, {"seed": -1}, "seed=-1 must be at least 0"),
        (TrainConfig, {"aux_weight": float("nan")}, "aux_weight=nan must be at least 0"),
        (TrainConfig, {"checkpoint_every": -1}, "checkpoint_every=-1 must be at least 0"),
        (TrainConfig, {"val_limit": 0}, "val_limit=0 must be at least 1"),
        (TrainConfig, {"methods": []}, "methods is empty: name at least one"),
        (TrainConfig, {"accumulate": 0}, "accumulate=0 must be at least 1"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1"),
        (TrainConfig, {"freeze": "heads"}, "freeze='heads' is unknown: choose one of none, backbone, all_but_exit"),
        (TrainConfig, {"ignored_pixels": "no"}, "ignored_pixels='no' is unknown: choose one of left_out, counted"),
        (DistillConfig, {"features": -1.0}, r"distill\.features=-1\.0 must be at least 0"),
        (DistillConfig, {"temperature": 0.0}, r"distill\.temperature=0\.0 must be positive"),
        (DistillConfig, {"teacher": "t", "features": 0, "logits": 0}, r"distill\.teacher has nothing to teach"),
        (TrainConfig, {"class_weights": [1.0, -1.0]}, "class_weights=.* must not be negative"),
        (OptimConfig, {"lr": 0.0}, r"optim\.lr=0\.0 must be positive"),
        (OptimConfig, {"lr": float("inf")}, r"optim\.lr=inf must be positive"),
        (OptimConfig, {"lr": 1e-3, "min_lr": 1e-2}, r"optim\.min_lr=0\.01 is above optim\.lr=0\.001: lower it"),
        (OptimConfig, {"clip_grad_norm": 0.0}, r"optim\.clip_grad_norm=0\.0 must be positive"),
        (OptimConfig, {"warmup_steps": -1}, r"optim\.warmup_steps=-1 must be at least 0"),
        (OptimConfig, {"momentum": 2.0}, r"optim\.momentum=2\.0 is outside \[0, 1\]"),
        (OptimConfig, {"betas": (0.9, 1.0)}, r"optim\.betas=\[0\.9, 1\.0\] must lie in"),
        (DataConfig, {"workers": -1}, r"data\.workers=-1 must be at least 0"),
        (DataConfig, {"cat_max_ratio": 1.5}, r"data\.cat_max_ratio=1\.5 is outside"),
    ],
)
def test_impossible_values_are_refused_by_name(kind: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        kind(**values)


def test_a_run_that_went_through_json_is_the_same_run() -> None:
    config = TrainConfig(methods=["dense", {"name": "dtop", "threshold": (0.9, 0.8)}])
    saved = json.loads(json.dumps(flat(config)))
    assert differing_key(saved, config) is None
    assert saved["data.crop"] == [352, 352]


@pytest.mark.parametrize("key", [key for key in flat(TrainConfig()) if key not in FREE_KEYS])
def test_every_key_that_shapes_the_weights_parts_two_runs(key: str) -> None:
    saved = flat(TrainConfig()) | {key: "something else"}
    assert differing_key(saved, TrainConfig()) == key


def test_a_run_saved_before_a_key_existed_had_its_default() -> None:
    saved = flat(TrainConfig(seed=3))
    del saved["distill.teacher"], saved["accumulate"]
    del saved["ignored_pixels"], saved["distill.upsampled"]  # the loss of that time is the default of today
    assert differing_key(saved_config(saved), TrainConfig(seed=3)) is None
    assert differing_key(saved_config(saved), TrainConfig(seed=3, accumulate=2)) == "accumulate"


def test_keys_beside_the_training_part_no_runs() -> None:
    assert flat(TrainConfig()).keys() >= FREE_KEYS
    other = TrainConfig(
        out="elsewhere", resume=False, validate_every=5, val_limit=2, checkpoint_every=7, checkpoint_blocks=True
    )
    other.data = DataConfig(root="there", val_split="test", workers=4, cache=True)
    assert differing_key(flat(other), TrainConfig()) is None
    assert differing_key(flat(replace(other, steps=7)), TrainConfig()) == "steps"


def test_defaults_are_not_shared_between_configurations() -> None:
    ModelConfig().exits.append(12)
    assert ModelConfig().exits == [3, 6, 9]
