"""A decode head of the user's own: any module from a feature map `(B, C, h, w)` to class logits `(B, K, H', W')`.

A saved model holds its weights and says by which import path its class was known. Nothing is imported from there: who
loads the model names the class.

Legend: B images, C channels, K classes, h x w patches of an image, H' x W' cells of its logits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Annotated, Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Grid, Packing, Tokens, pack_grids, unpack_grids
from tokenexit.errors import ConfigError
from tokenexit.heads.base import Head, HeadOutput
from tokenexit.runtime.schema import Between, check, check_keys, shown

MODULE = "module"
"""The kind of these heads in a configuration; it is no name of `HEADS`, as a name alone builds none."""
MOST_SCALE = 256

HeadModule = nn.Module | Callable[..., nn.Module]
"""A module, or a class or function that returns one."""

_Scale = Annotated[int, Between(1, MOST_SCALE)]


class _Spec(TypedDict):
    kind: str
    options: dict[str, Any]
    scale: _Scale


class ModuleHead(Head):
    """The head is a module of the user's own on the complete grid of the last features.

    Args:
        module: from `(B, C, h, w)` to `(B, K, scale h, scale w)`, whatever h and w; images of one grid are given
            together.
        embed_dim: width C of the features.
        num_classes: number K of classes.
        scale: number of logit cells per patch side.
        options: arguments by name that build the module from its class, as JSON holds them; saved with the model.

    Raises:
        ConfigError: for a module whose layers have no shapes yet or whose state is more than tensors, and for options
            that JSON cannot hold.
    """

    needs_grid = True

    def __init__(
        self,
        module: nn.Module,
        embed_dim: int,
        num_classes: int,
        scale: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_classes)
        check("scale of a decode head", scale, _Scale)
        if any(map(is_lazy, chain(module.parameters(), module.buffers()))):
            raise ConfigError(f"{named(module)} has layers without shapes: run it once, or give their input channels.")
        if other := next((name for name, value in module.state_dict().items() if not isinstance(value, Tensor)), None):
            raise ConfigError(f"{named(module)} keeps '{other}', which is no tensor and cannot be saved: leave it out.")
        self.module, self.embed_dim, self.scale, self.options = module, embed_dim, scale, _as_json(options or {})

    @property
    def spec(self) -> dict[str, Any]:
        """The head as `config.json` holds it: `kind`, the import path of its class, its options and scale."""
        return {
            "kind": MODULE,
            "import": import_path(self.module),
            "options": dict(self.options),
            "scale": self.scale,
        }

    def forward(self, tokens: Tokens) -> HeadOutput:
        batches = unpack_grids(tokens.x, tokens.grids)
        logits = pack_grids([(members, self._map(batch.contiguous())) for members, batch in batches])
        return HeadOutput(logits, Packing.of([h * w * self.scale**2 for h, w in tokens.grids], logits.device))

    def _map(self, features: Tensor) -> Tensor:
        logits: Tensor = self.module(features)
        if not torch.compiler.is_exporting():  # there sizes are open, and the graph is compared with the model
            images, _, h, w = features.shape
            expected = (images, self.num_classes, h * self.scale, w * self.scale)
            if logits.shape != expected:
                raise ConfigError(
                    f"{named(self.module)} gives {_size(logits)} for features {tuple(features.shape)}, where "
                    f"{self.scale} cells per patch side make {expected}: its scale must be the same for every grid."
                )
        return logits

    def ops(self, tokens: int, grid: Grid) -> Ops:
        return Ops(macs=_macs(self, grid))


def module_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain form of a `ModuleHead`'s specification. Raises `ConfigError` for a value that it cannot have."""
    check_keys("a head of kind 'module'", spec, known=(*_Spec.__annotations__, "import"), needed=("import", "scale"))
    options = {"options": {}, **spec}
    check("import of head 'module'", options["import"], str)
    for name, kind in (("options", dict[str, Any]), ("scale", _Scale)):
        check(f"{name} of head 'module'", options[name], kind)
    return options


def head_from(given: HeadModule | None, spec: Mapping[str, Any], embed_dim: int, num_classes: int) -> ModuleHead:
    """Return the head that `spec`, a module head's, describes, made of what the user names, with any weights.

    given: a module, of which a copy is taken, or a class or function that returns one.

    Raises:
        ConfigError: if nothing is given, and for what is no module and cannot be called for one.
    """
    path, options = spec["import"], spec["options"]
    if given is None:
        raise ConfigError(
            f"the decode head is a module of its own, {shown(path)}, and nothing is imported unasked: give its class "
            "as head (on the command line, --head-module package.module:Name)."
        )
    if isinstance(given, nn.Module):
        return ModuleHead(copy.deepcopy(given), embed_dim, num_classes, spec["scale"], options)
    what = getattr(given, "__qualname__", shown(given))
    if not callable(given):
        raise ConfigError(f"head {what} is no module and no class of one: give that of {shown(path)}.")
    try:
        module = given(**options)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(
            f"head {what} could not be built with the saved options {shown(options)} ({in_short(error)}): give the "
            "class that the model was saved with, or a function that returns the module."
        ) from None
    if not isinstance(module, nn.Module):
        raise ConfigError(f"head {what} returns {shown(module)}, no torch.nn.Module: give that of {shown(path)}.")
    return ModuleHead(module, embed_dim, num_classes, spec["scale"], options)


def import_path(module: nn.Module) -> str:
    """Return `package.module:Name` of a module's class."""
    return f"{type(module).__module__}:{type(module).__qualname__}"


def named(module: nn.Module) -> str:
    """Return how messages call a module of the user's."""
    return f"decode head {type(module).__qualname__}"


def in_short(error: Exception) -> str:
    """Return the kind of an error that foreign code raised, and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------ measuring a module


def probed(module: nn.Module, channels: int, grids: tuple[Grid, Grid]) -> tuple[int, int]:
    """Run a head on zeros of two grids; return its number K of classes and its scale.

    The module must be in evaluation mode.

    Raises:
        ConfigError: where it does not take one map `(B, C, h, w)`, gives no map `(B, K, H', W')`, or where H' / h and
            W' / w are not one whole number for both grids.
    """
    _refuse_several_maps(module)
    like = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    shapes: list[tuple[Grid, tuple[int, ...]]] = []
    for h, w in grids:
        features = torch.zeros(2, channels, h, w, device=like.device, dtype=torch.float32)
        try:
            with torch.no_grad():
                logits = module(features)
        except Exception as error:  # the user's own code may raise anything
            raise ConfigError(
                f"{named(module)} does not take one feature map {tuple(features.shape)} ({in_short(error)}): give a "
                "module from (B, C, h, w) to (B, K, H', W') that reads the last feature map alone."
            ) from None
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[0] != 2:
            raise ConfigError(
                f"{named(module)} gives {_size(logits)} for features {tuple(features.shape)}: give a module that "
                "returns class logits (B, K, H', W')."
            )
        shapes.append(((h, w), tuple(logits.shape)))
    (h, _), (_, classes, height, _) = shapes[0]
    scale = height // h
    if not 1 <= scale <= MOST_SCALE or any(shape != (2, classes, h * scale, w * scale) for (h, w), shape in shapes):
        found = " and ".join(f"{h}x{w} to {shape[2]}x{shape[3]}" for (h, w), shape in shapes)
        raise ConfigError(
            f"{named(module)} maps {found}: height and width must grow by one whole number of at most {MOST_SCALE}, "
            "the same for every grid."
        )
    return classes, scale


def _refuse_several_maps(module: nn.Module) -> None:
    """Refuse heads of mmsegmentation's kind that say themselves that they read several maps."""
    transform, index = getattr(module, "input_transform", None), getattr(module, "in_index", None)
    if transform in ("resize_concat", "multiple_select") or (isinstance(index, list | tuple) and len(index) > 1):
        raise ConfigError(
            f"{named(module)} reads several feature maps ({'in_index' if transform is None else 'input_transform'}="
            f"{shown(index if transform is None else transform)}): give a head of the last feature map alone."
        )


def _layer_flops(source: Tensor, width: int, heads: int, *weights: Any) -> int:
    """Count the operator that torch has for attention with its projections, and for a transformer layer around it."""
    images, length = source.shape[:2]
    projections = sum(images * length * w.numel() for w in weights if isinstance(w, Tensor) and w.ndim == 2)
    return 2 * (projections + 2 * images * length * length * width)


_ATEN = torch.ops.aten
_BEYOND_TORCH: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape),
    _ATEN._native_multi_head_attention: lambda q, k, v, *rest: _layer_flops(q, *rest),
    _ATEN._transformer_encoder_layer_fwd: _layer_flops,
}
"""What torch's own table of operators lacks."""


class _Counter(TorchDispatchMode):
    """Counts the operators that run in its scope, in this thread alone, where torch's own counter hooks all modules."""

    flops: int

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip its compiler torch imports it, for seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := _BEYOND_TORCH.get(func._overloadpacket)) is not None:
            self.flops += count(*args)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


_COUNTED: WeakKeyDictionary[nn.Module, dict[Grid, int]] = WeakKeyDictionary()
"""Multiply-adds of each head by grid; they follow from shapes alone."""


def _macs(head: ModuleHead, grid: Grid) -> int:
    """Count by running the module on one image of zeros, once for each grid, and in evaluation mode."""
    counted = _COUNTED.setdefault(head, {})
    if grid not in counted:
        module = head.module
        if any(part.training for part in module.modules()):
            module = copy.deepcopy(module).eval()
        like = next((t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()), torch.empty(0))
        counter = _Counter()
        with torch.inference_mode(False), torch.no_grad(), counter:
            module(torch.zeros(1, head.embed_dim, *grid, dtype=like.dtype, device=like.device))
        counted[grid] = counter.flops // 2
    return counted[grid]


def _size(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError):
        values = None
    if not isinstance(values, dict) or values != dict(options):
        raise ConfigError(
            f"head_options must be numbers, words, lists and mappings by name, as in JSON, got {shown(options)}."
        )
    return values
