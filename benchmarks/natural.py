"""Measure a trained model on real images: milliseconds of every image, dense and dynamic in turn.

    python -m benchmarks.natural runs/camvid-dtop --data camvid --data-root ../shared/data/camvid \\
        --method dtop --threshold 0.98/0.8/0.65 --precision bf16 --json FILE

Three times for every image: the forward pass to grid logits, that plus classes at the image's full size, each the
median of `--repeats` runs, and the forward pass at first sight, when the process has not met this image, which is what
users of photographs have. Percentiles are over images; the worst one has the longest dynamic time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.conversion import median_interval, processor
from benchmarks.study import model_and_data_parser
from tokenexit.data.registry import open_dataset
from tokenexit.methods import Dense, Method, build_method
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference, training_precision
from tokenexit.segmenter import ExitSegmenter


def one_run(model: ExitSegmenter, image: Tensor, method: Method[Any], size: tuple[int, int]) -> tuple[float, float]:
    """Milliseconds to grid logits, and to classes at full size."""
    start = time.perf_counter()
    output = model.segment([image], method, targets=[size])
    forward = time.perf_counter()
    _ = output.labels
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
    return 1e3 * (forward - start), 1e3 * (time.perf_counter() - start)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    keep_buffers()
    parser = model_and_data_parser(__doc__)
    parser.add_argument("--limit", type=int, help="number of images, evenly spread over the split")
    parser.add_argument("--method", choices=("dtop", "dovit"), default="dtop")
    parser.add_argument("--threshold", default="0.98/0.8/0.65")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    options.precision = training_precision(options.precision, device)  # the fastest
    model = ExitSegmenter.from_pretrained(options.model, device)
    data = open_dataset(options.data, options.data_root, options.split)
    thresholds = tuple(map(float, options.threshold.split("/")))
    methods = {"dense": Dense(), "dynamic": build_method({"name": options.method, "threshold": thresholds})}
    count = min(options.limit or len(data), len(data))
    rows = []
    with inference(device, options.precision):
        for n in range(count):
            sample = data[n * len(data) // count]
            image = model.preprocessing.to_tensor(sample.image).to(device)
            size = (sample.mask.shape[0], sample.mask.shape[1])
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
            if n == 0:  # weights are lowered, libraries loaded
                for method in methods.values():
                    one_run(model, image.flip(2), method, size)
            for _ in range(options.repeats):
                for name, method in methods.items():
                    runs[name].append(one_run(model, image, method, size))
            ledger = model.segment([image], methods["dynamic"]).ledger
            row: dict[str, Any] = {"image": sample.name, "share_of_dense": ledger.share_of_dense[0]}
            for name, pairs in runs.items():
                row[name] = median(forward for forward, _ in pairs)
                row[f"{name} to labels"] = median(labels for _, labels in pairs)
                row[f"{name} at first sight"] = pairs[0][0]
            rows.append(row)
    figures = summarize(rows)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("json", "model")}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    content = {"settings": settings, "machine": machine, **figures, "images": rows}
    print(json.dumps({key: value for key, value in content.items() if key != "images"}, indent=2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles over images, speed-ups and conversion with their intervals, the worst image."""
    figures: dict[str, Any] = {"count": len(rows), "share_of_dense": sum(r["share_of_dense"] for r in rows) / len(rows)}
    for end in ("", " to labels", " at first sight"):
        for name in ("dense", "dynamic"):
            values = [row[name + end] for row in rows]
            figures[f"{name}{end} ms"] = {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95)}
        speedups = [row[f"dense{end}"] / row[f"dynamic{end}"] for row in rows]
        figures[f"speedup{end}"] = list(median_interval(speedups))
        conversions = [(s - 1) / (1 / row["share_of_dense"] - 1) for s, row in zip(speedups, rows)]
        figures[f"conversion{end}"] = list(median_interval(conversions))
    worst = max(rows, key=lambda row: row["dynamic"])
    return figures | {"worst": worst, "best": min(rows, key=lambda row: row["dynamic"])}


if __name__ == "__main__":
    main()
