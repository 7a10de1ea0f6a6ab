"""Results of evaluations as tables and as a JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenexit.errors import ConfigError
from tokenexit.evaluation.results import Evaluation
from tokenexit.methods import Dense, Truncated
from tokenexit.report.tables import Column, Table
from tokenexit.runtime.atomic import write_or_refuse
from tokenexit.runtime.schema import as_json
from tokenexit.segmenter import ExitSegmenter
from tokenexit.version import __version__

OVER_IMAGES = (
    "The 95 % bootstrap interval over these images (1,000 resamples): what other images of the kind would change. "
    "The variance of training is not included."
)
TO_DENSE = "The same interval of mIoU minus dense mIoU on the same images, which is usually narrower than either."


def main_table(
    results: Sequence[Evaluation], latency: bool = True, spread: bool = False, intervals: bool = False
) -> Table:
    """Make the main table, one row per method: accuracy, compute, live tokens and time; it fits into 100 columns.

    spread: with the 5th and 95th percentile of multiply-adds, for wider places. intervals: with those of mIoU, and of
    its difference to dense, over images.
    """
    columns = [
        Column("method"),
        Column("mIoU", "{:.2f}", "right"),
        Column("aAcc", "{:.2f}", "right"),
        Column("mAcc", "{:.2f}", "right"),
        Column("boundary IoU", "{:.2f}", "right"),
        Column("GMACs", "{:.3f}", "right", "Giga multiply-adds per image, exit heads and decode head included, mean."),
        Column("of dense", "{:.0%}", "right", "Multiply-adds over those of the same model without exits."),
        Column("live, %", _percents, "right", "Share of tokens still computed after each exit, in percent."),
    ]
    rows: list[list[Any]] = [
        [
            result.label,
            result.scores.miou,
            result.scores.aacc,
            result.scores.macc,
            result.boundary_iou,
            result.gmacs_mean,
            result.share_of_dense,
            result.live_mean,
        ]
        for result in results
    ]
    if spread:
        help_text = "GMACs of the 5th and the 95th percentile of images."
        columns.append(Column("5 to 95 %", lambda ends: "{:.3f} to {:.3f}".format(*ends), "right", help_text))
        rows = [[*row, np.percentile(result.gmacs, (5, 95))] for row, result in zip(rows, results)]
    if intervals:
        dense = next((result for result in results if result.method == Dense() and result.input_scale == 1.0), None)
        columns += [
            Column("mIoU, 95 %", _ends("{:.1f}"), "right", OVER_IMAGES),
            Column("to dense, 95 %", _ends("{:+.2f}"), "right", TO_DENSE),
        ]
        ends = [(r.miou_interval(), None if dense in (None, r) else r.miou_interval(dense)) for r in results]
        rows = [[*row, *both] for row, both in zip(rows, ends)]
    if latency:
        columns.append(Column("ms", "{:.1f}", "right", "Median milliseconds of a forward pass, one image at a time."))
        rows = [[*row, float(np.median(result.latency_ms))] for row, result in zip(rows, results)]
    return Table(columns, rows)


def class_table(results: Sequence[Evaluation], names: Sequence[str]) -> Table:
    """Make a table of the IoU of every class, one column per method."""
    columns = [Column("class"), *(Column(result.label, "{:.1f}", "right") for result in results)]
    rows = [[name, *(result.scores.iou[i] for result in results)] for i, name in enumerate(names)]
    return Table(columns, rows, caption="IoU per class, percent")


def late_blocks_note(model: ExitSegmenter, results: Sequence[Evaluation]) -> str | None:
    """Return a sentence if stopping at an exit is at least as good as dense on these images, else None."""
    found = {result.method: result for result in results if result.input_scale == 1.0}
    exits, depth = model.config.exits, model.depth
    stops = [(n, found[Truncated(n)].scores.miou) for n in range(1, len(exits) + 1) if Truncated(n) in found]
    if Dense() not in found or not stops:
        return None
    dense = found[Dense()]
    after, best = max(stops, key=lambda stop: (stop[1], -stop[0]))
    if not best >= dense.scores.miou:
        return None
    block = exits[after - 1]
    late = f"Blocks {block + 1} to {depth} do" if block + 1 < depth else f"Block {depth} does"
    cure = f", or use `--method truncated --after {after}`" if _can_stop(model, after) else ""
    return (
        f"{late} not help this model yet (mIoU {best:.2f} after block {block}, {dense.scores.miou:.2f} after all "
        f"{depth}, on {len(dense.gmacs)} images): train longer{cure}."
    )


def _can_stop(model: ExitSegmenter, after: int) -> bool:
    """Return whether `Truncated` runs on this model; it needs exit heads of one resolution."""
    try:
        model.check(Truncated(after))
    except ConfigError:
        return False
    return True


def write_json(path: Path, results: Sequence[Evaluation], names: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write all figures and the setup of the measurement atomically; NaN becomes null."""
    machine = {
        "tokenexit": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    content = {"about": {**about, **machine}, "results": [result.to_dict(names) for result in results]}
    text = json.dumps(as_json(content), indent=2, allow_nan=False) + "\n"
    with write_or_refuse(path, "choose another file") as unfinished:
        unfinished.write_text(text)


def _ends(form: str) -> Callable[[tuple[float, float]], str]:
    """Return a function that writes both ends of an interval in this form."""
    return lambda ends: " to ".join(form.format(end) for end in ends)


def _percents(shares: Sequence[float]) -> str:
    """Write shares as `62/41/30`."""
    return "/".join(f"{100 * share:.0f}" for share in shares)
