"""The segmenter as a graph for one image: the engine's own blocks, heads and rules, traced with counts left open.

Nothing of the methods is written twice. What changes is how tokens are packed: with one image there is one length, it
comes out of `nonzero`, and the tracer must be told between which bounds it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.errors import ConfigError
from tokenexit.exits import per_class, per_exit
from tokenexit.methods import DoViT, DToP, Gated, GatedBySize, Method
from tokenexit.methods.reference import Imposed
from tokenexit.output import resize_maps
from tokenexit.segmenter import ExitSegmenter
from tokenexit.tokens import Packing, Tokens

OUTPUTS = ("labels", "grid_logits", "exit_stage")


@dataclass(frozen=True)
class OneImage(Tokens):
    """Tokens of one image, for tracing. min_live: so many patch tokens are live whatever the scores."""

    min_live: int = 0

    def patch_index(self) -> Tensor:
        return torch.arange(self.num_prefix, self.x.shape[0], device=self.x.device)

    def patches(self) -> Tokens:
        if self.num_prefix == 0:
            return self
        x = self.x[self.num_prefix :]
        packing = Packing.of([x.shape[0]], x.device)
        return replace(self, x=x, position=self.position[self.num_prefix :], packing=packing, num_prefix=0)

    def keep(self, mask: Tensor) -> Tokens:
        index = mask.nonzero().squeeze(1)
        torch._check(index.shape[0] >= self.min_live)
        torch._check(index.shape[0] <= mask.shape[0])
        if self.num_prefix:
            prefix = torch.arange(self.num_prefix, device=index.device)
            index = torch.cat([prefix, index + self.num_prefix])
        x = self.x.index_select(0, index)
        packing = Packing.of([x.shape[0]], x.device)
        return replace(self, x=x, position=self.position.index_select(0, index), packing=packing)


class ExitGraph(nn.Module):
    """`forward(image, thresholds)` of a segmenter with one method: one graph has many budgets.

    image: `(1, 3, H, W)`, as `Preprocessing` makes it; any height and width. thresholds: `(E,)` of the exits, or
    `(E, K)` if the method has one for each class. Returns labels `(1, H, W)` int64, the decode grid's logits or scores
    `(1, K, h s, w s)`, and exit stages `(1, h, w)` int64.
    """

    def __init__(self, model: ExitSegmenter, method: Method[Any]) -> None:
        super().__init__()
        check_exportable(model, method)
        self.model, self.method = model, method
        keeps = isinstance(method, DToP) and method.keep_per_class > 0
        self.min_live = int(keeps)

    def forward(self, image: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, backbone, exits = self.model, self.model.backbone, self.model.config.exits
        around = model.for_methods()
        method = self._with(thresholds)
        embedded = backbone.embed([image[0]])
        values = {field.name: getattr(embedded, field.name) for field in fields(Tokens)}
        tokens: Tokens = OneImage(**values, min_live=self.min_live)
        state = method.start(tokens, around)
        for n, (start, stop) in enumerate(pairwise((0, *exits, backbone.config.depth))):
            tokens = backbone.run(tokens, start, stop)
            if n < len(exits):
                tokens, state = method.at_exit(n, tokens, state, around)
        result = method.result(tokens, state, around)
        ((h, w),) = tokens.grids
        head = model.decode_head
        maps = result.logits.view(1, h * head.scale, w * head.scale, -1).permute(0, 3, 1, 2).float()
        size = (image.shape[2], image.shape[3])
        labels = resize_maps(maps, (h, w), backbone.config.patch_size, head.upscale, size).argmax(dim=1)
        return labels, maps.contiguous(), result.exit_stage.view(1, h, w)

    def _with(self, thresholds: Tensor) -> Method[Any]:
        """The method held to thresholds that are tensors; its own were checked when it was made."""
        if not hasattr(self.method, "threshold"):
            return self.method
        method = replace(self.method)
        object.__setattr__(method, "threshold", thresholds.unbind())
        return method


def check_exportable(model: ExitSegmenter, method: Method[Any]) -> None:
    """Raise `ConfigError`, in one sentence, for what a graph cannot hold."""
    model.check(method)
    if isinstance(method, Imposed):
        raise ConfigError("exits imposed from outside are no method to export: choose dense, dtop or dovit.")
    if isinstance(method, Gated | GatedBySize):
        raise ConfigError("closed exits follow from a machine and a size: export the method inside.")
    if getattr(method, "cap", None) is not None:
        raise ConfigError("a cap counts tokens on the host and cannot be exported: calibrate without --cap.")
    if getattr(method, "boundary_guard", False):
        raise ConfigError("boundary_guard cannot be exported: calibrate without it.")
    if isinstance(method, DToP) and method.keep_per_class == 0:
        raise ConfigError(
            "with keep_per_class=0 no token may be left, and heads cannot be traced on none: export with 1 or more."
        )
    if isinstance(method, DoViT) and method.batch_mode == "mean":
        raise ConfigError("batch_mode='mean' means nothing for one image: export with batch_mode='exact'.")


def threshold_table(model: ExitSegmenter, method: Method[Any]) -> Tensor:
    """The method's thresholds as the graph takes them: `(E,)`, or `(E, K)` by class; ones if it has none."""
    exits = len(model.config.exits)
    own = getattr(method, "threshold", None)
    if own is None:
        return torch.ones(exits)
    if not per_class(own):
        return torch.tensor(per_exit(own, exits), dtype=torch.float32)
    classes = model.config.num_classes
    rows = [[tau] * classes if isinstance(tau, int | float) else list(tau) for tau in per_exit(own, exits)]
    return torch.tensor(rows, dtype=torch.float32)
