"""Accuracy against compute of one trained model: every size, every stop, exits at every size, and plans of all three.

    python -m benchmarks.frontier runs/camvid-dense --data camvid --data-root data/camvid --seed 0 --out FILE

The rivals of exits are static: the image at another size, everybody stopped after some block, both together. Plans are
made on the images of `--plan-split`, by agreement with the dense model and by labels, and run on those of `--split`
like every other row. `--merge supertokens:0.6,policy=net` adds exits beside merging at every size. Rows of one size are
run in turn, and results are in the file as they come: a second call goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import model_and_data_parser
from tokenexit.calibration.calibration_set import CalibrationSet, labelled
from tokenexit.calibration.for_plan import on_all_exits
from tokenexit.calibration.plans import choose_plan
from tokenexit.calibration.survey import Survey
from tokenexit.cli.chosen_methods import reducers_of
from tokenexit.cli.progress import progress_bars
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Cached
from tokenexit.data.registry import open_dataset
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import Evaluation, evaluate
from tokenexit.evaluation.results import Scaled
from tokenexit.methods import Dense, DToP, Method, Reduced, Truncated
from tokenexit.reducers import Reducer
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.notebook import Notebook
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

SIZES = (1.25, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35)
THRESHOLDS: tuple[tuple[float, ...], ...] = ((0.99, 0.95, 0.9), (0.98, 0.9, 0.8), (0.98, 0.8, 0.65), (0.9, 0.7, 0.5))
AT_RANDOM = (1.0, 0.7)
"""Sizes at which random exits run beside."""
CONTEXT = ("keep_per_class", "keep_in_window", "frozen_context")
"""Options of DToP that say which tokens stay as context."""
BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def static_plans(model: ExitSegmenter) -> list[Method[Any]]:
    """Return what needs no exits: dense, and a stop after each of them."""
    return [Dense(), *(Truncated(n + 1) for n in range(len(model.config.exits)))]


def exit_plans(
    thresholds: Sequence[Sequence[float]],
    stops: Sequence[int | None],
    merging: Sequence[Reducer],
    context: Mapping[str, Any],
) -> list[Method[Any]]:
    """Return exits at a few thresholds, stopped or not, alone and beside merging; with other options of DToP."""
    exits = [DToP(tuple(one), stop=stop, **context) for stop in stops for one in thresholds]
    return [*exits, *(Reduced(each, by) for by in merging for each in exits)]


def figures(
    model: ExitSegmenter, data: SegmentationDataset, rows: Sequence[Scaled], at_random: bool, precision: Precision
) -> list[Any]:
    """Run rows on all images; at random: with random exits at the counts of each, and the oracle at full size."""
    lines = ["random"] if at_random else []
    if at_random and rows[0].input_scale == 1.0:
        lines.append("oracle")
    found = evaluate(
        model,
        data,
        rows,
        precision=precision,
        references=lines,  # type: ignore[arg-type]
        progress=progress_bars()("running"),
    )
    dense = found[0] if rows[0].method == Dense() else None
    return [as_row(one, data, dense) for one in found]


def as_row(one: Evaluation, data: SegmentationDataset, dense: Evaluation | None) -> dict[str, Any]:
    """Return a row as JSON, with the interval of its mIoU less that of dense at the same size."""
    return one.to_dict(data.labels.names) | {
        "minus_dense_interval": None if dense is None else one.miou_interval(dense),
        "latency_ms_p95": sorted(one.latency_ms)[int(0.95 * len(one.latency_ms))],
    }


def plans(
    model: ExitSegmenter, data: SegmentationDataset, chosen_on: SegmentationDataset, labels: bool
) -> list[dict[str, Any]]:
    """Make a plan for every budget on some images, and run them on the others."""
    images = CalibrationSet(model, Cached(chosen_on), range(len(chosen_on)), progress=progress_bars())
    if labels:
        images = labelled(images)
    rows: list[Scaled] = []
    about: list[dict[str, Any]] = []
    with inference(model.device, "fp32"):
        survey = Survey(images, DToP(), "classes", labels=labels)
        for budget in BUDGETS:
            try:
                best, *others = choose_plan(survey, budget)
            except ConfigError:
                continue
            print(f"{budget:.0%}: {best.plan} ({best.agreement:.2%}), then {', '.join(str(o.plan) for o in others)}")
            method = on_all_exits(model.config.exits, best)
            rows.append(Scaled(method))
            about.append({"budget": budget, "plan": str(best.plan), "kind": best.kind, "loss": best.loss})
    found = evaluate(model, data, rows, progress=progress_bars()("running plans"))
    return [as_row(one, data, None) | told for one, told in zip(found, about)]


def per_exit(text: str) -> tuple[float, ...]:
    """Read thresholds written as `0.99/0.95/0.9`."""
    return tuple(map(float, text.split("/")))


def main() -> None:
    keep_buffers()
    parser = model_and_data_parser(__doc__)
    parser.add_argument("--name", help="name of the data in the rows; that of the dataset if not given")
    parser.add_argument("--plan-split", default="val")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--thresholds", nargs="+", type=per_exit, help="of exits, such as 0.99/0.95/0.9, a few of them")
    parser.add_argument("--merge", nargs="+", default=[], help="reducers beside exits, such as supertokens:0.9")
    parser.add_argument("--seed", type=int, default=0, help="seed that the model was trained with, for the rows")
    parser.add_argument("--trained", default="dense", help="how the model was trained, for the rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of every row; plans take fp32")
    parser.add_argument("--static", action="store_true", help="sizes and stops alone, without exits")
    parser.add_argument("--exits-only", action="store_true", help="exits alone, where static plans were run before")
    parser.add_argument(
        "--stops", type=int, nargs="+", help="exits at which all that are left leave; none if not given"
    )
    for name in CONTEXT:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="of all exits; as published if not given")
    parser.add_argument("--no-plans", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = ExitSegmenter.from_pretrained(options.model)
    model.calibration = None
    data, chosen_on = (
        open_dataset(options.data, options.data_root, one) for one in (options.split, options.plan_split)
    )
    settings = {"data": options.name or options.data, "split": options.split, "seed": options.seed,
                "trained": options.trained,
                "model": model.fingerprint(), "torch": torch.__version__, "threads": options.threads}  # fmt: skip
    if options.thresholds:
        settings["thresholds"] = options.thresholds
    if options.precision != "fp32":
        settings["precision"] = options.precision
    context = {name: getattr(options, name) for name in CONTEXT if getattr(options, name) is not None}
    settings |= context
    for name in ("merge", "exits_only", "stops"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    notebook = Notebook(options.out, settings)
    thresholds = options.thresholds or [one[: len(model.config.exits)] for one in THRESHOLDS]
    merging = [by for by in reducers_of(options.merge) if by is not None]
    at_random: tuple[float, ...] = AT_RANDOM
    planned_by: tuple[bool, ...] = (False, True)
    if options.static:
        thresholds = []
    if options.static or options.exits_only:
        at_random = ()
    if options.static or options.no_plans or not model.decode_head.takes_live_tokens:
        planned_by = ()
    methods = [] if options.exits_only else static_plans(model)
    if model.decode_head.takes_live_tokens:
        methods += exit_plans(thresholds, options.stops or [None], merging, context)
    for size in options.sizes:
        rows = [Scaled(method, size) for method in methods]
        run = partial(figures, model, Cached(data), rows, size in at_random, options.precision)
        for row in notebook.once(f"size {size:g}", run):
            print(f"{row['label']}: mIoU {row['mIoU']:.2f} at {row['gmacs_mean']:.2f} GMACs", flush=True)
    for labels in planned_by:
        key = f"plans by {'labels' if labels else 'agreement'}"
        for row in notebook.once(key, partial(plans, model, data, chosen_on, labels)):
            print(f"{key}, {row['budget']:.0%}: {row['plan']}: mIoU {row['mIoU']:.2f} at {row['gmacs_mean']:.2f} GMACs")


if __name__ == "__main__":
    main()
