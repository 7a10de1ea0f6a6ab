"""The share of queries that see their own mask alone, block by block, over a run (mask annealing of EoMT)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenexit.errors import ConfigError
from tokenexit.training.config import MaskConfig

POWER = 0.9


def fades(config: MaskConfig, blocks: int, steps: int) -> Sequence[tuple[int, int]]:
    """Return the steps between which the mask attention of each joint block fades; empty for none at all.

    Raises `ConfigError` for steps that are given for another number of blocks.
    """
    if config.fade_start is None or config.fade_end is None:
        parts = blocks + 2
        return [(steps * (i + 1) // parts, steps * (i + 2) // parts) for i in range(blocks)]
    if len(config.fade_start) not in (0, blocks):
        raise ConfigError(
            f"masks.fade_start must have {blocks} steps, one for each joint block, got {len(config.fade_start)}: "
            "correct it and masks.fade_end."
        )
    return list(zip(config.fade_start, config.fade_end))


def mask_share(step: int, start: int, end: int) -> float:
    """Return the probability with which a query sees its own mask alone: 1 before `start`, 0 from `end` on."""
    if step >= end:
        return 0.0
    done: float = max(step - start, 0) / (end - start) if end > start else 0.0
    return float((1.0 - done) ** POWER)


def mask_shares(config: MaskConfig, blocks: int, step: int, steps: int) -> tuple[float, ...]:
    """Return the probability of each joint block at a step, a pure function of it; empty without mask attention."""
    return tuple(mask_share(step, start, end) for start, end in fades(config, blocks, steps))
