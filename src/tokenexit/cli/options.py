"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tokenexit.cli.method_options import method_options
from tokenexit.errors import CheckpointError, ConfigError, TokenExitError

if TYPE_CHECKING:
    import torch

    from tokenexit.data.base import SegmentationDataset
    from tokenexit.methods import Method, MethodSpec
    from tokenexit.segmenter import ExitSegmenter

T = TypeVar("T")

FIRST_LINE, LINES_APART = 2.0, 30.0
"""Seconds to the first line of progress where there is no terminal, and from each to the next."""


LARGEST = {"input_scale": 8.0}
"""The largest values that options take; those of others end where 32 bits do."""
LARGEST_NUMBER = 2**31 - 1


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all others are, and that answers a shell that asks for completions."""

    def parse_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        if asked_by_shell():
            from argcomplete import autocomplete

            autocomplete(self, always_complete_options=False)  # ends the program
        options = super().parse_args(*arguments)
        for name, value in vars(options).items():
            check_numbers(name, value)
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.dest
            raise ConfigError(f"{name} {value} is unknown: choose one of {', '.join(map(str, action.choices))}.")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help.")


def check_numbers(name: str, value: Any) -> None:
    """Refuse numbers that no command can work with, alone or in a list: too large, infinite, or none."""
    largest = LARGEST.get(name, LARGEST_NUMBER)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= largest:
            raise ConfigError(f"--{name.replace('_', '-')} {number} must be a number of at most {largest:.0f}.")


def asked_by_shell() -> bool:
    """Whether a shell waits for completions, see `cli/completion.py`."""
    return "_ARGCOMPLETE" in os.environ


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but not that of an option that has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.const is True else super()._get_help_string(action)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    return CommandParser(prog=f"tokenexit {name}", description=description, formatter_class=_Help, allow_abbrev=False)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the forward pass; auto: bf16 on CUDA cards that have it, fp32 on CPUs",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes CUDA where there is one")


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
    from dataclasses import fields

    from tokenexit.methods import METHODS

    given = given_method_options(options)
    texts = given.get("threshold", [])
    thresholds = [numbers("threshold", text) for text in (texts if isinstance(texts, list) else [texts])]
    specs: list[dict[str, Any]] = []
    taken: set[str] = set()
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"--method {name} is unknown: choose one of {', '.join(METHODS)}.")
        known = {f.name for f in fields(METHODS[name])}
        own = {key: value for key, value in given.items() if key in known}
        taken |= set(own)
        rows = [{"threshold": threshold} for threshold in thresholds] if "threshold" in own else [{}]
        specs += [{"name": name, **own, **row} for row in rows]
    for key in sorted(set(given) - taken):
        raise ConfigError(
            f"--{key.replace('_', '-')} is no option of {', '.join(names)}: leave it out, or choose another method."
        )
    return list({json.dumps(spec): spec for spec in specs}.values())  # each once


CALIBRATED = "calibrated"
"""The name of the method that a model was calibrated for, at the calibration's thresholds."""
UNCALIBRATED = "tokenexit: the model is not calibrated: running dense; run `tokenexit calibrate`, or name --method."


def asked_methods(names: Sequence[str] | None, options: Any) -> list[dict[str, Any]] | None:
    """Specifications of the methods that were named, checked before a model is read; None if none was.

    `calibrated` is a name, too. Raises `ConfigError` for what no model could run.
    """
    if names is None:
        if given_method_options(options):
            raise ConfigError("options of a method need --method: name it, such as dtop.")
        return None
    others = [name for name in names if name != CALIBRATED]
    if not others and given_method_options(options):
        raise ConfigError(f"options of a method do not go with --method {CALIBRATED}: name the method itself.")
    methods_of(others, options)
    specs = [
        [{"name": name}] if name == CALIBRATED else method_specs([name], _own_options(name, options)) for name in names
    ]
    return [spec for own in specs for spec in own]


def _own_options(name: str, options: Any) -> argparse.Namespace:
    """The options without those of methods that this one does not have."""
    from dataclasses import fields

    from tokenexit.methods import METHODS

    known = {f.name for f in fields(METHODS[name])}
    foreign = set(method_options()) - known
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


def calibrated_name(model: ExitSegmenter) -> str | None:
    """The name of the method that a model was calibrated for, whether or not the calibration can be used."""
    return None if model.calibration is None else model.calibration.method_name


def is_calibrated(model: ExitSegmenter, method: Method[Any]) -> bool:
    """Whether this is the method, thresholds and all, that the model was calibrated for."""
    with suppress(CheckpointError):  # a calibration of other weights is none of this model
        return method.name == calibrated_name(model) and method == model.calibrated_method()
    return False


def methods_of(names: Sequence[str], options: Any) -> list[Method[Any]]:
    from tokenexit.methods import build_method

    return [build_method(spec) for spec in method_specs(names, options)]


def numbers(name: str, text: str) -> Any:
    """`0.95`, or `0.98/0.9/0.8` with one for each exit, each of them one number or `0.9,0.99,0.95` for every class."""
    try:
        exits = [tuple(float(part) for part in exit.split(",")) for exit in text.split("/")]
    except ValueError:
        raise ConfigError(f"--{name} {text} is no number: write 0.95, or 0.98/0.9/0.8 for one per exit.") from None
    values = tuple(exit[0] if len(exit) == 1 else exit for exit in exits)
    return values[0] if text.count("/") == text.count(",") == 0 else values


def add_window_options(parser: argparse.ArgumentParser) -> None:
    sides: dict[str, Any] = {"nargs": "+", "metavar": "PIXELS"}
    parser.add_argument("--window", help="segment in windows of one side, or height and width; none: whole", **sides)
    parser.add_argument("--stride", help="of the windows, which touch if it is not given", **sides)


def set_windows(model: ExitSegmenter, options: Any) -> None:
    """Replace the windows that the model was saved with by those that were asked for."""
    from dataclasses import replace

    from tokenexit.inputs.preprocessing import checked_window

    if options.window is None and options.stride is None:
        return
    window = model.preprocessing.window if options.window is None else _sides("--window", options.window)
    window, stride = checked_window("--", window, options.stride and _sides("--stride", options.stride))
    model.preprocessing = replace(model.preprocessing, window=window, stride=stride)


def _sides(name: str, texts: Sequence[str]) -> tuple[int, ...] | None:
    """`512`, `512 1024`, or `none`."""
    if texts == ["none"]:
        return None
    try:
        sides = tuple(map(int, texts))
    except ValueError:
        raise ConfigError(
            f"{name} {' '.join(texts)} is no size: give one side in pixels, or height and width."
        ) from None
    check_numbers(name.removeprefix("--"), list(sides))
    return sides * 2 if len(sides) == 1 else sides


def in_windows(model: ExitSegmenter) -> str:
    window, stride = model.preprocessing.window, model.preprocessing.stride
    if window is None or stride is None:
        return ""
    return f" in windows of {window[0]}x{window[1]} every {stride[0]}x{stride[1]}"


def dataset_of(options: Any) -> tuple[str, SegmentationDataset]:
    """Name and split of the dataset that was asked for, else of the one that the model was trained on."""
    from tokenexit.data.registry import open_dataset
    from tokenexit.pretrained import TRAINING_FILE, read_record

    if options.data is not None:
        return options.data, open_dataset(options.data, options.data_root, options.split)
    record = read_record(options.model, TRAINING_FILE) or {}
    data = record.get("config", {}).get("data", {})
    if not {"name", "root", "options"} <= data.keys():
        raise ConfigError(f"{options.model} does not say what it was trained on: name it with --data.")
    name, root, extra = data["name"], data["root"], dict(data["options"])
    extra.pop("length", None)  # how many scenes were drawn for training says nothing of the other splits
    return name, open_dataset(name, options.data_root or root, options.split, **extra)


def share(text: str) -> float:
    """A number as it is, and `60%` as 0.6; a type of options."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} {value} must be at least 1.")


def progress_bar(title: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """Progress of one loop on stderr: a bar on a terminal, elsewhere a line now and then."""
    return progress_bars()(title)


def progress_bars() -> Callable[[str], Callable[[Iterable[T]], Iterable[T]]]:
    """The same for a command of many loops, by their titles: their lines keep one pace."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        return lambda title: lambda items: track(items, description=title, console=console)
    due = pace(time.monotonic)
    return lambda title: lambda items: progress_lines(title, items, due)


def progress_lines(title: str, items: Iterable[T], due: Callable[[], bool]) -> Iterator[T]:
    """Hands on `items` and says on stderr how many are done whenever a line is due."""
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if due():
            print(progress_line(title, done + 1, total, time.monotonic() - start), file=sys.stderr, flush=True)


def progress_line(title: str, done: int, total: int | None, seconds: float) -> str:
    """`evaluating: 12 of 100, 0:00:05 so far, 0:00:37 left`."""
    so_far = timedelta(seconds=round(seconds))
    if total is None:
        return f"{title}: {done} done, {so_far} so far"
    left = timedelta(seconds=round(seconds / done * (total - done)))
    return f"{title}: {done} of {total}, {so_far} so far, {left} left"


def pace(clock: Callable[[], float]) -> Callable[[], bool]:
    """Tells, each time it is asked, whether a line is due: the first after `FIRST_LINE` seconds, the next ones
    `LINES_APART`."""
    due_at = clock() + FIRST_LINE

    def due() -> bool:
        nonlocal due_at
        now = clock()
        if now < due_at:
            return False
        due_at = now + LINES_APART
        return True

    return due


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path`, itself included, that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def device_of(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # each process has its own
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta, which makes tensors and holds nothing, is none either
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"--device {name} is not there: choose cpu, or auto.") from None
    return device


def machine_of(options: Any) -> torch.device:
    """The device that was asked for; `options.precision` then says what `auto` comes to there.

    Warns of a precision that the device multiplies slowly."""
    from tokenexit.runtime.precision import inference_precision, slow_precision

    device = device_of(options.device)
    options.precision = inference_precision(options.precision, device)
    warning = slow_precision(options.precision, device)
    if warning is not None and os.environ.get("RANK", "0") == "0":
        print(f"warning: {warning}", file=sys.stderr)
    return device


def exit_status(error: TokenExitError) -> int:
    return 2 if isinstance(error, ConfigError) else 1


@contextmanager
def report_once() -> Iterator[None]:
    """Of several processes that fail alike, the first says why."""
    try:
        yield
    except TokenExitError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(exit_status(error)) from None
