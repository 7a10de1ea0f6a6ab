"""The plain Vision Transformer over packed tokens.

Parameters carry timm's names, so that timm weights load as they are. The backbone knows no heads and no methods: it
embeds images, and runs a span of blocks over whatever tokens are live.

Legend: T live tokens of the batch, B images, C channels, N heads, H channels per head, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.block import Block, drop_path, run_block
from tokenexit.engine.cuda_graphs import STEP, CapturedBlocks, Record, cuda_graphs
from tokenexit.engine.ops import Ops
from tokenexit.engine.recurring_rows import images_in_recurring_rows, pads_rows
from tokenexit.engine.rope import rope_periods, rope_phases
from tokenexit.engine.tokens import Grid, Packing, Tokens, group_equal
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.engine.window_policy import WindowPolicy
from tokenexit.errors import ConfigError

Projected = list[tuple[list[int], Tensor]]
"""Projected patches of images: the indices of those of one size, and their maps `(b, C, h, w)`."""


def resize_pos_embed(
    table: Tensor,
    old: Grid,
    new: Grid,
    mode: str = "bicubic",
    antialias: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """Resize the patch rows `(1, h w, C)` of a position table from grid `old` to grid `new`.

    offset: DINOv2 scales by `(new + offset) / old` instead of `new / old`, against rounding in its own code.
    """
    if old == new:
        return table
    maps = table.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    if offset:
        scale = [(n + offset) / o for n, o in zip(new, old)]
        maps = F.interpolate(maps, scale_factor=scale, mode=mode, antialias=antialias, align_corners=False)
        if maps.shape[2:] != torch.Size(new):
            raise ConfigError(
                f"pos_embed_offset={offset} gives a {tuple(maps.shape[2:])} table for a {new} grid: "
                "use an offset below 1."
            )
    else:
        maps = F.interpolate(maps, size=new, mode=mode, antialias=antialias, align_corners=False)
    return maps.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(table.dtype)


class PatchEmbed(nn.Module):
    """Projection of non-overlapping patches to vectors.

    Images that are no multiple of the patch are padded right and below with zeros (the mean colour after
    normalisation).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=not config.norm_pre)

    def grid(self, height: int, width: int) -> Grid:
        """Return (rows, columns) of patches of an image of this size in pixels."""
        p = self.patch_size
        return (height + p - 1) // p, (width + p - 1) // p  # graphs divide towards zero: no negative numbers

    def forward(self, images: Tensor) -> Tensor:
        """Embed images `(B, 3, H, W)` as `(B, C, h, w)`."""
        height, width = images.shape[2:]
        h, w = self.grid(height, width)
        images = F.pad(images, (0, w * self.patch_size - width, 0, h * self.patch_size - height))
        return self.proj(images)  # type: ignore[no-any-return]


class ViT(nn.Module):
    """The backbone: `embed` turns images into tokens, `run` applies a span of blocks, `norm` ends it if configured."""

    pos_embed: nn.Parameter
    """The position table `(1, prefix rows + h w, C)`; None where the configuration has none."""
    window_policy: WindowPolicy | None
    """The network that chooses windows for `Supertokens`, which learns apart from the rest; None without one."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, (rows, columns) = config.embed_dim, config.pos_embed_grid
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim))
        table = torch.empty(1, rows * columns + self.pos_embed_prefix, dim) if config.pos_embed else None
        self.register_parameter("pos_embed", None if table is None else nn.Parameter(table))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                config.mlp_hidden,
                mlp=config.mlp,
                sub_norm=config.sub_norm,
                qkv_bias=config.qkv_bias,
                k_bias=config.k_bias,
                attn_norm=config.attn_norm,
                rope=config.rope,
                layer_scale=config.layer_scale,
                norm_eps=config.norm_eps,
                drop_path=config.drop_path * i / max(config.depth - 1, 1),
                drop_path_attention=config.drop_path_attention,
            )
            for i in range(config.depth)
        )
        self.norm_pre = nn.LayerNorm(dim, config.norm_eps) if config.norm_pre else nn.Identity()
        self.norm = nn.LayerNorm(dim, config.norm_eps) if config.final_norm else nn.Identity()
        policy = WindowPolicy(config.patch_size, config.window_policy) if config.window_policy else None
        self.register_module("window_policy", None if policy is None else policy.requires_grad_(False))
        self.grad_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.captured: CapturedBlocks | None = None
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embed.proj.weight.device

    @property
    def pos_embed_prefix(self) -> int:
        """Number of rows of the position table in front of the patch rows: one if the class token has its own."""
        return int(self.config.pos_embed and self.config.pos_embed_prefix and self.config.class_token)

    def reset_parameters(self) -> None:
        """Draw weights and embeddings from a truncated normal of 0.02 and set biases to zero, as timm does."""
        for name, parameter in self.named_parameters():
            if name.startswith("window_policy."):
                continue  # convolutions keep their own start
            if name.endswith(("cls_token", "reg_token", "pos_embed")) or parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def project(self, images: Sequence[Tensor]) -> Projected:
        """Project the patches of images `(3, H, W)`, those of one size together."""
        shapes = [(image.shape[1], image.shape[2]) for image in images]
        groups = group_equal(shapes)
        return [(members, self.patch_embed(torch.stack([images[i] for i in members]))) for members in groups]

    def embed(self, images: Sequence[Tensor], projected: Projected | None = None) -> Tokens:
        """Turn images `(3, H, W)` of any sizes into packed tokens: patches, positions, prefix tokens in front.

        Images of one size are embedded together. projected: their patches, of `project`, if they are known.
        """
        grids = tuple(self.patch_embed.grid(image.shape[1], image.shape[2]) for image in images)
        rows: list[Tensor] = [torch.empty(0)] * len(images)
        for members, batch in self.project(images) if projected is None else projected:
            embedded = self._embed_grid(batch)
            for i, image in zip(members, embedded):
                rows[i] = image
        prefix = self.config.num_prefix_tokens
        cells = [h * w for h, w in grids]
        packing, x = Packing.of([prefix + n for n in cells], rows[0].device), torch.cat(rows)
        return Tokens(x, _positions(cells, prefix, x.device), packing, grids, prefix, self._phases(grids, x))

    def embed_windows(self, images: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        """Embed windows of `side x side` patches as one patch each: of images made smaller, by means of pixels.

        Their positions are means, too, of rows of the table or of coordinates. Windows are cut from the upper left, and
        those that a grid cuts off are left out, so there must be a whole one.

        images: `(b, 3, H, W)`. Returns features `(b, h // side, w // side, C)` and phases `(h // side, w // side, 2 H)`
        if positions are rotary. Raises `ConfigError` in training with `rope_rescale`, which is drawn for patches.
        """
        if self.training and self.config.rope is not None and self.config.rope_rescale > 1.0:
            raise ConfigError("windows of patches know no drawn scale of rotary positions: set rope_rescale to 1.")
        p, config = self.config.patch_size, self.config
        grid = self.patch_embed.grid(images.shape[2], images.shape[3])
        rows, columns = grid[0] // side, grid[1] // side
        whole = (0, columns * side * p - images.shape[3], 0, rows * side * p - images.shape[2])  # negative ones cut
        x = self.patch_embed(F.avg_pool2d(F.pad(images, whole), side))  # (b, C, rows, columns)
        table = self._table(grid)
        if table is not None:
            x = x + F.avg_pool2d(table.unflatten(1, grid).permute(0, 3, 1, 2), side)
        phases = None
        if config.rope is not None:
            prefix, periods = config.num_prefix_tokens, self._periods(x)
            phases = rope_phases(grid, prefix, periods, config.rope, config.places, side)[prefix:]
            phases = phases.unflatten(0, (rows, columns))
        return self.norm_pre(x.permute(0, 2, 3, 1)), phases

    def with_window_policy(self, policy: WindowPolicy) -> ViT:
        """Return this backbone with a network that chooses windows; weights are shared."""
        backbone = copy(self)
        backbone._modules = {**self._modules, "window_policy": policy.requires_grad_(False)}
        backbone.config = replace(self.config, window_policy=policy.sides)
        return backbone

    def _periods(self, x: Tensor) -> Tensor:
        """Return the periods of rotary positions, in fp32 at least."""
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return rope_periods(self.config.head_dim, self.config.rope_theta, self.config.rope_periods, like)

    def _phases(self, grids: Sequence[Grid], x: Tensor) -> Tensor | None:
        """Compute the phases of all tokens of images with these grids, in fp32 at least; None without rotary ones."""
        config = self.config
        if config.rope is None:
            return None
        periods = self._periods(x)
        if self.training and config.rope_rescale > 1.0:
            periods = periods / config.rope_rescale ** (2 * torch.rand((), device=x.device) - 1)
        images: list[Tensor] = [periods] * len(grids)
        for members in group_equal(grids):
            table = rope_phases(grids[members[0]], config.num_prefix_tokens, periods, config.rope, config.places)
            for i in members:
                images[i] = table
        return torch.cat(images)

    def _embed_grid(self, patches: Tensor) -> Tensor:
        """Turn patches `(b, C, h, w)` into `(b, prefix + h w, C)` with positions added."""
        config, prefix_rows = self.config, self.pos_embed_prefix
        table = self._table((patches.shape[2], patches.shape[3]))
        x = patches.flatten(2).transpose(1, 2)
        if table is not None:
            x = x + table
        prefix = []
        if config.class_token:
            with_place = table is not None and prefix_rows > 0
            prefix.append(self.cls_token + self.pos_embed[:, :prefix_rows] if with_place else self.cls_token)
        if config.num_registers:
            prefix.append(self.reg_token)
        joined = torch.cat([*(p.to(x.dtype).expand(x.shape[0], -1, -1) for p in prefix), x], dim=1)
        return self.norm_pre(joined)  # type: ignore[no-any-return]

    def _table(self, grid: Grid) -> Tensor | None:
        """Return the rows of the position table for the patches of a grid, `(1, h w, C)`; None without a table."""
        table: Tensor | None = self.pos_embed
        if table is None:
            return None
        config = self.config
        return resize_pos_embed(
            table[:, self.pos_embed_prefix :],
            config.pos_embed_grid,
            grid,
            config.pos_embed_mode,
            config.pos_embed_antialias,
            config.pos_embed_offset,
        )

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` (inclusive) to `stop` (exclusive) on the live tokens."""
        x, phases, weight, frozen = tokens.x, tokens.phases, tokens.weight, tokens.frozen
        plain = weight is None and frozen is None and not torch.is_grad_enabled()
        captured = self.captured if plain else None
        if captured is not None and captured.fits(tokens.packing):
            return tokens.with_x(captured.run(x, tokens.packing, start, stop, phases))
        if pads_rows(tokens):
            return self._run_in_recurring_rows(tokens, start, stop)
        for block in islice(self.blocks, start, stop):  # a slice would be a new ModuleList
            x = run_block(block, self.grad_checkpointing, x, tokens.packing, phases, None, weight, frozen)
        return tokens.with_x(x)

    def _run_in_recurring_rows(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run the same, each image by itself, with a number of rows that recurs."""
        images = []
        for length, (x, packing, phases, weight, frozen) in zip(
            tokens.packing.lengths, images_in_recurring_rows(tokens)
        ):
            for block in islice(self.blocks, start, stop):
                x = run_block(block, self.grad_checkpointing, x, packing, phases, None, weight, frozen)
            images.append(x[:length])
        return tokens.with_x(images[0] if len(images) == 1 else torch.cat(images))

    def attend(self, tokens: Tokens, n: int, weighed: bool = False) -> tuple[Tokens, Tensor]:
        """Run block `n` up to its MLP. Returns its queries, keys, values, too: `(T, 3, N, H)`.

        With `feed` it draws stochastic depth as the whole block does. Activations of both are kept in training.

        weighed: a token counts as a key once for each cell that it stands for.
        """
        block = self.blocks[n]
        assert isinstance(block, Block)
        qkv = block.before(tokens.x, tokens.phases)
        weight = tokens.weights_by_size() if weighed else tokens.weight
        attended = block.attn.attend(qkv, tokens.packing, weight=weight, frozen=block.seen(tokens.frozen))
        drops = block.training and block.drop_path > 0.0 and block.drop_path_attention
        factor = drop_path(block.drop_path, tokens.packing, attended.dtype) if drops else None
        mixed = block.mix(tokens.x, attended, factor)
        return tokens.with_x(mixed), qkv.unflatten(1, (3, block.attn.num_heads, -1))

    def feed(self, tokens: Tokens, n: int) -> Tokens:
        """Run the MLP of block `n`, behind `attend`."""
        block = self.blocks[n]
        assert isinstance(block, Block)
        drops = block.training and block.drop_path > 0.0
        factor = drop_path(block.drop_path, tokens.packing, tokens.x.dtype) if drops else None
        return tokens.with_x(block.feed(tokens.x, factor))

    def compile_blocks(self, **options: Any) -> None:
        """Compile what lies around attention in each block: two graphs for all blocks and any number of live tokens.

        On CUDA this fuses norms, activations and residuals and saves launches; on the CPUs that were measured it is as
        fast as without (docs/evidence/performance.md). The first call takes long, and needs a C++ compiler on CPU.

        Args:
            **options: keyword arguments of torch.compile.
        """
        before = torch.compile(Block.before, dynamic=True, **options)
        after = torch.compile(Block.after, dynamic=True, **options)
        for block in self.blocks:
            for name, function in (("before", before), ("after", after)):
                setattr(block, name, MethodType(function, block))

    def capture_blocks(self, step: int = STEP, record: Record | None = None) -> None:
        """Replay spans of blocks as CUDA graphs, which saves the launches of small batches.

        Weights must not change afterwards, and calls must not overlap. Tokens with weights as keys, or beside frozen
        ones, run without graphs.

        Args:
            step: number of tokens between two padded lengths; a graph is recorded at the first use of each.
            record: another recorder, for tests.

        Raises:
            ConfigError: without CUDA.
        """
        device = self.device
        if record is None and device.type != "cuda":
            raise ConfigError(f"capture_blocks needs CUDA and the model is on {device}: move it there.")
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        self.captured = CapturedBlocks(blocks, cuda_graphs(device) if record is None else record, step)

    def embed_ops(self, grid: Grid) -> Ops:
        """Count the work of the patch embedding on one image, and of the norm before the first block."""
        config = self.config
        embedded = ops.conv2d(*grid, 3, config.embed_dim, config.patch_size)
        if not config.norm_pre:
            return embedded
        return embedded + ops.layer_norm(config.num_prefix_tokens + grid[0] * grid[1], config.embed_dim)

    def block_ops(self, tokens: int, fed: int | None = None) -> Ops:
        """Count the work of any one block (all are alike) on one image, see `Block.ops`."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.ops(tokens, fed)

    def frozen_ops(self, tokens: int, frozen: int) -> Ops:
        """Count what tokens that are keys and values alone add to `block_ops` of one block, see `Block.frozen_ops`."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.frozen_ops(tokens, frozen)

    def norm_ops(self, tokens: int) -> Ops:
        """Count the final LayerNorm on this many tokens."""
        return ops.layer_norm(tokens, self.config.embed_dim) if self.config.final_norm else Ops()


def _positions(cells: Sequence[int], prefix: int, device: torch.device) -> Tensor:
    """Return the canvas row of every packed token, -1 for prefix tokens."""
    parts, start = [], 0
    for n in cells:
        parts += [torch.full((prefix,), -1), torch.arange(start, start + n)]
        start += n
    return torch.cat(parts).to(device, non_blocking=True)
