"""Baselines of the dense model as users run it: a plain batch, torch's fused attention, compiled, weights in bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.engine.rope import Pairing, rotate
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.methods import Dense
from tokenexit.runtime.precision import LOWERED, Precision
from tokenexit.segmenter import ExitSegmenter


class PlainViT(nn.Module):
    """The backbone on a batch of images of one size: nothing packed, nothing counted."""

    def __init__(self, model: ExitSegmenter) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, prefix + h w, C)`, final norm included."""
        vit: Any = self.backbone
        patches = vit.patch_embed(images)
        x = vit._embed_grid(patches)
        phases = vit._phases([(patches.shape[2], patches.shape[3])], x[0])
        for block in vit.blocks:
            batch, tokens, channels = x.shape
            qkv = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, block.attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            if phases is not None:
                q, k = (_rotated(part, phases, block.attn.rope) for part in (q, k))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, channels)
            x = x + block.ls1(block.attn.proj(block.attn.norm(attended)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        normed: Tensor = vit.norm(x)
        return normed


def _rotated(x: Tensor, phases: Tensor, pairing: Pairing) -> Tensor:
    """`(b, N, T, H)` rotated by `(T, 2 H)`, every image alike."""
    return rotate(x.permute(2, 0, 1, 3).flatten(1, 2), phases, pairing).unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)


def plain(
    model: ExitSegmenter, images: Sequence[Tensor], precision: Precision, compiled: bool
) -> Callable[[], list[Tensor]]:
    """A call that segments `images` densely, those of one size together: returns logits `(cells, K)` per size.

    In bf16 and fp16 all weights and activations are, which is faster than autocast.
    """
    dtype = LOWERED.get(precision, torch.float32)
    own = copy.deepcopy(model).to(dtype)
    backbone: Callable[[Tensor], Tensor] = PlainViT(own)
    if compiled:
        backbone = torch.compile(backbone)
    shapes = list(dict.fromkeys(image.shape for image in images))
    batches = [torch.stack([i for i in images if i.shape == shape]).to(dtype) for shape in shapes]
    prefix = model.config.backbone.num_prefix_tokens

    def one(batch: Tensor) -> Tensor:
        x = backbone(batch)[:, prefix:]
        grid = own.backbone.patch_embed.grid(batch.shape[2], batch.shape[3])
        tokens = Tokens(
            x=x.reshape(-1, x.shape[2]),
            position=torch.arange(x.shape[0] * x.shape[1], device=x.device),
            packing=Packing.of([x.shape[1]] * len(batch), x.device),
            grids=(grid,) * len(batch),
            num_prefix=0,
        )
        logits: Tensor = own.decode_head(tokens).logits
        return logits

    return lambda: [one(batch) for batch in batches]


def agrees(model: ExitSegmenter, images: Sequence[Tensor]) -> float:
    """Largest difference between the plain model and the engine's dense pass, in fp32: they must be one model."""
    with torch.no_grad():
        (logits,) = plain(model, images[:1], "fp32", compiled=False)()
        ours = model([images[0]], Dense()).grid_logits[0].flatten(1).T
    return float((logits - ours).abs().max())
