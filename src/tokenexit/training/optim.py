"""Parameter groups of the optimiser, and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokenexit.training.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split backbone and heads, each into weights that decay and those that do not.

    Heads learn `head_lr_factor` times faster (both papers: every parameter whose name contains "head"). One-dimensional
    parameters, embeddings and prefix tokens do not decay unless `decay_all` asks for it, as DToP does. `initial_lr` is
    what the schedule scales.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token", "reg_token", "queries.weight"))
            key = ("head" in name, config.decay_all or not spared)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr": lr, "initial_lr": lr}
        for (head, decays), parameters in groups.items()
        for lr in (config.lr * (config.head_lr_factor if head else 1.0),)
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(initial: float, step: int, steps: int, config: OptimConfig) -> float:
    """Return the rate of a group that starts at `initial`: linear warm-up, then polynomial decay to `min_lr`.

    A pure function of the step, so that a resumed run continues where it stood.
    """
    end = steps if config.decay_end is None else config.decay_end
    done = min(max(step - config.decay_start, 0) / max(end - config.decay_start, 1), 1.0)
    rate: float = (initial - config.min_lr) * (1.0 - done) ** config.power + config.min_lr
    if step < config.warmup_steps:
        rate *= config.warmup_start + (1.0 - config.warmup_start) * step / config.warmup_steps
    return rate
