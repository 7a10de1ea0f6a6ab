"""Print what each row of `benchmarks.field` costs small and large classes, against dense of the same file.

    python docs/evidence/field/classes.py docs/evidence/field/camvid_seed0.json
    python docs/evidence/field/classes.py docs/evidence/field/three_seeds/seed?.json

A row that stands in all files is the mean over them, with its standard deviation where there are several.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SMALL = ("Pole", "SignSymbol", "Pedestrian", "Bicyclist", "Fence")


def changes(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """IoU of classes and of boundaries, and mIoU, less those of dense."""
    classes = {name: row["IoU"][name] - dense["IoU"][name] for name in dense["IoU"]}
    return {
        "of dense": row["share_of_dense"],
        "mIoU": row["mIoU"] - dense["mIoU"],
        "small": mean(value for name, value in classes.items() if name in SMALL),
        "large": mean(value for name, value in classes.items() if name not in SMALL),
        "boundary": row["boundary_IoU"] - dense["boundary_IoU"],
    }


def main() -> None:
    files = [json.loads(Path(name).read_text())["results"] for name in sys.argv[1:]]
    found = [{row["label"]: changes(row, rows[0]) for row in rows} for rows in files]
    labels = [label for label in found[0] if all(label in each for each in found)]
    print("| row | of dense | mIoU | small classes | large classes | boundary IoU |")
    print("|---|---:|---:|---:|---:|---:|")
    for label in sorted(labels, key=lambda label: -found[0][label]["of dense"]):
        cells = [f"{mean(each[label]['of dense'] for each in found):.0%}"]
        for name in ("mIoU", "small", "large", "boundary"):
            values = [each[label][name] for each in found]
            cells.append(f"{mean(values):+.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
