"""Draw the field: mIoU against compute from the JSON of `benchmarks.field`.

python docs/evidence/field/draw.py docs/evidence/field/camvid_seed0.json docs/evidence/field/camvid.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {  # label begins with, holds: name, colour, marker
    ("dense +", "algm"): ("ALGM", "#0f7f6b", "s"),
    ("dense +", "mpm"): ("MPM", "#0f7f6b", "P"),
    ("dense +", "tome"): ("ToMe", "#0f7f6b", "X"),
    ("dense +", "g2tm"): ("G2TM", "#0f7f6b", "^"),
    ("dtop", "algm"): ("DToP + ALGM", "#c8501e", "s"),
    ("dtop", "mpm"): ("DToP + MPM", "#c8501e", "P"),
    ("dtop", "tome"): ("DToP + ToMe", "#c8501e", "X"),
    ("dtop", "g2tm"): ("DToP + G2TM", "#c8501e", "^"),
    ("dtop", ""): ("DToP", "#1f6fb4", "o"),
    ("dense @", ""): ("smaller image", "#222222", "d"),
    ("dense", ""): ("Dense", "#222222", "D"),
    ("truncated", ""): ("stopped after 6, 9 blocks", "#777777", "v"),
}
LOWEST = 54.0
"""mIoU below which nothing is drawn."""


def draw(file: Path, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    rows = [row for row in json.loads(file.read_text())["results"] if row["mIoU"] > LOWEST]
    for (first, inner), (name, colour, marker) in KINDS.items():
        mine = [row for row in rows if row["label"].startswith(first) and inner in row["label"]]
        rows = [row for row in rows if row not in mine]
        points = sorted((100 * row["share_of_dense"], row["mIoU"]) for row in mine)
        if points:
            x, y = zip(*points)
            axes.plot(x, y, color=colour, marker=marker, linestyle="-" if points[1:] else "", lw=0.8, label=name)
    axes.set_xlabel("multiply-adds, percent of dense, comparisons included")
    axes.set_ylabel("mIoU on CamVid test, percent")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
