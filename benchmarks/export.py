"""Measure the speed of exported models: milliseconds in onnxruntime against the share of live tokens.

    python -m benchmarks.export --backbone vit_small_patch16 --size 512 --json docs/evidence/performance/onnx.json

Random weights: DToP and DoViT with one exit whose threshold is set so that a share of the tokens leaves, dense, and the
same DToP in torch, in turn in one process on one thread; medians with 95 % intervals. Every head is exported; times are
of the FCN heads unless `--heads` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conversion import median_interval, processor
from tokenexit.exporting.export import FILES, export_model
from tokenexit.heads import class_scores
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)


@torch.no_grad()
def thresholds(model: ExitSegmenter, image: torch.Tensor) -> list[float]:
    """Thresholds at which the shares leave at the first exit."""
    tokens = model.backbone.run(model.backbone.embed([image]), 0, model.config.exits[0]).patches()
    head: Any = model.exit_heads[0]
    out = head(tokens)
    scores = class_scores(head.kind, out.logits, out.presence, out.packing.image_index()).amax(1)
    return [1.0 if share == 0 else float(scores.quantile(1 - share)) for share in SHARES]


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--heads", nargs="+", default=["fcn"])
    parser.add_argument("--num-classes", type=int, default=19)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    rows = []
    for head in options.heads:
        torch.manual_seed(0)
        model = ExitSegmenter(options.backbone, options.num_classes, [3], head, head).eval()
        image = torch.randn(3, options.size, options.size)
        taus = thresholds(model, image)
        methods: dict[str, Method[Any]] = {"dense": Dense(), "dtop": DToP(keep_per_class=1)}
        if head != "atm":
            methods["dovit"] = DoViT()
        with tempfile.TemporaryDirectory() as folder:
            sessions = {}
            for name, method in methods.items():
                export_model(model, method, [image[:, :96, :128]], Path(folder) / name)
                sessions[name] = onnxruntime.InferenceSession(Path(folder) / name / FILES["onnx"], settings)
            for share, tau in zip(SHARES, taus):
                rows.append({"head": head, "leave": share, **one_share(model, sessions, image, tau, options.rounds)})
                print(json.dumps(rows[-1]), flush=True)
    machine = {"processor": processor(torch.device("cpu")), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    asked = {"backbone": options.backbone, "size": options.size, "num_classes": options.num_classes}
    content = {"settings": asked, "machine": machine, "versions": versions, "rows": rows}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def shares_of_dense(model: ExitSegmenter, image: torch.Tensor, tau: float) -> dict[str, float]:
    """Of the multiply-adds: methods show their heads different tokens, so that a threshold lets others leave."""
    methods: tuple[Method[Any], ...] = (DToP(threshold=tau, keep_per_class=1), DoViT(threshold=tau))
    if model.decode_head.kind == "atm":
        methods = methods[:1]
    return {method.name: model([image], method).ledger.share_of_dense[0] for method in methods}


def one_share(model: ExitSegmenter, sessions: Any, image: torch.Tensor, tau: float, rounds: int) -> dict[str, Any]:
    """Times of every session, and of torch, at one threshold."""
    given = {"image": image[None].numpy(), "thresholds": np.array([tau], np.float32)}
    method = DToP(threshold=tau, keep_per_class=1)
    calls: dict[str, Callable[[], Any]] = {
        **{name: partial(session.run, None, given) for name, session in sessions.items()},
        "dtop in torch": lambda: model([image], method).labels,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with inference(torch.device("cpu")):
        shares = shares_of_dense(model, image, tau)
        for turn in range(rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {"share_of_dense": shares, "ms": {name: median_interval(values) for name, values in times.items()}}


if __name__ == "__main__":
    main()
