"""Measure what an image costs that the process has not met, beside one that it has, in every runtime.

    python -m benchmarks.new_images --shapes tiny-660 small-1024 --json docs/evidence/performance/new-images.json

Fresh models with three exits of DToP, drawn images of one size and of different contrast, so that each has its own
numbers of live tokens. Contenders run in turn on one thread; each runs on a new image, and on the same once more.
`as they are` is without padded rows. In torch each call lowers the weights to bf16 anew. Milliseconds are of the
process's CPU, medians over the second half of the images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.conversion import processor
from benchmarks.deploy import thresholds_of
from benchmarks.exit_cost import LEAVING, METHODS, SHAPES, some
from tokenexit.engine import recurring_rows
from tokenexit.exporting.export import export_model, open_onnx
from tokenexit.exporting.openvino import PAD_ROWS, open_openvino
from tokenexit.exporting.quantize import quantize_int8
from tokenexit.methods import Dense, Method
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import Precision, inference, is_fast
from tokenexit.segmenter import ExitSegmenter

Contender = Callable[[Tensor], Any]


def in_torch(model: ExitSegmenter, method: Method[Any], precision: Precision, padded: bool) -> Contender:
    costs = recurring_rows.new_numbers_cost if padded else lambda _: False

    def run(image: Tensor) -> Any:
        with inference(image.device, precision), patch.object(recurring_rows, "new_numbers_cost", costs):
            return model([image], method).labels

    return run


def in_runtimes(path: Path, image: Tensor, bf16: bool) -> dict[str, Contender]:
    """A file in onnxruntime, and in OpenVINO in three precisions."""
    small = quantize_int8(path, [image], agreement=0.0, ranges=[image], runtime="openvino").path
    runs = {"onnxruntime fp32": (open_onnx(path), path), "OpenVINO fp32": (open_openvino(path), path)}
    if bf16:
        runs["OpenVINO bf16"] = open_openvino(path, precision="bf16"), path
    runs["OpenVINO int8"] = open_openvino(small, small.with_suffix(".bin")), small

    def contender(run: Any, thresholds: Any) -> Contender:
        return lambda image: run(image[None].numpy(), thresholds)

    return {name: contender(run, thresholds_of(file)) for name, (run, file) in runs.items()}


def contenders(model: ExitSegmenter, method: Method[Any], image: Tensor, folder: Path) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    bf16 = is_fast("bf16", image.device)
    ways = (("dense", Dense(), None), ("exits as they are", method, None), ("exits", method, PAD_ROWS))
    for name, each, pad_rows in ways:
        for precision in ("fp32", "bf16") if bf16 else ("fp32",):
            found[f"torch {precision}, {name}"] = in_torch(model, each, precision, pad_rows is not None)  # type: ignore[arg-type]
        path = export_model(model, each, [image], folder / name, pad_rows=pad_rows).path
        found |= {f"{runtime}, {name}": run for runtime, run in in_runtimes(path, image, bf16).items()}
    return found


def measure(shape: str, count: int, only: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, like = SHAPES[shape]()
    images = [torch.randn_like(like) * (0.5 + torch.rand(1)) + 0.3 * torch.randn(3, 1, 1) for _ in range(count + 1)]
    with inference(like.device):
        method = some(model, images[0], METHODS["dtop"], LEAVING)
        share = [model([image], method).ledger.share_of_dense[0] for image in images[1:]]
    ms: Mapping[str, dict[str, list[float]]] = defaultdict(lambda: {"new": [], "known": []})
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(model, method, images[0], Path(folder))
        running = {name: run for name, run in running.items() if only in name}
        for run in running.values():
            run(images[0])
        for image in images[1:]:
            for name, run in running.items():
                for look in ("new", "known"):
                    start = time.process_time()
                    run(image)
                    ms[name][look].append(1e3 * (time.process_time() - start))
    rows = {name: {look: round(median(t[count // 2 :]), 1) for look, t in of.items()} for name, of in ms.items()}
    return {"images": count, "share of dense": round(sum(share) / count, 3), "ms": rows}


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["quickstart", "tiny-660", "small-1024"])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--only", default="", help="contenders whose names hold this, such as 'OpenVINO int8'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows = {}
    for shape in options.shapes:
        rows[shape] = measure(shape, options.images, options.only)
        print(f"{shape}: {json.dumps(rows[shape], indent=1)}", flush=True)
    machine = {"torch": torch.__version__, "threads": 1, "processor": processor(torch.device("cpu"))}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
