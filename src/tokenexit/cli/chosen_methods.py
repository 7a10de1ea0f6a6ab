"""From `--method` and the options of methods to the methods that a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from tokenexit.cli.method_options import (
    CALIBRATED,
    CHOSEN,
    NO_MERGING,
    REDUCERS,
    method_names,
    method_options,
    options_of,
)
from tokenexit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenexit.methods import Method, MethodSpec
    from tokenexit.reducers import Reducer
    from tokenexit.segmenter import ExitSegmenter

UNCALIBRATED = "tokenexit: the model is not calibrated: running dense; run `tokenexit calibrate`, or name --method."


def given_method_options(options: Any) -> dict[str, Any]:
    """Options of methods that were given, threshold included."""
    given: dict[str, Any] = {}
    for name, option in method_options().items():
        value = getattr(options, name, None)
        if value is not None:
            given[name] = numbers(name, value) if option.is_text and name != "threshold" else value
    return given


def method_specs(names: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """One specification for every method and threshold; options are given to the methods that have them."""
    given = given_method_options(options)
    texts = given.get("threshold", [])
    thresholds = [numbers("threshold", text) for text in (texts if isinstance(texts, list) else [texts])]
    specs: list[dict[str, Any]] = []
    taken: set[str] = set()
    for name in names:
        if name not in method_names():
            raise ConfigError(f"--method {name} is unknown: choose one of {', '.join(method_names())}.")
        known = options_of(name)
        own = {key: value for key, value in given.items() if key in known}
        taken |= set(own)
        rows = [{"threshold": threshold} for threshold in thresholds] if "threshold" in own else [{}]
        specs += [{"name": name, **own, **row} for row in rows]
    for key in sorted(set(given) - taken):
        raise ConfigError(
            f"--{key.replace('_', '-')} is no option of {', '.join(names)}: leave it out, or choose another method."
        )
    return list({json.dumps(spec): spec for spec in specs}.values())  # each once


def asked_methods(names: str | Sequence[str] | None, options: Any) -> list[dict[str, Any]] | None:
    """Specifications of the methods that were named, checked before a model is read; None if none was.

    `calibrated` is a name, too. Raises `ConfigError` for what no model could run: names and options that do not go
    together before torch is loaded, then values.
    """
    if names is None:
        if given_method_options(options):
            raise ConfigError("options of a method need --method: name it, such as dtop.")
        return None
    names = [names] if isinstance(names, str) else names
    others = [name for name in names if name != CALIBRATED]
    if not others and given_method_options(options):
        raise ConfigError(f"options of a method do not go with --method {CALIBRATED}: name the method itself.")
    method_specs(others, options)  # refuses options that none of them has
    rows = [
        [{"name": name}] if name == CALIBRATED else method_specs([name], _own_options(name, options)) for name in names
    ]
    specs = [spec for own in rows for spec in own]
    for spec in specs:
        if spec["name"] != CALIBRATED:
            _build(spec)
    return specs


def _own_options(name: str, options: Any) -> argparse.Namespace:
    """The options without those of methods that this one does not have."""
    foreign = set(method_options()) - options_of(name)
    return argparse.Namespace(**(vars(options) | dict.fromkeys(foreign)))


def chosen_methods(
    model: ExitSegmenter, asked: Sequence[dict[str, Any]] | None, needs_exits: str = ""
) -> list[Method[Any]]:
    """The methods that a command runs: those that were asked for, else the calibrated one, else dense.

    A name without options stands for the calibrated method where the model was calibrated for that one: a
    calibration's thresholds are the model's default for its method. An uncalibrated model has no thresholds of its own,
    so it runs dense if nothing is named, which `say_if_uncalibrated` says.
    asked: of `asked_methods`. needs_exits: why dense alone is of no use to the command, if it is none: an uncalibrated
    model is refused then. Raises `ConfigError`, and `CheckpointError` for a calibration of other weights.
    """
    if asked is not None:
        return list(dict.fromkeys(_chosen(model, spec) for spec in asked))
    method = model.calibrated_method()
    if method is not None:
        return [method]
    if needs_exits:
        raise ConfigError(f"{needs_exits}, and this model is not calibrated: calibrate it, or name --method.")
    return [_build("dense")]


def reducer_to_choose(text: str | None) -> tuple[Reducer | None, bool]:
    """What merges tokens beside a method that is calibrated, and whether its value is to be chosen, as in `NAME:auto`.

    Raises `ConfigError`, for a reducer whose value sets no amount, too.
    """
    first, comma, others = (text or "").partition(",")
    name, _, value = first.partition(":")
    if value != CHOSEN:
        (by,) = reducers_of(text)
        return by, False
    (by,) = reducers_of(f"{name}{comma}{others}")
    if by is None or not by.trials:
        raise ConfigError(f"--merge {text}: {name} has no amount to choose: give it as it is.")
    return by, True


def reducers_of(texts: Sequence[str] | str | None) -> list[Reducer | None]:
    """What merges tokens beside a method, for every `--merge`; None alone if it was not given.

    A text is a reducer's name, `NAME:VALUE` with its main option, or either with others behind commas,
    `supertokens:0.9,sizes=2/4`. Raises `ConfigError`.
    """
    if texts is None:
        return [None]
    given_texts = [texts] if isinstance(texts, str) else texts
    for text in given_texts:
        if text != NO_MERGING and text.partition(",")[0].partition(":")[0] not in REDUCERS:
            raise ConfigError(
                f"--merge {text} is unknown: choose {', '.join(REDUCERS)}, or {NO_MERGING} for no merging."
            )
    from tokenexit.reducers import REDUCERS as KINDS
    from tokenexit.reducers import build_reducer
    from tokenexit.reducers.base import option_names
    from tokenexit.runtime.schema import hints

    found: list[Reducer | None] = []
    for text in given_texts:
        if text == NO_MERGING:
            found.append(None)
            continue
        first, *others = text.split(",")
        name, colon, value = first.partition(":")
        kind, spec = KINDS[name], dict[str, Any](name=name)
        known = hints(kind)
        given = {kind.main_option: value} if colon else {}
        given |= {option: rest for option, _, rest in (other.partition("=") for other in others)}
        for option, value in given.items():
            if value == CHOSEN:
                raise ConfigError(f"--merge {text}: {CHOSEN} is a value that calibrate alone chooses: give a number.")
            if option not in known or not value:
                raise ConfigError(
                    f"--merge {text}: '{option}' is no option with its value: write {name}:VALUE,OPTION=VALUE with "
                    f"options {', '.join(option_names(kind))}."
                )
            spec[option] = _value(known[option], value)
        found.append(build_reducer(spec))
    return list(dict.fromkeys(found))


def _value(kind: Any, text: str) -> Any:
    """What a text on the command line says of a reducer's option of this type."""
    if get_origin(kind) is Literal:
        return text
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if text == "none":
        return None
    value = numbers("merge", text)
    if kind in (float, float | None):
        return value
    if get_origin(kind) is not tuple:
        return _whole(value)
    several = value if isinstance(value, tuple) else (value,)
    return several if get_args(kind)[0] is float else tuple(map(_whole, several))


def _whole(value: Any) -> int:
    if isinstance(value, tuple) or value != int(value):
        raise ConfigError(f"--merge takes whole numbers here, got {value}: write mpm:2/5.")
    return int(value)


def merged(model: ExitSegmenter, method: Method[Any], by: Reducer | None) -> Method[Any]:
    """The method with a reducer beside its exits, checked on the model.

    It says on stderr where thresholds of a calibration without merging run with it.
    """
    if by is None:
        return method
    from dataclasses import replace

    from tokenexit.methods import Reduced, Resized

    reduced: Method[Any] = Reduced(method, by)
    if isinstance(method, Resized):  # which is the outermost
        reduced = replace(method, method=Reduced(method.method, by))
    model.check(reduced)
    if method.thresholds is not None and is_calibrated(model, method):
        print(
            f"tokenexit: these thresholds were calibrated without merging, and run beside {by.label}: scores and costs "
            "differ, calibrate with --merge.",
            file=sys.stderr,
        )
    return reduced


def resized(method: Method[Any], scale: float | None) -> Method[Any]:
    """The method on images whose sides are multiplied by `--input-scale`; as it is without one.

    Raises `ConfigError` for a scale out of range, and for a plan that resizes images by itself.
    """
    from tokenexit.methods import Resized

    if scale is None:
        return method
    if isinstance(method, Resized):
        raise ConfigError(
            f"--input-scale {scale:g} does not go with this model's calibrated plan, which takes images at "
            f"{method.scale:g} of their sides: leave it out, or name --method with its --threshold."
        )
    return method if scale == 1.0 else Resized(method, scale)


def say_if_uncalibrated(model: ExitSegmenter, asked: Sequence[dict[str, Any]] | None) -> None:
    """Say on stderr, beside the results, that they are dense's because nothing else was asked for."""
    if asked is None and model.calibration is None:
        print(UNCALIBRATED, file=sys.stderr)


def _build(spec: MethodSpec) -> Method[Any]:
    from tokenexit.methods import build_method

    return build_method(spec)


def _chosen(model: ExitSegmenter, spec: dict[str, Any]) -> Method[Any]:
    """What one specification stands for on this model."""
    from dataclasses import replace

    name, options = spec["name"], {key: value for key, value in spec.items() if key != "name"}
    if name == CALIBRATED:
        method = model.calibrated_method()
        if method is None:
            raise ConfigError(f"--method {CALIBRATED}: this model is not, run `tokenexit calibrate` or name another.")
        return method
    if "threshold" not in options:
        _say_if_merging_was_calibrated(model, name)
    if "threshold" in options or name != calibrated_name(model):
        return _build(spec)
    try:
        method = model.calibrated_method()
    except CheckpointError:
        raise ConfigError(
            f"--method {name} takes the calibration's thresholds, which are of other weights or damaged: calibrate "
            "again, or give --threshold, too."
        ) from None
    assert method is not None, "it has a name"
    if replace(method, **options) != method:
        given = " and ".join(f"--{key.replace('_', '-')}" for key in options)
        raise ConfigError(f"{name} was calibrated with another {given}: give --threshold, too, or leave {given} out.")
    return method


def _say_if_merging_was_calibrated(model: ExitSegmenter, name: str) -> None:
    """Say on stderr that a method without thresholds of its own does not run with those it has beside merging."""
    spec = {} if model.calibration is None else model.calibration.method
    inner = spec.get("method") if isinstance(spec, Mapping) and spec.get("name") == "reduced" else None
    if isinstance(inner, Mapping) and inner.get("name") == name:
        print(
            f"tokenexit: this model's thresholds of {name} were calibrated with merging, and {name} runs with its "
            f"defaults: name --method {CALIBRATED}, or calibrate without --merge.",
            file=sys.stderr,
        )


def calibrated_name(model: ExitSegmenter) -> str | None:
    """The name of the method that a model was calibrated for, whether or not the calibration can be used."""
    return None if model.calibration is None else model.calibration.method_name


def is_calibrated(model: ExitSegmenter, method: Method[Any]) -> bool:
    """Whether this is the method, thresholds and all, that the model was calibrated for."""
    with suppress(CheckpointError):  # a calibration of other weights is none of this model
        return method.name == calibrated_name(model) and method == model.calibrated_method()
    return False


def methods_of(names: Sequence[str], options: Any) -> list[Method[Any]]:
    """Methods by name, with the options that were given. Raises `ConfigError`."""
    return [_build(spec) for spec in method_specs(names, options)]


def numbers(name: str, text: str) -> Any:
    """`0.95`, or `0.98/0.9/0.8` with one for each exit, each of them one number or `0.9,0.99,0.95` for every class."""
    try:
        exits = [tuple(float(part) for part in exit.split(",")) for exit in text.split("/")]
    except ValueError:
        raise ConfigError(f"--{name} {text} is no number: write 0.95, or 0.98/0.9/0.8 for one per exit.") from None
    values = tuple(exit[0] if len(exit) == 1 else exit for exit in exits)
    return values[0] if text.count("/") == text.count(",") == 0 else values
