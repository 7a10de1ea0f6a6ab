"""Backbones of other libraries are read as modules: their weights by name, their settings from their own attributes.

Neither library is imported. A module is known by the names of its weights, and a `Reader` says where its library keeps
what names and shapes do not tell. What a plain ViT lacks is refused here, in one sentence; what cannot be seen from
outside is found when features are compared (`tokenexit.conversion.wrap`).

Legend: B images, N tokens with prefix, C channels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.conversion.families import SOURCES, Normalisation, detect, not_plain
from tokenexit.conversion.infer import backbone_config
from tokenexit.conversion.rename import State, register_positions, under
from tokenexit.engine.tokens import Grid
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import CheckpointError, ConfigError

PLAIN = "wrap takes plain ViTs of timm, transformers and DINOv2"
TANH = "GELU (tanh)"
"""Name of the approximation of GELU that SigLIP 2 has."""
_INNER = ("_orig_mod", "module")
"""Where torch.compile and data parallel training keep the module that they wrap."""


@dataclass(frozen=True)
class Reader:
    """A reader of modules of one library.

    Attributes:
        settings: fields of `ViTConfig` that names and shapes do not tell; raises AttributeError for another structure.
        blocks: the blocks, in order.
        norms: the two norms of a block.
        activation: name of a block's activation, as `_activation` has it.
        norm: the norm after the last block.
        projection: the convolution that embeds patches.
        features: images to all tokens `(B, N, C)` after that norm.
        takes_any_size: whether it takes images of other sizes than those of its grid.
        normalisation: mean and std it was trained with, None where it does not say.
        rotary: whether positions are rotary; `settings` then says which.
        activations: the activations that it may have; `settings` says which if several are ungated.
    """

    settings: Callable[[Any], dict[str, Any]]
    blocks: Callable[[Any], Sequence[Any]]
    norms: Callable[[Any], tuple[Any, Any]]
    activation: Callable[[Any, Any], str]
    norm: Callable[[Any], nn.Module]
    projection: Callable[[Any], nn.Module]
    features: Callable[[Any, Tensor], Tensor]
    takes_any_size: Callable[[Any], bool]
    normalisation: Callable[[Any], Normalisation | None]
    rotary: bool = False
    activations: tuple[str, ...] = ("GELU", "SiLU of a gate")


@dataclass(frozen=True)
class Backbone:
    """A module that was read.

    Attributes:
        module: the encoder itself, without what stands around it.
        reader: how it is read.
        config: what rebuilds it here.
        state: its weights under our names. What needs no new shape is the module's own parameter, or a view of it.
        normalisation: mean and std it was trained with, or those of its library.
        grid: rows and columns of patches that it was built for.
    """

    module: nn.Module
    reader: Reader
    config: ViTConfig
    state: State
    normalisation: Normalisation
    grid: Grid

    @property
    def name(self) -> str:
        """The name of the module's class, for messages."""
        return type(self.module).__name__


def read_backbone(module: nn.Module) -> Backbone:
    """Read a plain ViT. Raises `ConfigError` for any other module, with what it has or lacks."""
    body = _encoder(module)
    _refuse_whole_segmenter(body)
    name = type(module).__name__
    given = body.state_dict(keep_vars=True)
    if other := not_plain(given):
        raise ConfigError(f"{PLAIN}, and {name} is {other}.")
    kind = detect(given)
    if kind not in READERS:
        raise ConfigError(_unknown(module, name, kind))
    reader = READERS[kind]
    with torch.no_grad():
        state = SOURCES[kind].rename(given)
        try:
            settings = SOURCES[kind].settings(state) | reader.settings(body)
            _refuse_other_computations(reader, body, name)
        except (AttributeError, KeyError) as error:
            raise ConfigError(f"{PLAIN}, and {name} is not built as theirs are ({error}).") from None
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        normalisation = reader.normalisation(body) or SOURCES[kind].normalisation(state)
        state = under(state, "backbone.")
        grid = settings.get("pos_embed_grid")
        if "pos_embed" not in state:
            settings.pop("pos_embed_grid", None)
        elif "reg_token" in state and grid is not None:
            state = register_positions(state, grid[0] * grid[1])
        try:
            config, _ = backbone_config(state, settings, f"the weights of {name}")
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    return Backbone(body, reader, config, _fitting(state, config, name), normalisation, grid or config.pos_embed_grid)


def _encoder(module: nn.Module) -> nn.Module:
    """Return the encoder inside what torch and transformers put around one."""
    for name in _INNER:
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return _encoder(inner)
    inner = getattr(module, str(getattr(module, "base_model_prefix", "")), None)
    if hasattr(module, "embeddings"):  # in DINOv3 of transformers the part of that name is the stack of blocks
        return module
    return inner if isinstance(inner, nn.Module) else module


def _refuse_whole_segmenter(module: nn.Module) -> None:
    heads = [part for part in ("decode_head", "head") if isinstance(getattr(module, part, None), nn.Module)]
    if heads and isinstance(getattr(module, "backbone", None), nn.Module):
        name = type(module).__name__
        raise ConfigError(f"{name} is a whole segmenter: give its two parts, wrap(model.backbone, model.{heads[0]}).")


def _unknown(module: nn.Module, name: str, kind: str | None) -> str:
    if kind is not None:
        return f"{PLAIN}, and {name} has the names of {SOURCES[kind].title}: convert its saved weights."
    first = ", ".join(list(module.state_dict())[:2])
    return f"{PLAIN}, and {name} has names of none of these (its weights begin with {first or 'nothing'})."


def _refuse_other_computations(reader: Reader, body: nn.Module, name: str) -> None:
    """Refuse what weights do not show: other norms, activations, windows, rotary positions, overlapping patches."""

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{PLAIN}, and {name} has {what}.")

    projection: Any = reader.projection(body)
    if isinstance(projection, nn.Conv2d) and (
        tuple(projection.stride) != tuple(projection.kernel_size) or projection.padding not in ("valid", (0, 0))
    ):
        raise refuse("patches that overlap")
    for part in body.modules():
        window: Any = getattr(part, "window_size", None)
        if isinstance(window, int | list | tuple) and any(window if isinstance(window, list | tuple) else [window]):
            raise refuse("attention in windows, where a plain ViT has it over the whole grid")
        if getattr(part, "rope", None) is not None and not reader.rotary:
            raise refuse("rotary positions, where a plain ViT has a table")
    blocks = reader.blocks(body)
    if not blocks:
        raise refuse("no blocks")
    norms = [*chain.from_iterable(map(reader.norms, blocks)), reader.norm(body)]
    eps = {norm.eps for norm in norms if not isinstance(norm, nn.Identity)}
    if len(eps) != 1:
        raise refuse(f"norms of different epsilon ({', '.join(map(str, sorted(eps, key=str)))})")
    for found in {reader.activation(body, block) for block in blocks}:
        if found not in reader.activations:
            raise refuse(f"the activation {found}, where tokenexit's blocks have GELU, or SiLU of a gate")


_FOREIGN = (
    (r"blocks\.\d+\.attn\.[qk]_norm\..+", "normalised queries and keys"),
    (r"norm_pre\..+", "a norm before its first block"),
    (r"patch_embed\.norm\..+", "a norm after its patch embedding"),
    (r"blocks\.\d+\.(?:attn|mlp)\.norm\..+", "a norm inside its blocks' branches"),
)


def _fitting(state: Mapping[str, Tensor], config: ViTConfig, name: str) -> State:
    """Return the entries that our backbone has, all of them. Raises `ConfigError` for other parts and other shapes."""
    with torch.device("meta"):
        target = ViT(config).state_dict()
    foreign = [key for key in state if key not in target and re.match(r"(?:blocks\.\d+|patch_embed|norm_pre)\.", key)]
    if foreign:
        words = next((words for pattern, words in _FOREIGN if re.fullmatch(pattern, foreign[0])), "other parts")
        raise ConfigError(f"{PLAIN}, and {name} has {words} ({foreign[0]}), which tokenexit's backbone lacks.")
    missing = [key for key in target if key not in state]
    if missing:
        raise ConfigError(f"{PLAIN}, and {name} lacks {missing[0]}, which tokenexit's backbone has.")
    for key, value in target.items():
        if state[key].shape != value.shape:
            raise ConfigError(
                f"{PLAIN}, and {name} has {key} of shape {tuple(state[key].shape)}, where tokenexit's backbone has "
                f"{tuple(value.shape)}."
            )
    return {key: state[key] for key in target}


def _activation(layer: Any, gated: bool) -> str:
    """Return the name of an activation: its class without what libraries add to it."""
    name = type(layer).__name__.removesuffix("Activation")
    if name == "GELUTanh" or (name == "GELU" and getattr(layer, "approximate", "none") != "none"):
        return TANH
    return f"{name} of a gate" if gated else name


# --------------------------------------------------------------------------------------------------------------- timm


def _timm_settings(body: Any) -> dict[str, Any]:
    settings = {"num_heads": body.blocks[0].attn.num_heads, "norm_eps": float(body.blocks[0].norm1.eps)}
    grid = body.patch_embed.grid_size
    return settings if grid is None else settings | {"pos_embed_grid": (int(grid[0]), int(grid[1]))}


def _timm_activation(body: Any, block: Any) -> str:
    mlp = block.mlp
    return _activation(mlp.act, hasattr(mlp, "fc1_g") or mlp.fc1.weight.shape[0] == 2 * mlp.fc2.weight.shape[1])


def _timm_activated_settings(body: Any) -> dict[str, Any]:
    tanh = _timm_activation(body, body.blocks[0]) == TANH
    return _timm_settings(body) | {"mlp": "gelu_tanh" if tanh else "gelu"}


def _timm_rotary_settings(body: Any) -> dict[str, Any]:
    """Read rotary positions; centres of patches have no reference, and what else there may be is found by features."""
    rope = body.rope
    if rope.temperature is None:
        raise ConfigError(f"{PLAIN}, and {type(body).__name__} has rotary positions of no temperature.")
    settings = _timm_settings(body) | {
        "rope": "half" if rope.rotate_half else "interleaved",
        "rope_theta": float(rope.temperature),
        "rope_column_first": rope.grid_indexing == "xy",
    }
    if not hasattr(rope, "ref_feat_shape"):
        return settings
    if rope.ref_feat_shape is None or len(set(rope.ref_feat_shape)) != 1:
        raise ConfigError(f"{PLAIN}, and {type(body).__name__} has rotary positions without a square reference grid.")
    return settings | {"rope_reference": float(rope.ref_feat_shape[0]), "rope_offset": float(rope.grid_offset)}


def _timm_normalisation(body: Any) -> Normalisation | None:
    known = getattr(body, "pretrained_cfg", None) or getattr(body, "default_cfg", None)
    if not isinstance(known, Mapping) or not {"mean", "std"} <= known.keys():
        return None
    return tuple(known["mean"]), tuple(known["std"])


# ------------------------------------------------------------------------------------------------------- transformers


def _layers(body: Any) -> Sequence[Any]:
    return body.layers if hasattr(body, "layers") else body.encoder.layer  # type: ignore[no-any-return]


def _huggingface_settings(body: Any) -> dict[str, Any]:
    config = body.config
    image, patch = _pair(config.image_size), _pair(config.patch_size)
    return {
        "num_heads": config.num_attention_heads,
        "norm_eps": float(config.layer_norm_eps),
        "pos_embed_grid": (image[0] // patch[0], image[1] // patch[1]),
    }


def _huggingface_activation(body: Any, block: Any) -> str:
    if getattr(body.config, "use_swiglu_ffn", False):  # which then has SiLU, whatever hidden_act says
        return "SiLU of a gate"
    known = {"gelu": "GELU", "gelu_python": "GELU"}
    return known.get(str(body.config.hidden_act), str(body.config.hidden_act))


def _huggingface_norms(layer: Any) -> tuple[Any, Any]:
    return (layer.norm1, layer.norm2) if hasattr(layer, "norm1") else (layer.layernorm_before, layer.layernorm_after)


def _huggingface_features(body: Any, images: Tensor) -> Tensor:
    resizes = "interpolate_pos_encoding" in inspect.signature(type(body).forward).parameters
    out = body(images, **({"interpolate_pos_encoding": True} if resizes else {}))
    features = getattr(out, "last_hidden_state", None)
    if not isinstance(features, Tensor):
        raise ConfigError(
            f"{PLAIN}, and a call of {type(body).__name__} gives no last_hidden_state: give the model itself, such as "
            "Dinov2Model."
        )
    return features


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _huggingface_dinov3_settings(body: Any) -> dict[str, Any]:
    theta = getattr(body.config, "rope_theta", None)
    settings = {"rope_theta": float(body.config.rope_parameters["rope_theta"] if theta is None else theta)}
    return _huggingface_settings(body) | settings


def _huggingface_dinov3_activation(body: Any, block: Any) -> str:
    act, gated = str(body.config.hidden_act), bool(body.config.use_gated_mlp)
    known = {"gelu": "GELU", "gelu_python": "GELU", "silu": "SiLU"}
    return known.get(act, act) + (" of a gate" if gated else "")


# ------------------------------------------------------------------------------------------------------ DINOv2's own


def _dinov2_blocks(body: Any) -> Sequence[Any]:
    """Return the blocks, which training code keeps in chunks, behind placeholders."""
    chunks = [chunk if isinstance(chunk, nn.ModuleList) else [chunk] for chunk in body.blocks]
    return [block for block in chain.from_iterable(chunks) if not isinstance(block, nn.Identity)]


def _dinov2_settings(body: Any) -> dict[str, Any]:
    block = _dinov2_blocks(body)[0]
    return {
        "num_heads": block.attn.num_heads,
        "norm_eps": float(block.norm1.eps),
        "pos_embed_antialias": bool(body.interpolate_antialias),
        "pos_embed_offset": float(body.interpolate_offset or 0.0),
    }


def _dinov2_activation(body: Any, block: Any) -> str:
    return "SiLU of a gate" if hasattr(block.mlp, "w12") else _activation(block.mlp.act, gated=False)


def _dinov2_features(body: Any, images: Tensor) -> Tensor:
    out = body.forward_features(images)
    front = (out["x_norm_clstoken"][:, None], out["x_norm_regtokens"])
    return torch.cat([*front, out["x_norm_patchtokens"]], dim=1)


_TIMM = Reader(
    settings=_timm_settings,
    blocks=lambda body: list(body.blocks),
    norms=lambda block: (block.norm1, block.norm2),
    activation=_timm_activation,
    norm=lambda body: body.norm,
    projection=lambda body: body.patch_embed.proj,
    features=lambda body, images: body.forward_features(images),
    takes_any_size=lambda body: bool(getattr(body, "dynamic_img_size", False)),
    normalisation=_timm_normalisation,
)

_EVA = replace(_TIMM, settings=_timm_rotary_settings, rotary=True)

READERS: dict[str, Reader] = {
    "timm": _TIMM,
    **dict.fromkeys(("dinov3_timm", "eva02_timm", "pe_core", "pe_spatial"), _EVA),
    "siglip": replace(_TIMM, settings=_timm_activated_settings, activations=("GELU", TANH)),
    "dinov3_huggingface": Reader(
        settings=_huggingface_dinov3_settings,
        blocks=lambda body: body.model.layer,
        norms=lambda layer: (layer.norm1, layer.norm2),
        activation=_huggingface_dinov3_activation,
        norm=lambda body: body.norm,
        projection=lambda body: body.embeddings.patch_embeddings,
        features=_huggingface_features,
        takes_any_size=lambda body: True,
        normalisation=lambda body: None,
        rotary=True,
    ),
    "huggingface": Reader(
        settings=_huggingface_settings,
        blocks=_layers,
        norms=_huggingface_norms,
        activation=_huggingface_activation,
        norm=lambda body: body.layernorm,
        projection=lambda body: body.embeddings.patch_embeddings.projection,
        features=_huggingface_features,
        takes_any_size=lambda body: hasattr(body.embeddings, "interpolate_pos_encoding"),
        normalisation=lambda body: None,
    ),
    "dinov2": Reader(
        settings=_dinov2_settings,
        blocks=_dinov2_blocks,
        norms=lambda block: (block.norm1, block.norm2),
        activation=_dinov2_activation,
        norm=lambda body: body.norm,
        projection=lambda body: body.patch_embed.proj,
        features=_dinov2_features,
        takes_any_size=lambda body: True,
        normalisation=lambda body: None,
    ),
}
"""Readers by the name of their source, as in `SOURCES`."""
