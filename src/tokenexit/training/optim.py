"""Parameter groups of the optimiser, and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import OptimConfig


def parameter_groups(model: ExitSegmenter, config: OptimConfig) -> list[dict[str, Any]]:
    """Split backbone and heads, each into weights that decay and those that do not, and the backbone by its depth.

    Heads learn `head_lr_factor` times faster (both papers: every parameter whose name contains "head"); blocks and norm
    of the backbone that the decode head holds learn as the backbone. One-dimensional parameters, embeddings and prefix
    tokens do not decay unless `decay_all` asks for it, as DToP does. `initial_lr` is what the schedule scales.
    """
    blocks = len(model.backbone.blocks) + model.decode_head.joint_blocks
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token", "reg_token", "queries.weight"))
            block = _block_of(name, model)
            factor = config.head_lr_factor if block is None else config.layer_decay ** (blocks - 1 - block)
            groups.setdefault((block is not None, factor, config.decay_all or not spared), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.lr * factor,
            "initial_lr": config.lr * factor,
            "backbone": backbone,
        }
        for (backbone, factor, decays), parameters in groups.items()
    ]


def _block_of(name: str, model: ExitSegmenter) -> int | None:
    """Return the block of the backbone, 0 the first, with which this parameter learns; None for one of a head."""
    own, joint = len(model.backbone.blocks), model.decode_head.joint_blocks
    part, _, inner = name.partition(".")
    held = part == "decode_head" and joint > 0 and inner.startswith(("blocks.", "norm."))
    if part != "backbone" and not held:
        return None
    if inner.startswith("norm."):
        return own + joint - 1
    return int(inner.split(".")[1]) + (own if held else 0) if inner.startswith("blocks.") else 0


def build_optimizer(model: ExitSegmenter, config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(initial: float, step: int, steps: int, config: OptimConfig, backbone: bool = False) -> float:
    """Return the rate of a group that starts at `initial`: linear warm-up, then polynomial decay to `min_lr`.

    A pure function of the step, so that a resumed run continues where it stood. backbone: whether the group is one of
    the backbone, which with `backbone_warmup_steps` warms up after the heads (EoMT).
    """
    warmup, begun, decay_start = config.warmup_steps, 0, config.decay_start
    if backbone and config.backbone_warmup_steps:
        begun, warmup = warmup, config.backbone_warmup_steps
        decay_start = max(decay_start, begun + warmup)
    if step < begun:
        return 0.0
    end = steps if config.decay_end is None else config.decay_end
    done = min(max(step - decay_start, 0) / max(end - decay_start, 1), 1.0)
    rate: float = (initial - config.min_lr) * (1.0 - done) ** config.power + config.min_lr
    if step - begun < warmup:
        rate *= config.warmup_start + (1.0 - config.warmup_start) * (step - begun) / warmup
    return rate
