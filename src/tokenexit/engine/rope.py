"""Rotary positions (Su et al., 2021; on two axes as in EVA-02 and DINOv3) as data that travels with tokens.

Every token carries one row of cosines and sines, its phases, gathered whenever tokens are. Attention rotates queries
and keys by them, so that place counts by difference, whichever tokens are left. Phases come from the patch's place in
the full grid, never from its rank among the live. Prefix tokens carry the identity: cosine 1, sine 0.

Legend: T tokens, N heads, H channels per head (a multiple of 4), h x w patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenexit.engine.tokens import Grid

Pairing = Literal["half", "interleaved"]
"""Which channels are rotated together: j with j + H / 2, or 2 j with 2 j + 1."""
PeriodPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Places:
    """Where patches lie: the coordinates that are turned into angles, and which axis comes first.

    Attributes:
        reference: None for centres of patches in [-1, 1], times 2 pi (DINOv3). Else the side of a grid to which every
            axis is stretched: patch i of n lies at `(i + offset) / n * reference`, in radians (EVA-02).
        offset: number of patches before the first.
        column_first: the first half of the angles is that of the column, else that of the row.
    """

    reference: float | None = None
    offset: float = 0.0
    column_first: bool = False

    def along(self, side: int, like: Tensor, window: int = 1) -> Tensor:
        """Return the coordinates `(side // window,)` of one axis, in radians of the shortest period's angle.

        window: number of patches of which each is the middle.
        """
        index = torch.arange(side // window, dtype=like.dtype, device=like.device)
        if window > 1:
            index = index * window + (window - 1) / 2
        if self.reference is None:
            return 2 * math.pi * (2 * (index + 0.5) / side - 1)
        return (index + self.offset) / side * self.reference


CENTRES = Places()


def rope_periods(head_dim: int, theta: float, precision: PeriodPrecision, like: Tensor) -> Tensor:
    """Return the periods `(H / 4,)` of each axis, from 1 to almost `theta`: what coordinates are divided by.

    precision: "bf16" rounds them as the files of DINOv3's release do. like: gives dtype and device.
    """
    quarter = head_dim // 4
    periods = theta ** (torch.arange(quarter, dtype=like.dtype, device=like.device) / quarter)
    return periods.to(torch.bfloat16).to(like.dtype) if precision == "bf16" else periods


def rope_phases(
    grid: Grid, prefix: int, periods: Tensor, pairing: Pairing, places: Places = CENTRES, window: int = 1
) -> Tensor:
    """Return the phases of one image's tokens, `(prefix + h w, 2 H)`: cosines of all channels, then sines.

    Each axis counts by its own length. The first half of the angles is that of the row, the second that of the column,
    or the other way round. window: number of patches along a side that one token stands in the middle of; only whole
    windows have one.
    """
    height, width = grid[0] // window, grid[1] // window
    rows, columns = (places.along(side, periods, window)[:, None] / periods for side in grid)
    axes = [rows[:, None, :].expand(height, width, -1), columns[None, :, :].expand(height, width, -1)]
    angles = torch.cat(axes[::-1] if places.column_first else axes, dim=-1).flatten(0, 1)  # (h w, H / 2)
    angles = angles.repeat(1, 2) if pairing == "half" else angles.repeat_interleave(2, dim=1)
    phases = torch.cat([angles.cos(), angles.sin()], dim=1)
    channels = 4 * len(periods)
    identity = torch.cat([periods.new_ones(prefix, channels), periods.new_zeros(prefix, channels)], dim=1)
    return torch.cat([identity, phases])


def rotate(x: Tensor, phases: Tensor, pairing: Pairing) -> Tensor:
    """Rotate pairs of channels, in fp32 at least, and round back: `x (T, N, H)` with `phases (T, 2 H)`."""
    cos, sin = phases[:, None].chunk(2, dim=-1)
    raised = x.to(torch.promote_types(x.dtype, phases.dtype))
    if pairing == "half":
        first, second = raised.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        even, odd = raised.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (raised * cos + turned * sin).to(x.dtype)
