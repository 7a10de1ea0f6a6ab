"""Print the Markdown tables of docs/evidence/results.md from the JSON files of `tokenexit evaluate`.

    python docs/evidence/results/tables.py docs/evidence/results/camvid/*.json           # a row per method and file
    python docs/evidence/results/tables.py --seeds docs/evidence/results/camvid/*.json   # mean and spread over seeds

With --seeds a row stands for the same method of the same NAME under every seed. "to Dense" is the difference to the
dense row of BASELINE of the same seed, so that what a seed does to both cancels.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tokenexit.report.tables import Column, Table

BASELINE = "dense"
"""The file whose `dense` row the others are compared with: the dense model, trained for as long as the others."""

COLUMNS = [
    Column("model"),
    Column("method, threshold"),
    Column("mIoU", "{:.2f}", "right"),
    Column("boundary IoU", "{:.2f}", "right"),
    Column("aAcc", "{:.2f}", "right"),
    Column("mAcc", "{:.2f}", "right"),
    Column("GMACs", "{:.3f}", "right"),
    Column("5 %", "{:.3f}", "right"),
    Column("95 %", "{:.3f}", "right"),
    Column("of dense", "{:.0%}", "right"),
    Column("live after exits", align="right"),
]

SEED_COLUMNS = [
    Column("model"),
    Column("method, threshold"),
    Column("mIoU", align="right"),
    Column("to Dense", align="right"),
    Column("boundary IoU", align="right"),
    Column("of dense MACs", align="right"),
    Column("each seed", align="right"),
]


def read(file: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def model_name(file: Path) -> str:
    return re.sub(r"_seed\d+$", "", file.stem).replace("_", " ")


def table(files: list[Path]) -> Table:
    """One row for each method of each file; a file is one model."""
    rows = []
    for file in files:
        for row in read(file):
            live = " / ".join(f"{share:.0%}" for share in row["live_after_exit"])
            figures = [
                row[key] for key in ("mIoU", "boundary_IoU", "aAcc", "mAcc", "gmacs_mean", "gmacs_p5", "gmacs_p95")
            ]
            rows.append([file.stem.replace("_", " "), row["label"], *figures, row["share_of_dense"], live])
    return Table(COLUMNS, rows)


def seed_table(files: list[Path]) -> Table:
    """One row for each method of each model, over all seeds."""
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for file in files:
        seed = int(file.stem.rsplit("_seed", 1)[1])
        for row in read(file):
            runs.setdefault((model_name(file), row["label"]), {})[seed] = row
    baseline = {seed: row["mIoU"] for seed, row in runs[BASELINE, "dense"].items()}
    rows = []
    for (model, label), seeds in runs.items():
        miou = [row["mIoU"] for row in seeds.values()]
        change = [row["mIoU"] - baseline[seed] for seed, row in seeds.items()]
        boundary = [row["boundary_IoU"] for row in seeds.values()]
        compute = [100 * row["share_of_dense"] for row in seeds.values()]
        rows.append(
            [
                model,
                label,
                spread(miou),
                spread(change, "+.2f") if (model, label) != (BASELINE, "dense") else None,
                spread(boundary),
                spread(compute, ".1f") + " %",
                " ".join(f"{value:.2f}" for value in miou),
            ]
        )
    return Table(SEED_COLUMNS, rows)


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean and standard deviation over seeds."""
    text = format(mean(values), form)
    return f"{text} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else text


if __name__ == "__main__":
    names = [Path(name) for name in sys.argv[1:] if name != "--seeds"]
    print((seed_table if "--seeds" in sys.argv else table)(names).to_markdown(), end="")
