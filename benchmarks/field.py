"""Every method and combination on one trained model and the same images: compute, time, agreement, mIoU.

    python -m benchmarks.field runs/camvid-dense --data camvid --data-root data/camvid --json FILE

Rows are exits, merging, both, and what needs neither: smaller images and a stop. mIoU, multiply-adds and the time of
one image at a time are of `tokenexit.evaluate`, whose methods run in turn; so do batches of `--batch` images.
conversion = (speed-up - 1) / (MAC ratio - 1), from medians over images; batches have the interval over rounds.
Agreement is the share of pixels with the dense model's class. Merging and thresholds are used as they are, on a model
that was trained with neither.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.conversion import interleaved_ms, median_interval, processor
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Spread
from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense, DoViT, DToP, Method, Reduced, Resized, Truncated
from tokenexit.reducers import ALGM, G2TM, MPM, Reducer, ToMe
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

MERGING: tuple[Reducer, ...] = (
    *(ALGM(threshold) for threshold in (0.95, 0.9, 0.85, 0.8)),
    MPM(),
    *(ToMe(ratio) for ratio in (0.02, 0.04, 0.06)),
    *(G2TM(threshold) for threshold in (0.95, 0.9, 0.85)),
)
BESIDE_EXITS: tuple[Reducer, ...] = (ALGM(0.95), ALGM(0.9), MPM(), ToMe(0.02), G2TM(0.95))
THRESHOLDS: tuple[tuple[float, ...], ...] = ((0.98, 0.9, 0.8), (0.98, 0.8, 0.65), (0.9, 0.7, 0.5))


def contenders(model: ExitSegmenter) -> list[Method[Any]]:
    exits = [DToP(thresholds) for thresholds in THRESHOLDS]
    return [
        Dense(),
        *exits,
        *(DoViT(thresholds) for thresholds in THRESHOLDS[:1]),
        *(Reduced(Dense(), by) for by in MERGING),
        *(Reduced(method, by) for method in exits[:2] for by in BESIDE_EXITS),
        *(Resized(Dense(), scale) for scale in (0.9, 0.8, 0.7, 0.6)),
        *(Truncated(n + 1) for n in range(len(model.config.exits))),
    ]


def agreements(model: ExitSegmenter, images: Sequence[Tensor], methods: Sequence[Method[Any]]) -> list[float]:
    """Share of pixels, of all images, that each method names as the first does."""
    same = torch.zeros(len(methods))
    for image in images:
        labels = [torch.as_tensor(model([image], method).labels) for method in methods]
        same += torch.stack([(each == labels[0]).float().mean() for each in labels])
    return (same / len(images)).tolist()


def batch_figures(
    model: ExitSegmenter, images: Sequence[Tensor], methods: Sequence[Method[Any]], rounds: int, precision: Any
) -> list[dict[str, Any]]:
    """Milliseconds of one batch of all images, the methods in turn, and their conversion."""
    calls = {str(n): partial(model, images, method) for n, method in enumerate(methods)}
    times = interleaved_ms(calls, rounds, model.device, precision, ())
    rows: list[dict[str, Any]] = []
    for n, method in enumerate(methods):
        ledger = model(images, method).ledger
        gain = [dense / own for dense, own in zip(times["0"], times[str(n)])]
        speedup, low, high = median_interval(gain)
        rows.append({"ms": median(times[str(n)]), "speedup": [speedup, low, high]})
        ratio = sum(ledger.dense_macs) / sum(ledger.macs)
        if ratio > 1.05:
            rows[-1]["conversion"] = [(each - 1) / (ratio - 1) for each in (speedup, low, high)]
    return rows


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="number of images, evenly spread over the split; all if not given")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="of a batch; 0 for none")
    parser.add_argument("--agree", type=int, default=24, help="images that agreement with dense is read from")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = ExitSegmenter.from_pretrained(options.model, device)
    data: SegmentationDataset = open_dataset(options.data, options.data_root, options.split)
    if options.limit:
        data = Spread(data, options.limit)
    methods, start = contenders(model), time.time()
    images = [model.preprocessing.to_tensor(data[n * len(data) // options.agree].image) for n in range(options.agree)]
    images = [image.to(device) for image in images]
    with inference(device, options.precision):
        agreed = agreements(model, images, methods)
        batches = batch_figures(model, images[:: max(1, options.agree // options.batch)][: options.batch], methods,
                                options.rounds, options.precision) if options.rounds else []  # fmt: skip
    print(f"agreement and batches: {time.time() - start:.0f} s", flush=True)
    rows = []
    for n, found in enumerate(evaluate(model, data, methods, precision=options.precision)):
        row = found.to_dict(data.labels.names) | {"agreement": agreed[n]}
        if batches:
            row["batch"] = batches[n]
        rows.append(row)
    dense = rows[0]["latency_ms_median"]
    for row in rows:
        ratio = 1 / row["share_of_dense"]
        if ratio > 1.05:
            row["conversion"] = (dense / row["latency_ms_median"] - 1) / (ratio - 1)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("json", "model", "data_root")}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"settings": settings, "machine": machine, "results": rows}, indent=1) + "\n")
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, in the order of multiply-adds."""
    lines = ["| row | of dense | GMACs | mIoU | boundary IoU | agreement | ms, one | conversion | conversion, batch |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda row: -float(row["share_of_dense"])):
        batch = row.get("batch", {}).get("conversion")
        lines.append(
            f"| {row['label']} | {row['share_of_dense']:.1%} | {row['gmacs_mean']:.2f} | {row['mIoU']:.2f} "
            f"| {row['boundary_IoU']:.2f} | {row['agreement']:.2%} | {row['latency_ms_median']:.0f} "
            f"| {format(row['conversion'], '.2f') if 'conversion' in row else ''} "
            f"| {f'{batch[0]:.2f} [{batch[1]:.2f}, {batch[2]:.2f}]' if batch else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
