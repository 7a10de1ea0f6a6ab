"""The command `calibrate`: thresholds for a budget or a bounded loss."""

from __future__ import annotations

from pathlib import Path

from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import (
    add_machine_options,
    add_window_options,
    command_parser,
    dataset_of,
    machine_of,
    methods_of,
    positive,
    progress_bars,
    set_windows,
    share,
)
from tokenexit.errors import ConfigError


def calibrate(arguments: list[str]) -> int:
    parser = command_parser("calibrate", "Choose thresholds for what you can afford, or for what you can bear to lose.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset to calibrate on; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="val", help="part of the dataset")
    parser.add_argument("--images", nargs="+", type=Path, metavar="IMAGE|DIR", help="images without labels instead")
    parser.add_argument("--limit", type=int, help="so many images only, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--method", choices=method_names(), default="dtop", help="dtop, dovit or paumer")
    add_method_options(parser, without=("cap",))
    add_window_options(parser)
    target = parser.add_argument_group("target, one of").add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", type=share, help="mean multiply-adds, at most this share of dense: 0.6, or 60%%")
    target.add_argument("--budget-gmacs", type=float, help="mean GMACs per image at most this")
    target.add_argument("--latency-ms", type=float, help="mean milliseconds per image at most this, on this machine")
    target.add_argument(
        "--max-disagreement", type=share, help="share of pixels unlike the dense model; needs no labels"
    )
    target.add_argument("--max-error-increase", type=share, help="share of wrong pixels over the dense model's")
    target.add_argument("--max-miou-drop", type=float, help="points of mIoU; an estimate, no guarantee")
    target.add_argument(
        "--cbt",
        type=float,
        nargs=2,
        metavar=("ALPHA", "BETA"),
        help="class-based thresholds between the two from labelled training images, such as 0.9 0.998",
    )
    parser.add_argument("--confidence", type=float, default=0.9, help="of a bound, over the draw of the images")
    parser.add_argument("--average", choices=("pixels", "classes"), default="pixels", help="a bound's error is over")
    parser.add_argument("--clip", type=float, default=1.0, help="largest loss that an image counts with, in a bound")
    parser.add_argument("--images-above", type=share, help="bound the share of images that lose more, not the mean")
    parser.add_argument("--in-expectation", action="store_true", help="bound on average, without a confidence")
    parser.add_argument("--cap", type=share, help="no image may cost more than this share of dense")
    parser.add_argument("--keep", choices=("pixels", "classes"), default="classes", help="agreement to keep is over")
    parser.add_argument("--fit-temperature", action="store_true", help="of the exit heads first; needs labels")
    parser.add_argument("--out", type=Path, help="folder for a calibrated copy; the model's own if not given")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    positive("--limit", options.limit)
    if options.threshold is not None:
        raise ConfigError("--threshold is what calibrate chooses: leave it out, or give it to predict and evaluate.")
    if options.images is not None and (options.data is not None or options.data_root is not None):
        raise ConfigError("--images are files and --data is a dataset: give one of the two.")
    from tokenexit.calibration.calibrate import calibrate as run
    from tokenexit.calibration.calibration_set import CalibrationSet, UnlabelledImages, drawn
    from tokenexit.calibration.cbt import calibrate_by_class
    from tokenexit.calibration.store import write_calibration
    from tokenexit.calibration.targets import target_of
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.inputs.labels import default_labels
    from tokenexit.methods import build_method
    from tokenexit.runtime.precision import inference
    from tokenexit.segmenter import ExitSegmenter

    asked = None if options.cbt is not None else target_of(vars(options))
    if asked is None and (options.fit_temperature or options.cap is not None):
        raise ConfigError("--cbt follows from labels alone: leave --cap and --fit-temperature out.")
    if options.fit_temperature and options.temperature is not None:
        raise ConfigError("--temperature is given and --fit-temperature finds one: give one of the two.")
    (method,) = methods_of([options.method], options)
    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
    set_windows(model, options)
    if options.images is None:
        name, data = dataset_of(options)
        about = {"data": name, "split": options.split}
    else:
        labels = model.preprocessing.labels or default_labels(model.config.num_classes)
        data = UnlabelledImages(options.images, labels)
        about = {"data": ", ".join(map(str, options.images))}
    check_classes(model, data)
    indices = drawn(len(data), options.limit, options.seed)
    calibration_set = CalibrationSet(model, data, indices, options.precision, progress_bars())
    with inference(model.device, options.precision):
        if asked is None:
            result = calibrate_by_class(calibration_set, method, options.cbt[0], options.cbt[1], about)
        else:
            result = run(
                calibration_set,
                method,
                asked,
                average=options.keep,
                cap=options.cap,
                seed=options.seed,
                temperatures=options.fit_temperature,
                about=about,
                say=print,
            )
    path = write_calibration(result, options.model, options.out or options.model)
    print(result.guarantee)
    predicted = result.reached.get("dense_pass_share_of_dense")
    beside = "" if predicted is None else f"; the dense pass predicted {predicted:.1%}"
    chosen = build_method(result.method).label
    print(f"{chosen}: {result.reached['share_of_dense']:.1%} of dense multiply-adds{beside}")
    print(f"calibration: {path}")
    return 0
