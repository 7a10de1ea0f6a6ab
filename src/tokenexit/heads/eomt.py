"""EoMT's end of the network (Kerssies et al., Your ViT is Secretly an Image Segmentation Model, CVPR 2025).

Learned queries join the tokens for the last blocks of the ViT itself; each then says a class and a mask. Here these
blocks, the final norm, the queries and what turns them into masks are the decode head, and the backbone is what comes
before: a token may leave after any of its blocks, the last one included.

Legend: T tokens with prefix, C channels, Q queries, K classes, s x s = 4 x 4 cells per patch, P patches of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine import ops
from tokenexit.engine.attention import segment_matmul
from tokenexit.engine.block import Block, run_block
from tokenexit.engine.ops import Ops
from tokenexit.engine.rope import Pairing
from tokenexit.engine.tokens import Grid, Packing, Tokens, pack_grids, scatter, unpack_grids
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.heads.base import (
    Head,
    HeadOutput,
    MaskPrediction,
    ScoreKind,
    attention_heads,
    check_head_options,
    init_linear,
)
from tokenexit.heads.mask_attention import mask_attention

PUBLISHED_JOINT = {12: 3, 24: 4, 40: 5}
"""Joint blocks of the released models, by the number of blocks of the whole ViT."""
UPSCALE_EPS = 1e-6
"""Epsilon of the norms between upscaling steps, on every backbone."""


class EoMTHead(Head):
    """The last `layers` blocks of a ViT with `queries` learned tokens, and their classes and masks.

    layers: number of joint blocks, 3 in the published S and B, 4 in L, 5 in g. queries: 100 for semantic segmentation.
    steps: doublings of the grid before masks, 2 for 16-pixel patches. prefix: class token and registers of the
    backbone. The others are those of the backbone's blocks, see `ViTConfig`; `eomt_spec` takes them from it.
    """

    kind: ClassVar[ScoreKind] = "masks"
    needs_grid: ClassVar[bool] = True
    takes_prefix: ClassVar[bool] = True
    takes_backdrop: ClassVar[bool] = True

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        layers: int = 3,
        queries: int = 100,
        steps: int = 2,
        prefix: int = 1,
        num_heads: int | None = None,
        mlp_hidden: int | None = None,
        mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu",
        qkv_bias: bool = True,
        k_bias: bool = True,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        rope: Pairing | None = None,
    ) -> None:
        super().__init__(num_classes)
        check_head_options("eomt", layers=layers, queries=queries, steps=steps)
        hidden = 4 * embed_dim if mlp_hidden is None else mlp_hidden
        self.scale, self.prefix, self.joint_blocks, d = 2**steps, prefix, layers, embed_dim
        self.queries = nn.Embedding(queries, d)
        self.blocks = nn.ModuleList(
            Block(
                d,
                attention_heads("eomt", d, num_heads),
                hidden,
                mlp=mlp,
                qkv_bias=qkv_bias,
                k_bias=k_bias,
                rope=rope,
                layer_scale=layer_scale,
                norm_eps=norm_eps,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d, norm_eps)
        self.classifier = nn.Linear(d, num_classes + 1)
        self.mask = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.upscale_steps = nn.ModuleList(Upscale(d) for _ in range(steps))
        init_linear(self.blocks)

    def forward(self, tokens: Tokens, mask_shares: Sequence[float] = (), backdrop: Tensor | None = None) -> HeadOutput:
        """Answer for whole images: all tokens with prefix, before any final norm; or live ones and a backdrop.

        backdrop: `(cells, C)` features of all patches, of which those of live ones do not count. The blocks see live
        tokens alone, masks are made of the grid with the last features of live tokens put in their places.

        mask_shares: in training, for each joint block the probability with which a query sees the patches of its own
        mask alone. The queries then predict before each of them, too; the images must be of one size.

        Returns mask logits `(P s^2, Q)`, and in `presence` the queries' class logits `(B, Q, K + 1)`, the last of
        which says "no object".
        """
        joined, earlier = self._join(tokens), []
        for n, block in enumerate(self.blocks):
            masked = None
            if mask_shares:
                earlier.append(prediction(self._predict(joined, backdrop), joined.grids, self.scale))
                if mask_shares[n] > 0:
                    masked = mask_attention(
                        list(earlier[-1].logits), joined, self.queries.num_embeddings, mask_shares[n]
                    )
            joined = joined.with_x(
                run_block(block, self.grad_checkpointing, joined.x, joined.packing, joined.phases, masked)
            )
        return replace(self._predict(joined, backdrop), earlier=tuple(earlier))

    def _join(self, tokens: Tokens) -> Tokens:
        """Put the queries between prefix and patches of every image.

        Attention has no order, and the class token stays the first row. Queries have no place: rotary positions leave
        them as they are.
        """
        if tokens.num_prefix != self.prefix:
            raise ConfigError(
                f"prefix of head 'eomt' must be {tokens.num_prefix}, the class and register tokens of the backbone, "
                f"got {self.prefix}: build its options with eomt_spec."
            )
        queries, prefix = self.queries.weight.to(tokens.x.dtype), tokens.num_prefix
        minus_one = tokens.position.new_full((len(queries),), -1)
        lengths = tokens.packing.lengths

        def between(rows: Tensor, new: Tensor) -> Tensor:
            return torch.cat([part for one in rows.split(lengths) for part in (one[:prefix], new, one[prefix:])])

        phases = None
        if tokens.phases is not None:
            cos, sin = tokens.phases.new_ones(len(queries), 1), tokens.phases.new_zeros(len(queries), 1)
            width = tokens.phases.shape[1] // 2
            phases = between(tokens.phases, torch.cat([cos.expand(-1, width), sin.expand(-1, width)], dim=1))
        return replace(
            tokens,
            x=between(tokens.x, queries),
            position=between(tokens.position, minus_one),
            packing=Packing.of([len(queries) + n for n in lengths], tokens.x.device),
            num_prefix=prefix + len(queries),
            phases=phases,
        )

    def _predict(self, joined: Tokens, backdrop: Tensor | None) -> HeadOutput:
        x, count = joined.x, self.queries.num_embeddings
        queries = x.index_select(0, joined.prefix_index()).unflatten(0, (-1, self.prefix + count))[:, self.prefix :]
        rows = joined.patch_index()
        queries, patches = self.norm(queries), x.index_select(0, rows)
        if backdrop is not None:
            patches = scatter(backdrop, joined.position.index_select(0, rows), patches)
        masks = queries
        for n, linear in enumerate(self.mask):
            masks = linear(F.gelu(masks) if n else masks)
        batches = unpack_grids(self.norm(patches), joined.grids)
        cells = pack_grids([(members, self._upscaled(maps)) for members, maps in batches])
        packing = Packing.of([h * w * self.scale**2 for h, w in joined.grids], x.device)
        return HeadOutput(segment_matmul(cells, masks, packing), packing, self.classifier(queries))

    def _upscaled(self, maps: Tensor) -> Tensor:
        """Turn `(b, C, h, w)` into `(b, C, h s, w s)`."""
        for step in self.upscale_steps:
            maps = step(maps)
        return maps

    def ops(self, tokens: int, grid: Grid) -> Ops:
        """Count joint blocks on the image's tokens and queries; upscaling and masks on the whole grid."""
        d, count, cells = self.queries.embedding_dim, self.queries.num_embeddings, grid[0] * grid[1]
        joint = tokens + self.prefix + count
        block = self.blocks[0]
        assert isinstance(block, Block)
        total = (
            block.ops(joint) * len(self.blocks)
            + ops.layer_norm(joint, d)
            + ops.linear(count, d, self.num_classes + 1)
            + ops.linear(count, d, d) * 3
        )
        for _ in self.upscale_steps:
            # every input cell gives four: one product of C x C each, then 3 x 3 of each channel by itself
            total += ops.linear(4 * cells, d, d) + Ops(macs=9 * d * 4 * cells) + ops.layer_norm(4 * cells, d)
            cells *= 4
        return total + ops.linear(cells, d, count)


def prediction(out: HeadOutput, grids: Sequence[Grid], scale: int) -> MaskPrediction:
    """Return what a head of masks answers for images of one grid as maps."""
    ((_, maps),) = unpack_grids(out.logits, grids, scale)
    assert out.presence is not None, "heads of masks always give class logits"
    return MaskPrediction(maps, out.presence)


class Upscale(nn.Module):
    """One doubling of the grid: transposed convolution, GELU, 3 x 3 of each channel, LayerNorm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels, UPSCALE_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        mixed: Tensor = self.mix(F.gelu(self.up(maps)))
        return self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def eomt_spec(backbone: ViTConfig, layers: int, queries: int = 100, steps: int | None = None) -> dict[str, Any]:
    """Return the specification of an `eomt` head whose blocks are like those of a backbone.

    Args:
        backbone: configuration of the ViT, with or without the last blocks.
        layers: number of joint blocks.
        queries: number of queries.
        steps: doublings of the grid; as published, down to cells of 4 to 7 pixels, if not given.
    """
    odd = [name for name in ("sub_norm", "attn_norm") if getattr(backbone, name)]
    if odd:
        raise ConfigError(f"head 'eomt' has no blocks with {odd[0]}: choose a backbone without it.")
    published = max(1, (backbone.patch_size).bit_length() - 3)
    return {
        "kind": "eomt",
        "layers": layers,
        "queries": queries,
        "steps": published if steps is None else steps,
        "prefix": backbone.num_prefix_tokens,
        "num_heads": backbone.num_heads,
        "mlp_hidden": backbone.mlp_hidden,
        "mlp": backbone.mlp,
        "qkv_bias": backbone.qkv_bias,
        "k_bias": backbone.k_bias,
        "layer_scale": backbone.layer_scale,
        "norm_eps": backbone.norm_eps,
        "rope": backbone.rope,
    }


def take_joint_blocks(whole: ViTConfig, spec: Mapping[str, Any]) -> tuple[ViTConfig, dict[str, Any]]:
    """Split a whole ViT into the backbone below the queries and the specification of an `eomt` head that ends it.

    Args:
        whole: configuration with all blocks and its final norm.
        spec: of the head: `layers`, as published for this depth if not given, `queries` and `steps`.
    """
    chosen = {name: spec[name] for name in ("layers", "queries", "steps") if name in spec}
    layers = chosen.setdefault("layers", PUBLISHED_JOINT.get(whole.depth, 1))
    check_head_options("eomt", layers=layers)
    if layers >= whole.depth:
        raise ConfigError(f"layers of head 'eomt' must be below {whole.depth}, the backbone's blocks, got {layers}.")
    return replace(whole, depth=whole.depth - layers, final_norm=False), eomt_spec(whole, **chosen)


@torch.no_grad()
def hand_over(whole: ViT, backbone: ViT, head: EoMTHead) -> None:
    """Copy the weights of a whole ViT to the two parts that `take_joint_blocks` has made of it."""
    state, last = whole.state_dict(), len(backbone.blocks)
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    for block, source in zip(head.blocks, whole.blocks[last:]):
        block.load_state_dict(source.state_dict())
    head.norm.load_state_dict(whole.norm.state_dict())
