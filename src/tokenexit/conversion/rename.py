"""All sources of weights share these steps: renaming by a table, fusing parts, converting extra tokens.

They are pure functions from a state dict to a new one. An entry that no rule matches keeps its name, and is reported at
the end.

Legend: N rows of a position table, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenexit.errors import CheckpointError

State = dict[str, Tensor]
Table = Sequence[tuple[str, str]]
"""(pattern of a whole name, its new form) pairs; the first that matches is taken."""


def rename(state: Mapping[str, Tensor], table: Table) -> State:
    """Rename entries whose whole name a pattern matches, and leave the others."""
    renamed: State = {}
    for key, value in state.items():
        name = new_name(key, table)
        if name in renamed:
            raise CheckpointError(
                f"two entries of the weights mean '{name}', one of them is '{key}': "
                "save one model in a file of its own."
            )
        renamed[name] = value
    return renamed


def new_name(key: str, table: Table) -> str:
    for pattern, form in table:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(form)
    return key


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the entries below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> State:
    """Stack `....parts[0].weight`, `....parts[1].weight`, ... to `....whole.weight`, and so with biases.

    Where one of the parts is missing, none is touched.
    """
    fused = dict(state)
    for key in state:
        match = re.fullmatch(rf"(.*\.){re.escape(parts[0])}\.(weight|bias)", key)
        if match is None:
            continue
        names = [f"{match[1]}{part}.{match[2]}" for part in parts]
        if all(name in state for name in names):
            fused[f"{match[1]}{whole}.{match[2]}"] = torch.cat([fused.pop(name) for name in names])
    return fused


def move_class_position(state: Mapping[str, Tensor]) -> State:
    """Add the first row of `backbone.pos_embed` `(1, N, C)` to the class token and take it out of the table."""
    moved, table = dict(state), state["backbone.pos_embed"]
    moved["backbone.cls_token"] = state["backbone.cls_token"] + table[:, :1]
    moved["backbone.pos_embed"] = table[:, 1:]
    return moved


def distillation_as_register(state: Mapping[str, Tensor]) -> State:
    """Turn DeiT's distillation token into a register, to which its row of the position table is added."""
    if "backbone.dist_token" not in state:
        return dict(state)
    moved = move_class_position(state)
    table = moved["backbone.pos_embed"]
    moved["backbone.reg_token"] = moved.pop("backbone.dist_token") + table[:, :1]
    moved["backbone.pos_embed"] = table[:, 1:]
    return moved


def register_positions(state: Mapping[str, Tensor], cells: int) -> State:
    """Add to the class token and the registers the rows that stand for them in front of `pos_embed`, if there are any.

    Names are without prefix. cells: number of patches of the table.
    """
    table, registers = state["pos_embed"], state["reg_token"].shape[1]
    first = int("cls_token" in state)
    if table.shape[1] != first + registers + cells:
        return dict(state)
    moved = dict(state)
    if first:
        moved["cls_token"] = state["cls_token"] + table[:, :1]
    moved["reg_token"] = state["reg_token"] + table[:, first : first + registers]
    moved["pos_embed"] = table[:, first + registers :]
    return moved
