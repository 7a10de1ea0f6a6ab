"""Methods decide which tokens leave, what remains of them, and what the result is made of."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tokenexit.errors import ConfigError
from tokenexit.methods.base import ExitRecord, Method, ModelView, Result
from tokenexit.methods.baselines import FixedRatio, Truncated
from tokenexit.methods.cropr import Cropr
from tokenexit.methods.dense import Dense
from tokenexit.methods.dovit import DoViT
from tokenexit.methods.dtop import DToP
from tokenexit.methods.gated import Gated, GatedBySize
from tokenexit.methods.paumer import PAUMER
from tokenexit.methods.reduced import Reduced
from tokenexit.methods.reference import PrescribedExits
from tokenexit.methods.resized import Resized
from tokenexit.methods.thresholded import ThresholdMethod
from tokenexit.methods.wrapper import Wrapper
from tokenexit.reducers import build_reducer, reducer_spec
from tokenexit.runtime.schema import check, hints

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method for method in (Dense, DToP, DoViT, PAUMER, FixedRatio, Cropr, Truncated)
}
WRAPPERS: dict[str, type[Wrapper]] = {method.name: method for method in (Gated, GatedBySize, Reduced, Resized)}


def register(kind: type[Method[Any]]) -> type[Method[Any]]:
    """Make a method known by its name: to YAML, the command line and its completion, calibration, the HTTP API.

    kind: a frozen dataclass with a `name` and a `title`, every field of which has a default. Usable as a decorator;
    returns `kind`. Raises `ConfigError` for what is no such class and for a name that is taken.
    """
    name = getattr(kind, "name", None)
    if not (isinstance(kind, type) and issubclass(kind, Method) and isinstance(name, str) and hasattr(kind, "title")):
        raise ConfigError(f"{kind!r} is no method: register a subclass of Method with a name and a title.")
    if inspect.isabstract(kind) or not is_dataclass(kind):
        raise ConfigError(f"method '{name}' is no whole dataclass: supply what Method leaves open, and @dataclass.")
    if (METHODS | WRAPPERS).get(name, kind) is not kind:
        raise ConfigError(f"method '{name}' is registered already: choose another name.")
    METHODS[name] = kind
    return kind


MethodSpec = str | Mapping[str, Any]
"""A method's name, or a mapping with `name` and the method's own fields: `{"name": "dtop", "threshold": 0.95}`."""

MethodLike = Method[Any] | MethodSpec
"""A method, its name or its specification: accepted wherever a method is an argument."""


def build_method(spec: MethodSpec) -> Method[Any]:
    """Build a method from its specification.

    Args:
        spec: a name of `METHODS`, or a mapping with `name` and the method's own fields,
            `{"name": "dtop", "threshold": 0.95}`.

    Returns:
        The method, a frozen value.

    Raises:
        ConfigError: for an unknown name or option, and for a value of another type or out of range.
    """
    check("a method", spec, MethodSpec)
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    check("name of a method", name, str | None)
    kind = (METHODS | WRAPPERS).get(name or "")
    if kind is None or (issubclass(kind, Wrapper) and options.keys() != {f.name for f in fields(kind)}):
        raise ConfigError(f"method '{name}' is unknown: choose one of {', '.join(METHODS)}.")
    known = [f.name for f in fields(kind)]
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"method '{name}' has no option '{option}': it takes {', '.join(known) or 'none'}.")
        if option == "method":  # a wrapper's inner method
            options[option] = build_method(value)
        elif option == "by":  # what reduces beside it
            options[option] = build_reducer(value)
        else:
            check(f"{option} of method '{name}'", value, hints(kind)[option])
            options[option] = _frozen(value)
    return kind(**options)


def as_method(method: MethodLike) -> Method[Any]:
    """Return a method as it is, or build it from its name or specification."""
    return method if isinstance(method, Method) else build_method(method)


def spec_of(method: Method[Any], whole: bool = False) -> dict[str, Any]:
    """Return the specification that `build_method` takes, as JSON holds it.

    whole: list all options, and not only those that differ from their defaults. Prescribed exits have a name alone.
    """
    if isinstance(method, PrescribedExits):
        return {"name": method.name}
    if isinstance(method, Wrapper):
        own = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "method"}
        if isinstance(method, Reduced):
            own["by"] = reducer_spec(method.by, whole)
        return {"name": method.name, "method": spec_of(method.method, whole), **own}
    default = type(method)()
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    listed = {name: value for name, value in options.items() if whole or value != getattr(default, name)}
    return {"name": method.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in listed.items()}}


def _frozen(value: Any) -> Any:
    """Turn lists into tuples, at any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


__all__ = [
    "METHODS",
    "PAUMER",
    "Cropr",
    "DToP",
    "Dense",
    "DoViT",
    "ExitRecord",
    "FixedRatio",
    "Gated",
    "GatedBySize",
    "Method",
    "MethodLike",
    "MethodSpec",
    "ModelView",
    "Reduced",
    "Resized",
    "Result",
    "ThresholdMethod",
    "Truncated",
    "as_method",
    "build_method",
    "register",
    "spec_of",
]
