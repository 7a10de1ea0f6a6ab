"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tokenexit.errors import ConfigError, TokenExitError

if TYPE_CHECKING:
    import torch

    from tokenexit.data.base import SegmentationDataset
    from tokenexit.methods import Method
    from tokenexit.segmenter import ExitSegmenter

T = TypeVar("T")

FIRST_LINE, LINES_APART = 2.0, 30.0
"""Seconds to the first line of progress where there is no terminal, and from each to the next."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all others are, and that answers a shell that asks for completions."""

    def parse_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        if asked_by_shell():
            from argcomplete import autocomplete

            autocomplete(self, always_complete_options=False)  # ends the program
        return super().parse_args(*arguments)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help.")


def asked_by_shell() -> bool:
    """Whether a shell waits for completions, see `cli/completion.py`."""
    return "_ARGCOMPLETE" in os.environ


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but not that of an option that has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.const is True else super()._get_help_string(action)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    return CommandParser(prog=f"tokenexit {name}", description=description, formatter_class=_Help, allow_abbrev=False)


def add_method_options(parser: Any, several: bool = False) -> None:
    """Options that select a method's parameters; with `several`, each threshold is a row of its own."""
    parser.add_argument(
        "--threshold",
        nargs="+" if several else None,
        type=str,
        default=None,
        help="threshold of all exits, or one for each as 0.98/0.9/0.8, an exit's for all classes or one for each as "
        "0.9,0.99,0.95; the method's own if not given",
    )
    parser.add_argument("--score", type=str, default=None, help="what thresholds meet: probability, margin or entropy")
    parser.add_argument("--temperature", type=str, default=None, help="of the exit heads' softmax: 1.5, or 1.8/1.5/1.2")
    parser.add_argument("--boundary-guard", action="store_true", default=None, help="no exits where classes meet")
    parser.add_argument("--keep-per-class", type=int, default=None, help="dtop: most confident tokens that stay")
    parser.add_argument("--finish", type=str, default=None, help="dtop: auto, presence_last or frozen")
    parser.add_argument("--ratios", type=str, default=None, help="fixed_ratio: tokens that go on, as 0.7/0.5/0.3")
    parser.add_argument("--after", type=int, default=None, help="truncated: which exit ends the network, 1 the first")
    parser.add_argument("--blend-weight", type=float, default=None, help="dovit: share of the mean in the class token")
    parser.add_argument("--batch-mode", type=str, default=None, help="dovit: exact or mean")
    parser.add_argument("--scoring", type=str, default=None, help="dovit: grid or live")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the forward pass; auto: bf16 on CUDA cards that have it, fp32 on CPUs",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes CUDA where there is one")


METHOD_OPTIONS = (
    *("score", "temperature", "boundary_guard", "keep_per_class", "finish", "ratios", "after"),
    *("blend_weight", "batch_mode", "scoring"),
)


def given_method_options(options: Any) -> dict[str, Any]:
    """Options of methods that were given, threshold included."""
    names = ("threshold", *METHOD_OPTIONS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return given | {name: numbers(name, given[name]) for name in ("temperature", "ratios") if name in given}


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


def calibrated_methods(model: ExitSegmenter, options: Any) -> list[Method[Any]] | None:
    """The method that the model was calibrated to, alone; None if it was not."""
    method = model.calibrated_method()
    if method is not None and given_method_options(options):
        raise ConfigError("options of a method need --method, as this model has a calibration of its own: name it.")
    return None if method is None else [method]


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

    from tokenexit.preprocessing import checked_window

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
    return sides * 2 if len(sides) == 1 else sides


def in_windows(model: ExitSegmenter) -> str:
    window, stride = model.preprocessing.window, model.preprocessing.stride
    if window is None or stride is None:
        return ""
    return f" in windows of {window[0]}x{window[1]} every {stride[0]}x{stride[1]}"


def dataset_of(options: Any) -> tuple[str, SegmentationDataset]:
    """Name and split of the dataset that was asked for, else of the one that the model was trained on."""
    from tokenexit.data.registry import open_dataset

    if options.data is not None:
        return options.data, open_dataset(options.data, options.data_root, options.split)
    path = options.model / "training.json"
    try:
        data = json.loads(path.read_text())["config"]["data"]
        name, root, extra = str(data["name"]), data["root"], dict(data["options"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{options.model} does not say what it was trained on: name it with --data.") from None
    extra.pop("length", None)  # how many scenes were drawn for training says nothing of the other splits
    return name, open_dataset(name, options.data_root or root, options.split, **extra)


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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"--device {name} is not there: choose cpu, or auto.") from None
    return device


def machine_of(options: Any) -> torch.device:
    """The device that was asked for; `options.precision` then says what `auto` comes to there.

    Warns of a precision that the device multiplies slowly."""
    from tokenexit.inference import inference_precision, slow_precision

    device = device_of(options.device)
    options.precision = inference_precision(options.precision, device)
    warning = slow_precision(options.precision, device)
    if warning is not None and os.environ.get("RANK", "0") == "0":
        print(f"warning: {warning}", file=sys.stderr)
    return device


def exit_status(error: TokenExitError) -> int:
    return 2 if isinstance(error, ConfigError) else 1


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes that fail alike, the first says why."""
    try:
        yield
    except TokenExitError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(exit_status(error)) from None
