"""Measure how much of the saved arithmetic becomes saved time, with prescribed exits.

    python -m benchmarks.conversion --backbone vit_base_patch16 --size 512 --batch 1 --precision fp32 --leave 0.5

Contenders run in turn in one process, on the same kernels, precision, threads and inputs: dense, dynamic, and with
`--rivals` the dense model as users would otherwise run it (benchmarks.rivals). Exit heads and the method's own rule are
counted and timed; then the tokens that leave are replaced by a given share in random places, so that untrained models
can be timed honestly. conversion = (speed-up - 1) / (MAC ratio - 1). A figure is the median over rounds with its 95 %
interval (order statistics, Conover 1999, section 3.2).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.rivals import agrees, plain
from tokenexit.engine.tokens import Tokens
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.methods.base import ExitRecord, ModelView
from tokenexit.methods.thresholded import Graded
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

Contender = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class DToPShares(DToP):
    """DToP whose rule is computed, and then replaced: who leaves at the first exit is given, `(cells,)` bool."""

    name: ClassVar[str] = "dtop, shares imposed"

    leaving: Tensor | None = None

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        ruled = super().decide(n, graded, live)
        assert self.leaving is not None
        assert graded.position is not None
        imposed = self.leaving.index_select(0, graded.position)
        return imposed if n == 0 else torch.zeros_like(ruled)


@dataclass(frozen=True, eq=False)
class DoViTShares(DoViT):
    """DoViT whose scores are computed, and then replaced by 1 for those given to stop, 0 for others."""

    name: ClassVar[str] = "dovit, shares imposed"

    leaving: Tensor | None = None

    def _graded(self, n: int, patches: Tokens, live: Tokens, model: ModelView) -> tuple[Tensor, Tensor, ExitRecord]:
        score, label, record = super()._graded(n, patches, live, model)
        assert self.leaving is not None
        return self.leaving.to(score.dtype), label, record


def imposed(method: str, cells: Sequence[int], leave: Sequence[float], device: torch.device, seed: int) -> Method[Any]:
    """Of each image the share that leaves at the first exit, in random places."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count, share in zip(cells, leave):
        part = torch.zeros(count, dtype=torch.bool)
        part[torch.randperm(count, generator=generator)[: round(count * share)]] = True
        parts.append(part)
    leaving = torch.cat(parts).to(device)
    return DToPShares(leaving=leaving) if method == "dtop" else DoViTShares(leaving=leaving)


def one_image(method: Method[Any], cells: Sequence[int], index: int) -> Method[Any]:
    """The same method for one image of the batch."""
    start = sum(cells[:index])
    assert isinstance(method, DToPShares | DoViTShares)
    assert method.leaving is not None
    return replace(method, leaving=method.leaving[start : start + cells[index]])


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the order statistics that enclose it with 95 % confidence (binomial, normal approximation)."""
    ordered = sorted(values)
    n = len(ordered)
    half = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2, ordered[low], ordered[high]


def interleaved_ms(
    contenders: Mapping[str, Contender],
    rounds: int,
    device: torch.device,
    precision: Precision,
    rivals: Sequence[str],
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round; the rounds of warm-up before are not counted.

    Rivals bring their own precision; all others run under one autocast block, as a program with many images does.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            with inference(device, "fp32" if name in rivals else precision):
                call()
            _synchronize(device)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Median and interval of the ratio, round by round."""
    median, low, high = median_interval([a / b for a, b in zip(numerator, denominator)])
    return {"median": round(median, 4), "interval": [round(low, 4), round(high, 4)]}


def summary(times: Mapping[str, list[float]], macs: Sequence[int], dense_macs: Sequence[int]) -> dict[str, Any]:
    """Speed-up, MAC ratio, conversion and overhead of `dynamic`, and its lead over every rival."""
    mac_ratio = sum(dense_macs) / sum(macs)
    speedup = ratio(times["dense"], times["dynamic"])
    figures: dict[str, Any] = {
        "ms": {name: round(median_interval(values)[0], 2) for name, values in times.items()},
        "rounds": len(times["dense"]),
        "dense_gmacs": sum(dense_macs) / 1e9,
        "mac_ratio": mac_ratio,
        "speedup": speedup,
    }
    if mac_ratio > 1:
        values = [speedup["median"], *speedup["interval"]]
        median, low, high = (round((value - 1) / (mac_ratio - 1), 3) for value in values)
        figures["conversion"] = {"median": median, "interval": [low, high]}
    else:  # nothing leaves: what the exits cost, in time and in multiply-adds
        figures["overhead"] = ratio(times["dynamic"], times["dense"])
        figures["head_macs_share"] = 1 / mac_ratio - 1
    for name in times.keys() - {"dense", "dynamic"}:
        figures[f"{name} / dynamic"] = ratio(times[name], times["dynamic"])
    return figures


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="side of every image, in turn")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--method", choices=("dtop", "dovit"), default="dtop")
    parser.add_argument("--leave", type=float, nargs="+", default=[0.5], help="share that exits first, per image")
    parser.add_argument("--exits", type=int, nargs="+", default=[3])
    parser.add_argument("--exit-head", default="fcn")
    parser.add_argument("--head", default="fcn", help="decode head")
    parser.add_argument("--num-classes", type=int, default=19)
    parser.add_argument("--rivals", action="store_true", help="plain dense model too, eager and compiled")
    parser.add_argument("--one-by-one", action="store_true", help="dynamic images one after another, too")
    parser.add_argument("--captured", action="store_true", help="blocks of dense and dynamic as CUDA graphs")
    parser.add_argument("--compiled-blocks", action="store_true", help="blocks of dense and dynamic compiled")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="number of threads; torch's default if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    heads = {"exit_head": options.exit_head, "decode_head": options.head}
    model = ExitSegmenter(options.backbone, options.num_classes, options.exits, **heads).eval().to(device)
    if options.compiled_blocks:
        model.backbone.compile_blocks()
    if options.captured:
        model.backbone.capture_blocks()
    sides = [options.size[i % len(options.size)] for i in range(options.batch)]
    leave = [options.leave[i % len(options.leave)] for i in range(options.batch)]
    images = [torch.randn(3, side, side, device=device) for side in sides]
    cells = [math.prod(model.backbone.patch_embed.grid(side, side)) for side in sides]
    method = imposed(options.method, cells, leave, device, seed=0)

    contenders: dict[str, Contender] = {
        "dense": lambda: model(images, Dense()),
        "dynamic": lambda: model(images, method),
    }
    rivals: list[str] = []
    if options.rivals:
        apart = agrees(model, images)
        assert apart < 1e-3, f"the rival is another model: logits differ by {apart}"
        contenders["plain"] = plain(model, images, options.precision, compiled=False)
        contenders["compiled"] = plain(model, images, options.precision, compiled=True)
        rivals = ["plain", "compiled"]
    if options.one_by_one:
        alone = [one_image(method, cells, i) for i in range(len(images))]
        contenders["one by one"] = lambda: [model([image], own) for image, own in zip(images, alone)]

    with inference(device, options.precision):
        ledger = model(images, method).ledger
        times = interleaved_ms(contenders, options.rounds, device, options.precision, rivals)
    figures = summary(times, ledger.macs, ledger.dense_macs)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "threads")}
    content = {"settings": settings, "machine": machine, **figures}
    print(json.dumps(content, indent=2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
