"""SETR heads of several upsampling steps, which mix neighbours and need the complete grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Packing, Tokens, pack_grids, unpack_grids
from tokenexit.errors import ConfigError
from tokenexit.heads.base import GridBatchNorm, Head, HeadOutput, check_head_options, init_linear

MOST_UP = 64
"""Cells per side of a patch; a map has its square."""


class SETRUpHead(Head):
    """The head applies LayerNorm, `steps` of (convolution, BatchNorm, ReLU, bilinear up), and a 1x1 classifier.

    SETR-PUP: 4 steps, kernel 3, up 2. DoViT's ViT-L exit heads on ADE20K: 2 steps, kernel 1, up 4. The classifier runs
    before the last upsampling, which gives the same logits to rounding.

    channels: width of every step; kernel: 1 or 3; up: scale of each step.
    """

    needs_grid = True

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        channels: int = 256,
        steps: int = 4,
        kernel: int = 3,
        up: int = 2,
    ) -> None:
        super().__init__(num_classes)
        check_head_options("setr_pup", channels=channels, steps=steps, up=up)
        if kernel not in (1, 3):
            raise ConfigError(f"head 'setr_pup' has kernel={kernel}: choose 1 or 3.")
        if up**steps > MOST_UP:
            raise ConfigError(f"head 'setr_pup' with steps={steps} and up={up} gives {up**steps}x maps: lower one.")
        self.up, self.scale, self.upscale = up, up ** (steps - 1), up
        self.input_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.convs = nn.ModuleList(
            nn.Conv2d(embed_dim if i == 0 else channels, channels, kernel, padding=kernel // 2, bias=False)
            for i in range(steps)
        )
        self.norms = nn.ModuleList(GridBatchNorm(channels) for _ in range(steps))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        init_linear(self)

    def forward(self, tokens: Tokens) -> HeadOutput:
        maps = unpack_grids(self.input_norm(tokens.x), tokens.grids)
        logits = pack_grids([(members, self._forward_maps(batch)) for members, batch in maps])
        lengths = [h * w * self.scale**2 for h, w in tokens.grids]
        return HeadOutput(logits, Packing.of(lengths, logits.device))

    def _forward_maps(self, x: Tensor) -> Tensor:
        """Classifies maps `(b, C, h, w)` as `(b, K, scale h, scale w)`."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            if i:
                x = F.interpolate(x, scale_factor=self.up, mode="bilinear", align_corners=False)
            x = F.relu(norm(conv(x)))
        return self.classifier(x)  # type: ignore[no-any-return]

    def ops(self, tokens: int, grid: Grid) -> Ops:
        total = ops.layer_norm(tokens, self.input_norm.normalized_shape[0])
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            side = self.up**i
            total += ops.conv2d(
                grid[0] * side, grid[1] * side, conv.in_channels, conv.out_channels, conv.kernel_size[0]
            )
        h, w = grid[0] * self.scale, grid[1] * self.scale
        return total + ops.conv2d(h, w, self.classifier.in_channels, self.classifier.out_channels, 1)
