"""Renamed parts compute what the modules they come from compute: torch's own, put together as each source documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import assert_close, enliven
from tokenexit.conversion.families.mmseg import from_mmseg
from tokenexit.conversion.families.mmseg_heads import rename_head
from tokenexit.conversion.families.segmenter import from_segmenter
from tokenexit.conversion.rename import prefixed, rename, under
from tokenexit.engine.block import Block
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.heads import build_head

DIM, CLASSES = 32, 5
CPU = torch.device("cpu")


class Layer(nn.Module):
    """A layer of mmsegmentation's ViT: torch's attention, inside a wrapper of the same name."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({"attn": nn.MultiheadAttention(dim, heads, batch_first=True)})
        fc1, fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ffn = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([fc1]), fc2])})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.attn["attn"](y, y, y, need_weights=False)[0]
        layers: Any = self.ffn["layers"]
        (fc1,), fc2 = layers
        return x + fc2(F.gelu(fc1(self.ln2(x))))


def patches(count: int, dim: int = DIM, grid: tuple[int, int] | None = None) -> Tokens:
    return Tokens(torch.randn(count, dim), torch.arange(count), Packing.of([count], CPU), (grid or (1, count),), 0)


@torch.no_grad()
def test_a_layer_of_mmsegmentation_is_a_block():
    layer = Layer(DIM, 4, 48, 1e-6).eval()
    enliven(layer)
    block = Block(DIM, 4, 48)
    block.load_state_dict(under(from_mmseg(prefixed(layer.state_dict(), "backbone.layers.0.")), "backbone.blocks.0."))
    x = torch.randn(7, DIM)
    assert_close(block(x, Packing.of([7], CPU)), layer(x[None])[0])


@torch.no_grad()
def test_a_setr_head_is_norm_convolution_and_upsampling_before_the_classifier():
    norm, conv, bn = nn.LayerNorm(DIM, 1e-6), nn.Conv2d(DIM, 12, 1, bias=False), nn.BatchNorm2d(12)
    conv_seg = nn.Conv2d(12, CLASSES, 1)
    parts = {"norm": norm, "up_convs.0.0.conv": conv, "up_convs.0.0.bn": bn, "conv_seg": conv_seg}
    for part in parts.values():
        enliven(part.eval())
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    head = build_head({"kind": "setr_naive", "channels": 12}, DIM, CLASSES).eval()
    head.load_state_dict(rename_head(state))
    tokens = patches(6, grid=(2, 3))
    maps = F.relu(bn(conv(norm(tokens.x).T.reshape(1, DIM, 2, 3))))
    expected = conv_seg(F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False))
    ours = head(tokens).logits.T.reshape(1, CLASSES, 2, 3)
    assert_close(F.interpolate(ours, scale_factor=4, mode="bilinear", align_corners=False), expected)


@torch.no_grad()
def test_an_atm_head_is_torchs_decoder_with_its_last_scores_as_masks():
    d, heads = 16, 2
    proj, norm, q, presence = nn.Linear(DIM, d), nn.LayerNorm(d), nn.Embedding(CLASSES, d), nn.Linear(d, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, heads, 4 * d, batch_first=True), 2).eval()
    parts = {"input_proj": proj, "proj_norm": norm, "q": q, "class_embed": presence, "decoder": decoder}
    for part in parts.values():
        enliven(part)
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    for i in range(2):  # cross-attention has query, key and value apart there
        name = f"decoder.layers.{i}.multihead_attn"
        for leaf in ("weight", "bias"):
            for part, value in zip("qkv", state.pop(f"{name}.in_proj_{leaf}").chunk(3)):
                state[f"{name}.{part}.{leaf}"] = value
        state = rename(state, ((rf"({name})\.out_proj\.(.+)", r"\1.proj.\2"),))
    head = build_head({"kind": "atm", "channels": d, "layers": 2, "num_heads": heads}, DIM, CLASSES).eval()
    head.load_state_dict(rename_head(state))

    tokens = patches(9)
    memory = norm(proj(tokens.x))[None]
    out = head(tokens)
    assert_close(out.presence, presence(decoder(q.weight[None], memory)))

    last = decoder.layers[1]
    x = decoder.layers[0](q.weight[None], memory)
    x = last.norm1(x + last.self_attn(x, x, x)[0])
    query, key, _ = last.multihead_attn.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = last.multihead_attn.in_proj_bias.chunk(3)
    queries = F.linear(x, query, query_bias)[0].unflatten(1, (heads, -1))
    keys = F.linear(memory, key, key_bias)[0].unflatten(1, (heads, -1))
    scores = torch.einsum("knh,pnh->npk", queries, keys) * (d // heads) ** -0.5
    assert_close(out.logits, scores.mean(0))


@torch.no_grad()
def test_segmenters_projections_are_applied_from_the_right():
    state = {"decoder.proj_patch": torch.randn(8, 8), "decoder.proj_classes": torch.randn(8, 8)}
    renamed, x = from_segmenter(state), torch.randn(3, 8)
    assert_close(F.linear(x, renamed["decode_head.patch_proj.weight"]), x @ state["decoder.proj_patch"])
    assert_close(F.linear(x, renamed["decode_head.class_proj.weight"]), x @ state["decoder.proj_classes"])
