"""The architecture of a model is inferred from the names and shapes of its weights.

What shapes do not tell, such as the number of attention heads, is assumed and reported. Names are tokenexit's.

Legend: N rows of a position table, C channels, K classes, d width of a head.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokenexit.conversion.rename import under
from tokenexit.engine.vit_config import PRESETS, ViTConfig
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import HEADS

Assumed = dict[str, Any]

# Widths whose attention heads do not have 64 channels: ViT-So400m, ViT-H, ViT-g, ViT-G.
_HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
_UP_OF_STEPS = {1: 4, 2: 4, 4: 2}  # the published SETR heads: naive, auxiliary of PUP, PUP

NEEDED = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")


def backbone_config(
    state: Mapping[str, Tensor], given: Mapping[str, Any], source: str = "these weights"
) -> tuple[ViTConfig, Assumed]:
    """Infer the backbone of `state` (timm's names).

    given: fields of `ViTConfig` that are known; they win over what is inferred.
    Returns the configuration and those of its fields that neither shapes nor `given` say.
    """
    if unknown := set(given) - set(inspect.signature(ViTConfig).parameters):
        raise ConfigError(f"a backbone has no option '{min(unknown)}': see ViTConfig.")
    if "pos_embed_grid" in given:
        ViTConfig(pos_embed_grid=given["pos_embed_grid"])  # is one, or is refused
    table, rope = state.get("pos_embed"), given.get("rope")
    needed = (*NEEDED, "blocks.0.mlp.fc2.weight", *(("pos_embed",) if rope is None else ()))
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} lack {', '.join(missing)}: only plain ViTs with a position table can be read, and DINOv3."
        )
    patch, qkv = state["patch_embed.proj.weight"], state["blocks.0.attn.qkv.weight"]
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3]:
        raise CheckpointError(
            f"{source} have a patch embedding of shape {tuple(patch.shape)}: only square patches of RGB can be read."
        )
    dim = qkv.shape[1]
    hidden, back = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    class_token = "cls_token" in state
    positions: dict[str, Any] = {"pos_embed": table is not None}
    if table is not None:
        prefix, grid = position_layout(table, class_token, given.get("pos_embed_grid"), source)
        positions |= {"pos_embed_grid": grid, "pos_embed_prefix": prefix}
    inferred = {
        "embed_dim": dim,
        "depth": max(blocks) + 1,
        "patch_size": patch.shape[2],
        "mlp_ratio": ratio(hidden, dim),
        "mlp": "swiglu" if hidden == 2 * back else "gelu",
        "sub_norm": "blocks.0.mlp.norm.weight" in state,
        "attn_norm": "blocks.0.attn.norm.weight" in state,
        "norm_pre": "norm_pre.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token,
        "num_registers": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "final_norm": "norm.weight" in state,
    } | positions
    assumed: Assumed = {}
    if "num_heads" not in given:
        assumed["num_heads"] = _HEADS_OF_WIDTH.get(dim, max(dim // 64, 1))
    return ViTConfig(**{**inferred, **assumed, **given}), assumed


def position_layout(
    table: Tensor, class_token: bool, grid: tuple[int, int] | None, source: str
) -> tuple[bool, tuple[int, int]]:
    """Tell whether the table `(1, N, C)` starts with a row for the class token, and its grid; square if not given."""
    rows = table.shape[1]
    for prefix in (True, False) if class_token else (False,):
        cells = rows - prefix
        side = math.isqrt(max(cells, 0))
        if grid is not None and cells == math.prod(grid):
            return prefix, (grid[0], grid[1])
        if grid is None and side and side * side == cells:
            return prefix, (side, side)
    raise CheckpointError(
        f"pos_embed in {source} has {rows} rows, no {'square' if grid is None else f'{grid[0]}x{grid[1]}'} grid "
        "with or without a class token: give its pos_embed_grid as (rows, columns)."
    )


def ratio(hidden: int, dim: int) -> float:
    """Return the MLP ratio that `ViTConfig` turns back into this width, in the presets' digits where these fit."""
    for known in (4.0, PRESETS["dinov2_giant_patch14"].mlp_ratio):
        if int(dim * known) == hidden:
            return known
    value = hidden / dim
    return value if int(dim * value) == hidden else math.nextafter(value, math.inf)


def preset_of(config: ViTConfig) -> str | None:
    """Return the name of the preset that this is, but for what loaded weights replace or training alone uses."""
    for name, preset in PRESETS.items():
        if (preset.layer_scale is None) == (config.layer_scale is None) and preset.mlp_hidden == config.mlp_hidden:
            changed = ("layer_scale", "drop_path", "mlp_ratio", "rope_rescale")
            if replace(preset, **{field: getattr(config, field) for field in changed}) == config:
                return name
    return None


def head_spec(
    head: Mapping[str, Tensor], embed_dim: int, given: Mapping[str, Any], what: str
) -> tuple[dict[str, Any], int, Assumed]:
    """Infer the head that holds these entries (our names, without prefix).

    given: options of the head that are known. what: how messages call the head.
    Returns its specification, K, and what neither shapes nor `given` say.
    """
    _refuse_segvit(head, what)
    if "queries.weight" in head and "upscale_steps.0.up.weight" in head:
        spec, classes, width, assumed = _eomt(head)
    elif "input_proj.weight" in head and "presence.weight" in head:
        spec, classes, width, assumed = _atm(head)
    elif "queries.weight" in head and "mask_norm.weight" in head:
        spec, classes, width, assumed = _mask_transformer(head)
    elif "convs.0.weight" in head and "classifier.weight" in head:
        spec, classes, width, assumed = _setr_up(head)
    elif "classifier.weight" in head and all(
        head[f"{n}.weight"].ndim < 3 for n in ("classifier", "proj") if f"{n}.weight" in head
    ):
        spec, classes, width, assumed = _pointwise(head)
    else:
        some = ", ".join(sorted(head)[:3])
        raise CheckpointError(f"{what} ({some}) is of no kind that tokenexit has: convert the backbone alone.")
    if width != embed_dim:
        raise CheckpointError(_other_width(spec["kind"], width, embed_dim, what))
    known = inspect.signature(HEADS[spec["kind"]]).parameters
    taken = {name: value for name, value in given.items() if name in known}
    return {**spec, **assumed, **taken}, classes, {k: v for k, v in assumed.items() if k not in taken}


Inferred = tuple[dict[str, Any], int, int, Assumed]
"""Specification, classes, width of the tokens it takes, what is assumed."""


def _layers(head: Mapping[str, Tensor], name: str) -> int:
    return len({int(match[1]) for key in head if (match := re.match(rf"{name}\.(\d+)\.", key))})


def _atm(head: Mapping[str, Tensor]) -> Inferred:
    d, width = head["input_proj.weight"].shape
    classes = head["queries.weight"].shape[0]
    spec = {"kind": "atm", "channels": d, "layers": _layers(head, "layers")}
    return spec, classes, width, {"num_heads": max(d // 64, 1)}


def _refuse_segvit(head: Mapping[str, Tensor], what: str) -> None:
    """Reject heads of SegViT's release, which differ from DToP's in their stages and in their class logits."""
    atm = "of the ATM heads, tokenexit reads those of DToP, with one stage and present or absent for every class"
    if any(key.startswith("atm.") for key in head):
        raise CheckpointError(
            f"{what} is that of a shrunk SegViT, whose backbone halves its grid on the way, as tokenexit's never does; "
            f"{atm}: take another model."
        )
    stages = {int(match[1]) for key in head if (match := re.match(r"(?:input_proj|proj_norm|decoder)_(\d+)\.", key))}
    if stages:
        raise CheckpointError(
            f"{what} is SegViT's own, which joins {max(stages)} stages; {atm}: convert the backbone alone "
            "(backbone_only, --backbone-only)."
        )
    outputs = head["presence.weight"].shape[0] if "presence.weight" in head else 2
    if outputs != 2:
        raise CheckpointError(
            f"{what} is SegViT's own, which says one of {outputs} classes for each of its "
            f"{head['queries.weight'].shape[0] if 'queries.weight' in head else 'learned'} queries; {atm}: convert the "
            "backbone alone (backbone_only, --backbone-only)."
        )


def _eomt(head: Mapping[str, Tensor]) -> Inferred:
    """What its blocks are like is known from those of the backbone."""
    queries, width = head["queries.weight"].shape
    steps, layers = _layers(head, "upscale_steps"), _layers(head, "blocks")
    spec = {"kind": "eomt", "layers": layers, "queries": queries, "steps": steps}
    return spec, head["classifier.weight"].shape[0] - 1, width, {}


def _mask_transformer(head: Mapping[str, Tensor]) -> Inferred:
    d, width = head["proj.weight"].shape if "proj.weight" in head else (0, 0)
    spec = {"kind": "mask_transformer", "channels": d, "layers": _layers(head, "blocks")}
    return spec, head["queries.weight"].shape[0], width, {"num_heads": max(d // 64, 1)}


def _setr_up(head: Mapping[str, Tensor]) -> Inferred:
    channels, width, kernel, _ = head["convs.0.weight"].shape
    steps = _layers(head, "convs")
    spec = {"kind": "setr_pup", "channels": channels, "steps": steps, "kernel": kernel}
    return spec, head["classifier.weight"].shape[0], width, {"up": _UP_OF_STEPS.get(steps, 2)}


def _pointwise(head: Mapping[str, Tensor]) -> Inferred:
    classes, hidden = head["classifier.weight"].shape
    if "proj.weight" in head:
        kind = "setr_naive" if "input_norm.weight" in head else "fcn"
        return {"kind": kind, "channels": hidden}, classes, head["proj.weight"].shape[1], {}
    return {"kind": "dinov2_linear" if "norm.weight" in head else "linear"}, classes, hidden, {}


def _other_width(kind: str, width: int, embed_dim: int, what: str) -> str:
    if kind == "dinov2_linear" and width == 4 * embed_dim:
        return (
            f"{what} reads the last four blocks at once ({width} = 4 x {embed_dim} channels), which tokenexit's heads "
            "do not: take the linear head of the last block."
        )
    return f"{what} takes {width} channels and the backbone gives {embed_dim}: give the backbone it was trained on."


def heads_of(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return the renamed heads by name, exit heads in order, and how many of them are exit heads."""
    numbers = sorted({int(match[1]) for key in state if (match := re.match(r"exit_heads\.(\d+)\.", key))})
    if numbers != list(range(len(numbers))):
        raise CheckpointError(f"{source} hold auxiliary heads {numbers}: some are missing, save the model again.")
    names = [f"exit_heads.{n}" for n in numbers]
    if any(key.startswith("decode_head.") for key in state):
        names.append("decode_head")
    elif names:
        raise CheckpointError(f"{source} hold auxiliary heads and no decode head: save the model again.")
    return {name: under(state, f"{name}.") for name in names}, len(numbers)
