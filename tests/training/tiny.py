"""A folder of small images and a run that takes a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tokenexit.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

CLASSES = ("dark", "bright", "green")
HEADS: dict[str, dict[str, Any]] = {
    "fcn": {"kind": "fcn", "channels": 8},
    "atm": {"kind": "atm", "channels": 8, "layers": 1, "num_heads": 2},
    "setr_pup": {"kind": "setr_pup", "channels": 8, "steps": 1, "kernel": 3, "up": 2},
    "eomt": {"kind": "eomt", "layers": 1, "queries": 5, "steps": 1},
}


def write_dataset(root: Path, splits: dict[str, int] | None = None, size: tuple[int, int] = (24, 32)) -> Path:
    """Images whose classes can be seen: dark and bright grey, and green; a void stripe in every mask."""
    rng = np.random.default_rng(0)
    for split, count in (splits or {"train": 6, "val": 2, "test": 3}).items():
        for name in ("images", "annotations"):
            (root / name / split).mkdir(parents=True)
        for i in range(count):
            mask = rng.integers(0, 3, (size[0] // 8, size[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            colours = np.array([[40, 40, 40], [210, 210, 210], [30, 200, 30]])[mask]
            image = (colours + rng.integers(-20, 20, colours.shape)).clip(0, 255).astype(np.uint8)
            mask[:, :2] = 255
            Image.fromarray(image).save(root / "images" / split / f"p{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"p{i}.png")
    (root / "dataset.yaml").write_text(f"classes: [{', '.join(CLASSES)}]\n")
    return root


def tiny_run(root: Path, out: Path, head: str = "fcn", **changes: Any) -> TrainConfig:
    """Six steps with everything random switched on: stochastic depth, augmentation, and every method drawn.

    In fp32, whatever the machine is fast in; validated, and the best weights kept, only where a test asks for it."""
    values: dict[str, Any] = {
        "precision": "fp32",
        "validate_every": 0,
        "keep": "last",
        "methods": ["dense", {"name": "dtop", "threshold": 0.36}, {"name": "dovit", "threshold": 0.36}],
        "steps": 6,
        "batch_size": 2,
        "seed": 4,
        "checkpoint_every": 2,
    }
    return TrainConfig(
        out=str(out),
        model=ModelConfig(
            exits=[1, 2],
            exit_head=HEADS["fcn" if head == "eomt" else head],
            decode_head=HEADS[head],
            options={
                "embed_dim": 16,
                "depth": 3,
                "num_heads": 2,
                "patch_size": 4,
                "pos_embed_grid": [6, 8],
                "drop_path": 0.2,
            },
        ),
        data=DataConfig(name="folder", root=str(root), crop=(24, 32)),
        optim=OptimConfig(lr=5e-3, head_lr_factor=1.0, warmup_steps=2),
        **(values | changes),
    )


def steady_run(root: Path, out: Path) -> TrainConfig:
    """One whose weights do not hang on the last bit: no token decides, nothing divides by small gradients."""
    config = tiny_run(root, out, methods=["dense"])
    config.optim = replace(config.optim, name="sgd", lr=0.05)
    return config


EVERYBODY_LEAVES: list[Any] = [
    {"name": "dtop", "threshold": 0.0, "keep_per_class": 0},
    {"name": "dovit", "threshold": 0.0},
]
"""No token is left for later blocks and heads."""


def everything_on(root: Path, out: Path, head: str = "fcn") -> TrainConfig:
    """A run for two processes: an average of the weights, two parts of each batch, blocks computed twice, a limit on
    the gradient, and methods after which no token is left. No token decides, nothing divides by small gradients."""
    config = tiny_run(
        *(root, out, head),
        methods=["dense", *EVERYBODY_LEAVES],
        batch_size=4,
        accumulate=2,
        ema_decay=0.6,
        checkpoint_blocks=True,
        sync_batch_norm=True,
    )
    config.optim = replace(config.optim, name="sgd", lr=0.05, clip_grad_norm=1.0)
    return config


def silent(line: str) -> None:
    """A `say` for runs whose words do not matter."""


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def nearly_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Up to rounding, which may differ between processes."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)
