"""The configuration inside a checkpoint of mmsegmentation says some things that the weights do not.

Both generations of the framework keep it as Python text (`meta.config` in 0.x, `meta.cfg` in 1.x). It is parsed and
never run: literals and calls of `dict` are understood, everything else is passed over.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

DEFAULT_HEADS = {"PruneHead": 6}
"""Attention heads of a decoder whose configuration names none, by its class; DToP's, whose ViT-B says nothing."""


def attention_heads_in(meta: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of attention heads by part, `backbone`, `decode_head` and `exit_heads.N`, where it is given."""
    model = _model(meta.get("cfg", meta.get("config")))
    auxiliary = model.get("auxiliary_head")
    heads = auxiliary if isinstance(auxiliary, list) else [auxiliary]
    parts = {"backbone": model.get("backbone"), "decode_head": model.get("decode_head")}
    parts |= {f"exit_heads.{n}": head for n, head in enumerate(heads)}
    found = {name: _number(part) for name, part in parts.items() if isinstance(part, dict)}
    return {name: number for name, number in found.items() if number is not None}


def _number(part: Mapping[Any, Any]) -> int | None:
    number = part.get("num_heads", DEFAULT_HEADS.get(str(part.get("type"))))
    return number if isinstance(number, int) and number > 0 else None


def _model(text: Any) -> dict[Any, Any]:
    """Return the mapping that `text` assigns to `model`, empty if there is none."""
    if not isinstance(text, str):
        return {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and any(_names_model(target) for target in statement.targets):
                value = _plain(statement.value)
                return value if isinstance(value, dict) else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # no Python, or nested without end
        pass
    return {}


def _names_model(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "model"


def _plain(node: ast.expr) -> Any:
    """Return the value of a literal or of a call of `dict`; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        return dict(zip(keys, map(_plain, node.values)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords}
    return None
