"""The command line: each command parses its options and calls one Python function.

The help of the program itself is static and a command's libraries are imported when it runs, so that help stays fast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenexit import __version__
from tokenexit.errors import ConfigError, TokenExitError

if TYPE_CHECKING:
    import torch

    from tokenexit.data.base import SegmentationDataset
    from tokenexit.methods import Method
    from tokenexit.segmenter import ExitSegmenter

HELP = f"""tokenexit {__version__}: early exits for the tokens of plain Vision Transformers

usage: tokenexit COMMAND [options]       tokenexit COMMAND --help for a command's options

  quickstart   train on drawn street scenes, compare Dense, DToP and DoViT, write a report; a few minutes on a CPU
  train        train or fine-tune a model as a YAML says
  evaluate     accuracy and compute of a model on a dataset, several methods in one table
  calibrate    thresholds for a budget or a bounded loss, saved with the model
  sweep        curves of mIoU against compute, several methods in one picture
  predict      segment pictures: masks, overlays, exit maps
  cost         multiply-adds of a model, without weights
  convert      weights of timm, Hugging Face, mmsegmentation, Segmenter, DINOv2, DToP and DoViT to a model
  data         read a dataset before anyone trains on it: counts, sizes, class shares, what is damaged
  doctor       what this machine and installation can do
"""


MAX_PIXELS = 7680 * 4320
"""Largest picture that `predict` takes; attention grows with the square of the pixels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 fine, 1 something failed, 2 wrong use, 130 interrupted.

    What a user can cause is said in one sentence on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"tokenexit: command '{name}' is unknown: choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        status = _status(COMMANDS[name], rest)
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
        return status
    except TokenExitError as error:
        print(f"tokenexit {name}: {error}", file=sys.stderr)
        return _exit_status(error)
    except KeyboardInterrupt:
        print(f"\ntokenexit {name}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone: nothing more to say, not even when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _exit_status(error: TokenExitError) -> int:
    return 2 if isinstance(error, ConfigError) else 1


def _status(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What the command returns, or how its parser ended after `--help`."""
    try:
        return command(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help.")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, but not that of an option that has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.const is True else super()._get_help_string(action)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"tokenexit {name}", description=description, formatter_class=_Help, allow_abbrev=False)


# ---------------------------------------------------------------------------------------------------- quickstart


def quickstart(arguments: list[str]) -> int:
    parser = _parser("quickstart", "Train on drawn street scenes and compare Dense, DToP and DoViT in a report.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for the model and report")
    parser.add_argument("--minutes", type=float, default=2.5, help="how long to train, about")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    options = parser.parse_args(arguments)
    from tokenexit.quickstart import run_quickstart

    run_quickstart(options.out, minutes=options.minutes, seed=options.seed)
    return 0


# --------------------------------------------------------------------------------------------------------- train


def train(arguments: list[str]) -> int:
    from tokenexit.training.parsing import parse_train

    def add_options(parser: Any) -> None:
        parser.add_argument("--method", type=str, default=None, help="train with this method alone: dense, dtop, dovit")
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        _add_method_options(parser)

    config, options = parse_train(arguments, add_options)
    if options.method is not None:
        config.methods = _method_specs([options.method], options)
    elif _given_method_options(options):
        raise ConfigError("options of a method need --method: name it, or write them to methods in the YAML.")
    if options.dry_run:
        from tokenexit.training.plan import plan

        print(plan(config))
        return 0
    from tokenexit.training.loop import train as run

    run(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"model: {config.out}")
    return 0


# ------------------------------------------------------------------------------------------------------ evaluate


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes that fail alike, the first says why."""
    try:
        yield
    except TokenExitError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(_exit_status(error)) from None


@_one_voice()
def evaluate(arguments: list[str]) -> int:
    parser = _parser("evaluate", "Accuracy and compute of a model on a dataset; all methods share one table.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset, such as scenes, camvid, folder; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test", help="part of the dataset")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument(
        "--method",
        nargs="+",
        help="dense, dtop, dovit, paumer, fixed_ratio, truncated; one or several; the calibrated one if not given, "
        "else dense",
    )
    _add_method_options(parser, several=True)
    parser.add_argument(
        "--input-scale",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="SCALE",
        help="multiply the pictures' sides, predict at their own size; of several, each is a row of every method",
    )
    _add_window_options(parser)
    parser.add_argument("--references", action="store_true", help="add random exits and the agreement oracle")
    _add_machine_options(parser)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    _positive("--limit", options.limit)
    if options.json is not None and (options.json.is_dir() or not os.access(_existing(options.json.parent), os.W_OK)):
        raise ConfigError(f"--json {options.json} cannot be written: name a file in a folder of yours.")
    from tokenexit.evaluation.evaluate import Scaled
    from tokenexit.evaluation.evaluate import evaluate as run
    from tokenexit.evaluation.processes import joined, place, together
    from tokenexit.report.evaluations import class_table, main_table, write_json
    from tokenexit.segmenter import ExitSegmenter

    named = None if options.method is None else _methods(options.method, options)
    with joined():
        with together():
            model = ExitSegmenter.from_pretrained(options.model, _device(options.device))
            _set_windows(model, options)
            name, data = _dataset(options)
            methods = named or _calibrated(model, options) or _methods(["dense"], options)
            rows = [Scaled(method, scale) for scale in dict.fromkeys(options.input_scale) for method in methods]
        results = run(
            model,
            data,
            rows,
            limit=options.limit,
            precision=options.precision,
            references=options.references,
            progress=_progress("evaluating"),
        )
        if place()[0] != 0:
            return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    images = f"{len(results[0].gmacs)} images of {name} ({options.split})"
    console.print(f"{images}{_in_windows(model)}, {options.precision} on {model.device}")
    console.print(main_table(results).to_rich())
    own = results[: len(rows)]  # reference lines are read by their totals
    console.print(class_table(own, data.labels.names).to_rich())
    if options.json is not None:
        about = {
            "model": str(options.model),
            "data": name,
            "split": options.split,
            "device": str(model.device),
            "precision": options.precision,
            "window": model.preprocessing.window,
            "stride": model.preprocessing.stride,
        }
        write_json(options.json, results, data.labels.names, about)
        print(f"figures: {options.json}")
    return 0


def _dataset(options: Any) -> tuple[str, SegmentationDataset]:
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


# ---------------------------------------------------------------------------------------------- calibrate, sweep


def calibrate(arguments: list[str]) -> int:
    parser = _parser("calibrate", "Choose thresholds for what you can afford, or for what you can bear to lose.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset to calibrate on; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="val", help="part of the dataset")
    parser.add_argument("--images", nargs="+", type=Path, metavar="IMAGE|DIR", help="pictures without labels instead")
    parser.add_argument("--limit", type=int, help="so many images only, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--method", default="dtop", help="dtop, dovit or paumer")
    _add_method_options(parser)
    _add_window_options(parser)
    wish = parser.add_argument_group("what you wish for, one of").add_mutually_exclusive_group(required=True)
    wish.add_argument("--budget", type=float, help="mean multiply-adds at most this share of dense")
    wish.add_argument("--budget-gmacs", type=float, help="mean GMACs per image at most this")
    wish.add_argument("--latency-ms", type=float, help="mean milliseconds per image at most this, on this machine")
    wish.add_argument("--max-disagreement", type=float, help="share of pixels unlike the dense model; needs no labels")
    wish.add_argument("--max-error-increase", type=float, help="share of wrong pixels over the dense model's")
    wish.add_argument("--max-miou-drop", type=float, help="points of mIoU; an estimate, no guarantee")
    parser.add_argument("--confidence", type=float, default=0.9, help="of a bound, over the draw of the images")
    parser.add_argument("--average", choices=("pixels", "classes"), default="pixels", help="a bound's error is over")
    parser.add_argument("--clip", type=float, default=1.0, help="largest loss that an image counts with, in a bound")
    parser.add_argument("--images-above", type=float, help="bound the share of images that lose more, not the mean")
    parser.add_argument("--in-expectation", action="store_true", help="bound on average, without a confidence")
    parser.add_argument("--cap", type=float, help="no image may cost more than this share of dense")
    parser.add_argument("--keep", choices=("pixels", "classes"), default="classes", help="agreement to keep is over")
    parser.add_argument("--out", type=Path, help="folder for a calibrated copy; the model's own if not given")
    _add_machine_options(parser)
    options = parser.parse_args(arguments)
    _positive("--limit", options.limit)
    if options.images is not None and (options.data is not None or options.data_root is not None):
        raise ConfigError("--images are pictures and --data is a dataset: give one of the two.")
    from tokenexit.calibration.calibrate import calibrate as run
    from tokenexit.calibration.calibrate import wish_of
    from tokenexit.calibration.runs import Bench, UnlabelledPictures, drawn
    from tokenexit.calibration.saved import write_calibration
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.preprocessing import default_labels
    from tokenexit.segmenter import ExitSegmenter

    asked = wish_of(vars(options))
    (method,) = _methods([options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, _device(options.device))
    _set_windows(model, options)
    if options.images is None:
        name, data = _dataset(options)
        about = {"data": name, "split": options.split}
    else:
        labels = model.preprocessing.labels or default_labels(model.config.num_classes)
        data = UnlabelledPictures(options.images, labels)
        about = {"data": ", ".join(map(str, options.images))}
    check_classes(model, data)
    indices = drawn(len(data), options.limit, options.seed)
    result = run(
        Bench(model, data, indices, options.precision, _progress),
        method,
        asked,
        average=options.keep,
        cap=options.cap,
        seed=options.seed,
        about=about,
        say=print,
    )
    path = write_calibration(result, options.model, options.out or options.model)
    print(result.promise)
    reached, predicted = (result.reached[key] for key in ("share_of_dense", "dense_pass_share_of_dense"))
    print(f"{result.method}: {reached:.1%} of dense multiply-adds; the dense pass predicted {predicted:.1%}")
    print(f"calibration: {path}")
    return 0


def sweep(arguments: list[str]) -> int:
    parser = _parser("sweep", "Curves of mIoU against GMACs: methods, one checkpoint, many thresholds.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test", help="part of the dataset to evaluate on")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--tune-split", default="val", help="part of the dataset to choose thresholds on, unlabelled")
    parser.add_argument("--tune-limit", type=int, help="so many of them only, drawn at random")
    parser.add_argument("--method", nargs="+", default=["dtop", "dovit"], help="any but dense; one or several")
    _add_method_options(parser, several=True)
    parser.add_argument("--points", type=int, default=8, help="of every method's curve")
    parser.add_argument("--keep", choices=("pixels", "classes"), default="classes", help="agreement to keep is over")
    parser.add_argument("--input-scale", type=float, nargs="*", default=[0.5, 0.625, 0.75, 0.875], help="rivals: dense")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder for sweep.json, .csv and .png")
    _add_window_options(parser)
    _add_machine_options(parser)
    options = parser.parse_args(arguments)
    for name in ("limit", "tune_limit", "points"):
        _positive(f"--{name.replace('_', '-')}", getattr(options, name))
    from tokenexit.calibration.runs import Bench, drawn
    from tokenexit.calibration.sweep import sweep as run
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.segmenter import ExitSegmenter

    by_hand = [m for m in _methods(options.method, options) if hasattr(m, "threshold")] if options.threshold else []
    options.threshold = None
    methods = _methods(options.method, options)
    model = ExitSegmenter.from_pretrained(options.model, _device(options.device))
    _set_windows(model, options)
    name, data = _dataset(options)
    options.split, split = options.tune_split, options.split
    _, tune = _dataset(options)
    check_classes(model, data)
    count = len(data) if options.limit is None else min(options.limit, len(data))
    rows = run(
        Bench(model, data, tuple(range(count)), options.precision, _progress),
        Bench(model, tune, drawn(len(tune), options.tune_limit, 0), options.precision, _progress),
        methods,
        by_hand,
        options.input_scale,
        options.out,
        {"data": name, "split": split, "tune_split": options.tune_split, "windows": _in_windows(model)},
        points=options.points,
        average=options.keep,
        say=print,
    )
    print(f"{len(rows)} points: {options.out / 'sweep.png'}, sweep.csv and sweep.json")
    return 0


# ------------------------------------------------------------------------------------------------------- predict


def predict(arguments: list[str]) -> int:
    parser = _parser("predict", "Segment pictures: palette PNG masks at the pictures' size, overlays, exit maps.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|DIR", help="pictures, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument("--method", help="dense, dtop or dovit; the calibrated one if not given, else dtop")
    _add_method_options(parser)
    _add_window_options(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are refused")
    _add_machine_options(parser)
    options = parser.parse_args(arguments)
    _positive("--max-pixels", options.max_pixels)
    from tokenexit.calibration.drift import Monitor
    from tokenexit.calibration.saved import usual_of
    from tokenexit.predicting import predict_files
    from tokenexit.segmenter import ExitSegmenter

    named = None if options.method is None else _methods([options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, _device(options.device))
    _set_windows(model, options)
    (method,) = named or _calibrated(model, options) or _methods(["dtop"], options)
    monitor = Monitor(usual_of(model)) if named is None and model.calibration is not None else None
    failed = predict_files(
        model,
        options.images,
        options.out,
        method,
        precision=options.precision,
        max_pixels=options.max_pixels,
        monitor=monitor,
        progress=_progress("predicting"),
    )
    warning = None if monitor is None else monitor.warning()
    if warning is not None:
        print(f"tokenexit predict: {warning}", file=sys.stderr)
    for message in failed:
        print(f"tokenexit predict: {message}", file=sys.stderr)
    if not failed:
        print(f"masks, overlays and exit maps: {options.out}")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------------- cost


def cost(arguments: list[str]) -> int:
    parser = _parser("cost", "Multiply-adds of a dense model on one image, without weights.")
    parser.add_argument("--backbone", default="vit_tiny_patch16", help="a preset, such as vit_base_patch16")
    parser.add_argument("--head", default="fcn", help="decode head")
    parser.add_argument("--num-classes", type=int, default=150, help="classes to predict")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="one side, or height and width")
    parser.add_argument(
        "--convention",
        choices=("tokenexit", "dtop"),
        default="tokenexit",
        help="dtop: as that paper counts, without class token, LayerNorm 5 and upsampling 4 per element",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    for name, value in (("--num-classes", options.num_classes), *(("--image-size", s) for s in options.image_size)):
        _positive(name, value)
    from tokenexit.ledger import dense_gmacs

    if len(options.image_size) > 2:
        raise ConfigError(f"--image-size has {len(options.image_size)} numbers: give one side, or height and width.")
    size = (options.image_size[0], options.image_size[-1])
    figures = dense_gmacs(options.backbone, options.head, options.num_classes, size, options.convention)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:12} {value}")
    return 0


# ------------------------------------------------------------------------------------------------- convert, data


def convert(arguments: list[str]) -> int:
    parser = _parser("convert", "Weights of another library to a model folder, or a backbone to a .safetensors file.")
    parser.add_argument("source", help="weight file, folder with one, or hf-hub:OWNER/NAME")
    parser.add_argument("destination", type=Path, help="model folder, or .safetensors file where there are no heads")
    parser.add_argument("--kind", default="auto", help="where the weights come from; auto tells by their names")
    parser.add_argument("--backbone", help="backbone weights, for DINOv2's released linear heads")
    parser.add_argument("--backbone-only", action="store_true", help="leave the heads out")
    parser.add_argument("--exits", type=int, nargs="*", help="after how many blocks auxiliary heads stand")
    options = parser.parse_args(arguments)
    from tokenexit.converting import convert as run

    report = run(
        options.source,
        options.destination,
        kind=options.kind,
        backbone=options.backbone,
        backbone_only=options.backbone_only,
        exits=options.exits,
    )
    print(report.summary())
    return 0


def data(arguments: list[str]) -> int:
    parser = _parser("data", "check: read a whole dataset and say what is in it and what is wrong with it.")
    parser.add_argument("action", choices=("check",))
    parser.add_argument("name", help="dataset, such as camvid, ade20k, cityscapes, folder")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", nargs="+", help="these splits only; all on disk if not given")
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    options = parser.parse_args(arguments)
    from tokenexit.data.check import run_data_check

    return run_data_check(
        options.name, options.data_root, options.split, progress=_progress("checking"), json_path=options.json
    )


# -------------------------------------------------------------------------------------------------------- doctor


def doctor(arguments: list[str]) -> int:
    _parser("doctor", "Versions, devices, attention path and precision on this machine.").parse_args(arguments)
    from tokenexit.doctor import diagnose, format_findings

    findings = diagnose()
    print(format_findings(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0


# ------------------------------------------------------------------------------------------------------- methods


def _add_method_options(parser: Any, several: bool = False) -> None:
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


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes CUDA where there is one")


METHOD_OPTIONS = (
    *("score", "temperature", "boundary_guard", "keep_per_class", "finish", "ratios", "after"),
    *("blend_weight", "batch_mode", "scoring"),
)


def _given_method_options(options: Any) -> dict[str, Any]:
    """Options of methods that were given, threshold included."""
    names = ("threshold", *METHOD_OPTIONS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return given | {name: _numbers(name, given[name]) for name in ("temperature", "ratios") if name in given}


def _method_specs(names: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """One specification for every method and threshold; options are given to the methods that have them."""
    from dataclasses import fields

    from tokenexit.methods import METHODS

    given = _given_method_options(options)
    texts = given.get("threshold", [])
    thresholds = [_numbers("threshold", text) for text in (texts if isinstance(texts, list) else [texts])]
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


def _calibrated(model: ExitSegmenter, options: Any) -> list[Method[Any]] | None:
    """The method that the model was calibrated to, alone; None if it was not."""
    method = model.calibrated_method()
    if method is not None and _given_method_options(options):
        raise ConfigError("options of a method need --method, as this model has a calibration of its own: name it.")
    return None if method is None else [method]


def _methods(names: Sequence[str], options: Any) -> list[Method[Any]]:
    from tokenexit.methods import build_method

    return [build_method(spec) for spec in _method_specs(names, options)]


def _numbers(name: str, text: str) -> Any:
    """`0.95`, or `0.98/0.9/0.8` with one for each exit, each of them one number or `0.9,0.99,0.95` for every class."""
    try:
        exits = [tuple(float(part) for part in exit.split(",")) for exit in text.split("/")]
    except ValueError:
        raise ConfigError(f"--{name} {text} is no number: write 0.95, or 0.98/0.9/0.8 for one per exit.") from None
    values = tuple(exit[0] if len(exit) == 1 else exit for exit in exits)
    return values[0] if text.count("/") == text.count(",") == 0 else values


# ------------------------------------------------------------------------------------------------------- windows


def _add_window_options(parser: argparse.ArgumentParser) -> None:
    sides: dict[str, Any] = {"nargs": "+", "metavar": "PIXELS"}
    parser.add_argument("--window", help="segment in windows of one side, or height and width; none: whole", **sides)
    parser.add_argument("--stride", help="of the windows, which touch if it is not given", **sides)


def _set_windows(model: ExitSegmenter, options: Any) -> None:
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


def _in_windows(model: ExitSegmenter) -> str:
    window, stride = model.preprocessing.window, model.preprocessing.stride
    if window is None or stride is None:
        return ""
    return f" in windows of {window[0]}x{window[1]} every {stride[0]}x{stride[1]}"


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} {value} must be at least 1.")


def _progress(title: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(items, description=title, console=console, disable=not console.is_terminal)


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, itself included, that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _device(name: str) -> torch.device:
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "quickstart": quickstart,
    "train": train,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "sweep": sweep,
    "predict": predict,
    "cost": cost,
    "convert": convert,
    "data": data,
    "doctor": doctor,
}
