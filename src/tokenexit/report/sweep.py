"""Accuracy against compute: one checkpoint, many budgets, methods beside each other and beside smaller images.

Every point is a true run on the evaluation images; only the thresholds come from the dense pass, on other images.
`sweep.json` is written after every point, and a call with the same settings goes on where the last one ended.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenexit.calibration.agreement import FALL_OFF
from tokenexit.calibration.calibration_set import (
    CalibrationSet,
    Reference,
    dense_reference,
    error,
    mean_error,
    true_run,
)
from tokenexit.calibration.planner import COMPARED_IMAGES, Planner
from tokenexit.calibration.targets import Average
from tokenexit.calibration.threshold_path import position_where
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.evaluation.results import Scaled
from tokenexit.methods import Method, Reduced, build_method, spec_of
from tokenexit.methods.reduced import parted
from tokenexit.methods.thresholded import calibratable
from tokenexit.reducers import Reducer
from tokenexit.report.chart import collapse_floor
from tokenexit.runtime.atomic import write_or_refuse
from tokenexit.runtime.notebook import Notebook

FIELDS = (
    "series",
    "label",
    "input_scale",
    "mIoU",
    "aAcc",
    "mAcc",
    "boundary_IoU",
    "gmacs_mean",
    "gmacs_p5",
    "gmacs_p95",
    "share_of_dense",
    "latency_ms_median",
    "images",
)
"""Columns of `sweep.csv`."""
CHOSEN = "{}, thresholds chosen"
BY_HAND = "{}, one threshold"
SMALLER = "dense, smaller images"
CURE = "choose another --out"
HALVINGS = 5
"""True runs that find where agreement falls off, to a 32nd of the path's range of compute."""
STYLES = (("#1f6fb4", "o"), ("#c8501e", "s"), ("#0f7f6b", "^"), ("#7a4fb5", "D"), ("#8a6d00", "v"), ("#b03060", "P"))


@dataclass(frozen=True)
class SweepPoint:
    """One point: the line it belongs to, the method's specification, and the scale of the images' sides."""

    series: str
    method: dict[str, Any]
    input_scale: float = 1.0


def plan_rule(method: Method[Any], points: int, num_exits: int) -> list[SweepPoint] | None:
    """Points of a method without thresholds, from dear to cheap; None for one that has them."""
    method, by = parted(method)
    chosen = method.curve(points, num_exits)
    name, beside = named(method, by), chosen if by is None else [Reduced(one, by) for one in chosen]
    if by is not None and method.thresholds is None and not chosen:  # the reducer alone
        return [SweepPoint(name, spec_of(Reduced(method, by)))]
    return [SweepPoint(name, spec_of(one)) for one in beside] or None


def named(method: Method[Any], by: Reducer | None) -> str:
    """Name of a line: the method, and what merges tokens beside it."""
    return method.name if by is None else f"{method.name} + {by.label}"


def plan_method(
    calibration_set: CalibrationSet,
    method: Method[Any],
    points: int,
    average: Average,
    full_range: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[SweepPoint]:
    """Points of one method, evenly spaced in predicted compute, from behind "nobody leaves", which is dense with heads
    that cost, to where agreement with dense falls off.

    full_range: on to before "everybody leaves at once", which is a truncation at the first exit.
    """
    method, by = parted(method)
    name = named(method, by)
    planner = Planner(calibration_set, calibratable(method), average, by=by)
    reference = dense_reference(calibration_set)
    middle = (planner.mac_ratio(0.0) + planner.mac_ratio(planner.path.end)) / 2
    planner.compare(calibration_set, reference, middle, partial(mean_error, average=average))
    end = planner.path.end
    first, last = planner.mac_ratio(0.0), planner.mac_ratio(end)
    steps = points + 1  # without the ends
    if not full_range:
        reach, unlike, images = agreeing(planner, calibration_set, reference)
        if reach < 1.0:
            last, steps = first + (last - first) * reach, points
            say(
                f"{name}: agreement with dense falls off, points end at {last:.0%} of dense compute, with "
                f"{unlike:.1%} of the pixels of {images} tuning images unlike dense (--full-range goes on)"
            )
    wanted = [first + (last - first) * i / steps for i in range(1, points + 1)]
    positions = dict.fromkeys(position_where(planner.mac_ratio, share, end) for share in wanted)
    return [SweepPoint(CHOSEN.format(name), spec_of(planner.method_at(position))) for position in positions]


def agreeing(planner: Planner, calibration_set: CalibrationSet, reference: Reference) -> tuple[float, float, int]:
    """How far down in compute, as a share of the path's range, true runs on a few images keep to dense labels: at most
    `FALL_OFF` of the pixels unlike them. With the pixels unlike dense there, and how many images that are.

    A dense pass alone cannot say: what the loss of context does to the tokens that stay is not in it. At least
    `1 / 2^HALVINGS`, so that a method which never keeps to them has its points, too.
    """
    positions = calibration_set.spread(COMPARED_IMAGES)
    few, said, end = calibration_set.part(positions), reference.part(positions), planner.path.end
    first, last = planner.mac_ratio(0.0), planner.mac_ratio(end)

    def unlike(reach: float) -> float:
        position = position_where(planner.mac_ratio, first + (last - first) * reach, end)
        run = true_run(few, planner.method_at(position), said, "looking where agreement falls off")
        return error(run.confusion, "pixels").mean().item()

    seen = {1.0: unlike(1.0)}
    low, high = (1.0, 1.0) if seen[1.0] <= FALL_OFF else (0.0, 1.0)
    for _ in range(HALVINGS if low < high else 0):
        middle = (low + high) / 2
        seen[middle] = unlike(middle)
        low, high = (middle, high) if seen[middle] <= FALL_OFF else (low, middle)
    reach = low if low > 0.0 else high
    return reach, seen[reach], len(positions)


def sweep(
    calibration_set: CalibrationSet,
    tune: CalibrationSet,
    methods: Sequence[Method[Any]],
    by_hand: Sequence[Method[Any]],
    scales: Sequence[float],
    out: Path,
    settings: Mapping[str, Any],
    *,
    points: int = 8,
    average: Average = "classes",
    full_range: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run all points and write `sweep.json`, `sweep.csv` and `sweep.png` to the folder `out`.

    calibration_set: images to evaluate on, the first of their dataset. tune: images to choose thresholds on, without
    labels. methods: one line each, of thresholds chosen or of what else they have; in `Reduced`
    with the reducer on. by_hand: methods as they are, one
    line for each name. scales: of the images' sides, for the line of dense models on smaller images. full_range: see
    `plan_method`. settings: what else decides the figures, such as model and data. Returns the rows. Raises
    `ConfigError` if `out` holds a sweep of other settings.
    """
    plt = _pyplot()
    notebook = Notebook(
        out / "sweep.json",
        {
            **settings,
            "model": calibration_set.model.fingerprint(),
            "methods": [spec_of(method) for method in methods],
            "by_hand": [spec_of(method) for method in by_hand],
            "scales": list(scales),
            "points": points,
            "average": average,
            "full_range": full_range,
            "images": len(calibration_set),
            "tuned_on": len(tune),
            "precision": calibration_set.precision,
        },
    )

    def planned() -> list[dict[str, Any]]:
        found = [SweepPoint("dense", {"name": "dense"})]
        found += [SweepPoint(SMALLER, {"name": "dense"}, scale) for scale in scales if scale != 1.0]
        found += [SweepPoint(BY_HAND.format(named(*parted(method))), spec_of(method)) for method in by_hand]
        for method in methods:
            own = plan_rule(method, points, len(calibration_set.model.config.exits))
            if own is None:
                say(f"choosing thresholds of {named(*parted(method))} on {len(tune)} images")
                own = plan_method(tune, method, points, average, full_range, say)
            found += own
        return [asdict(point) for point in found]

    plan = [SweepPoint(**point) for point in notebook.once("points", planned)]
    rows = [
        notebook.once(f"row {n}", partial(measured_row, calibration_set, point, f"{n}/{len(plan)}"))
        for n, point in enumerate(plan, start=1)
    ]
    _write_csv(out / "sweep.csv", rows)
    _draw(plt, rows, out / "sweep.png")
    return rows


def measured_row(calibration_set: CalibrationSet, point: SweepPoint, number: str) -> dict[str, Any]:
    """Evaluate one point; number: where it stands among all, for the progress."""
    row = Scaled(build_method(point.method), point.input_scale)
    (result,) = evaluate(
        calibration_set.model,
        calibration_set.data,
        [row],
        limit=len(calibration_set),
        precision=calibration_set.precision,
        progress=calibration_set.progress(f"{number} {row.label}"),
    )
    return {"series": point.series, **result.to_dict(calibration_set.data.labels.names)}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with write_or_refuse(path, CURE) as unfinished, unfinished.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("sweep draws with matplotlib, which is missing: pip install 'tokenexit[plot]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw(plt: Any, rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = figure_of(plt, rows)
    with write_or_refuse(path, CURE) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


def figure_of(plt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """mIoU against GMACs, a line for each series; dense is a point, and begins the line of smaller images.

    Points of a collapse stand on the lower edge as an arrow with their value, and do not flatten the rest.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    dense = [row for row in rows if row["series"] == "dense"]
    names = [name for name in dict.fromkeys(row["series"] for row in rows) if name != "dense"]
    floor = collapse_floor(list(map(_miou, rows)), max(map(_miou, dense), default=math.nan))
    if floor is not None:
        above = [miou for miou in map(_miou, rows) if miou >= floor]
        margin = 0.05 * (max(above) - min(above) + 1)
        axes.set_ylim(min(above) - margin, max(above) + margin)
    for name, (colour, marker) in zip(names, STYLES * len(names)):
        line = [row for row in rows if row["series"] == name] + (dense if name == SMALLER else [])
        line.sort(key=lambda row: row["gmacs_mean"])
        style = ":" if name.endswith("one threshold") else "-"
        spots = [row["gmacs_mean"] for row in line], [row["mIoU"] for row in line]
        axes.plot(*spots, style, color=colour, marker=marker, markersize=5, label=name)
        for row in line:
            if floor is not None and _miou(row) < floor:
                spot = row["gmacs_mean"], axes.get_ylim()[0]
                axes.plot(*spot, "v", color=colour, markersize=9, clip_on=False, zorder=5)
                axes.annotate(f"{row['mIoU']:.1f}", spot, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    for row in dense:
        axes.plot([row["gmacs_mean"]], [row["mIoU"]], "*", color="#222222", markersize=12, label="dense")
    axes.set_xlabel("GMACs per image, mean")
    axes.set_ylabel("mIoU, percent")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="lower right")
    return figure


def _miou(row: dict[str, Any]) -> float:
    """NaN where JSON has none."""
    return math.nan if row["mIoU"] is None else float(row["mIoU"])
