"""Measure what a user would deploy: dense and exits, fp32, bf16 and INT8, in torch, onnxruntime and OpenVINO, in turn.

    python -m benchmarks.deploy --out docs/evidence/performance/deploy
    python -m benchmarks.deploy --out docs/evidence/performance/deploy --only small-1024 base-512 --threads 2
    python -m benchmarks.deploy --out docs/evidence/performance/deploy --tables

Batch 1, to labels at full size. Random weights: the threshold of the one exit lets half of the tokens leave, in bf16
and INT8 the one at which as many leave. torch in INT8 is dynamic quantisation of linear layers, exit heads left in
fp32; torch has no compiled form of that. onnxruntime has no bf16 on CPUs, and rows on processors without bf16
instructions leave it out. torch in bf16 is autocast, but for compiled dense, whose weights and activations all are.
onnxruntime in INT8 takes ranges as they come, OpenVINO in advance, from the image itself.
Compiled exits have compiled blocks, compiled dense is one graph. Times are medians over rounds with 95 % intervals,
ratios are taken round by round; agreement is the share of fp32 dense's labels.

Every row is a process of its own and a JSON file; interrupted, it goes on with the first row that has no file.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.conversion import median_interval, processor, ratio
from benchmarks.parts import threshold_for
from benchmarks.rivals import plain
from tokenexit.exporting.export import Runner, export_model
from tokenexit.exporting.graph import OUTPUTS
from tokenexit.exporting.openvino import PAD_ROWS, open_openvino
from tokenexit.exporting.quantize import Thresholds, quantize_int8, thresholds_of
from tokenexit.methods import Dense, DToP, Method
from tokenexit.outputs.segmentation import resize_maps
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import Precision, inference, is_fast
from tokenexit.segmenter import ExitSegmenter

ROWS = tuple((backbone, size) for size in (512, 1024) for backbone in ("vit_small_patch16", "vit_base_patch16"))
RUNTIMES = ("torch eager", "torch compiled", "onnxruntime", "OpenVINO")
PRECISIONS = ("fp32", "bf16", "int8")

Labels = npt.NDArray[np.int64]
Cell = tuple[str, str, str]
"""dense or exits, precision, runtime."""


def leaving(model: ExitSegmenter, image: Tensor, tau: float) -> int:
    """The number of tokens that leave at the exit."""
    return int((model([image], DToP(tau)).exit_index[0] == 0).sum())


def matched(left_at: Callable[[float], int], wanted: int, tau: float) -> float:
    """The threshold near `tau` at which as many tokens leave a model of other precision, by halving."""
    low, high = 0.0, 1.0
    for _ in range(20):
        left = left_at(tau)
        if left == wanted:
            break
        low, high = (tau, high) if left > wanted else (low, tau)
        tau = (low + high) / 2
    return tau


def in_int8(model: ExitSegmenter) -> ExitSegmenter:
    """The model with its linear layers in INT8, ranges as they come, but for those of exit heads."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this moves to a package of its own
        small: ExitSegmenter = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    small.exit_heads = copy.deepcopy(model.exit_heads)
    return small


def compiled_dense(model: ExitSegmenter, image: Tensor, precision: Precision) -> Callable[[], Labels]:
    """The plain dense model as one compiled graph, with its logits at full size."""
    logits = plain(model, [image], precision, compiled=True)
    grid, patch = model.backbone.patch_embed.grid(*image.shape[1:]), model.config.backbone.patch_size

    def labels() -> Labels:
        (rows,) = logits()
        maps = rows.float().view(1, *grid, -1).permute(0, 3, 1, 2)
        full = resize_maps(maps, grid, patch, model.decode_head.upscale, (image.shape[1], image.shape[2]))
        return full.argmax(1)[0].numpy()

    return labels


def in_torch(
    model: ExitSegmenter, image: Tensor, method: Method[Any], precision: Precision = "fp32"
) -> Callable[[], Labels]:
    def labels() -> Labels:
        with inference(image.device, precision):
            return torch.as_tensor(model([image], method).labels)[0].numpy()

    return labels


def in_onnxruntime(path: Path, image: Tensor, threads: int) -> Callable[[], Labels]:
    """The labels of an exported file at its own thresholds."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feeds = {"image": image[None].numpy(), "thresholds": thresholds_of(path)}
    return lambda: session.run(list(OUTPUTS[:1]), feeds)[0][0]


def in_openvino(run: Runner, image: Tensor, thresholds: Thresholds) -> Callable[[], Labels]:
    """The labels of an exported file at its own thresholds."""
    return lambda: run(image[None].numpy(), thresholds)[0][0]


def cells(
    model: ExitSegmenter,
    image: Tensor,
    tau: float,
    folder: Path,
    threads: int,
    compiled: bool = True,
    openvino: bool = True,
) -> dict[Cell, Callable[[], Labels]]:
    """All that a user could deploy, by what it is; each returns labels `(H, W)`."""
    found: dict[Cell, Callable[[], Labels]] = {}
    small, bf16 = in_int8(model), is_fast("bf16", image.device)
    floats: tuple[Precision, ...] = ("fp32", "bf16") if bf16 else ("fp32",)
    with inference(image.device):
        wanted = leaving(model, image, tau)
        taus = {"fp32": tau, "int8": matched(lambda t: leaving(small, image, t), wanted, tau)}
    if bf16:
        with inference(image.device, "bf16"):
            taus["bf16"] = matched(lambda t: leaving(model, image, t), wanted, tau)
    for name in ("dense", "exits"):
        method = {each: Dense() if name == "dense" else DToP(value) for each, value in taus.items()}
        for precision in floats:
            found[name, precision, "torch eager"] = in_torch(model, image, method[precision], precision)
        found[name, "int8", "torch eager"] = in_torch(small, image, method["int8"])
        path = export_model(model, method["fp32"], [image], folder / name).path
        found[name, "fp32", "onnxruntime"] = in_onnxruntime(path, image, threads)
        int8 = quantize_int8(path, [image], agreement=0.0).path
        found[name, "int8", "onnxruntime"] = in_onnxruntime(int8, image, threads)
        if openvino:
            path = export_model(model, method["fp32"], [image], folder / f"{name} padded", pad_rows=PAD_ROWS).path
            found[name, "fp32", "OpenVINO"] = in_openvino(open_openvino(path), image, thresholds_of(path))
            graph = quantize_int8(path, [image], agreement=0.0, ranges=[image], runtime="openvino").path
            run = open_openvino(graph, graph.with_suffix(".bin"))
            found[name, "int8", "OpenVINO"] = in_openvino(run, image, thresholds_of(graph))
        if openvino and bf16:
            run, own = open_openvino(path, precision="bf16"), thresholds_of(path)
            if name == "exits":
                own = as_many_leave(run, image, wanted, own)
            found[name, "bf16", "OpenVINO"] = in_openvino(run, image, own)
    if compiled:
        blocks = copy.deepcopy(model)
        blocks.backbone.compile_blocks()
        for precision in floats:
            found["dense", precision, "torch compiled"] = compiled_dense(model, image, precision)
            found["exits", precision, "torch compiled"] = in_torch(blocks, image, DToP(taus[precision]), precision)
    return found


def as_many_leave(run: Runner, image: Tensor, wanted: int, thresholds: Thresholds) -> Thresholds:
    """The thresholds at which as many tokens leave an exported file in other precision."""

    def left_at(tau: float) -> int:
        return int((run(image[None].numpy(), np.full_like(thresholds, tau))[2] == 0).sum())

    return np.full_like(thresholds, matched(left_at, wanted, float(thresholds[0])))


def measured(
    model: ExitSegmenter,
    image: Tensor,
    rounds: int,
    threads: int,
    folder: Path,
    compiled: bool = True,
    openvino: bool = True,
) -> dict[str, Any]:
    """Time all cells in turn; two rounds before are not counted, in which graphs are compiled."""
    tau = threshold_for(model, image, 0.5)
    found = cells(model, image, tau, folder, threads, compiled, openvino)
    times: dict[Cell, list[float]] = {cell: [] for cell in found}
    answers: dict[Cell, Labels] = {}
    with inference(torch.device("cpu")):
        ledger = model([image], DToP(tau)).ledger
        for turn in range(rounds + 2):
            for cell, call in found.items():
                start = time.perf_counter()
                answers[cell] = call()
                if turn > 1:
                    times[cell].append(1e3 * (time.perf_counter() - start))
    truth = answers["dense", "fp32", "torch eager"]
    mac_ratio = ledger.dense_macs[0] / ledger.macs[0]
    return {
        "mac_ratio": round(mac_ratio, 4),
        "rounds": rounds,
        "cells": [
            {
                "what": what,
                "precision": precision,
                "runtime": runtime,
                "ms": [round(value, 3) for value in median_interval(times[what, precision, runtime])],
                "agreement": round(float((answers[what, precision, runtime] == truth).mean()), 5),
            }
            for what, precision, runtime in found
        ],
        "speed-up": {
            f"{runtime} {precision}": ratio(times["dense", precision, runtime], times["exits", precision, runtime])
            for what, precision, runtime in found
            if what == "dense"
        },
    }


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: a line for each runtime and precision, dense beside exits."""
    head = "| row | runtime | dense, ms | exits, ms | dense / exits | MAC ratio | agreement: dense | exits |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|"]
    for name, row in rows.items():
        by = {(cell["what"], cell["precision"], cell["runtime"]): cell for cell in row["cells"]}
        for runtime in RUNTIMES:
            for precision in PRECISIONS:
                if ("dense", precision, runtime) not in by:
                    continue
                dense, exits = (by[what, precision, runtime] for what in ("dense", "exits"))
                gain = row["speed-up"][f"{runtime} {precision}"]
                lines.append(
                    f"| {name} | {runtime}, {precision} | {_spread(dense['ms'])} | {_spread(exits['ms'])} "
                    f"| {_spread([gain['median'], *gain['interval']], 2)} | {row['mac_ratio']:.2f} "
                    f"| {dense['agreement']:.1%} | {exits['agreement']:.1%} |"
                )
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 0) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} [{low}, {high}]"


def one_row(backbone: str, size: int, threads: int, rounds: int, path: Path) -> None:
    """Measure one row and write its file."""
    keep_buffers()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ExitSegmenter(backbone, 19, [3], "fcn", "fcn").eval()
    image = torch.randn(3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(model, image, rounds, threads, Path(folder))
    import onnxruntime
    import openvino

    versions = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
    }
    machine = {"processor": processor(torch.device("cpu")), "threads": threads}
    settings = {"backbone": backbone, "size": size, "batch": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"settings": settings, "machine": machine, "versions": versions, **row}, indent=1) + "\n"
    )


def main() -> None:
    names = [f"{backbone.split('_')[1]}-{size}" for backbone, size in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows' files")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="rows to measure; all without it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--row", help="name of a single row to measure in this process")
    parser.add_argument("--tables", action="store_true", help="table of existing figures only, without measurements")
    options = parser.parse_args()

    rows = {f"{name}-{options.threads}": row for name, row in zip(names, ROWS)}
    if options.row:
        one_row(*rows[options.row], options.threads, options.rounds, options.out / f"{options.row}.json")
        return
    wanted = [f"{name}-{options.threads}" for name in options.only]
    for number, name in enumerate(wanted, 1):
        if options.tables or (options.out / f"{name}.json").exists():
            continue
        print(f"{number} of {len(wanted)}: {name}", file=sys.stderr, flush=True)
        same = ["--out", str(options.out), "--threads", str(options.threads), "--rounds", str(options.rounds)]
        command = [sys.executable, "-m", "benchmarks.deploy", *same, "--row", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    there = {name: options.out / f"{name}.json" for name in rows}
    print(table({name: json.loads(path.read_text()) for name, path in there.items() if path.exists()}))


if __name__ == "__main__":
    main()
