"""Exits, supertokens, merging and all of them together on an untrained model, with counts imposed by the images.

    python -m benchmarks.untrained --backbone vit_small_patch16 --size 1024 --table step --json FILE
    python -m benchmarks.untrained --backbone vit_small_patch16 --size 512 --table field --rivals --json FILE
    python -m benchmarks.untrained --backbone vit_small_patch16 --size 512 --table mixed --json FILE

Images are noise with flat windows of 4x4 patches in random places, a share of each (`--flat`, in turn), so that every
reducer runs its own rule and pays for it, and what it finds is known. Tokens leave at exits in random places, a share
of all at each (`--leave`), after heads and rules have run. Nothing here says anything of accuracy.

step: dense, exits, supertokens, and both, which is STEP. field: every reducer, alone and beside exits. Both one image
at a time and in one batch of unlike images, whose sides are `--size` in turn. mixed: ALGM's windows in a batch of
unlike images, each image's own saving beside the published rule, by which all merge as many as the image with fewest.

conversion = (speed-up - 1) / (MAC ratio - 1). Contenders run in turn; a figure is the median over rounds, with its 95 %
interval. Peak memory is that of allocations in one call of the batch, beyond those before it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.conversion import interleaved_ms, median_interval, processor
from benchmarks.rivals import plain
from tokenexit.methods import Dense, DToP, FixedRatio, Method, Reduced
from tokenexit.methods.thresholded import Graded
from tokenexit.reducers import ALGM, G2TM, MPM, Reducer, Supertokens, ToMe, ZeroTPrune
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import Precision, inference
from tokenexit.segmenter import ExitSegmenter

FLAT = 4
"""Side of a flat window, in patches."""
REDUCERS: tuple[Reducer, ...] = (ALGM(0.9), MPM(), ToMe(0.02), G2TM(0.95), ZeroTPrune(), Supertokens(0.9))


@dataclass(frozen=True, eq=False)
class DToPImposed(DToP):
    """DToP whose rule is computed, and then replaced: `exit_index (cells,)` says who leaves where."""

    name: ClassVar[str] = "dtop, exits imposed"

    exit_index: Tensor | None = None

    @property
    def label(self) -> str:
        return "exits"

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        super().decide(n, graded, live)
        assert self.exit_index is not None
        assert graded.position is not None
        return self.exit_index.index_select(0, graded.position) == n


def image_of(side: int, patch: int, flat: float, generator: torch.Generator) -> Tensor:
    """Noise `(3, side, side)` in which a share of all windows of 4x4 patches has one colour each."""
    image, step = torch.randn(3, side, side, generator=generator), FLAT * patch
    corners = [(y, x) for y in range(0, side - step + 1, step) for x in range(0, side - step + 1, step)]
    for n in torch.randperm(len(corners), generator=generator)[: round(flat * len(corners))].tolist():
        y, x = corners[n]
        image[:, y : y + step, x : x + step] = torch.randn(3, 1, 1, generator=generator)
    return image


def imposed(cells: Sequence[int], leave: Sequence[float], generator: torch.Generator) -> Tensor:
    """Where each cell of all images leaves, in random places: a share of an image's cells at each exit."""
    found = []
    for count in cells:
        exit_index = torch.full((count,), len(leave))
        order, start = torch.randperm(count, generator=generator), 0
        for n, share in enumerate(leave):
            stop = min(count, start + round(share * count))
            exit_index[order[start:stop]] = n
            start = stop
        found.append(exit_index)
    return torch.cat(found)


def contenders(exits: Tensor, table: str) -> list[Method[Any]]:
    """The methods of a table, dense first, for the whole batch. exits: where each cell leaves, `(cells,)`."""
    dense: Method[Any] = Dense()
    dtop = DToPImposed(keep_per_class=0, exit_index=exits)
    reducers = (Supertokens(0.9, (2, 4)),) if table == "step" else REDUCERS
    found = [dense, dtop, *(Reduced(inner, by) for by in reducers for inner in (dense, dtop))]
    return found if table == "step" else [*found, FixedRatio(0.5), FixedRatio(0.5, rejoin=1)]


def of_cells(method: Method[Any], cells: slice) -> Method[Any]:
    """The method for the image of these cells alone."""
    if isinstance(method, Reduced):
        return replace(method, method=of_cells(method.method, cells))
    if isinstance(method, DToPImposed):
        assert method.exit_index is not None
        return replace(method, exit_index=method.exit_index[cells])
    return method


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Largest sum of allocations of one call beyond what there was, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def one_by_one(model: ExitSegmenter, images: Sequence[Tensor], methods: Sequence[Method[Any]]) -> None:
    """Each image by itself, each with its method."""
    for image, method in zip(images, methods):
        model([image], method)


def rows_of(
    model: ExitSegmenter,
    images: Sequence[Tensor],
    methods: Sequence[Method[Any]],
    rounds: int,
    precision: Precision,
    rivals: bool,
    warmup: int,
) -> list[dict[str, Any]]:
    """A row for each method, the first dense; then, with rivals, the plain dense model eager and compiled."""
    bounds = [0, *accumulate(math.prod(model.backbone.patch_embed.grid(*image.shape[1:])) for image in images)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    calls: dict[str, Callable[[], Any]] = {}
    for n, method in enumerate(methods):
        calls[f"{n} batch"] = partial(model, images, method)
        calls[f"{n} one"] = partial(one_by_one, model, images, [of_cells(method, part) for part in parts])
    own: list[str] = []
    if rivals:
        for name, compiled in (("plain", False), ("compiled", True)):
            calls[f"{name} batch"] = plain(model, images, precision, compiled)
            singles = [plain(model, images[i : i + 1], precision, compiled) for i in range(len(images))]
            calls[f"{name} one"] = partial(lambda singles: [call() for call in singles], singles)
            own += [f"{name} batch", f"{name} one"]
    times = interleaved_ms(calls, rounds, model.device, precision, own, warmup)

    rows: list[dict[str, Any]] = []
    for n, method in enumerate(methods):
        ledger = model(images, method).ledger
        ratio = sum(ledger.dense_macs) / sum(ledger.macs)
        row: dict[str, Any] = {
            "label": method.label,
            "gmacs": [round(one, 3) for one in ledger.gmacs],
            "live_in_first_and_last_block": [[live[0], live[-1]] for live in ledger.live],
            "mac_ratio": ratio,
            "reduction_share": sum(part.reduction for part in ledger.parts) / sum(ledger.macs),
        }
        for kind in ("one", "batch"):
            gains = [dense / mine for dense, mine in zip(times[f"0 {kind}"], times[f"{n} {kind}"])]
            speedup = median_interval(gains)
            row[kind] = {"ms": median_interval(times[f"{n} {kind}"])[0], "speedup": speedup}
            if ratio > 1.05:
                row[kind]["conversion"] = [(gain - 1) / (ratio - 1) for gain in speedup]
            for name in ("plain", "compiled") if rivals else ():
                against = [rival / mine for rival, mine in zip(times[f"{name} {kind}"], times[f"{n} {kind}"])]
                row[kind][f"over {name}"] = median_interval(against)
        row["peak_mib"] = peak_mib(calls[f"{n} batch"], model.device)
        rows.append(row)
    for name in ("plain", "compiled") if rivals else ():
        row = {"label": f"dense, {name}", "mac_ratio": 1.0, "peak_mib": peak_mib(calls[f"{name} batch"], model.device)}
        rows.append(row | {kind: {"ms": median_interval(times[f"{name} {kind}"])[0]} for kind in ("one", "batch")})
    return rows


def table_of(rows: Sequence[dict[str, Any]], batch: int) -> str:
    """Markdown."""
    lines = [f"| row | MACs of dense | comparisons | ms, one by one | conversion | ms, batch of {batch} | conversion "]
    lines[0] += "| over compiled dense | peak, MiB |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [row["label"], f"{1 / row['mac_ratio']:.1%}", f"{row.get('reduction_share', 0):.1%}"]
        for kind in ("one", "batch"):
            conversion = row[kind].get("conversion")
            shown = "" if conversion is None else "{:.2f} [{:.2f}, {:.2f}]".format(*conversion)
            cells += [f"{row[kind]['ms']:.0f}", shown]
        over = row["batch"].get("over compiled")
        lines.append(
            "| " + " | ".join([*cells, "" if over is None else f"{over[0]:.2f}", f"{row['peak_mib']:.0f}"]) + " |"
        )
    return "\n".join(lines)


def mixed(
    model: ExitSegmenter, images: Sequence[Tensor], rounds: int, precision: Precision, warmup: int
) -> list[dict[str, Any]]:
    """ALGM's windows: how many merge in each image of a batch, and by the published rule, the batch's fewest."""
    method = Reduced(Dense(), ALGM(0.9, 1, None))
    ledger = model(images, method).ledger
    calls = {"dense": partial(model, images, Dense()), "own": partial(model, images, method)}
    times = interleaved_ms(calls, rounds, model.device, precision, (), warmup)
    speedup = median_interval([dense / own for dense, own in zip(times["dense"], times["own"])])
    merged = [(cells - live[-1]) // 3 for cells, live in zip(ledger.tokens, ledger.live)]
    rows: list[dict[str, Any]] = []
    for i, (cells, own) in enumerate(zip(ledger.tokens, merged)):
        alone = model(images[i : i + 1], method).ledger
        assert alone == ledger[i], "an image's saving does not depend on its companions"
        rows.append(
            {
                "cells": cells,
                "windows": own,
                "windows_of_the_published_rule": min(merged),
                "tokens": cells - 3 * own,
                "tokens_of_the_published_rule": cells - 3 * min(merged),
                "share_of_dense": ledger.share_of_dense[i],
            }
        )
    whole = {"share_of_dense": sum(ledger.macs) / sum(ledger.dense_macs), "speedup": speedup}
    print("| image | windows merged | tokens left | by the published rule | of dense |\n|---|---:|---:|---:|---:|")
    for i, row in enumerate(rows):
        print(
            f"| {i + 1} | {row['windows']} | {row['tokens']} of {row['cells']} | {row['tokens_of_the_published_rule']} "
            f"| {row['share_of_dense']:.1%} |"
        )
    print(
        f"batch: {whole['share_of_dense']:.1%} of dense, {speedup[0]:.2f} [{speedup[1]:.2f}, {speedup[2]:.2f}] faster"
    )
    return [*rows, whole]


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16")
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="side of every image, in turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--table", choices=("step", "field", "mixed"), default="step")
    parser.add_argument("--flat", type=float, nargs="+", default=[0.64, 0.8, 0.5, 0.2], help="share of flat windows")
    parser.add_argument("--exits", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument(
        "--leave", type=float, nargs="+", default=[0.3, 0.2, 0.1], help="share that leaves at each exit"
    )
    parser.add_argument("--num-classes", type=int, default=19)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--rivals", action="store_true", help="plain dense model too, eager and compiled")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, which are not counted")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.leave) != len(options.exits):
        parser.error(f"--leave has {len(options.leave)} shares for {len(options.exits)} exits: give one for each.")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, generator = torch.device(options.device), torch.Generator().manual_seed(0)
    model = ExitSegmenter(options.backbone, options.num_classes, options.exits).eval().to(device)
    patch = model.config.backbone.patch_size
    sides = [options.size[i % len(options.size)] for i in range(options.batch)]
    shares = [options.flat[i % len(options.flat)] for i in range(options.batch)]
    images = [image_of(side, patch, flat, generator).to(device) for side, flat in zip(sides, shares)]
    cells = [math.prod(model.backbone.patch_embed.grid(side, side)) for side in sides]
    exits = imposed(cells, options.leave, generator).to(device)
    with inference(device, options.precision):
        if options.table == "mixed":
            results = mixed(model, images, options.rounds, options.precision, options.warmup)
        else:
            methods = contenders(exits, options.table)
            results = rows_of(model, images, methods, options.rounds, options.precision, options.rivals, options.warmup)
            print(table_of(results, options.batch))
    settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(device)}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": settings, "machine": machine, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
