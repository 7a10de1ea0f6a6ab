"""Reducers merge, drop or split tokens between exits; `tokenexit.Reduced` puts one beside any method."""

from collections.abc import Mapping
from typing import Any

from tokenexit.errors import ConfigError
from tokenexit.reducers.algm import ALGM
from tokenexit.reducers.base import Reducer, Site, option_names
from tokenexit.reducers.coarse_first import CoarseFirst
from tokenexit.reducers.g2tm import G2TM
from tokenexit.reducers.mpm import MPM
from tokenexit.reducers.supertokens import Supertokens
from tokenexit.reducers.tome import ToMe
from tokenexit.reducers.zero_tprune import ZeroTPrune
from tokenexit.runtime.schema import check, hints

REDUCERS: dict[str, type[Reducer]] = {
    kind.name: kind for kind in (ALGM, MPM, ToMe, G2TM, Supertokens, ZeroTPrune, CoarseFirst)
}

ReducerSpec = str | Mapping[str, Any]
"""A reducer's name, or a mapping with `name` and its own fields: `{"name": "algm", "threshold": 0.9}`."""


def build_reducer(spec: ReducerSpec) -> Reducer:
    """Build a reducer from its specification.

    Args:
        spec: a name of `REDUCERS`, or a mapping with `name` and the reducer's own fields.

    Returns:
        The reducer, a frozen value.

    Raises:
        ConfigError: for an unknown name or option, and for a value of another type or out of range.
    """
    check("a reducer", spec, ReducerSpec)
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    check("name of a reducer", name, str | None)
    kind = REDUCERS.get(name or "")
    if kind is None:
        raise ConfigError(f"reducer '{name}' is unknown: choose one of {', '.join(REDUCERS)}.")
    known = option_names(kind)
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"reducer '{name}' has no option '{option}': it takes {', '.join(known)}.")
        check(f"{option} of reducer '{name}'", value, hints(kind)[option])
        options[option] = tuple(value) if isinstance(value, list) else value
    return kind(**options)


def reducer_spec(reducer: Reducer, whole: bool = False) -> dict[str, Any]:
    """Return the specification that `build_reducer` takes, as JSON holds it.

    whole: list all options, and not only those that differ from their defaults.
    """
    default = type(reducer)()
    options = {name: getattr(reducer, name) for name in option_names(reducer)}
    listed = {name: value for name, value in options.items() if whole or value != getattr(default, name)}
    return {"name": reducer.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in listed.items()}}


__all__ = [
    "ALGM",
    "G2TM",
    "MPM",
    "REDUCERS",
    "CoarseFirst",
    "Reducer",
    "ReducerSpec",
    "Site",
    "Supertokens",
    "ToMe",
    "ZeroTPrune",
    "build_reducer",
    "reducer_spec",
]
