"""The segmenter is traced as a graph for one image, with the engine's blocks, heads and rules, and open token counts.

Only the packing differs: with one image there is one length, which comes out of `nonzero`, and the tracer needs its
bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine.tokens import Grid, Packing, Tokens
from tokenexit.methods import Method, Result
from tokenexit.methods.thresholded import per_class, per_exit
from tokenexit.outputs.segmentation import resize_maps, scores_of_masks
from tokenexit.segmenter import ExitSegmenter, run_tokens

OUTPUTS = ("labels", "grid_logits", "exit_stage")


@dataclass(frozen=True)
class OneImage(Tokens):
    """Tokens of one image, for tracing.

    Attributes:
        min_live: number of patch tokens that are live whatever the scores.
        row_multiple: the multiple to which rows are padded behind the first exit; None for no padding.
        some_left: whether this is behind an exit.
    """

    min_live: int = 0
    row_multiple: int | None = None
    some_left: bool = False

    def patch_index(self) -> Tensor:
        return torch.arange(self.num_prefix, self.x.shape[0], device=self.x.device)

    def patches(self) -> Tokens:
        if self.num_prefix == 0:
            return self
        x = self.x[self.num_prefix :]
        packing = Packing.of([x.shape[0]], x.device)
        phases = None if self.phases is None else self.phases[self.num_prefix :]
        position = self.position[self.num_prefix :]
        return replace(self, x=x, position=position, packing=packing, num_prefix=0, phases=phases, weight=None)

    def keep(self, mask: Tensor) -> Tokens:
        index = mask.nonzero().squeeze(1)
        torch._check(index.shape[0] >= self.min_live)
        torch._check(index.shape[0] <= mask.shape[0])
        if self.num_prefix:
            prefix = torch.arange(self.num_prefix, device=index.device)
            index = torch.cat([prefix, index + self.num_prefix])
        x = self.x.index_select(0, index)
        packing = Packing.of([x.shape[0]], x.device)
        position = self.position.index_select(0, index)
        phases, weight = self.phases_at(index), self.weight_at(index)
        return replace(self, x=x, position=position, packing=packing, phases=phases, weight=weight, some_left=True)

    def freeze(self, mask: Tensor) -> Tokens:
        some = replace(self, min_live=0)  # nobody may be frozen
        return replace(self, frozen=super(OneImage, some).freeze(mask).frozen)


class ExitGraph(nn.Module):
    """The graph of a segmenter with one method; thresholds are an input, so that one graph serves many budgets.

    pad_rows: the multiple to which numbers of live tokens are padded; None for no padding.
    """

    def __init__(self, model: ExitSegmenter, method: Method[Any], pad_rows: int | None = None) -> None:
        super().__init__()
        check_exportable(model, method)
        self.model, self.method, self.pad_rows = model, method.for_export(), pad_rows

    def forward(self, image: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Segment one image.

        image: `(1, 3, H, W)`, as `Preprocessing` makes it; any height and width. thresholds: `(E,)` of the exits, or
        `(E, K)` if the method has one for each class. Returns labels `(1, H, W)` int64, the decode grid's logits or
        scores `(1, K, h s, w s)`, and exit indices `(1, h, w)` int64.
        """
        model, backbone = self.model, self.model.backbone
        method = self.method if self.method.thresholds is None else self.method.with_thresholds(thresholds.unbind())
        embedded = backbone.embed([image[0]])
        values = {field.name: getattr(embedded, field.name) for field in fields(Tokens)}
        tokens = OneImage(**values, min_live=method.min_live, row_multiple=self.pad_rows)
        result, _ = run_tokens(backbone, model.config.exits, tokens, method, model.view())
        ((h, w),) = tokens.grids
        head = model.decode_head
        maps = result.logits.view(1, h * head.scale, w * head.scale, -1).permute(0, 3, 1, 2).float()
        patch = backbone.config.patch_size
        full = resize_maps(maps, (h, w), patch, head.upscale, (h * patch, w * patch))
        if result.queries is not None:
            maps = full = _class_maps(full, result, (h, w), patch, model.view().num_exits)
        labels = full.argmax(dim=1)
        return _cropped(labels, image.shape[2], image.shape[3]), maps.contiguous(), result.exit_index.view(1, h, w)


def _class_maps(masks: Tensor, result: Result, grid: Grid, patch: int, num_exits: int) -> Tensor:
    """Turn masks `(1, Q, H', W')` at the size of whole patches into scores of the classes `(1, K, H', W')`."""
    assert result.queries is not None, "masks come with their queries"
    size = (grid[0] * patch, grid[1] * patch)
    if result.frozen is None:
        return scores_of_masks(masks[0].sigmoid(), result.queries[0])[None]
    frozen = resize_maps(result.frozen.view(1, *grid, -1).permute(0, 3, 1, 2), grid, patch, 1, size)
    left = (result.exit_index.view(1, 1, *grid) < num_exits).float()
    exited = F.interpolate(left, size, mode="nearest")[0, 0] > 0.5
    return torch.where(exited, frozen[0], scores_of_masks(masks[0].sigmoid(), result.queries[0]))[None]


def _cropped(labels: Tensor, height: int, width: int) -> Tensor:
    """Cut the padding off labels `(1, H', W')` by index.

    It is no slice, since onnxruntime's `quant_pre_process` cannot prove that a slice's end lies within the padded size,
    and notes the padded size as that of the labels.
    """
    rows, columns = (torch.arange(side, device=labels.device) for side in (height, width))
    return labels.index_select(1, rows).index_select(2, columns)


def check_exportable(model: ExitSegmenter, method: Method[Any]) -> None:
    """Raise `ConfigError`, in one sentence, for a model or method that a graph cannot hold."""
    model.check(method)
    method.for_export()


def threshold_table(model: ExitSegmenter, method: Method[Any]) -> Tensor:
    """Return the method's thresholds as the graph takes them: `(E,)`, or `(E, K)` by class; ones without any."""
    exits = len(model.config.exits)
    thresholds = method.thresholds
    if thresholds is None:
        return torch.ones(exits)
    if not per_class(thresholds):
        return torch.tensor(per_exit(thresholds, exits), dtype=torch.float32)
    classes = model.config.num_classes
    rows = [[tau] * classes if isinstance(tau, int | float) else list(tau) for tau in per_exit(thresholds, exits)]
    return torch.tensor(rows, dtype=torch.float32)
