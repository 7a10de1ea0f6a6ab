"""Measure what an exit costs beyond the products of its head: operations and milliseconds, one image on one thread.

    python -m benchmarks.exit_cost --json docs/evidence/performance/exit-cost.json

Three exits of DToP (k = 5) and DoViT on fresh models with FCN heads. Contenders run in turn in one process: dense,
never (a threshold of 1) and some (at every exit the most confident share of its live tokens leaves, by thresholds that
were found before). Times are of the thread's own CPU, which other work on the machine disturbs little; a figure is the
median over rounds.

An exit is timed inside whole calls, where blocks have emptied the caches, and its head's linear layers are taken off;
`caches warm` is the second exit of a call, called again and again;
`around` is what a call of `never` takes beyond one of dense, by exit and again without these layers: it has state and
result in it, too. `conversion, exits free` is what would be left if exits cost nothing: a call has a fixed part, the
time of dense on an image of one patch, and only the rest shrinks with multiply-adds.

Operations are those that the profiler lists under an exit, nested ones included, and those that reach the dispatcher
once; what the linear layers call is taken off both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.conversion import median_interval, processor
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.methods.base import ModelView
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

METHODS: Mapping[str, Callable[[Any], Method[Any]]] = {
    "dtop": lambda threshold: DToP(threshold),
    "dovit": lambda threshold: DoViT(threshold),
}
LEAVING = 0.3
"""Share of the live tokens above the threshold of each exit, of `some`."""


def quickstart() -> tuple[ExitSegmenter, Tensor]:
    """The quickstart's model and an image of its size: 384 tokens."""
    shape = ViTConfig(embed_dim=128, depth=8, num_heads=4, patch_size=8, pos_embed_grid=(16, 24))
    head = {"kind": "fcn", "channels": 128}
    return ExitSegmenter(shape, 8, (2, 4, 6), head, head).eval(), torch.randn(3, 128, 192)


def preset(backbone: str, height: int, width: int) -> tuple[ExitSegmenter, Tensor]:
    return ExitSegmenter(backbone, 11, (3, 6, 9), "fcn", "fcn").eval(), torch.randn(3, height, width)


SHAPES: Mapping[str, Callable[[], tuple[ExitSegmenter, Tensor]]] = {
    "quickstart": quickstart,
    "tiny-660": lambda: preset("vit_tiny_patch16", 352, 480),
    "tiny-1024": lambda: preset("vit_tiny_patch16", 512, 512),
    "small-1024": lambda: preset("vit_small_patch16", 512, 512),
}


def some(model: ExitSegmenter, image: Tensor, build: Callable[[Any], Method[Any]], leaving: float) -> Method[Any]:
    """The method whose thresholds let this share of the live tokens leave at every exit of this image."""
    exits = len(model.config.exits)
    thresholds = [1.0] * exits
    for n in range(exits):
        found: list[Tensor] = []
        method = build(tuple(thresholds))
        decide = type(method).decide  # type: ignore[attr-defined]

        def noted(self: Any, at: int, graded: Any, live: Tensor, /, kept: Any = (n, found, decide)) -> Tensor:
            exit, scores, rule = kept
            if at == exit:
                scores.append(graded.score[live])
            return rule(self, at, graded, live)  # type: ignore[no-any-return]

        with patch.object(type(method), "decide", noted):
            model([image], method)
        thresholds[n] = float(found[0].quantile(1 - leaving))
    return build(tuple(thresholds))


class Counter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def listed(call: Callable[[], Any]) -> int:
    """Operations of a call that the profiler lists, nested ones included."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.name.startswith("aten::") for event in seen.events())


def dispatched(call: Callable[[], Any]) -> int:
    """Operations of a call that reach the dispatcher."""
    with Counter() as counter:
        call()
    return counter.count


def second_exit(
    model: ExitSegmenter, image: Tensor, method: Method[Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The second exit of a call, to be called again, and the products of its head's linear layers alone."""
    calls: list[Callable[[], Any]] = []
    at_exit = type(method).at_exit

    def kept(self: Any, n: int, tokens: Any, state: Any, view: ModelView) -> Any:
        if n == 1:
            calls.append(lambda: at_exit(self, n, tokens, state, view))
        return at_exit(self, n, tokens, state, view)

    inputs: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
        for layer in model.exit_heads[1].modules()
        if isinstance(layer, nn.Linear)
    ]
    with patch.object(type(method), "at_exit", kept):
        model([image], method)
    for hook in hooks:
        hook.remove()

    def products() -> None:
        for layer, x in inputs:
            layer(x)

    (call,) = calls
    call()  # lowers the head's weights under autocast
    return call, products


def operations(call: Callable[[], Any], products: Callable[[], Any]) -> dict[str, int]:
    """Operations of an exit beyond those of its products."""
    return {name: count(call) - count(products) for name, count in (("listed", listed), ("dispatched", dispatched))}


def warm_ms(call: Callable[[], Any], products: Callable[[], Any], times: int = 200) -> list[float]:
    """Milliseconds of an exit beyond its products, called again and again, so that the caches hold all it touches."""
    both = [(cpu_ms(call), cpu_ms(products)) for _ in range(times)]
    return interval([exit - alone for exit, alone in both[times // 4 :]])


@contextmanager
def watched(model: ExitSegmenter, kind: type[Method[Any]], spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds in exits and in the linear layers of their heads inside this block."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = function(*args, **kwargs)
            spent[part] += time.thread_time() - start
            return result

        return run

    with ExitStack() as stack:
        stack.enter_context(patch.object(kind, "at_exit", timed("exits", kind.at_exit)))
        for head in model.exit_heads:
            for layer in head.modules():
                if isinstance(layer, nn.Linear):
                    stack.enter_context(patch.object(layer, "forward", timed("products", layer.forward)))
        yield


def cpu_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of this thread's CPU that a call takes."""
    start = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - start)


def measure(
    shape: Callable[[], tuple[ExitSegmenter, Tensor]], name: str, precision: Precision, rounds: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, image = shape()
    exits, device = len(model.config.exits), torch.device("cpu")
    with inference(device, precision):
        contenders = {
            "dense": Dense(),
            "never": METHODS[name](1.0),
            "some": some(model, image, METHODS[name], LEAVING),
        }
        ms: dict[str, list[float]] = defaultdict(list)
        parts: dict[str, list[float]] = defaultdict(list)
        side = model.config.backbone.patch_size
        for turn in range(rounds + 2):
            alone = cpu_ms(lambda: model([image[:, :side, :side]], Dense()))
            if turn > 1:
                ms["one patch"].append(alone)
            for contender, method in contenders.items():
                took = cpu_ms(partial(model, [image], method))
                spent: dict[str, float] = {"exits": 0.0, "products": 0.0}
                if contender != "dense":
                    with watched(model, type(method), spent):
                        model([image], method)
                if turn > 1:
                    ms[contender].append(took)
                    parts[f"{contender} exit"].append(1e3 * (spent["exits"] - spent["products"]) / exits)
                    parts[f"{contender} products"].append(1e3 * spent["products"] / exits)
        ledger = model([image], contenders["some"]).ledger
        share = model([image], contenders["never"]).ledger.share_of_dense[0] - 1
        again = {contender: second_exit(model, image, contenders[contender]) for contender in ("never", "some")}
        counts = {contender: operations(*pair) for contender, pair in again.items()}
        warm = {contender: warm_ms(*pair) for contender, pair in again.items()}
    beyond = [(never - dense) / exits for never, dense in zip(ms["never"], ms["dense"])]
    around = [extra - products for extra, products in zip(beyond, parts["never products"])]
    ratio = 1 / ledger.share_of_dense[0]
    fixed = median(ms["one patch"])
    free = [dense / (fixed + (dense - fixed) / ratio) for dense in ms["dense"]]
    speedup = interval([dense / dynamic for dense, dynamic in zip(ms["dense"], ms["some"])])
    return {
        "tokens": ledger.tokens[0],
        "live": ledger.live_after(model.config.exits),
        "operations of an exit": counts,
        "ms of an exit": {name: interval(parts[f"{name} exit"]) for name in ("never", "some")},
        "ms of an exit, caches warm": warm,
        "ms of its products": {name: round(median(parts[f"{name} products"]), 3) for name in ("never", "some")},
        "ms around an exit": interval(around),
        "ms": {name: round(median(values), 2) for name, values in ms.items()},
        "never / dense": interval([never / dense for never, dense in zip(ms["never"], ms["dense"])]),
        "heads' share of multiply-adds": round(share, 4),
        "MAC ratio": round(ratio, 4),
        "speed-up": speedup,
        "conversion": [round((value - 1) / (ratio - 1), 3) for value in speedup],
        "conversion, exits free": [round((value - 1) / (ratio - 1), 3) for value in interval(free)],
    }


def interval(values: Sequence[float]) -> list[float]:
    """Median and its 95 % interval."""
    return [round(value, 4) for value in median_interval(values)]


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["quickstart", "tiny-660", "tiny-1024"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for shape in options.shapes:
        for precision in options.precisions:
            for name in options.methods:
                row = rows[f"{shape} {name} {precision}"] = measure(SHAPES[shape], name, precision, options.rounds)
                print(f"{shape} {name} {precision}: {json.dumps(row)}", flush=True)
    machine = {"torch": torch.__version__, "threads": 1, "processor": processor(torch.device("cpu"))}
    content = {"settings": {"rounds": options.rounds, "leaving": LEAVING}, "machine": machine, "rows": rows}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
