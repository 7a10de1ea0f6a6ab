"""Measure how time grows with live tokens, image side, batch, classes and threads.

    python -m benchmarks.scaling --backbone vit_small_patch16 --precision bf16 --json FILE --plot FILE

One axis moves, the others stay at 512x512, one image, 19 classes, one thread, half of the tokens leaving after block
3. Dense and dynamic run in turn; times are to classes at full size, medians over rounds. Peak memory is what a process
holds beyond what it held before; each point is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.conversion import imposed, processor
from tokenexit.methods import Dense
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference, training_precision
from tokenexit.segmenter import ExitSegmenter

START: dict[str, float] = {"leave": 0.5, "side": 512, "batch": 1, "classes": 19, "threads": 1}
LEAST_ROUNDS, SECONDS = 3, 40.0
"""Of a point; more rounds only as long as they take no longer."""
AXES: dict[str, tuple[float, ...]] = {
    "leave": (0.0, 0.2, 0.4, 0.6, 0.8, 0.95),
    "side": (256, 384, 512, 768, 1024, 1536, 2048),
    "batch": (1, 2, 4, 8, 16),
    "classes": (2, 19, 150, 600),
    "threads": (1, 2),
}


def point(backbone: str, precision: Any, at: dict[str, float], rounds: int) -> dict[str, float]:
    """One point in this process: milliseconds and peak memory of dense and dynamic."""
    keep_buffers()
    torch.set_num_threads(int(at["threads"]))
    torch.manual_seed(0)
    model = ExitSegmenter(backbone, int(at["classes"]), [3]).eval()
    side, batch = int(at["side"]), int(at["batch"])
    images = [torch.randn(3, side, side) for _ in range(batch)]
    cells = [math.prod(model.backbone.patch_embed.grid(side, side))] * batch
    methods = {"dynamic": imposed("dtop", cells, [at["leave"]] * batch, torch.device("cpu"), 0), "dense": Dense()}
    figures: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in methods}
    with inference(torch.device("cpu"), precision):
        for name, method in methods.items():  # dynamic first: the peak of a process never falls
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            output = model(images, method)
            _ = output.labels
            figures[f"{name} peak MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            figures[f"{name} gmacs"] = sum(output.ledger.gmacs)
            del output
        figures["dense peak MiB"] += figures["dynamic peak MiB"]
        begun = time.perf_counter()
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - begun > SECONDS:
                break
            for name, method in methods.items():
                start = time.perf_counter()
                _ = model(images, method).labels
                times[name].append(1e3 * (time.perf_counter() - start))
    return figures | {f"{name} ms": median(values) for name, values in times.items()}


def draw(curves: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    plots = [
        ("leave", "ms"),
        ("side", "ms"),
        ("side", "peak MiB"),
        ("batch", "ms"),
        ("classes", "ms"),
        ("threads", "ms"),
    ]
    for ax, (axis, unit) in zip(axes.flat, plots):
        if axis not in curves:
            ax.remove()
            continue
        xs = [1 - p["at"] if axis == "leave" else p["at"] for p in curves[axis]]
        for name, style in (("dense", "o--"), ("dynamic", "o-")):
            ax.plot(xs, [p[f"{name} {unit}"] for p in curves[axis]], style, label=name)
        ax.set_xlabel("share of tokens live after block 3" if axis == "leave" else axis)
        ax.set_ylabel(unit)
        if axis != "side":
            ax.set_ylim(bottom=0)
        if axis in ("side", "classes"):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log" if axis == "side" else "linear")
        if axis != "leave":
            ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--json", type=Path, required=True, help="JSON file of the figures, from which an interrupted run continues"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = training_precision(options.precision, torch.device("cpu"))  # the fastest
    if options.point is not None:
        print(json.dumps(point(options.backbone, options.precision, json.loads(options.point), options.rounds)))
        return

    settings = {"backbone": options.backbone, "precision": options.precision, "rounds": options.rounds}
    content: dict[str, Any] = {"settings": settings, "machine": processor(torch.device("cpu")), "curves": {}}
    if options.json.exists():
        content = json.loads(options.json.read_text())
        assert content["settings"] == settings, f"{options.json} holds points of other settings: name another file"
    for axis, values in AXES.items():
        curve = content["curves"].setdefault(axis, [])
        for value in values[len(curve) :]:
            at = START | {axis: value}
            print(axis, value, file=sys.stderr, flush=True)
            own = ["--backbone", options.backbone, "--precision", options.precision, "--rounds", str(options.rounds)]
            command = [sys.executable, "-m", "benchmarks.scaling", *own, "--json", "-", "--point", json.dumps(at)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            curve.append({"at": value, **json.loads(found)})
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot is not None:
        draw(content["curves"], options.plot, f"{options.backbone}, {options.precision}, {content['machine']}")


if __name__ == "__main__":
    main()
