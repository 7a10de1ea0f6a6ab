"""The plain ViT of one image on its full grid, from state-dict tensors: loops and explicit products in fp64.

Every token is always there. `alive` says which rows are computed and are keys; all other rows come out as they went in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def under(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"].flatten(1))
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def grid_of(image: Tensor, patch: int) -> tuple[int, int]:
    return math.ceil(image.shape[1] / patch), math.ceil(image.shape[2] / patch)


def embed(state: State, config, image: Tensor) -> Tensor:
    """`(3, H, W)` to `(prefix + h w, C)`: patch by patch, zeros where the last patches overhang."""
    size = config.patch_size
    h, w = grid_of(image, size)
    weight = state["patch_embed.proj.weight"].flatten(1)
    rows = []
    for i in range(h):
        for j in range(w):
            patch = torch.zeros(3, size, size, dtype=torch.float64)
            part = image[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            patch[:, : part.shape[1], : part.shape[2]] = part
            bias = 0.0 if config.norm_pre else state["patch_embed.proj.bias"]
            rows.append(weight @ patch.flatten() + bias)
    patches = torch.stack(rows)

    table = state["pos_embed"][0] if config.pos_embed else torch.zeros(h * w, config.embed_dim).double()
    own_row = config.class_token and config.pos_embed_prefix and config.pos_embed
    class_row, table = (table[0], table[1:]) if own_row else (torch.zeros(config.embed_dim).double(), table)
    if config.pos_embed and (h, w) != config.pos_embed_grid:
        # The table is resized in fp32, which is part of the model.
        maps = table.float().view(1, *config.pos_embed_grid, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (h, w), mode=config.pos_embed_mode, antialias=config.pos_embed_antialias)
        table = maps[0].flatten(1).T.double()
    prefix = []
    if config.class_token:
        prefix.append(state["cls_token"][0, 0] + class_row)
    prefix += [state["reg_token"][0, i] for i in range(config.num_registers)]
    x = torch.stack([*prefix, *(patches + table)])
    return layer_norm(state, "norm_pre", x, config.norm_eps) if config.norm_pre else x


def angles(config, grid: tuple[int, int]) -> Tensor:
    """Angle of every pair of channels of every row, `(prefix + h w, H / 2)`: none for prefix tokens."""
    quarter = config.embed_dim // config.num_heads // 4
    periods = [config.rope_theta ** (i / quarter) for i in range(quarter)]
    rows = [[0.0] * (2 * quarter) for _ in range(config.num_prefix_tokens)]
    for i in range(grid[0]):
        for j in range(grid[1]):
            if config.rope_reference is None:
                y, x = (2 * math.pi * (2 * (n + 0.5) / side - 1) for n, side in ((i, grid[0]), (j, grid[1])))
            else:
                y, x = (
                    (n + config.rope_offset) / side * config.rope_reference for n, side in ((i, grid[0]), (j, grid[1]))
                )
            axes = (x, y) if config.rope_column_first else (y, x)
            rows.append([at / period for at in axes for period in periods])
    return torch.tensor(rows, dtype=torch.float64)


def turned(head: Tensor, by: Tensor, pairing: str) -> Tensor:
    """Every pair of channels as a complex number, times that of the angle: `(rows, H)`."""
    width = head.shape[1]
    if pairing == "half":
        pairs = [(c, c + width // 2) for c in range(width // 2)]
    else:
        pairs = [(2 * c, 2 * c + 1) for c in range(width // 2)]
    out = torch.empty_like(head)
    for c, (real, imaginary) in enumerate(pairs):
        product = torch.complex(head[:, real], head[:, imaginary]) * torch.exp(1j * by[:, c])
        out[:, real], out[:, imaginary] = product.real, product.imag
    return out


def attention(
    state: State,
    x: Tensor,
    alive: Tensor,
    num_heads: int,
    rope: tuple[Tensor, str] | None = None,
    eps: float = 1e-6,
    counts: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every row over the living rows; rope: angles of the rows, and which channels are pairs.

    counts: as how many keys each row counts.
    """
    q, k, v = linear(state, "qkv", x).chunk(3, dim=-1)
    width = q.shape[1] // num_heads
    heads = []
    for n in range(num_heads):
        part = slice(n * width, (n + 1) * width)
        q_n, k_n = (t[:, part] if rope is None else turned(t[:, part], *rope) for t in (q, k))
        score = q_n @ k_n.T / math.sqrt(width)
        score = score.masked_fill(~alive[None, :], -math.inf)
        seen = torch.exp(score - score.amax(1, keepdim=True)) * (1.0 if counts is None else counts)
        heads.append(seen / seen.sum(1, keepdim=True) @ v[:, part])
    joined = torch.cat(heads, dim=1)
    if "norm.weight" in state:
        joined = layer_norm(state, "norm", joined, eps)
    return linear(state, "proj", joined)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def mlp(state: State, x: Tensor, kind: str, eps: float = 1e-6) -> Tensor:
    if kind != "swiglu":
        return linear(state, "fc2", (gelu_tanh if kind == "gelu_tanh" else gelu)(linear(state, "fc1", x)))
    gate, value = linear(state, "fc1", x).chunk(2, dim=-1)
    hidden = gate * torch.sigmoid(gate) * value
    if "norm.weight" in state:
        hidden = layer_norm(state, "norm", hidden, eps)
    return linear(state, "fc2", hidden)


def block(
    state: State,
    x: Tensor,
    alive: Tensor,
    num_heads: int,
    eps: float = 1e-6,
    kind: str = "gelu",
    rope: tuple[Tensor, str] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    if not alive.any():
        return x
    one = torch.ones(x.shape[1], dtype=torch.float64)
    y = x + state.get("ls1.gamma", one) * attention(
        under(state, "attn."), layer_norm(state, "norm1", x, eps), alive, num_heads, rope, eps, counts
    )
    y = y + state.get("ls2.gamma", one) * mlp(under(state, "mlp."), layer_norm(state, "norm2", y, eps), kind, eps)
    return torch.where(alive[:, None], y, x)


def run_block(
    state: State,
    config,
    index: int,
    x: Tensor,
    alive: Tensor,
    grid: tuple[int, int],
    counts: Tensor | None = None,
) -> Tensor:
    part = under(state, f"blocks.{index}.")
    if not config.k_bias and "attn.qkv.bias" in part:
        part["attn.qkv.bias"] = part["attn.qkv.bias"].clone()
        part["attn.qkv.bias"][config.embed_dim : 2 * config.embed_dim] = 0.0
    rope = None if config.rope is None else (angles(config, grid), config.rope)
    return block(part, x, alive, config.num_heads, config.norm_eps, config.mlp, rope, counts)


def final_norm(state: State, config, x: Tensor) -> Tensor:
    return layer_norm(state, "norm", x, config.norm_eps) if config.final_norm else x
