"""Sidecar files say what weights do not: `config.json`, `preprocessor_config.json`, `variant.yml`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tokenexit.errors import CheckpointError
from tokenexit.runtime.schema import Between, damaged, misfit, parse_json, parse_yaml, read_bytes

HF_CONFIG, HF_PREPROCESSOR, SEGMENTER_VARIANT = "config.json", "preprocessor_config.json", "variant.yml"
FILES = (HF_CONFIG, HF_PREPROCESSOR, SEGMENTER_VARIANT)

REPAIR = "repair it, or move the weights elsewhere"

_Side = Annotated[int, Between(1, 65535)]
_Size = _Side | tuple[_Side, _Side]
_Colour = tuple[float, float, float]


class _HFRope(TypedDict, total=False):
    rope_theta: Annotated[float, Between(1, 1e6)]


class _HFConfig(TypedDict, total=False):
    hidden_act: str
    use_swiglu_ffn: bool
    use_gated_mlp: bool
    rope_theta: Annotated[float, Between(1, 1e6)]
    rope_parameters: _HFRope
    num_attention_heads: Annotated[int, Between(1, 512)]
    layer_norm_eps: Annotated[float, Between(0, 1)]
    image_size: _Size
    patch_size: _Size


class _HFSize(TypedDict, total=False):
    shortest_edge: _Side


class _HFProcessor(TypedDict, total=False):
    image_mean: _Colour
    image_std: _Colour


class _EomtProcessor(TypedDict, total=False):
    do_split_image: bool
    size: _HFSize


class _TimmPretrained(TypedDict, total=False):
    mean: _Colour
    std: _Colour


class _TimmConfig(TypedDict, total=False):
    pretrained_cfg: _TimmPretrained


class _SegmenterNet(TypedDict, total=False):
    n_heads: Annotated[int, Between(1, 512)]
    normalization: str


class _SegmenterVariant(TypedDict, total=False):
    net_kwargs: _SegmenterNet


Find = Callable[[str], Path | None]
"""A function that finds the file of this name beside the weights, if there is one."""


@dataclass(frozen=True)
class Sidecar:
    """The contents of the files that were found.

    Attributes:
        settings: fields of `ViTConfig`.
        normalisation: mean and std per channel.
        files: names of the files that were read.
        window: side in pixels of square windows, evenly spread over an image of that shortest side.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    files: tuple[str, ...] = ()
    window: int | None = None


def read_sidecar(kind: str, find: Find) -> Sidecar:
    """Read the files that belong to weights of this kind. Raises `CheckpointError` for a damaged file."""
    readers = {
        "dinov3_huggingface": _dinov3_huggingface,
        "eomt_huggingface": _eomt,
        **dict.fromkeys(("dinov3_timm", "eva02_timm", "pe_core", "pe_spatial", "siglip"), _timm),
        "huggingface": _huggingface,
        "timm": _timm,
        "segmenter": _segmenter,
    }
    return readers[kind](find) if kind in readers else Sidecar()


def _huggingface(find: Find) -> Sidecar:
    config, normalisation = _read(find(HF_CONFIG), _HFConfig), _normalisation(find)
    settings: dict[str, Any] = {}
    files = [HF_CONFIG] if config is not None else []
    if config is not None:
        act = config.get("hidden_act", "gelu")
        if act != "gelu" and not config.get("use_swiglu_ffn"):
            raise CheckpointError(f"{HF_CONFIG} names hidden_act '{act}', tokenexit has gelu: choose another model.")
        if "num_attention_heads" in config:
            settings["num_heads"] = config["num_attention_heads"]
        if "layer_norm_eps" in config:
            settings["norm_eps"] = float(config["layer_norm_eps"])
        if "image_size" in config and "patch_size" in config:
            image, patch = _pair(config["image_size"]), _pair(config["patch_size"])
            settings["pos_embed_grid"] = (image[0] // patch[0], image[1] // patch[1])
    if normalisation is not None:
        files.append(HF_PREPROCESSOR)
    return Sidecar(settings, normalisation, tuple(files))


def _dinov3_huggingface(find: Find) -> Sidecar:
    """As for the others; its activation goes with its MLP, its size fixes no table, and its periods are configured."""
    config = _read(find(HF_CONFIG), _HFConfig) or {}
    act, gated = config.get("hidden_act"), config.get("use_gated_mlp", False)
    if act is not None and act != ("silu" if gated else "gelu"):
        with_what = "with gates" if gated else "without gates"
        raise CheckpointError(
            f"{HF_CONFIG} names hidden_act '{act}' {with_what}, tokenexit has gelu, or silu of a gate: choose another "
            "model."
        )
    beside = _normalisation(find)
    names = {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
    settings: dict[str, Any] = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    theta = config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta"))
    if theta is not None:
        settings["rope_theta"] = float(theta)
    files = ([HF_CONFIG] if config else []) + ([HF_PREPROCESSOR] if beside is not None else [])
    return Sidecar(settings, beside, tuple(files))


def _eomt(find: Find) -> Sidecar:
    """As DINOv3's, DINOv2's table has the grid of the training size, and semantic models split images into windows."""
    processor = _read(find(HF_PREPROCESSOR), _EomtProcessor) or {}
    window = processor.get("size", {}).get("shortest_edge") if processor.get("do_split_image") else None
    with_rope, config = replace(_dinov3_huggingface(find), window=window), _read(find(HF_CONFIG), _HFConfig) or {}
    if "image_size" not in config or "patch_size" not in config or "rope_theta" in with_rope.settings:
        return with_rope
    image, patch = _pair(config["image_size"]), _pair(config["patch_size"])
    grid = (image[0] // patch[0], image[1] // patch[1])
    return replace(with_rope, settings={**with_rope.settings, "pos_embed_grid": grid})


def _normalisation(find: Find) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    processor = _read(find(HF_PREPROCESSOR), _HFProcessor)
    if processor is None or not {"image_mean", "image_std"} <= processor.keys():
        return None
    return tuple(processor["image_mean"]), tuple(processor["image_std"])


def _timm(find: Find) -> Sidecar:
    pretrained = (_read(find(HF_CONFIG), _TimmConfig) or {}).get("pretrained_cfg", {})
    if "mean" not in pretrained or "std" not in pretrained:
        return Sidecar()
    return Sidecar({}, (tuple(pretrained["mean"]), tuple(pretrained["std"])), (HF_CONFIG,))


def _segmenter(find: Find) -> Sidecar:
    net = (_read(find(SEGMENTER_VARIANT), _SegmenterVariant) or {}).get("net_kwargs")
    if net is None:
        return Sidecar()
    settings = {"num_heads": net["n_heads"]} if "n_heads" in net else {}
    known = {"vit": ((0.5,) * 3, (0.5,) * 3), "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
    return Sidecar(settings, known.get(net.get("normalization", "")), (SEGMENTER_VARIANT,))


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def _read(path: Path | None, kind: Any) -> Any:
    """Read a file whose contents fit the annotation `kind`. Raises `CheckpointError` if they do not."""
    if path is None:
        return None
    what = f"{path} beside the weights"
    try:
        content = read_bytes(path)
        values = parse_json(content) if path.suffix == ".json" else parse_yaml(content, _loader())
    except OSError as error:
        raise damaged(what, error.strerror or "it cannot be read", REPAIR) from None
    except ValueError as error:
        raise damaged(what, error, REPAIR) from None
    if wrong := misfit("", values, kind):
        raise CheckpointError(f"{what} holds an impossible value ({wrong}): {REPAIR}.")
    return values


def _loader() -> Any:
    """Return a loader of plain YAML that also reads the tuples which Segmenter writes."""
    import yaml

    class Loader(yaml.SafeLoader):
        def tuple_(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
            return tuple(self.construct_sequence(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.tuple_)
    return Loader
