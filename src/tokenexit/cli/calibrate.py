"""The command `calibrate`: thresholds for a budget or a bounded loss."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.chosen_methods import merged, methods_of, reducer_to_choose
from tokenexit.cli.method_options import add_merge_option, add_method_options, threshold_method_names
from tokenexit.cli.options import (
    add_data_options,
    add_keep_option,
    add_model_argument,
    add_running_options,
    check_counts,
    command_parser,
    completes,
    dataset_of,
    open_model,
    share,
)
from tokenexit.cli.progress import progress_bars
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from tokenexit.calibration.calibration_set import CalibrationSet
    from tokenexit.calibration.targets import CalibrationTarget
    from tokenexit.checkpoints.calibration import Calibration

PROGRESS_FILE = ".calibrating.json"
"""What was tried of merging so far, in the folder of the calibration, until that is written."""


def calibrate(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    from tokenexit.calibration.store import write_calibration
    from tokenexit.calibration.targets import target_of
    from tokenexit.runtime.precision import inference

    target = None if options.cbt is not None else target_of(vars(options))
    if target is None and (options.fit_temperature or options.cap is not None):
        raise ConfigError("--cbt follows from labels alone: leave --cap and --fit-temperature out.")
    (method,) = methods_of([options.method], options)
    by, choose_merging = reducer_to_choose(options.merge)
    progress = (options.out or options.model) / PROGRESS_FILE if choose_merging else None
    calibration_set, about = _calibration_set(options)
    method = merged(calibration_set.model, method, by)
    with inference(calibration_set.model.device, options.precision):
        result = _calibration(calibration_set, method, target, about, options, choose_merging, progress)
    path = write_calibration(result, options.model, options.out or options.model)
    if progress is not None:
        progress.unlink(missing_ok=True)
    _print_calibration(result)
    print(f"calibration: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("calibrate", "Choose thresholds for what you can afford, or for what you can bear to lose.")
    add_model_argument(parser)
    parser.add_argument("--out", type=Path, help="folder for a calibrated copy; the model's own if not given")
    _add_target(parser)
    _add_bound_options(parser)
    add_data_options(parser, "val", "number of images, drawn at random")
    parser.add_argument("--images", nargs="+", type=Path, metavar="IMAGE|DIR", help="images without labels, not --data")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    known = threshold_method_names()
    method = parser.add_argument("--method", metavar="NAME", default=known[0], help=f"method: {', '.join(known)}")
    completes(method, known)
    add_method_options(parser, without=("cap",), only=known)
    add_merge_option(parser, chosen=True)
    parser.add_argument("--cap", type=share, help="largest share of dense multiply-adds that any image may cost")
    add_keep_option(parser)
    parser.add_argument(
        "--plan",
        choices=("dense", "labels"),
        help="size, stop and open exits chosen with the thresholds, by agreement with dense or by labels; for budgets",
    )
    parser.add_argument(
        "--fit-temperature", action="store_true", help="temperatures of the exit heads first; needs labels"
    )
    add_running_options(parser)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group("target, one of these").add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", type=share, help="largest mean multiply-adds, as a share of dense: 0.6, or 60%%")
    target.add_argument("--budget-gmacs", type=float, help="largest mean GMACs of an image")
    target.add_argument("--latency-ms", type=float, help="largest mean milliseconds of an image, on this machine")
    target.add_argument(
        "--max-disagreement", type=share, help="largest share of pixels unlike the dense model; needs no labels"
    )
    target.add_argument("--max-error-increase", type=share, help="largest share of wrong pixels over the dense model's")
    target.add_argument("--max-miou-drop", type=float, help="largest loss in points of mIoU; an estimate, no guarantee")
    target.add_argument(
        "--cbt",
        type=float,
        nargs=2,
        metavar=("ALPHA", "BETA"),
        help="class-based thresholds between the two from labelled training images, such as 0.9 0.998",
    )


def _add_bound_options(parser: argparse.ArgumentParser) -> None:
    bound = parser.add_argument_group("bounds")
    bound.add_argument("--confidence", type=float, default=0.9, help="confidence of a bound, over the draw of images")
    bound.add_argument(
        "--average",
        choices=("pixels", "classes"),
        default="pixels",
        help="units over which a bound's error is averaged",
    )
    bound.add_argument("--clip", type=float, default=1.0, help="largest loss that an image counts with in a bound")
    bound.add_argument(
        "--images-above",
        type=share,
        help="loss above which an image counts, for a bound on the share of such images and not on the mean",
    )
    bound.add_argument("--in-expectation", action="store_true", help="bound on average, without a confidence")


def _check(options: argparse.Namespace) -> None:
    """Refuse, before torch is loaded, what does not go together."""
    check_counts(options, "limit")
    known = threshold_method_names()
    if options.method not in known:
        raise ConfigError(
            f"method '{options.method}' has no thresholds to calibrate: choose one of {', '.join(known)}."
        )
    if options.threshold is not None:
        raise ConfigError("--threshold is what calibrate chooses: leave it out, or give it to predict and evaluate.")
    if options.images is not None and (options.data is not None or options.data_root is not None):
        raise ConfigError("--images are files and --data is a dataset: give one of the two.")
    budget = options.budget or options.budget_gmacs or options.latency_ms
    if options.plan is not None and (options.cap is not None or budget is None):
        raise ConfigError("--plan goes with a budget, without --cap: leave one of the two out.")
    if options.merge is not None:
        for name in ("plan", "cap", "cbt", "fit_temperature"):
            if getattr(options, name) not in (None, False):
                other = name.replace("_", "-")
                raise ConfigError(f"--merge goes with thresholds for a budget or a bound alone: leave --{other} out.")
    if options.fit_temperature and options.temperature is not None:
        raise ConfigError("--temperature is given and --fit-temperature finds one: give one of the two.")


def _calibration_set(options: argparse.Namespace) -> tuple[CalibrationSet, dict[str, Any]]:
    """Model and images, and where the images are from."""
    from tokenexit.calibration.calibration_set import CalibrationSet, drawn
    from tokenexit.data.photos import UnlabelledImages
    from tokenexit.evaluation.evaluate import check_classes

    model = open_model(options)
    if options.images is None:
        name, data = dataset_of(options)
        about = {"data": name, "split": options.split}
    else:
        data = UnlabelledImages(options.images, model.classes)
        about = {"data": ", ".join(map(str, options.images))}
    check_classes(model, data)
    indices = drawn(len(data), options.limit, options.seed)
    return CalibrationSet(model, data, indices, options.precision, progress_bars()), about


def _calibration(
    calibration_set: CalibrationSet,
    method: Any,
    target: CalibrationTarget | None,
    about: dict[str, Any],
    options: argparse.Namespace,
    choose_merging: bool,
    progress: Path | None,
) -> Calibration:
    """Thresholds for a target, or class-based ones if there is none."""
    from tokenexit.calibration.calibrate import calibrate as run
    from tokenexit.calibration.cbt import calibrate_by_class

    if target is None:
        alpha, beta = options.cbt
        return calibrate_by_class(calibration_set, method, alpha, beta, about)
    return run(
        calibration_set,
        method,
        target,
        average=options.keep,
        cap=options.cap,
        seed=options.seed,
        temperatures=options.fit_temperature,
        plan=options.plan,
        choose_merging=choose_merging,
        progress=progress,
        about=about,
        say=print,
    )


def _print_calibration(result: Calibration) -> None:
    from tokenexit.methods import build_method

    print(result.guarantee)
    predicted = result.reached.get("dense_pass_share_of_dense")
    beside = "" if predicted is None else f"; the dense pass predicted {predicted:.1%}"
    chosen = build_method(result.method).label
    print(f"{chosen}: {result.reached['share_of_dense']:.1%} of dense multiply-adds{beside}")
