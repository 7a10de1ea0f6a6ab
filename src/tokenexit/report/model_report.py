"""The report of a trained model: one HTML file with its accuracy, its cost and example images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tokenexit.data.base import SegmentationDataset
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import ReferenceLine, evaluate
from tokenexit.evaluation.results import Evaluation, Scaled
from tokenexit.methods import Dense, Method
from tokenexit.report.chart import Point, Series, collapse_floor, histogram_svg, line_chart_svg
from tokenexit.report.evaluations import late_blocks_note, main_table
from tokenexit.report.examples import example
from tokenexit.report.html import Block, Chart, Code, Facts, FigureRow, Legend, Section, write_report
from tokenexit.report.pictures import exit_legend
from tokenexit.report.tables import Column, Swatch, Table
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

CONFUSIONS = 12


def report_model(
    model: ExitSegmenter,
    data: SegmentationDataset,
    methods: Sequence[Method[Any] | Scaled],
    out: Path,
    *,
    scales: Sequence[float] = (),
    references: bool = True,
    limit: int | None = None,
    examples: int = 3,
    precision: Precision = "fp32",
    what: str = "",
    command: str = "",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Path:
    """Evaluate dense and `methods` on a dataset and write the report to `out`.

    methods: the first one is shown class by class and image by image; all are in the table and the curve;
    `Scaled` gives one a note. scales: of the images' sides, for dense on smaller images. references: with
    lines of random exits at the counts of every DToP method (a run more for each) and of a stop after each exit (one
    dense pass more for all). examples: number of images shown with the least and with the most compute. what: the data
    in words. Raises `ConfigError` as `evaluate` does, and for no method.
    """
    named = [method if isinstance(method, Scaled) else Scaled(method) for method in methods]
    own = [row for row in named if row != Scaled(Dense())]
    if not own:
        raise ConfigError("methods must name one beside dense, got none: give --method, such as dtop.")
    rows = [Scaled(Dense()), *own, *(Scaled(Dense(), scale) for scale in scales)]
    lines: tuple[ReferenceLine, ...] = ("random", "depths") if references else ()
    results = evaluate(model, data, rows, limit=limit, precision=precision, references=lines, progress=progress)
    dense, chosen = results[0], results[1]
    with inference(model.device, precision):
        shown = _examples(model, data, chosen, examples)
    late = late_blocks_note(model, results)
    table = main_table(results, spread=True, intervals=True)
    sections = [
        Section("Result", [_facts(dense, chosen), *([late] if late else []), table, _curve(results)]),
        Section(
            "Classes", [_classes(dense, chosen, data.labels.names), *_confusions(dense, chosen, data.labels.names)]
        ),
        Section("Compute by image", [_histogram(chosen), _time(dense, chosen), *shown]),
        Section("How it was made", [_how(model, dense, precision, what), *([Code(command)] if command else [])]),
    ]
    summary = (
        f"{chosen.label} takes {chosen.share_of_dense:.0%} of dense multiply-adds at "
        f"{chosen.scores.miou - dense.scores.miou:+.2f} mIoU on {len(dense.gmacs)} images{what and f' of {what}'}."
    )
    return write_report(out, "Where the compute went", sections, summary=summary, footer="Made by tokenexit report.")


def _facts(dense: Evaluation, chosen: Evaluation) -> Facts:
    boundary = chosen.boundary_iou - dense.boundary_iou
    return Facts(
        [
            (f"{chosen.share_of_dense:.0%}", f"of dense multiply-adds, {chosen.label}"),
            (f"{chosen.scores.miou:.2f}", f"mIoU, dense {dense.scores.miou:.2f}{_difference(dense, chosen)}"),
            (f"{boundary:+.2f}", "boundary IoU against dense"),
            (f"{_speedups(dense, chosen)[0]:.2f}x", "speed-up over dense, median over images"),
        ]
    )


def _difference(dense: Evaluation, chosen: Evaluation) -> str:
    """Write the interval of the difference in mIoU."""
    ends = chosen.miou_interval(dense)
    return "" if ends is None else f"; the difference is {ends[0]:+.2f} to {ends[1]:+.2f} (95 % over images)"


TITLES = {"imposed": "random exits", "truncated": "stopped after an exit"}


def _curve(results: Sequence[Evaluation]) -> Chart:
    """Draw mIoU against GMACs: thresholds of one method are joined, and dense with its smaller images."""
    dense = results[0]
    ordered = sorted(results, key=lambda r: r.method.name)
    series = []
    for name, group in groupby(ordered, key=lambda r: r.method.name):
        members = sorted(group, key=lambda r: r.gmacs_mean)
        smaller = name == "dense" and len(members) > 1
        title = "dense, and on smaller images" if smaller else TITLES.get(name, name)
        series.append(Series(title, [_point(result, dense) for result in members]))
    floor = collapse_floor([result.scores.miou for result in results], dense.scores.miou)
    chart = line_chart_svg(series, "GMACs per image", "mIoU, percent", floor=floor)
    caption = "Whiskers: 95 % interval over images of the difference to dense, around dense mIoU."
    return Chart(chart, caption + (" Arrows stand for points below the chart." if floor is not None else ""))


def _point(result: Evaluation, dense: Evaluation) -> Point:
    """Return a point with the whisker of the difference to dense, as easy and hard images move all methods alike."""
    ends = None if result is dense else result.miou_interval(dense)
    low, high = (None, None) if ends is None else (dense.scores.miou + end for end in ends)
    return Point(result.gmacs_mean, result.scores.miou, low=low, high=high)


def _classes(dense: Evaluation, chosen: Evaluation, names: Sequence[str]) -> Table:
    share = (dense.confusion.sum(1) / dense.confusion.sum().clamp(min=1)).tolist()
    columns = [
        Column("class"),
        Column("pixels", "{:.1%}", "right"),
        Column("dense", "{:.1f}", "right"),
        Column(chosen.label, "{:.1f}", "right"),
        Column("difference", "{:+.2f}", "right"),
    ]
    ious = zip(names, share, dense.scores.iou, chosen.scores.iou)
    return Table(columns, [[name, s, a, b, b - a] for name, s, a, b in ious], caption="IoU per class, percent")


def _confusions(dense: Evaluation, chosen: Evaluation, names: Sequence[str]) -> list[Block]:
    """Make a table of the most frequent confusions, as shares of the true class."""
    counts = chosen.confusion.double().numpy()
    wrong = counts * (1 - np.eye(len(counts)))
    order = np.argsort(-wrong, axis=None)[:CONFUSIONS]
    pairs = [divmod(int(cell), len(counts)) for cell in order if wrong.flat[cell] > 0]
    if not pairs:
        return []
    columns = [
        Column("truth"),
        Column("predicted as"),
        Column("dense", "{:.1%}", "right", "Share of the true class's pixels."),
        Column(chosen.label, "{:.1%}", "right"),
        Column("of all errors", "{:.1%}", "right"),
    ]
    rows = [
        [names[i], names[j], *(_share(r, i, j) for r in (dense, chosen)), float(wrong[i, j] / wrong.sum())]
        for i, j in pairs
    ]
    return [Table(columns, rows, caption="Largest confusions")]


def _share(result: Evaluation, truth: int, taken_for: int) -> float:
    return float(result.confusion[truth, taken_for] / result.confusion[truth].sum())


def _histogram(chosen: Evaluation) -> Chart:
    shares = [100 * own / dense for own, dense in zip(chosen.gmacs, chosen.dense_gmacs)]
    caption = f"{chosen.label}: from {min(shares):.0f} to {max(shares):.0f} percent of an image's dense multiply-adds."
    return Chart(histogram_svg(shares, "multiply-adds, percent of dense", "images"), caption)


def _speedups(dense: Evaluation, chosen: Evaluation) -> tuple[float, float, float]:
    """Return the median, 5th and 95th percentile of the speed-up over images."""
    ratios = np.array(dense.latency_ms) / np.array(chosen.latency_ms)
    median, low, high = np.percentile(ratios, (50, 5, 95))
    return float(median), float(low), float(high)


def _time(dense: Evaluation, chosen: Evaluation) -> Table:
    columns = [
        Column("milliseconds of a forward pass"),
        *(Column(name, "{:.1f}", "right") for name in ("median", "95th percentile", "longest")),
    ]
    rows = [
        [r.label, *(float(x) for x in np.percentile(r.latency_ms, (50, 95))), max(r.latency_ms)]
        for r in (dense, chosen)
    ]
    return Table(columns, rows, caption="One image at a time, dense and the method in turn")


def _examples(model: ExitSegmenter, data: SegmentationDataset, chosen: Evaluation, count: int) -> list[Block]:
    """Show the images that cost least and those that cost most, with their exit maps."""
    shares = np.array(chosen.gmacs) / np.array(chosen.dense_gmacs)
    order = [int(i) for i in np.argsort(shares, kind="stable")]
    count = min(count, len(order) // 2 or 1)
    classes = [Swatch(name, colour) for name, colour in zip(data.labels.names, data.labels.palette)]
    exits = exit_legend(len(model.config.exits), model.config.exits)
    blocks: list[Block] = [Legend("Classes", classes), Legend("Exits", exits)]
    for title, indices in (("Least compute", order[:count]), ("Most compute", order[::-1][:count])):
        for index in indices:
            sample = data[index]
            figures = example(model, sample, [chosen.method], data.labels)
            blocks.append(FigureRow(figures, title=f"{title}: {sample.name}"))
    return blocks


def _how(model: ExitSegmenter, dense: Evaluation, precision: Precision, what: str) -> str:
    backbone = model.config.backbone
    return (
        f"A ViT of {model.depth} blocks and width {backbone.embed_dim} with exits after blocks "
        f"{', '.join(map(str, model.config.exits))}, on {len(dense.gmacs)} images{what and f' of {what}'}, in "
        f"{precision} on {model.device}. Multiply-adds include exit heads and decode head, from true counts of "
        "tokens. Milliseconds are those of this machine while the report was made."
    )
