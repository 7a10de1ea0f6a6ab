"""Our weights under the names that other code bases document for the same parts, written out one by one.

That the parts also compute the same is shown in `test_foreign_parts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WB = ("weight", "bias")


def part(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key[len(prefix) :]: value.clone() for key, value in state.items() if key.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}


def moved(state: State, old: str, new: str, leaves: tuple[str, ...] = WB) -> State:
    """The leaves of one layer under another name."""
    return {f"{new}.{leaf}": state[f"{old}.{leaf}"] for leaf in leaves if f"{old}.{leaf}" in state}


def count(state: State, name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


# Layers


def mmseg_layers(state: State, fused_qkv: bool = False) -> State:
    """TransformerEncoderLayer of mmsegmentation; DoViT's has timm's attention."""
    out: State = {}
    for i in range(count(state, "blocks")):
        old, new = f"blocks.{i}", f"layers.{i}"
        for n in (1, 2):
            out |= moved(state, f"{old}.norm{n}", f"{new}.ln{n}")
        if fused_qkv:
            out |= moved(state, f"{old}.attn.qkv", f"{new}.attn.qkv") | moved(
                state, f"{old}.attn.proj", f"{new}.attn.proj"
            )
        else:
            for leaf in WB:
                out[f"{new}.attn.attn.in_proj_{leaf}"] = state[f"{old}.attn.qkv.{leaf}"]
            out |= moved(state, f"{old}.attn.proj", f"{new}.attn.attn.out_proj")
        out |= moved(state, f"{old}.mlp.fc1", f"{new}.ffn.layers.0.0")
        out |= moved(state, f"{old}.mlp.fc2", f"{new}.ffn.layers.1")
    return out


def mmseg_backbone(state: State, fused_qkv: bool = False) -> State:
    out = {"cls_token": state["cls_token"], "pos_embed": state["pos_embed"]}
    out |= moved(state, "patch_embed.proj", "patch_embed.projection") | moved(state, "norm", "ln1")
    return under("backbone.", out | mmseg_layers(state, fused_qkv))


# Heads


def conv_seg(head: State) -> State:
    weight = head["classifier.weight"]
    return {"conv_seg.weight": weight.reshape(*weight.shape[:2], 1, 1), "conv_seg.bias": head["classifier.bias"]}


def dinov2_linear(head: State) -> State:
    """BNHead of DINOv2's linear evaluation."""
    return conv_seg(head) | moved(head, "norm", "bn", BN)


def dinov3_linear(head: State) -> State:
    """LinearHead of DINOv3's linear evaluation."""
    out = {"conv.weight": head["classifier.weight"][..., None, None], "conv.bias": head["classifier.bias"]}
    return out | moved(head, "norm", "batchnorm_layer", BN)


def fcn(head: State) -> State:
    """FCNHead with one 1x1 convolution and no concatenation."""
    convolution = {"convs.0.conv.weight": head["proj.weight"][..., None, None]}
    return conv_seg(head) | convolution | moved(head, "norm", "convs.0.bn", BN)


def setr(head: State) -> State:
    """SETRUPHead with one 1x1 step (naive), or several."""
    out = conv_seg(head) | moved(head, "input_norm", "norm")
    if "proj.weight" in head:
        out["up_convs.0.0.conv.weight"] = head["proj.weight"][..., None, None]
        return out | moved(head, "norm", "up_convs.0.0.bn", BN)
    for i in range(count(head, "convs")):
        out[f"up_convs.{i}.0.conv.weight"] = head[f"convs.{i}.weight"]
        out |= moved(head, f"norms.{i}", f"up_convs.{i}.0.bn", BN)
    return out


def mask_transformer(head: State, fused_qkv: bool = False) -> State:
    """SegmenterMaskTransformerHead, with the classifier that every head of the framework gets."""
    classes, d = head["queries.weight"].shape
    return (
        {"cls_emb": head["queries.weight"][None]}
        | {"conv_seg.weight": torch.randn(classes, d, 1, 1), "conv_seg.bias": torch.randn(classes)}
        | moved(head, "proj", "dec_proj")
        | moved(head, "patch_proj", "patch_proj")
        | moved(head, "class_proj", "classes_proj")
        | moved(head, "norm", "decoder_norm")
        | moved(head, "mask_norm", "mask_norm")
        | mmseg_layers(head, fused_qkv)
    )


def atm(head: State) -> State:
    """PruneHead of DToP: a single-level attention-to-mask decoder."""
    out = {"q.weight": head["queries.weight"]}
    for old, new in (("input_proj", "input_proj"), ("input_norm", "proj_norm"), ("presence", "class_embed")):
        out |= moved(head, old, new)
    for i in range(count(head, "layers")):
        old, new = f"layers.{i}", f"decoder.layers.{i}"
        for leaf in WB:
            out[f"{new}.self_attn.in_proj_{leaf}"] = head[f"{old}.self_qkv.{leaf}"]
        out |= moved(head, f"{old}.self_proj", f"{new}.self_attn.out_proj")
        for name in ("q", "k", "v", "proj"):
            out |= moved(head, f"{old}.{name}", f"{new}.multihead_attn.{name}")
        for n in (1, 2):
            out |= moved(head, f"{old}.fc{n}", f"{new}.linear{n}")
        for n in (1, 2, 3):
            out |= moved(head, f"{old}.norm{n}", f"{new}.norm{n}")
    return out


HEADS: dict[str, Callable[[State], State]] = {
    "linear": conv_seg,
    "dinov2_linear": dinov2_linear,
    "fcn": fcn,
    "setr_naive": setr,
    "setr_pup": setr,
    "mask_transformer": mask_transformer,
    "atm": atm,
}


def segmenter(state: State) -> State:
    """Segmenter's own release: mask transformer or linear decoder."""
    encoder, head = part(state, "backbone."), part(state, "decode_head.")
    encoder |= {"head.weight": torch.randn(5, 8), "head.bias": torch.randn(5)}
    if "classifier.weight" in head:
        return under("encoder.", encoder) | under("decoder.", moved(head, "classifier", "head"))
    decoder = {
        "cls_emb": head["queries.weight"][None],
        "proj_patch": head["patch_proj.weight"].T.contiguous(),  # applied as x @ proj_patch
        "proj_classes": head["class_proj.weight"].T.contiguous(),
    }
    decoder |= moved(head, "proj", "proj_dec") | moved(head, "norm", "decoder_norm")
    decoder |= moved(head, "mask_norm", "mask_norm") | under("blocks.", part(head, "blocks."))
    return under("encoder.", encoder) | under("decoder.", decoder)


def huggingface(state: State, front: str = "", split_mlp: bool = False) -> State:
    """A backbone in the names of transformers' files: ViT, or with LayerScale DINOv2.

    split_mlp: the halves of a gated MLP apart, as newer modules have them.
    """
    dinov2 = "blocks.0.ls1.gamma" in state
    out = {"embeddings.cls_token": state["cls_token"], "embeddings.position_embeddings": state["pos_embed"]}
    out |= moved(state, "patch_embed.proj", "embeddings.patch_embeddings.projection") | moved(
        state, "norm", "layernorm"
    )
    if "reg_token" in state:
        out["embeddings.register_tokens"] = state["reg_token"]
    for i in range(count(state, "blocks")):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        for n, vit in ((1, "layernorm_before"), (2, "layernorm_after")):
            out |= moved(state, f"{old}.norm{n}", f"{new}.norm{n}" if dinov2 else f"{new}.{vit}")
        for leaf in WB:
            for name, value in zip(("query", "key", "value"), state[f"{old}.attn.qkv.{leaf}"].chunk(3)):
                out[f"{new}.attention.attention.{name}.{leaf}"] = value
        out |= moved(state, f"{old}.attn.proj", f"{new}.attention.output.dense")
        fc1, fc2 = f"{old}.mlp.fc1", f"{old}.mlp.fc2"
        if state[f"{fc1}.weight"].shape[0] == 2 * state[f"{fc2}.weight"].shape[1]:
            if split_mlp:
                for leaf in WB:
                    gate, up = state[f"{fc1}.{leaf}"].chunk(2)
                    out |= {f"{new}.mlp.gate_proj.{leaf}": gate, f"{new}.mlp.up_proj.{leaf}": up}
                out |= moved(state, fc2, f"{new}.mlp.down_proj")
            else:
                out |= moved(state, fc1, f"{new}.mlp.weights_in") | moved(state, fc2, f"{new}.mlp.weights_out")
        elif dinov2:
            out |= moved(state, fc1, f"{new}.mlp.fc1") | moved(state, fc2, f"{new}.mlp.fc2")
        else:
            out |= moved(state, fc1, f"{new}.intermediate.dense") | moved(state, fc2, f"{new}.output.dense")
        for n in (1, 2):
            if dinov2:
                out[f"{new}.layer_scale{n}.lambda1"] = state[f"{old}.ls{n}.gamma"]
    return under(front, out)


# Whole models


def mmseg(state: State, kinds: Mapping[str, str], auxiliary: str = "auxiliary_head.", fused_qkv: bool = False) -> State:
    """kinds: the kind of each head by its name, `decode_head` and `exit_heads.N`."""
    out = mmseg_backbone(part(state, "backbone."), fused_qkv)
    for name, kind in kinds.items():
        head = part(state, f"{name}.")
        named = mask_transformer(head, fused_qkv) if kind == "mask_transformer" else HEADS[kind](head)
        out |= under(f"{name.replace('exit_heads.', auxiliary)}.", named)
    return out
