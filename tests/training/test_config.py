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
        (TrainConfig, {"steps": 0}, "steps must be at least 1, got 0"),
        (TrainConfig, {"batch_size": -1}, "batch_size must be at least 1, got -1"),
        (TrainConfig, {"loss_stride": 0}, "loss_stride must be at least 1, got 0"),
        (TrainConfig, {"loss_stride": 704}, "loss_stride must leave pixels in a crop of 352x352, got 704"),
        (TrainConfig, {"seed": -1}, "seed must be at least 0, got -1"),
        (TrainConfig, {"aux_weight": float("nan")}, "aux_weight must be at least 0, got nan"),
        (TrainConfig, {"macs_weight": -0.1}, "macs_weight must be at least 0, got -0.1"),
        (TrainConfig, {"checkpoint_every": -1}, "checkpoint_every must be at least 0, got -1"),
        (TrainConfig, {"val_limit": 0}, "val_limit must be at least 1, got 0"),
        (TrainConfig, {"methods": []}, "methods must name at least one method, got none"),
        (TrainConfig, {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must lie between 0 and 1, got 1.0"),
        (TrainConfig, {"freeze": "heads"}, "freeze must be one of none, backbone, all_but_exit_heads, got 'heads'"),
        (TrainConfig, {"ignored_pixels": "no"}, "ignored_pixels must be one of left_out, counted, got 'no'"),
        (DistillConfig, {"features": -1.0}, r"distill\.features must be at least 0, got -1\.0"),
        (DistillConfig, {"temperature": 0.0}, r"distill\.temperature must be positive, got 0\.0"),
        (DistillConfig, {"teacher": "t", "features": 0, "logits": 0}, r"distill\.teacher has nothing to teach"),
        (TrainConfig, {"class_weights": [1.0, -1.0]}, "class_weights must not be negative, got .*"),
        (OptimConfig, {"lr": 0.0}, r"optim\.lr must be positive, got 0\.0"),
        (OptimConfig, {"lr": float("inf")}, r"optim\.lr must be positive, got inf"),
        (OptimConfig, {"lr": 1e-3, "min_lr": 1e-2}, r"optim\.min_lr must be at most optim\.lr=0\.001, got 0\.01"),
        (OptimConfig, {"clip_grad_norm": 0.0}, r"optim\.clip_grad_norm must be positive, got 0\.0"),
        (OptimConfig, {"warmup_steps": -1}, r"optim\.warmup_steps must be at least 0, got -1"),
        (OptimConfig, {"momentum": 2.0}, r"optim\.momentum must lie in \[0, 1\], got 2\.0"),
        (OptimConfig, {"betas": (0.9, 1.0)}, r"optim\.betas must lie in \[0, 1\), got \[0\.9, 1\.0\]"),
        (DataConfig, {"workers": -1}, r"data\.workers must be at least 0, got -1"),
        (DataConfig, {"cat_max_ratio": 1.5}, r"data\.cat_max_ratio must lie in \[0, 1\], got 1\.5"),
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
