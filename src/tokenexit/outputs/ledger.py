"""The ledger holds the cost of one call, image by image, from true counts of live tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tokenexit.engine.ops import GIGA, Ops
from tokenexit.engine.tokens import Grid
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import vit_config
from tokenexit.heads import Head, HeadSpec, build_head
from tokenexit.heads.eomt import take_joint_blocks
from tokenexit.methods.base import ExitRecord

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class MacsByPart:
    """Multiply-adds of one image by part of the network.

    Attributes:
        embed: patch embedding.
        blocks: all blocks, prefix tokens included.
        exit_heads: heads of the exits that ran.
        decode_head: the head at the end, and stage adapters in front of it.
        reduction: comparisons by which a reducer merges or drops tokens.
    """

    embed: int
    blocks: int
    exit_heads: int
    decode_head: int
    reduction: int = 0

    @property
    def total(self) -> int:
        """Multiply-adds of all parts."""
        return self.embed + self.blocks + self.exit_heads + self.decode_head + self.reduction


@dataclass(frozen=True)
class Ledger:
    """Live patch tokens in every block and the multiply-adds that follow, per image.

    Attributes:
        live: `[image][block]` patch tokens computed, in the MLP where some merge before it; prefix tokens are not
            counted here but are in the multiply-adds.
        tokens: number of patches of each image as the network saw it.
        ended: patch tokens of each image that were live after the last block.
        parts: multiply-adds of each image by part of the network.
        dense_macs: multiply-adds of the same image without exits (backbone and decode head), at its full size where a
            method resizes it.
    """

    live: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    ended: tuple[int, ...]
    parts: tuple[MacsByPart, ...]
    dense_macs: tuple[int, ...]

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of each image."""
        return tuple(part.total for part in self.parts)

    @property
    def gmacs(self) -> tuple[float, ...]:
        """Giga multiply-adds of each image."""
        return tuple(macs / GIGA for macs in self.macs)

    @property
    def share_of_dense(self) -> tuple[float, ...]:
        """Multiply-adds of each image over those of the dense model."""
        return tuple(macs / dense for macs, dense in zip(self.macs, self.dense_macs))

    def __getitem__(self, image: int) -> Ledger:
        one = slice(image, image + 1)
        return Ledger(self.live[one], self.tokens[one], self.ended[one], self.parts[one], self.dense_macs[one])

    def live_after(self, exits: Sequence[int], image: int = 0) -> tuple[int, ...]:
        """Return how many patch tokens of an image went on behind each exit. exits: number of blocks before each."""
        after = (*self.live[image], self.ended[image])
        return tuple(after[n] for n in exits)


def write_ledger(
    backbone: ViT,
    exit_heads: Sequence[Head],
    decode_head: Head,
    grids: Sequence[Grid],
    lengths: Sequence[Sequence[int]],
    records: Sequence[ExitRecord],
    full_grids: Sequence[Grid] | None = None,
    fed: Sequence[Sequence[int]] | None = None,
    reduction: Sequence[Ops] | None = None,
    frozen: Sequence[Sequence[int]] = (),
) -> Ledger:
    """Add up the cost of one call.

    lengths: `[block][image]` tokens in every block and, last, after it, prefix included; 0 where nothing ran. records:
        one for each exit, then the decode head's. full_grids: of the images before a method resized them, for
        `dense_macs`; `grids` if not given. fed: tokens in the MLP of every block, and after the last; `lengths` if not
        given. reduction: of each image. frozen: `[block][image]` tokens that are keys and values alone, in the first
        blocks; none in others.
    """
    fed = lengths if fed is None else fed
    prefix = backbone.config.num_prefix_tokens
    live, parts, dense = [], [], []
    for i, (grid, full) in enumerate(zip(grids, grids if full_grids is None else full_grids)):
        alike = Counter((block[i], late[i]) for block, late in zip(lengths[:-1], fed))  # counts differ at exits alone
        blocks = sum((backbone.block_ops(*counts) * number for counts, number in alike.items()), Ops())
        for queries, keys in zip(lengths, frozen):
            if keys[i] and queries[i]:
                blocks += backbone.frozen_ops(queries[i], keys[i])
        heads = Ops()
        for head, record in zip(exit_heads, records):
            if record.work:
                heads += record.work[i]
            elif record.head_tokens:
                heads += head.ops(record.head_tokens[i], grid)
        final = decode_head.ops(records[-1].head_tokens[i], grid) if records[-1].head_tokens else Ops()
        if records[-1].beside:
            final += records[-1].beside[i]
        embed = backbone.embed_ops(grid)
        compared = Ops() if reduction is None else reduction[i]
        live.append(tuple(max(0, block[i] - prefix) for block in fed))  # and those after the last block
        parts.append(MacsByPart(embed.macs, blocks.macs, heads.macs, final.macs, compared.macs))
        dense.append(dense_ops(backbone, decode_head, full).macs)
    return Ledger(
        live=tuple(one[:-1] for one in live),
        tokens=tuple(h * w for h, w in grids),
        ended=tuple(one[-1] for one in live),
        parts=tuple(parts),
        dense_macs=tuple(dense),
    )


def with_frozen_keys(ledger: Ledger, backbone: ViT) -> Ledger:
    """Add what it takes that all tokens of an image which are not live are keys and values of those that are.

    ledger: of a run in which they were not, with the same live tokens. A block without any query needs no keys.
    """
    prefix, parts = backbone.config.num_prefix_tokens, []
    for live, tokens, part in zip(ledger.live, ledger.tokens, ledger.parts):
        queries = [count + prefix for count in live]
        extra = sum((backbone.frozen_ops(q, tokens + prefix - q) for q in queries if q), Ops())
        parts.append(replace(part, blocks=part.blocks + extra.macs))
    return replace(ledger, parts=tuple(parts))


def dense_ops(backbone: ViT, decode_head: Head, grid: Grid) -> Ops:
    """Count backbone and decode head on all tokens: the denominator of every saving."""
    cells = grid[0] * grid[1]
    length = cells + backbone.config.num_prefix_tokens
    blocks = backbone.block_ops(length) * backbone.config.depth
    return backbone.embed_ops(grid) + blocks + backbone.norm_ops(cells) + decode_head.ops(cells, grid)


def dtop_convention_gmacs(backbone: ViT, head: Head, image_size: Size) -> float:
    """Return the dense GMACs of one crop as the DToP paper prints them ("GFLOPs").

    One head, LayerNorm 5 per element, two bilinear upsamples of the class maps at 4 per output element; no exit head.
    This yields the four dense baselines of the release's README to the printed decimal. Build the backbone with
    `class_token=False, final_norm=False`, as the release does.
    """
    ops = dense_ops(backbone, head, backbone.patch_embed.grid(*image_size))
    return ops.in_dtop_convention(2 * head.num_classes * image_size[0] * image_size[1]) / GIGA


def dense_gmacs(
    backbone: str, head: HeadSpec, num_classes: int, image_size: Size, convention: Literal["tokenexit", "dtop"]
) -> dict[str, float | int | str]:
    """Return the dense cost of a preset with a decode head on one image, in either convention, without weights."""
    dtop = convention == "dtop"
    options = {"class_token": False, "final_norm": False} if dtop else {}
    config = vit_config(backbone, **options)
    name = head if isinstance(head, str) else head["kind"]
    if head == "eomt":  # as published: the head holds the last blocks of the preset
        config, head = take_joint_blocks(config, {})
    with torch.device("meta"):
        vit, decode_head = ViT(config), build_head(head, config.embed_dim, num_classes)
    grid = vit.patch_embed.grid(*image_size)
    if dtop:
        gmacs = dtop_convention_gmacs(vit, decode_head, image_size)
    else:
        gmacs = dense_ops(vit, decode_head, grid).macs / GIGA
    parameters = sum(p.numel() for p in (*vit.parameters(), *decode_head.parameters()))
    return {
        "gmacs": round(gmacs, 2),
        "backbone": backbone,
        "head": name,
        "convention": convention,
        "tokens": grid[0] * grid[1],
        "parameters": parameters,
    }
