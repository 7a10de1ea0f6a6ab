"""Heads on the features of one image, from state-dict tensors: attention head by attention head, nothing reordered.

Written from descriptions of the heads in the official releases of DToP and DoViT, and of Segmenter's decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.vit import State, block, layer_norm, linear, under


def run_head(state: State, spec: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features `(n, C)` of the tokens a head may see to logits `(n, K)` and, for ATM, presence logits `(K, 2)`."""
    kind = spec["kind"]
    if kind == "linear":
        return linear(state, "classifier", x), None
    if kind == "dinov2_linear":
        return linear(state, "classifier", _batch_norm(state, "norm", x)), None
    if kind == "fcn":
        return linear(state, "classifier", _hidden(state, x)), None
    if kind == "setr_naive":
        return linear(state, "classifier", _hidden(state, layer_norm(state, "input_norm", x, 1e-6))), None
    if kind == "mask_transformer":
        return mask_transformer(state, spec, x), None
    if kind == "atm":
        return atm(state, spec, x)
    raise NotImplementedError(kind)


def _batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """With running statistics, channels last."""
    x = (x - state[f"{name}.running_mean"]) / torch.sqrt(state[f"{name}.running_var"] + 1e-5)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def _hidden(state: State, x: Tensor) -> Tensor:
    return _batch_norm(state, "norm", linear(state, "proj", x)).clamp(min=0)


def setr_naive_fine(state: State, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """SETR-naive in its own order, features upsampled x4 and classified there: `(h w, C)` to `(K, 4h, 4w)`."""
    hidden = _hidden(state, layer_norm(state, "input_norm", x, 1e-6))
    maps = hidden.T.view(1, -1, *grid)
    maps = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    return linear(state, "classifier", maps[0].permute(1, 2, 0)).permute(2, 0, 1)


def setr_up_fine(state: State, spec: Mapping[str, Any], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """SETR with several steps in its own order: convolve, normalise, ReLU, upsample; classify last."""
    steps, kernel, up = spec.get("steps", 4), spec.get("kernel", 3), spec.get("up", 2)
    maps = layer_norm(state, "input_norm", x, 1e-6).T.view(1, -1, *grid)
    for i in range(steps):
        maps = F.conv2d(maps, state[f"convs.{i}.weight"], padding=kernel // 2)
        maps = _batch_norm(state, f"norms.{i}", maps.permute(0, 2, 3, 1)).clamp(min=0).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, scale_factor=up, mode="bilinear", align_corners=False)
    return linear(state, "classifier", maps[0].permute(1, 2, 0)).permute(2, 0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head attention and its scaled scores before the softmax, averaged over the heads."""
    width = q.shape[1] // num_heads
    outs, scores = [], []
    for n in range(num_heads):
        part = slice(n * width, (n + 1) * width)
        score = q[:, part] @ k[:, part].T / math.sqrt(width)
        scores.append(score)
        outs.append(torch.softmax(score, dim=1) @ v[:, part])
    return torch.cat(outs, dim=1), torch.stack(scores).mean(0)


def atm(state: State, spec: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits `(n, K)` and presence logits `(K, 2)`, "present" first, as in the official release of DToP."""
    memory = layer_norm(state, "input_norm", linear(state, "input_proj", x), 1e-5)
    query = state["queries.weight"]
    num_heads, score = spec["num_heads"], torch.empty(0)
    for i in range(spec.get("layers", 3)):
        layer = under(state, f"layers.{i}.")
        q, k, v = linear(layer, "self_qkv", query).chunk(3, dim=-1)
        query = query + linear(layer, "self_proj", _attend(q, k, v, num_heads)[0])
        query = layer_norm(layer, "norm1", query, 1e-5)
        q, k, v = linear(layer, "q", query), linear(layer, "k", memory), linear(layer, "v", memory)
        out, score = _attend(q, k, v, num_heads)
        query = layer_norm(layer, "norm2", query + linear(layer, "proj", out), 1e-5)
        hidden = linear(layer, "fc1", query).clamp(min=0)
        query = layer_norm(layer, "norm3", query + linear(layer, "fc2", hidden), 1e-5)
    return score.T, linear(state, "presence", query)


def mask_transformer(state: State, spec: Mapping[str, Any], x: Tensor) -> Tensor:
    """Segmenter's decoder: tokens and class embeddings through blocks, unit vectors, inner products, LayerNorm."""
    n = len(x)
    joined = torch.cat([linear(state, "proj", x), state["queries.weight"]])
    everyone = torch.ones(len(joined), dtype=torch.bool)
    for i in range(spec.get("layers", 2)):
        joined = block(under(state, f"blocks.{i}."), joined, everyone, spec["num_heads"], eps=1e-5)
    joined = layer_norm(state, "norm", joined, 1e-5)
    patches, classes = linear(state, "patch_proj", joined[:n]), linear(state, "class_proj", joined[n:])
    patches = patches / patches.norm(dim=1, keepdim=True)
    classes = classes / classes.norm(dim=1, keepdim=True)
    return layer_norm(state, "mask_norm", patches @ classes.T, 1e-5)
