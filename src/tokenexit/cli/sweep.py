"""The command `sweep`: curves of mIoU against compute."""

from __future__ import annotations

from pathlib import Path

from tokenexit.cli.method_options import add_method_options, method_names
from tokenexit.cli.options import (
    add_machine_options,
    add_window_options,
    command_parser,
    dataset_of,
    in_windows,
    machine_of,
    methods_of,
    positive,
    progress_bars,
    set_windows,
)


def sweep(arguments: list[str]) -> int:
    parser = command_parser("sweep", "Curves of mIoU against GMACs: methods, one checkpoint, many thresholds.")
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--data", help="dataset; that of the training if not given")
    parser.add_argument("--data-root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", default="test", help="part of the dataset to evaluate on")
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument("--tune-split", default="val", help="part of the dataset to choose thresholds on, unlabelled")
    parser.add_argument("--tune-limit", type=int, help="so many of them only, drawn at random")
    parser.add_argument(
        "--method", nargs="+", choices=method_names(), default=["dtop", "dovit"], help="any but dense; one or several"
    )
    add_method_options(parser, several=True)
    parser.add_argument("--points", type=int, default=8, help="of every method's curve")
    parser.add_argument("--full-range", action="store_true", help="go on where agreement with dense has fallen off")
    parser.add_argument("--keep", choices=("pixels", "classes"), default="classes", help="agreement to keep is over")
    parser.add_argument("--input-scale", type=float, nargs="*", default=[0.5, 0.625, 0.75, 0.875], help="rivals: dense")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder for sweep.json, .csv and .png")
    add_window_options(parser)
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    for name in ("limit", "tune_limit", "points"):
        positive(f"--{name.replace('_', '-')}", getattr(options, name))
    from tokenexit.calibration.calibration_set import CalibrationSet, drawn
    from tokenexit.evaluation.evaluate import check_classes
    from tokenexit.report.sweep import sweep as run
    from tokenexit.runtime.precision import inference
    from tokenexit.segmenter import ExitSegmenter

    by_hand = [m for m in methods_of(options.method, options) if hasattr(m, "threshold")] if options.threshold else []
    options.threshold = None
    methods = methods_of(options.method, options)
    model = ExitSegmenter.from_pretrained(options.model, machine_of(options))
    set_windows(model, options)
    name, data = dataset_of(options)
    options.split, split = options.tune_split, options.split
    _, tune = dataset_of(options)
    check_classes(model, data)
    count = len(data) if options.limit is None else min(options.limit, len(data))
    progress = progress_bars()
    with inference(model.device, options.precision):
        rows = run(
            CalibrationSet(model, data, tuple(range(count)), options.precision, progress),
            CalibrationSet(model, tune, drawn(len(tune), options.tune_limit, 0), options.precision, progress),
            methods,
            by_hand,
            options.input_scale,
            options.out,
            {"data": name, "split": split, "tune_split": options.tune_split, "windows": in_windows(model)},
            points=options.points,
            average=options.keep,
            full_range=options.full_range,
            say=print,
        )
    print(f"{len(rows)} points: {options.out / 'sweep.png'}, sweep.csv and sweep.json")
    return 0
