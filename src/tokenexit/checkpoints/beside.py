"""Read files beside weights that say what these do not: `config.json`, `preprocessor_config.json`, `variant.yml`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenexit.errors import CheckpointError

HF_CONFIG, HF_PREPROCESSOR, SEGMENTER_VARIANT = "config.json", "preprocessor_config.json", "variant.yml"
FILES = (HF_CONFIG, HF_PREPROCESSOR, SEGMENTER_VARIANT)

Find = Callable[[str], Path | None]
"""The file of this name beside the weights, if there is one."""


@dataclass(frozen=True)
class Beside:
    """The files that were found say this.

    settings: fields of `ViTConfig`. normalisation: mean and std. files: names of those that were read."""

    settings: dict[str, Any] = field(default_factory=dict)
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    files: tuple[str, ...] = ()


def read_beside(kind: str, find: Find) -> Beside:
    """Read what belongs to weights of this kind. Raises `CheckpointError` for a damaged file."""
    readers = {"huggingface": _huggingface, "timm": _timm, "segmenter": _segmenter}
    if kind not in readers:
        return Beside()
    try:
        return readers[kind](find)
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{' or '.join(FILES)} beside the weights holds an impossible value ({error}): repair it."
        ) from None


def _huggingface(find: Find) -> Beside:
    config, files = _mapping(find(HF_CONFIG)), []
    settings: dict[str, Any] = {}
    if config is not None:
        files.append(HF_CONFIG)
        act = config.get("hidden_act", "gelu")
        if act != "gelu" and not config.get("use_swiglu_ffn"):
            raise CheckpointError(f"{HF_CONFIG} names hidden_act '{act}', tokenexit has gelu: choose another model.")
        if "num_attention_heads" in config:
            settings["num_heads"] = int(config["num_attention_heads"])
        if "layer_norm_eps" in config:
            settings["norm_eps"] = float(config["layer_norm_eps"])
        if "image_size" in config and "patch_size" in config:
            image, patch = _pair(config["image_size"]), _pair(config["patch_size"])
            settings["pos_embed_grid"] = (image[0] // patch[0], image[1] // patch[1])
    processor = _mapping(find(HF_PREPROCESSOR))
    normalisation = None
    if processor is not None and "image_mean" in processor and "image_std" in processor:
        files.append(HF_PREPROCESSOR)
        normalisation = (tuple(processor["image_mean"]), tuple(processor["image_std"]))
    return Beside(settings, normalisation, tuple(files))


def _timm(find: Find) -> Beside:
    config = _mapping(find(HF_CONFIG))
    pretrained = config.get("pretrained_cfg") if config is not None else None
    if not isinstance(pretrained, Mapping) or "mean" not in pretrained or "std" not in pretrained:
        return Beside()
    return Beside({}, (tuple(pretrained["mean"]), tuple(pretrained["std"])), (HF_CONFIG,))


def _segmenter(find: Find) -> Beside:
    path = find(SEGMENTER_VARIANT)
    variant = None if path is None else _mapping(path)
    net = variant.get("net_kwargs") if variant is not None else None
    if not isinstance(net, Mapping):
        return Beside()
    settings = {"num_heads": int(net["n_heads"])} if "n_heads" in net else {}
    known = {"vit": ((0.5,) * 3, (0.5,) * 3), "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
    return Beside(settings, known.get(str(net.get("normalization"))), (SEGMENTER_VARIANT,))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def _mapping(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text())
        else:
            import yaml

            values = yaml.load(path.read_text(), Loader=_loader())
    except Exception:  # OSError, and what the two parsers raise
        values = None
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} beside the weights is damaged: repair it, or move the weights elsewhere.")
    return values


def _loader() -> Any:
    """Return a loader of plain YAML that also reads the tuples which Segmenter writes."""
    import yaml

    class Loader(yaml.SafeLoader):
        def tuple_(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
            return tuple(self.construct_sequence(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.tuple_)
    return Loader
