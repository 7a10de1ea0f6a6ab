"""A state dict with timm's names is loaded into the backbone: everything that fits, with a report of the rest.

Legend: N rows of a position table, C channels, h x w its grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Grid
from tokenexit.engine.vit import ViT, resize_pos_embed
from tokenexit.errors import CheckpointError

Shape = tuple[int, ...]

SHOWN = 5  # keys named in one message

# What a ViT can lack and fine-tuning can make up for; everything else missing is an error.
OPTIONAL = ("norm.weight", "norm.bias")

_CLASS_POSITION = "pos_embed[:, :1]"  # the class token's row of a position table
_CLASSIFIER = re.compile(r"(head|head_dist|heads|fc_norm|fc|pre_logits|classifier)\.")
# A leftover here was part of the computation, so the model without it computes something else.
_COMPUTED = re.compile(r"(blocks\.\d+|patch_embed|norm_pre)\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")

_CURES = (
    (re.compile(r"cls_token"), "class_token=False builds the backbone without a class token"),
    (re.compile(r"reg_token"), "num_registers=0 builds the backbone without registers"),
    (re.compile(r"blocks\.\d+\.ls\d\."), "layer_scale=None builds it without LayerScale"),
    (re.compile(r"blocks\.\d+\.attn\.qkv\.bias"), "qkv_bias=False builds it without these biases"),
)


@dataclass(frozen=True)
class LoadReport:
    """The report of a load lists which weights were used.

    Attributes:
        loaded: entries of the backbone that took a value from the weights.
        missing: entries of the backbone that the weights lack; they keep their start values.
        unexpected: entries of the weights that were not used; `classifier` are those of an image classifier.
        resized: position tables and patch kernels that were interpolated, as (name, shape in the weights, shape in the
            backbone).
    """

    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[tuple[str, Shape, Shape], ...] = ()

    @property
    def classifier(self) -> tuple[str, ...]:
        """Unexpected entries of an image classifier, which a segmentation model does not use."""
        return tuple(key for key in self.unexpected if _CLASSIFIER.match(key))

    def summary(self) -> str:
        """Summarise the load in a line for each kind of entry."""
        lines = [f"loaded {self.loaded} tensors into the backbone"]
        lines += [f"resized {key}: {old} to {new}" for key, old, new in self.resized]
        if self.missing:
            lines.append(f"not in the weights, left at start values: {_some(self.missing)}")
        if self.classifier:
            lines.append(f"classifier, not used: {_some(self.classifier)}")
        if others := [key for key in self.unexpected if key not in self.classifier]:
            lines.append(f"no place in the backbone, not used: {_some(others)}")
        return "\n".join(lines)


def load_backbone(
    model: ViT,
    state: Mapping[str, Tensor],
    *,
    source: str = "these weights",
    pos_embed_grid: Grid | None = None,
) -> LoadReport:
    """Load `state` (timm's names, see `read_state_dict`) into `model`, all of it or nothing.

    The position table is brought to the model's grid, resized the way the model resizes at run time. Its class
    token row is added to the class token where the model keeps none, is zero where only the model has one (both
    leave the result as it was), and is dropped where the model has no class token. Patches of another size are resized,
    see `resize_patches`. Blocks beyond the model's depth are left out.

    source: how messages call the weights, in the plural: `weights 'vit.pth'`.
    pos_embed_grid: (rows, columns) of the table in `state`, needed only where it is neither square nor the
        model's.

    Raises `CheckpointError`, naming up to five entries, where a shape does not fit, an entry is missing (but for
    `OPTIONAL`), or the weights hold parts that the model's blocks or patch embedding lack.
    """
    target = model.state_dict()
    ready = {key: value for key, value in state.items() if key in target}
    unexpected = [key for key in state if key not in target]
    _refuse_foreign_parts(unexpected, model.config.depth, source)
    missing = [key for key in target if key not in state]
    _refuse_missing([key for key in missing if key not in OPTIONAL], len(ready), state, source)
    resized = []
    if "pos_embed" in ready and _is_table(ready["pos_embed"], target["pos_embed"]):
        class_row, table, old, new = _fit_pos_embed(model, ready["pos_embed"].detach(), pos_embed_grid, source)
        ready["pos_embed"] = table
        if old != new:
            resized.append(("pos_embed", tuple(state["pos_embed"].shape), tuple(table.shape)))
        if class_row is not None and not model.config.class_token:
            unexpected.append(_CLASS_POSITION)
        elif class_row is not None and ready["cls_token"].shape == class_row.shape:
            ready["cls_token"] = ready["cls_token"].detach() + class_row
    name = "patch_embed.proj.weight"
    if name in ready and ready[name].ndim == 4 and ready[name].shape[:2] == target[name].shape[:2]:
        height, width = ready[name].shape[2:]
        side = model.config.patch_size
        if height == width != side:
            resized.append((name, tuple(ready[name].shape), tuple(target[name].shape)))
            ready[name] = resize_patches(ready[name].detach(), side)
    _refuse_mismatched(ready, target, source)
    with torch.no_grad():
        for key, value in ready.items():
            target[key].copy_(value)
    return LoadReport(len(ready), tuple(missing), tuple(unexpected), tuple(resized))


def resize_patches(kernel: Tensor, side: int) -> Tensor:
    """Resize the kernel of a patch embedding, `(C, 3, p, p)` to `(C, 3, side, side)`, by a pseudo-inverse.

    What it says of an enlarged patch is what the old one said of the patch itself (FlexiViT, Beyer et al., CVPR 2023,
    section 3.4); bicubic with antialiasing, as timm. So DINOv2, trained at 14 pixels, runs at 16 (EoMT).
    """
    old = kernel.shape[-1]
    pixels = torch.eye(old * old, dtype=torch.float32, device=kernel.device).view(-1, 1, old, old)
    enlarged = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False).flatten(1)
    inverse = torch.linalg.pinv(enlarged.double())  # (side^2, p^2)
    resized: Tensor = kernel.double().flatten(2) @ inverse.T
    return resized.view(*kernel.shape[:2], side, side).to(kernel.dtype)


def _is_table(table: Tensor, target: Tensor) -> bool:
    return table.ndim == 3 and table.shape[0] == 1 and table.shape[2] == target.shape[2]


def _fit_pos_embed(
    model: ViT, table: Tensor, grid: Grid | None, source: str
) -> tuple[Tensor | None, Tensor, Grid, Grid]:
    """Bring a table `(1, N, C)` to the model's shape.

    Returns (class row left over `(1, 1, C)` or None, table, old grid, new grid).
    """
    config, prefix, new = model.config, model.pos_embed_prefix, model.config.pos_embed_grid
    rows, old = _layout(table.shape[1], prefix, new, grid, source)
    class_row, patches = (table[:, :1] if rows else None), table[:, rows:]
    patches = resize_pos_embed(
        patches, old, new, config.pos_embed_mode, config.pos_embed_antialias, config.pos_embed_offset
    )
    if prefix:
        front = torch.zeros_like(patches[:, :1]) if class_row is None else class_row
        return None, torch.cat([front, patches], dim=1), old, new
    return class_row, patches, old, new


def _layout(count: int, prefix: int, model_grid: Grid, given: Grid | None, source: str) -> tuple[int, Grid]:
    """Divide `count` rows into class token rows (0 or 1) and the patch grid."""
    grid = given or model_grid
    for rows in (prefix, 1 - prefix):
        if count - rows == math.prod(grid):
            return rows, grid
    if given is None:
        for rows in (1, 0):
            side = math.isqrt(max(count - rows, 0))
            if side and side * side == count - rows:
                return rows, (side, side)
        raise CheckpointError(
            f"pos_embed in {source} has {count} rows, which is no square grid with or without a class token: "
            "give its pos_embed_grid as (rows, columns)."
        )
    raise CheckpointError(
        f"pos_embed in {source} has {count} rows, pos_embed_grid={given} needs {math.prod(given)}, or one more with "
        "a class token: give the grid the weights were trained on."
    )


def _refuse_foreign_parts(unexpected: Sequence[str], depth: int, source: str) -> None:
    foreign = [key for key in unexpected if _COMPUTED.match(key)]
    foreign = [key for key in foreign if not ((block := _BLOCK.match(key)) and int(block[1]) >= depth)]
    if foreign:
        raise CheckpointError(
            f"{source} hold parts this backbone lacks ({_some(foreign)}): choose the backbone they were trained with."
        )


def _refuse_missing(missing: Sequence[str], matched: int, state: Mapping[str, Tensor], source: str) -> None:
    if not missing:
        return
    if not matched:
        raise CheckpointError(
            f"{source} hold none of the names of a plain ViT (theirs begin with {_some(list(state)[:2])}): "
            "give weights with timm's names."
        )
    cures = [cure for pattern, cure in _CURES if all(pattern.match(key) for key in missing)]
    cure = cures[0] if cures else "choose the backbone they were trained with"
    raise CheckpointError(f"{source} lack {_some(missing)}: {cure}.")


def _refuse_mismatched(ready: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(target[key].shape)}"
        for key, value in ready.items()
        if value.shape != target[key].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} do not fit the backbone, {_some(wrong)}: choose the backbone they were trained with."
        )


def _some(names: Sequence[str]) -> str:
    """Name the first few, and say how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
