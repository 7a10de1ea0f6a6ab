"""The recipe of the small model that quickstart trains on drawn street scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tokenexit.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

SIZE = (128, 192)
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
BATCH_SIZE = 8


WARMUP, WARMUP_SHARE = 30, 0.1
"""Steps of warm-up, and the largest share of a short training that they may take."""


def scene_recipe(out: Path, steps: int, precision: Precision, seed: int, batch_size: int = BATCH_SIZE) -> TrainConfig:
    """Return the recipe of a small ViT with patches of 8 pixels.

    The method is drawn for each step, so that one model serves all three.
    """
    head = {"kind": "fcn", "channels": 128}
    return TrainConfig(
        out=str(out),
        model=ModelConfig(
            exits=[2, 4, 6],
            exit_head=head,
            decode_head=head,
            options={"embed_dim": 128, "depth": 8, "num_heads": 4, "patch_size": 8, "pos_embed_grid": [16, 24]},
        ),
        data=DataConfig(name="scenes", options={"length": 100_000, "size": SIZE}, crop=SIZE, ratio=(1.0, 1.5)),
        optim=OptimConfig(
            lr=1e-3,
            head_lr_factor=1.0,
            weight_decay=0.02,
            warmup_steps=min(WARMUP, max(1, int(WARMUP_SHARE * steps))),
            clip_grad_norm=1.0,
        ),
        methods=["dense", {"name": "dtop", "threshold": 0.95}, {"name": "dovit", "threshold": 0.95}],
        steps=steps,
        batch_size=batch_size,
        loss_stride=2,
        seed=seed,
        precision=precision,
        validate_every=0,
        checkpoint_every=0,
        resume=False,
    )
