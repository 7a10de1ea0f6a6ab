"""Collect the runs of `benchmarks.frontier` in one file, compare exits with the best static plan, and draw both.

    python docs/evidence/frontier/frontier.py docs/evidence/frontier/*_seed?.json

Runs differ in data, seed, and in how their model was trained: `dense`, `finetuned` with exits on, `finetuned early`
with exits from the first block on, `finetuned step` and `finetuned coarse` with supertokens or coarse first beside
these, `trained on` for as many steps without them, which is the control, `with DoViT` from the start, or `heads alone`,
fitted to the dense model as it is. Beside the runs it writes `frontier.json`, a row for each measured point, and a plot
for each data set; it prints Markdown tables. The best static plan for some multiply-adds is the dense model at any
size, stopped after any exit's block: their upper hull over the logarithm of multiply-adds, so that no further point can
lower it. Exits get no hull: the points that no cheaper one equals, joined by lines.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
HERE = Path(__file__).parent
AT = {"camvid": (1.0, 1.5, 2.0, 3.0, 4.0), "cwfid": (3.0, 6.0, 8.0, 14.0, 20.0, 35.0, 45.0, 70.0)}
"""GMACs of an image at which curves are compared."""
KINDS = {
    "dense": ("Dense at other sizes", "#222222", "d", "--"),
    "truncated": ("everybody stopped after a block, any size", "#888888", "^", ""),
    "dense, finetuned": ("Dense of the finetuned model", "#b08a3c", "d", "--"),
    "truncated, finetuned": ("stopped, of the finetuned model", "#d8c08a", "^", ""),
    "dense, trained on": ("Dense, trained on for as long", "#7a7a3c", "d", "--"),
    "truncated, trained on": ("stopped, trained on for as long", "#b9b98c", "^", ""),
    "dtop": ("DToP, any size", "#1f6fb4", "o", ""),
    "dtop with frozen keys": ("DToP with frozen keys, not trained for exits", "#0f7f6b", "o", ""),
    "dtop and supertokens": ("DToP beside supertokens (STEP), any size", "#b3262a", "P", ""),
    "dtop, trained on": ("DToP on the dense model trained on", "#6fa8d6", "o", ""),
    "dtop, finetuned": ("DToP Finetune, any size", "#1f6fb4", "s", ""),
    "dense, finetuned early": ("Dense of the model with early exits", "#c58f8f", "d", "--"),
    "truncated, finetuned early": ("stopped, of the model with early exits", "#e3c4c4", "^", ""),
    "dtop, finetuned early": ("DToP Finetune with early exits, any size", "#b3262a", "o", ""),
    "random, finetuned early": ("random exits at its counts", "#d9a0a0", "x", ""),
    "dense, finetuned step": ("Dense of the model with exits and supertokens", "#c58f8f", "d", "--"),
    "truncated, finetuned step": ("stopped, of the model with exits and supertokens", "#e3c4c4", "^", ""),
    "dtop, finetuned step": ("DToP of that model, early exits", "#8fb3d9", "o", ""),
    "dtop and supertokens, finetuned step": ("the same beside supertokens", "#e08f8f", "o", ""),
    "random, finetuned step": ("random exits at its counts", "#99aacc", "x", ""),
    "oracle, finetuned step": ("agreement oracle", "#7b4fa3", "*", ""),
    "dense, finetuned coarse": ("Dense of the model trained coarse first", "#a08fc5", "d", "--"),
    "truncated, finetuned coarse": ("stopped, of the model trained coarse first", "#cfc4e3", "^", ""),
    "dtop, finetuned coarse": ("DToP of the model trained coarse first, all fine", "#b9a6e0", "o", ""),
    "dtop and coarse_first, finetuned coarse": ("DToP coarse first, any size", "#4b2fa3", "P", ""),
    "random, finetuned coarse": ("random exits at its counts, all fine", "#bbbbbb", "+", ""),
    "oracle, finetuned coarse": ("agreement oracle", "#7b4fa3", "*", ""),
    "oracle, finetuned early": ("agreement oracle", "#7b4fa3", "*", ""),
    "dense, heads alone": ("Dense, early heads fitted to it", "#5f7f5f", "d", "--"),
    "truncated, heads alone": ("stopped at heads fitted to Dense", "#a9c0a9", "^", ""),
    "dense, with DoViT": ("Dense of the model trained with DoViT", "#9fbf9f", "d", "--"),
    "dovit, with DoViT": ("DoViT, exits on for the whole schedule, any size", "#2f7f3b", "D", ""),
    "planned": ("plans of size, stop and exits, by agreement", "#c8501e", "s", "-"),
    "planned by labels": ("plans of size, stop and exits, by labels", "#0f7f6b", "P", "-"),
    "random": ("random exits at DToP's counts", "#bbbbbb", "x", ""),
    "random, finetuned": ("the same of the finetuned model", "#99aacc", "x", ""),
    "oracle": ("agreement oracle", "#7b4fa3", "*", ""),
}
COLUMNS = {
    "dtop": "DToP, any size",
    "dtop with frozen keys": "DToP with frozen keys",
    "dtop and supertokens": "DToP beside supertokens",
    "dtop, finetuned": "Finetune",
    "dtop, finetuned early": "early exits",
    "dtop, finetuned step": "early exits, trained beside supertokens",
    "dtop and supertokens, finetuned step": "the same with supertokens",
    "dtop and coarse_first, finetuned coarse": "coarse first",
    "dovit, with DoViT": "DoViT, trained with exits",
    "planned": "plan, by agreement",
    "planned by labels": "plan, by labels",
}
"""Kinds that are compared with the best static plan, and their heads in tables."""
STATIC = tuple(kind for kind in KINDS if kind.startswith(("dense", "truncated")))


def rows_of(file: Path) -> list[Row]:
    """Return a run's points as rows of one form."""
    content = json.loads(file.read_text())
    settings, rows = content["settings"], []
    for key, results in content["results"].items():
        for found in results:
            spec = found["method"]
            kind = spec["name"]
            if kind == "reduced":
                kind, spec = f"{spec['method']['name']} and {spec['by']['name']}", spec["method"]
            if spec.get("frozen_context"):
                kind = f"{kind} with frozen keys"
            if key.startswith("plans"):
                kind = "planned by labels" if key.endswith("labels") else "planned"
            elif found["label"].startswith("random"):
                kind = "random"
            elif found["label"].startswith("agreement"):
                kind = "oracle"
            if settings["trained"] != "dense":
                kind = f"{kind}, {settings['trained']}"
            rows.append(
                {
                    "data": settings["data"],
                    "method": kind,
                    "label": found.get("plan", found["label"]),
                    "model": settings["model"],
                    "size": found["input_scale"],
                    "seed": settings["seed"],
                    "thresholds": spec.get("threshold"),
                    "after": spec.get("after"),
                    "budget": found.get("budget"),
                    "gmacs": found["gmacs_mean"],
                    "miou": found["mIoU"],
                    "boundary_iou": found["boundary_IoU"],
                    "iou": found["IoU"],
                    "ms": found["latency_ms_median"],
                    "ms_p95": found.get("latency_ms_p95"),
                }
            )
    return rows


def best(rows: Iterable[Row], figure: str = "miou") -> list[tuple[float, float]]:
    """Return the points that no cheaper one equals, `(GMACs, figure)`, cheapest first."""
    found: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row["gmacs"]):
        if not found or row[figure] > found[-1][1]:
            found.append((row["gmacs"], row[figure]))
    return found


def best_static(rows: Iterable[Row], figure: str = "miou") -> list[tuple[float, float]]:
    """Return the corners of the line, concave over the logarithm of multiply-adds, that no static point is above."""
    kept: list[tuple[float, float]] = []
    for x, y in best((row for row in rows if row["method"] in STATIC), figure):
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2:]
            if (y1 - y0) * math.log(x / x0) > (y - y0) * math.log(x1 / x0):
                break
            kept.pop()
        kept.append((x, y))
    return kept


def at(points: Sequence[tuple[float, float]], gmacs: float) -> float:
    """Return the figure at some multiply-adds: between points over their logarithm, the last one's behind it."""
    if not points or gmacs < points[0][0]:
        return math.nan
    for (x0, y0), (x1, y1) in pairwise(points):
        if gmacs < x1:
            return y0 + (y1 - y0) * math.log(gmacs / x0) / math.log(x1 / x0)
    return points[-1][1]


def curve(rows: Iterable[Row], kind: str, gmacs: float, figure: str) -> float:
    """Return what points of one kind reach at some multiply-adds, at any size."""
    return at(best((row for row in rows if row["method"] == kind), figure), gmacs)


def tables(data: str, rows: list[Row]) -> None:
    seeds = sorted({row["seed"] for row in rows})
    columns = [kind for kind in COLUMNS if any(row["method"] == kind for row in rows)]
    for figure in ("miou", "boundary_iou"):
        print(f"\n{data}, {figure}, seeds {seeds}\n")
        print(f"| GMACs | best static | {' | '.join(COLUMNS[kind] for kind in columns)} |")
        print(f"|---:|---:|{'---:|' * len(columns)}")
        for gmacs in AT[data]:
            by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
            static = [at(best_static(mine, figure), gmacs) for mine in by_seed]
            cells = [f"{mean(static):.2f}"]
            for kind in columns:
                own = [curve(mine, kind, gmacs, figure) for mine in by_seed]
                gains = [mine - other for mine, other in zip(own, static) if not math.isnan(mine)]
                spread = f" ± {stdev(gains):.2f}" if gains[1:] else ""
                reached = mean(one for one in own if not math.isnan(one)) if gains else math.nan
                cells.append(f"{reached:.2f} ({mean(gains):+.2f}{spread})" if gains else "")
            print(f"| {gmacs:g} | {' | '.join(cells)} |")


def random_gains(data: str, rows: list[Row]) -> None:
    """Print what exits by score are better than random ones at the same counts."""
    print(f"\n{data}: exits against random exits at the same counts\n")
    print("| exits | of dense | mIoU | random |\n|---|---:|---:|---:|")
    dense = {row["seed"]: row["gmacs"] for row in rows if row["method"] == "dense" and row["size"] == 1.0}
    pairs: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        if row["method"].startswith("random"):
            label = row["label"].removeprefix("random, counts of ")
            name = label + row["method"].removeprefix("random")
            (own,) = [
                r
                for r in rows
                if r["label"] == label
                and r["seed"] == row["seed"]
                and r["model"] == row["model"]
                and r["method"].startswith("dtop")
            ]
            pairs[name].append((own["gmacs"] / dense[row["seed"]], own["miou"], row["miou"]))
    for label, found in pairs.items():
        share, by_score, at_random = (mean(one[i] for one in found) for i in range(3))
        print(f"| {label} | {share:.0%} | {by_score:.2f} | {at_random:.2f} |")


def draw(data: str, rows: list[Row], out: Path) -> None:
    """Draw every point, and the best static plan of each seed as a line."""
    figure, axes = plt.subplots(figsize=(11, 5.4), layout="constrained")
    seeds = sorted({row["seed"] for row in rows})
    for kind, (name, colour, marker, line) in KINDS.items():
        for n, seed in enumerate(seeds):
            points = sorted((r["gmacs"], r["miou"]) for r in rows if r["method"] == kind and r["seed"] == seed)
            if points:
                x, y = zip(*points)
                axes.plot(x, y, color=colour, marker=marker, ls=line, lw=0.9, ms=5, alpha=1 - 0.25 * n, label=name)
    for n, seed in enumerate(seeds):
        static = best_static(row for row in rows if row["seed"] == seed)
        axes.plot(*zip(*static), color="#222222", lw=0.7, ls=":", alpha=1 - 0.25 * n, label="best static plan")
    top = max(row["miou"] for row in rows)
    axes.set_ylim(top - 12, top + 0.7)
    axes.set_xscale("log")
    axes.set_xlim(0.6 * AT[data][0], 1.15 * max(row["gmacs"] for row in rows))
    ticks = AT[data]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("GMACs of an image, heads and decode head included")
    axes.set_ylabel(f"mIoU on {data} test, percent" + (f"; seeds {seeds}, the first darkest" if seeds[1:] else ""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(named.values(), named.keys(), fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(out, dpi=130)


def main() -> None:
    rows = [row for file in map(Path, sys.argv[1:]) for row in rows_of(file)]
    (HERE.parent / "frontier.json").write_text(json.dumps(rows, indent=1) + "\n")
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        tables(data, mine)
        random_gains(data, mine)
        draw(data, mine, HERE / f"{data}.png")


if __name__ == "__main__":
    main()
