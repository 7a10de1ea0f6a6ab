"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenexit.data.registry import DATASETS, UNLABELLED
from tokenexit.errors import ConfigError, TokenExitError

if TYPE_CHECKING:
    import torch

    from tokenexit.data.base import SegmentationDataset
    from tokenexit.segmenter import ExitSegmenter

LARGEST = {"input_scale": 8.0, "threads": 4096}
"""The largest values that options take; those of others end where 32 bits do. A system that refuses to start very many
threads ends the program."""
LARGEST_NUMBER = 2**31 - 1
SMALLEST = {"threads": 1}


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
    """Refuse numbers that no command can work with, alone or in a list: too large or small, infinite, or none."""
    largest = LARGEST.get(name, LARGEST_NUMBER)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= largest:
            raise ConfigError(f"--{name.replace('_', '-')} {number} must be a number of at most {largest:.0f}.")
        if isinstance(number, int | float) and name in SMALLEST and number < SMALLEST[name]:
            raise ConfigError(f"--{name.replace('_', '-')} {number} must be at least {SMALLEST[name]}.")


def asked_by_shell() -> bool:
    """Whether a shell waits for completions, see `cli/completion.py`."""
    return "_ARGCOMPLETE" in os.environ


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but not that of an option that has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.const is True else super()._get_help_string(action)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    return CommandParser(prog=f"tokenexit {name}", description=description, formatter_class=_Help, allow_abbrev=False)


def completes(action: argparse.Action, words: Iterable[str]) -> None:
    """Offer words to a shell where others are taken, too."""
    known = list(words)
    action.completer = lambda **_: known  # type: ignore[attr-defined]


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_model`."""
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument(
        "--head-module",
        metavar="MODULE:NAME",
        help="class or function that makes the decode head, for a model with one of your own: package.module:Name",
    )


def load_model(options: Any, device: str | torch.device = "cpu") -> ExitSegmenter:
    """The model of `add_model_argument`."""
    from tokenexit.segmenter import ExitSegmenter

    return ExitSegmenter.from_pretrained(options.model, device, head=head_module(options.head_module))


def head_module(path: str | None) -> Any:
    """What `package.module:Name` names, None for None; the folder in which the command runs is searched last."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(f"--head-module {path} is no import path: write package.module:Name.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        return attrgetter(name)(import_module(module))
    except Exception as error:  # the user's own code may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"--head-module {path} cannot be imported ({reason}): check the name, and that it can be found from here."
        ) from None


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `machine_of`."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the forward pass; auto: bf16 on CUDA cards that have it, fp32 on CPUs",
    )
    device = group.add_argument("--device", default="auto", help="device: cpu, cuda, cuda:1; auto: CUDA if available")
    completes(device, ("auto", "cpu", "cuda"))
    add_threads_option(group)


def add_threads_option(parser: Any) -> None:
    """Add the option of `start_threads` to a parser, of argparse or of jsonargparse, or to a group of one."""
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="number of threads for torch; if not given, OMP_NUM_THREADS, else one for each core, or fewer while "
        "others keep cores busy and that is no slower",
    )


def start_threads(options: Any) -> None:
    """Let torch start as many threads as `--threads` says, else the environment, else as suits what is there now.

    Fewer than cores are explained on stderr, by the first of several processes.
    """
    from tokenexit.runtime.threads import choose_threads

    first = os.environ.get("RANK", "0") == "0"
    choose_threads(options.threads, say=lambda reason: print(f"note: {reason}.", file=sys.stderr) if first else None)


def add_running_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `open_model`: windows, device, precision."""
    sides: dict[str, Any] = {"nargs": "+", "metavar": "PIXELS"}
    group = parser.add_argument_group("windows")
    group.add_argument(
        "--window", help="size of sliding windows: one side, or height and width; none: the whole image", **sides
    )
    group.add_argument(
        "--stride",
        help="stride of the windows, or even: as few as cover the image, evenly spread; their size if not given",
        **sides,
    )
    add_machine_options(parser)


def open_model(options: Any) -> ExitSegmenter:
    """The model of `add_model_argument` on the machine, and in the windows, that were asked for."""
    model = load_model(options, machine_of(options))
    if "window" in options:
        set_windows(model, options)
    return model


def add_keep_option(parser: argparse.ArgumentParser) -> None:
    """Add what the thresholds that a command chooses shall keep."""
    parser.add_argument(
        "--keep",
        choices=("pixels", "classes"),
        default="classes",
        help="units over which agreement with dense is averaged",
    )


def add_data_options(parser: argparse.ArgumentParser, split: str, images: str = "number of images, the first") -> None:
    """Add the options of `dataset_of`, and `--limit`.

    split: the default. images: which ones `--limit` leaves, for the help.
    """
    group = add_dataset_options(parser, split, "data", "; that of the training if not given")
    group.add_argument("--limit", type=int, help=f"{images}; all if not given")


def add_dataset_options(parser: argparse.ArgumentParser, split: str, title: str, otherwise: str = "") -> Any:
    """Add the options of `dataset_of` in a group of this title, which is returned.

    otherwise: what is taken without `--data`, for the help.
    """
    group = parser.add_argument_group(title)
    group.add_argument(
        "--data", choices=tuple(DATASETS), metavar="NAME", help=f"dataset: {', '.join(DATASETS)}{otherwise}"
    )
    group.add_argument("--data-root", type=Path, help="folder of the dataset")
    completes(group.add_argument("--split", default=split, help="part of the dataset"), ("train", "val", "test"))
    return group


def set_windows(model: ExitSegmenter, options: Any) -> None:
    """Replace the windows that the model was saved with by those that were asked for."""
    from dataclasses import replace

    from tokenexit.inputs.preprocessing import checked_window

    if options.window is None and options.stride is None:
        return
    window = model.preprocessing.window if options.window is None else _sides("--window", options.window)
    asked = options.stride
    window, stride = checked_window("--", window, "even" if asked == ["even"] else asked and _sides("--stride", asked))
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
    from tokenexit.inputs.preprocessing import windows_in_words

    window, stride = model.preprocessing.window, model.preprocessing.stride
    return "" if window is None or stride is None else f" in {windows_in_words(window, stride)}"


def dataset_of(options: Any) -> tuple[str, SegmentationDataset]:
    """Name and split of the dataset that was asked for, else of the one that the model was trained on."""
    from tokenexit.data.registry import open_dataset
    from tokenexit.pretrained import TRAINING_FILE, read_record

    if options.data in UNLABELLED:
        raise ConfigError(
            f"--data {options.data} has no labels: name a dataset that has masks; calibrate takes images without as "
            "--images."
        )
    if options.data is not None:
        return options.data, open_dataset(options.data, options.data_root, options.split)
    record = read_record(options.model, TRAINING_FILE) or {}
    data = record.get("config", {}).get("data", {})
    if not {"name", "root", "options"} <= data.keys():
        raise ConfigError(f"{options.model} does not say what it was trained on: name it with --data.")
    name, root, extra = data["name"], data["root"], dict(data["options"])
    if name in UNLABELLED:
        raise ConfigError(f"{options.model} was trained on images without labels: name a dataset with --data.")
    extra.pop("length", None)  # how many scenes were drawn for training says nothing of the other splits
    return name, open_dataset(name, options.data_root or root, options.split, **extra)


def share(text: str) -> float:
    """A number as it is, and `60%` as 0.6; a type of options."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def check_counts(options: Any, *names: str) -> None:
    """Refuse numbers, alone or in a list, below 1. names: of the options, with underscores."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {number} must be at least 1.")


def add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        default=[512],
        help="image size: one side, or height and width",
    )


def image_size(options: Any) -> tuple[int, int]:
    """Height and width as `--image-size` says."""
    sides = options.image_size
    check_counts(options, "image_size")
    if len(sides) > 2:
        raise ConfigError(f"--image-size has {len(sides)} numbers: give one side, or height and width.")
    return sides[0], sides[-1]


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

    Starts as many threads as were asked for, and warns of a precision that the device multiplies slowly."""
    from tokenexit.runtime.precision import inference_precision, slow_precision

    start_threads(options)
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
