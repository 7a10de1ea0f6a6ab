"""Heads by name, for exits and for the end of the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tokenexit.errors import ConfigError
from tokenexit.heads.atm import ATMHead
from tokenexit.heads.base import (
    Head,
    HeadOutput,
    MaskPrediction,
    ScoreKind,
    class_scores,
    presence_probability,
    query_classes,
)
from tokenexit.heads.cropr import CroprHead
from tokenexit.heads.eomt import EoMTHead, eomt_spec
from tokenexit.heads.mask_transformer import MaskTransformerHead
from tokenexit.heads.module import MODULE, HeadModule, ModuleHead, head_from, module_spec
from tokenexit.heads.pointwise import DINOv2LinearHead, FCNHead, LinearHead, SETRNaiveHead
from tokenexit.heads.setr import SETRUpHead
from tokenexit.heads.stage_adapter import StageAdapter
from tokenexit.runtime.schema import check

HEADS: dict[str, Callable[..., Head]] = {
    "linear": LinearHead,
    "fcn": FCNHead,
    "setr_naive": SETRNaiveHead,
    "setr_pup": SETRUpHead,
    "atm": ATMHead,
    "mask_transformer": MaskTransformerHead,
    "dinov2_linear": DINOv2LinearHead,
    "eomt": EoMTHead,
    "cropr": CroprHead,
}

HeadSpec = str | Mapping[str, Any]
"""A head's name, or a mapping with `kind` and the options of its class: `{"kind": "atm", "layers": 3}`."""


def normalize_head(spec: HeadSpec | ModuleHead) -> dict[str, Any]:
    """Return the plain form of a head specification, a mapping with `kind`. Raises `ConfigError` as `build_head`."""
    if isinstance(spec, ModuleHead):
        return spec.spec
    check("a head", spec, HeadSpec)
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = options.get("kind")
    if kind == MODULE:
        return module_spec(options)
    if not isinstance(kind, str) or kind not in HEADS:
        raise ConfigError(f"head '{kind}' is unknown: choose one of {', '.join(HEADS)}.")
    parameters = inspect.signature(HEADS[kind], eval_str=True).parameters
    known = set(parameters) - {"embed_dim", "num_classes"}
    for name, value in options.items():
        if name in known:
            check(f"{name} of head '{kind}'", value, parameters[name].annotation)
        elif name != "kind":
            raise ConfigError(f"head '{kind}' has no option '{name}': it takes {', '.join(sorted(known)) or 'none'}.")
    return options


def build_head(spec: HeadSpec | ModuleHead, embed_dim: int, num_classes: int) -> Head:
    """Build a head with fresh weights.

    Args:
        spec: a name of `HEADS`, or a mapping with `kind` and the options of its class; a `ModuleHead` is returned as it
            is.
        embed_dim: width C of the tokens.
        num_classes: number K of classes.

    Returns:
        A head from packed tokens `(P, C)` to logits `(P, K)`.

    Raises:
        ConfigError: for an unknown head or option, and for a value that it cannot have.
    """
    if isinstance(spec, ModuleHead):
        if (spec.embed_dim, spec.num_classes) != (embed_dim, num_classes):
            raise ConfigError(
                f"the decode head takes {spec.embed_dim} channels and has {spec.num_classes} classes, and the model "
                f"has {embed_dim} and {num_classes}: make them agree."
            )
        return spec
    options = normalize_head(spec)
    if options["kind"] == MODULE:
        return head_from(None, options, embed_dim, num_classes)
    return HEADS[options.pop("kind")](embed_dim, num_classes, **options)


__all__ = [
    "HEADS",
    "ATMHead",
    "CroprHead",
    "DINOv2LinearHead",
    "EoMTHead",
    "FCNHead",
    "Head",
    "HeadModule",
    "HeadOutput",
    "HeadSpec",
    "LinearHead",
    "MaskPrediction",
    "MaskTransformerHead",
    "ModuleHead",
    "SETRNaiveHead",
    "SETRUpHead",
    "ScoreKind",
    "StageAdapter",
    "build_head",
    "class_scores",
    "eomt_spec",
    "head_from",
    "normalize_head",
    "presence_probability",
    "query_classes",
]
