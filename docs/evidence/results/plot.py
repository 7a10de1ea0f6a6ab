"""Draw mIoU against compute from the JSON files of `tokenexit evaluate`, mean and spread over seeds.

    python docs/evidence/results/plot.py docs/evidence/results/camvid.png docs/evidence/results/camvid/*_seed?.json

A curve is one method on one trained model, each point the mean over the files NAME_seedN.json with its standard
deviation as a bar.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {  # file, label begins with: name, colour, marker, line
    ("dtop_finetune_smaller_input", "dtop"): ("DToP Finetune, smaller input", "#5aa9dd", "v", ""),
    ("dtop_finetune", "dtop"): ("DToP Finetune", "#1f6fb4", "o", "-"),
    ("dense", "dtop"): ("DToP Direct", "#1f6fb4", "o", ":"),
    ("dovit_finetune", "dovit"): ("DoViT Finetune", "#c8501e", "s", "-"),
    ("dovit_heads_only", "dovit"): ("DoViT, heads and adapters alone, side 0.9 and 1", "#c8501e", "P", ""),
    ("dense", "dense"): ("Dense", "#222222", "D", ""),
    ("dense_smaller_input", "dense"): ("Dense, image side 0.9, 0.8, 0.7", "#222222", "d", "--"),
    ("dense_truncated", "truncated"): ("Dense, stopped after 6, 9 blocks", "#777777", "^", "--"),
    ("dense_references", "random"): ("random exits at DToP's counts", "#999999", "x", ""),
    ("dense_references", "agreement"): ("agreement oracle", "#0f7f6b", "*", ""),
    ("eomt_exits", "dtop"): ("EoMT, DToP Finetune (1 seed)", "#7b4fa3", "o", "-"),
    ("eomt_exits", "dovit"): ("EoMT, DoViT Finetune (1 seed)", "#7b4fa3", "s", "-"),
    ("eomt", "dtop"): ("EoMT, DToP Direct (1 seed)", "#7b4fa3", "o", ":"),
    ("eomt", "dense"): ("EoMT (1 seed, 1200 steps)", "#7b4fa3", "D", ""),
}
LOWEST = 52.0
"""mIoU below which nothing is drawn."""


def points(files: list[Path]) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """(share of Dense's multiply-adds, mIoU) of every seed, by curve and label. EoMT costs more than Dense itself."""
    dense = {
        row["gmacs_mean"] for file in files if file.stem.startswith("dense_seed") for row in rows_of(file, "dense")
    }
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        name = re.sub(r"\d*_seed\d+$", "", file.stem)
        for row in rows_of(file):
            key = next(((n, word) for n, word in CURVES if n == name and row["label"].startswith(word)), None)
            if key is not None:
                share = row["gmacs_mean"] / max(dense) if name.startswith("eomt") else row["share_of_dense"]
                found[key][row["label"]].append((100 * share, row["mIoU"]))
    return found


def rows_of(file: Path, label: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return [row for row in rows if label is None or row["label"] == label]


def draw(files: list[Path], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    found = points(files)
    for key, (name, colour, marker, line) in CURVES.items():
        curve = sorted(
            (mean(x for x, _ in seeds), mean(y for _, y in seeds), stdev([y for _, y in seeds]) if seeds[1:] else 0.0)
            for seeds in found.get(key, {}).values()
        )
        curve = [point for point in curve if point[1] > LOWEST]
        if curve:
            x, y, spread = zip(*curve)
            style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line}
            axes.errorbar(x, y, spread, capsize=3, elinewidth=0.8, label=name, **style)
    axes.set_xlabel("multiply-adds, percent of dense (mean over the test split)")
    axes.set_ylabel("mIoU on CamVid test, percent")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    draw([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
