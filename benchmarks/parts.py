"""Measure the parts of a forward pass: embed, blocks, attention, exit head, rule, compaction, canvas, finish.

    python -m benchmarks.parts --backbone vit_small_patch16 --size 512 --precision bf16 --leave 0.5

Every part is timed from outside, by wrapping the functions that do it, and counts its own time only: attention lies
inside a block, the rule inside the work at an exit. Dense and dynamic run in turn; a figure is the median over pairs.
The dynamic pass is DToP with a threshold under which the wanted share of tokens leaves at the first exit, so that its
own rule is what is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tokenexit.engine.block
import tokenexit.segmenter
from tokenexit.engine.tokens import Tokens
from tokenexit.heads import class_scores
from tokenexit.methods import Dense, DToP, Method
from tokenexit.methods.base import Canvas
from tokenexit.segmenter import ExitSegmenter

PARTS = ("embed", "blocks", "attention", "exit head", "rule", "compaction", "canvas", "decode head", "ledger", "finish")


class Stopwatch:
    """Own time of nested parts, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                total = time.perf_counter() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + total - self._inside.pop()
                if self._inside:
                    self._inside[-1] += total

        return timed


@contextmanager
def watched(model: ExitSegmenter, watch: Stopwatch) -> Iterator[None]:
    """All parts of `model` report to `watch` inside this block."""
    places: list[tuple[Any, str, str]] = [
        (model.backbone, "embed", "embed"),
        (model.backbone, "run", "blocks"),
        (tokenexit.engine.block, "packed_attention", "attention"),
        (DToP, "decide", "rule"),
        (Tokens, "keep", "compaction"),
        (Canvas, "read", "canvas"),
        (model.decode_head, "forward", "decode head"),
        (tokenexit.segmenter, "write_ledger", "ledger"),
        *((head, "forward", "exit head") for head in model.exit_heads),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, _timed(watch, part, owner, name)))
        yield


def _timed(watch: Stopwatch, part: str, owner: Any, name: str) -> Callable[..., Any]:
    return watch.wrap(part, getattr(owner, name))


@torch.inference_mode()
def parts_ms(model: ExitSegmenter, image: Tensor, method: Method[Any], precision: str) -> dict[str, float]:
    """Milliseconds of every part of one pass that ends with labels at full size."""
    watch = Stopwatch()
    with watched(model, watch), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        start = time.perf_counter()
        output = model([image], method)
        watch.wrap("finish", lambda: output.labels)()
        total = time.perf_counter() - start
    rest = total - sum(watch.seconds.values())
    return {part: 1e3 * watch.seconds.get(part, 0.0) for part in PARTS} | {"rest": 1e3 * rest, "all": 1e3 * total}


@torch.inference_mode()
def threshold_for(model: ExitSegmenter, image: Tensor, leave: float) -> float:
    """The threshold at which a share `leave` of all tokens is sure enough at the first exit."""
    tokens = model.backbone.run(model.backbone.embed([image]), 0, model.config.exits[0]).patches()
    head: Any = model.exit_heads[0]
    out = head(tokens)
    scores = class_scores(head.kind, out.logits, out.presence, out.packing.image_index()).amax(1)
    return float(scores.quantile(1 - leave))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--leave", type=float, default=0.5)
    parser.add_argument("--head", default="fcn")
    parser.add_argument("--num-classes", type=int, default=19)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ExitSegmenter(options.backbone, options.num_classes, [3], options.head, options.head).eval()
    image = torch.randn(3, options.size, options.size)
    method = DToP(threshold=threshold_for(model, image, options.leave), keep_per_class=0)
    runs: dict[str, list[dict[str, float]]] = {"dense": [], "dynamic": []}
    for pair in range(options.pairs + 1):
        for name, one in (("dense", Dense()), ("dynamic", method)):
            figures = parts_ms(model, image, one, options.precision)
            if pair:
                runs[name].append(figures)
    medians = {name: {part: median(run[part] for run in of) for part in of[0]} for name, of in runs.items()}
    print(f"{'part':<12} {'dense ms':>9} {'dynamic ms':>11} {'ratio':>6}")
    for part, dense in medians["dense"].items():
        dynamic = medians["dynamic"][part]
        print(f"{part:<12} {dense:>9.2f} {dynamic:>11.2f} {dynamic / dense if dense else float('nan'):>6.2f}")
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "median_ms": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
