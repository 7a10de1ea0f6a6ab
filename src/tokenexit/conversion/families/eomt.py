"""EoMT holds its ViT and all that turns queries into masks in one file, as its release or transformers name them.

The last blocks and the final norm go to the decode head, where queries join them. How many blocks these are is said by
the length of `attn_mask_probs`, the shares of queries whose attention is still masked, or by the released depths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tokenexit.conversion.rename import State, fuse, rename
from tokenexit.errors import CheckpointError
from tokenexit.heads.eomt import PUBLISHED_JOINT

_BLOCK = r"backbone.blocks.\1."
_PARTS = (
    (r"blocks\.(\d+)\.attention\.([qkv])_proj\.(.+)", _BLOCK + r"attn.\2.\3"),
    (r"blocks\.(\d+)\.attention\.(?:out|o)_proj\.(.+)", _BLOCK + r"attn.proj.\2"),
    (r"blocks\.(\d+)\.layer_scale([12])\.lambda1", _BLOCK + r"ls\2.gamma"),
    (r"blocks\.(\d+)\.mlp\.weights_in\.(.+)", _BLOCK + r"mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.(?:weights_out|down_proj)\.(.+)", _BLOCK + r"mlp.fc2.\2"),
    (r"blocks\.(\d+)\.(.+)", _BLOCK + r"\2"),
)

_ENCODER = r"(?:network\.)?encoder\.backbone\."
RELEASE = (
    (_ENCODER + r"blocks\.(.+)", r"blocks.\1"),
    (_ENCODER + r"(?:patch_embed\.)?cls_token", "backbone.cls_token"),
    (_ENCODER + r"(?:reg_token|patch_embed\.register_tokens)", "backbone.reg_token"),
    (_ENCODER + r"patch_embed\.(?:proj|patch_embeddings)\.(.+)", r"backbone.patch_embed.proj.\1"),
    (_ENCODER + r"pos_embed", "backbone.pos_embed"),
    (_ENCODER + r"norm\.(.+)", r"decode_head.norm.\1"),
    (r"(?:network\.)?q\.weight", "decode_head.queries.weight"),
    (r"(?:network\.)?class_head\.(.+)", r"decode_head.classifier.\1"),
    (r"(?:network\.)?mask_head\.0\.(.+)", r"decode_head.mask.0.\1"),
    (r"(?:network\.)?mask_head\.2\.(.+)", r"decode_head.mask.1.\1"),
    (r"(?:network\.)?mask_head\.4\.(.+)", r"decode_head.mask.2.\1"),
    (r"(?:network\.)?upscale\.(\d+)\.conv1\.(.+)", r"decode_head.upscale_steps.\1.up.\2"),
    (r"(?:network\.)?upscale\.(\d+)\.conv2\.(.+)", r"decode_head.upscale_steps.\1.mix.\2"),
    (r"(?:network\.)?upscale\.(\d+)\.norm\.(.+)", r"decode_head.upscale_steps.\1.norm.\2"),
    (r"(?:network\.)?(attn_mask_probs)", r"\1"),
)

HUGGINGFACE = (
    (r"layers\.(.+)", r"blocks.\1"),
    (r"embeddings\.cls_token", "backbone.cls_token"),
    (r"embeddings\.register_tokens", "backbone.reg_token"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?(.+)", r"backbone.patch_embed.proj.\1"),
    (r"embeddings\.position_embeddings\.weight", "backbone.pos_embed"),
    (r"(?:layernorm|norm)\.(.+)", r"decode_head.norm.\1"),
    (r"query\.weight", "decode_head.queries.weight"),
    (r"class_predictor\.(.+)", r"decode_head.classifier.\1"),
    (r"mask_head\.fc1\.(.+)", r"decode_head.mask.0.\1"),
    (r"mask_head\.fc2\.(.+)", r"decode_head.mask.1.\1"),
    (r"mask_head\.fc3\.(.+)", r"decode_head.mask.2.\1"),
    (r"upscale_block\.block\.(\d+)\.conv1\.(.+)", r"decode_head.upscale_steps.\1.up.\2"),
    (r"upscale_block\.block\.(\d+)\.conv2\.(.+)", r"decode_head.upscale_steps.\1.mix.\2"),
    (r"upscale_block\.block\.(\d+)\.layernorm2d\.(.+)", r"decode_head.upscale_steps.\1.norm.\2"),
)

_DELTA = 0.5
"""Mean weight of the first norm below which blocks are differences: of released ViTs it is near 1."""


def from_eomt(state: Mapping[str, Tensor]) -> State:
    return _joined(rename(state, RELEASE))


def from_eomt_huggingface(state: Mapping[str, Tensor]) -> State:
    return _joined(rename(state, HUGGINGFACE))


def _joined(state: State) -> State:
    """Fuse the parts of blocks, and move the last of them to the decode head."""
    renamed = _biases_without_keys(rename(state, _PARTS))
    renamed = fuse(renamed, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    renamed = fuse(renamed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")
    renamed = rename(renamed, ((r"(backbone\.blocks\.\d+\.mlp\.)up_proj\.(.+)", r"\1fc1.\2"),))  # without gates
    if (table := renamed.get("backbone.pos_embed")) is not None and table.ndim == 2:
        renamed["backbone.pos_embed"] = table[None]
    blocks = [int(match[1]) for name in renamed if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))]
    depth, shares = max(blocks, default=-1) + 1, renamed.pop("attn_mask_probs", None)
    if shares is not None and bool((shares > 0).any()):
        raise CheckpointError(
            "attn_mask_probs of these weights are above 0: their attention still needs masks, as training did not run "
            "to its end; take weights of a finished training."
        )
    joint = PUBLISHED_JOINT.get(depth, 0) if shares is None else len(shares)
    if not 0 < joint < depth:
        raise CheckpointError(
            f"these weights have {depth} blocks and do not say how many of them queries join: attn_mask_probs must "
            "have one entry for each; take the whole checkpoint."
        )

    def place(name: str) -> str:
        match = re.fullmatch(r"backbone\.blocks\.(\d+)\.(.+)", name)
        if match is None or int(match[1]) < depth - joint:
            return name
        return f"decode_head.blocks.{int(match[1]) - depth + joint}.{match[2]}"

    return {place(name): value for name, value in renamed.items()}


def are_differences(state: State) -> bool:
    """Return whether blocks and embeddings are differences from a ViT's, as the release keeps those on DINOv3."""
    norm = state.get("backbone.blocks.0.norm1.weight")
    return norm is not None and bool(norm.float().mean() < _DELTA)


def added_to(base: State, differences: State, what: str) -> State:
    """Add differences to the weights that they were taken from, which have all blocks in their backbone.

    Queries, classes, masks and upscaling are no differences. A base without biases of queries, keys and values has
    zeros there, as timm leaves them out. Raises `CheckpointError` about `what`, the base, where parts do not pair up.
    """
    partners = _partners(differences)
    base = {name: value for name, value in base.items() if name.startswith("backbone.")}
    odd = [name for name in partners.values() if name not in base and not name.endswith(".attn.qkv.bias")]
    odd += [name for name in base if name not in partners.values()]
    both = {here: there for here, there in partners.items() if there in base}
    odd += [there for here, there in both.items() if base[there].shape != differences[here].shape]
    if odd:
        raise CheckpointError(
            f"{what} are not those that these differences of EoMT belong to, {odd[0]} has no partner of its shape: "
            "give the DINOv3 that it was trained from."
        )
    sums = {here: differences[here].float() + base[there].float() for here, there in both.items()}
    return {**differences, **sums}


def _partners(differences: State) -> dict[str, str]:
    """Return the names of what differs, each with its name in the whole ViT."""
    below = [int(match[1]) for name in differences if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))]
    names = {}
    for name in differences:
        if match := re.fullmatch(r"decode_head\.blocks\.(\d+)\.(.+)", name):
            names[name] = f"backbone.blocks.{max(below) + 1 + int(match[1])}.{match[2]}"
        elif name.startswith("decode_head.norm."):
            names[name] = name.replace("decode_head", "backbone")
        elif name.startswith("backbone."):
            names[name] = name
    return names


def _biases_without_keys(state: State) -> State:
    """Give keys a bias of zeros where queries and values have one (DINOv3)."""
    whole = dict(state)
    for name, bias in state.items():
        key = name.replace(".attn.q.bias", ".attn.k.bias")
        if name.endswith(".attn.q.bias") and key not in state:
            whole[key] = torch.zeros_like(bias)
    return whole
