"""Milliseconds from live tokens: a small cost model, measured on this machine.

    ms = a + b (sum over blocks of L) + c (sum over blocks of L^2),   L live tokens of a block, a, b, c >= 0

Fitted to true runs of the method itself, so all it does beside the blocks is in it. Kept in the user's cache folder,
one file for each model, method, device and precision; delete the file to measure anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.calibration.runs import Bench
from tokenexit.evaluation.evaluate import timed_forward
from tokenexit.methods import Method
from tokenexit.writing import whole

Array = npt.NDArray[np.float64]
REPEATS = 3
IMAGES = 8


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of one image at batch 1. relative_error: median of |fitted - measured| / measured."""

    coefficients: tuple[float, float, float]
    relative_error: float

    def ms(self, live: Tensor, exits: Sequence[int], depth: int) -> Tensor:
        """`(n, E + 1)` live counts to `(n,)` milliseconds."""
        return torch.from_numpy(_features(live, exits, depth) @ np.array(self.coefficients))


def _features(live: Tensor, exits: Sequence[int], depth: int) -> Array:
    """`(n, 3)`: one, and first and second powers of live tokens, summed over blocks."""
    blocks = np.diff(np.array([0, *exits, depth])).astype(np.float64)
    counts = live.numpy().astype(np.float64)
    return np.stack([np.ones(len(counts)), counts @ blocks, counts**2 @ blocks], axis=1)


def fit(live: Tensor, ms: Sequence[float], exits: Sequence[int], depth: int) -> LatencyModel:
    """Least squares of the relative error with coefficients that are not negative: the best of all subsets."""
    features, times = _features(live, exits, depth), np.asarray(ms, dtype=np.float64)
    weighted, ones = features / times[:, None], np.ones(len(times))
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):
        for subset in combinations(range(3), size):
            values = np.linalg.lstsq(weighted[:, subset], ones, rcond=None)[0]
            loss = float(((weighted[:, subset] @ values - 1.0) ** 2).sum())
            if (values >= 0).all() and loss < least - 1e-12:
                best, least = np.zeros(3), loss
                best[list(subset)] = values
    apart = np.median(np.abs(features @ best - times) / times)
    return LatencyModel((float(best[0]), float(best[1]), float(best[2])), float(apart))


def timed_runs(bench: Bench, method: Method[Any], title: str = "timing") -> tuple[list[float], Tensor]:
    """Milliseconds of every image by itself, and live tokens `(n, E + 1)`; the first image runs once before."""
    times, live = [], []
    exits = bench.model.config.exits
    for place in bench.progress(title)(range(len(bench))):
        image = bench.model.preprocessing.to_tensor(bench.data[bench.indices[place]].image)
        for _ in range(2 if place == 0 else 1):
            output, ms = timed_forward(bench.model, image, method, (1, 1), bench.precision)
        times.append(ms)
        live.append([output.ledger.tokens[0], *(output.ledger.live[0][n] for n in exits)])
    return times, torch.tensor(live)


def latency_model(bench: Bench, methods: Sequence[Method[Any]]) -> LatencyModel:
    """The cost model of the first method's kind, from the cache or measured with all `methods` on a few images."""
    path = cache_file(bench, methods[0])
    try:
        values = json.loads(path.read_text())
        a, b, c = (float(x) for x in values["coefficients"])
        return LatencyModel((a, b, c), float(values["relative_error"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or not readable: measure
    few = bench.part(range(min(IMAGES, len(bench))))
    times: list[float] = []
    live: list[Tensor] = []
    for method in methods:
        runs = [timed_runs(few, method) for _ in range(REPEATS)]
        times += np.median([ms for ms, _ in runs], axis=0).tolist()
        live.append(runs[0][1])
    config = bench.model.config
    model = fit(torch.cat(live), times, config.exits, config.backbone.depth)
    _keep(path, model)
    return model


def cache_file(bench: Bench, method: Method[Any]) -> Path:
    """Where the cost model of this model, method, device, threads and precision is kept."""
    device = bench.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    grids = sorted({bench.model.preprocessing.to_tensor(bench.data[i].image).shape[1:] for i in bench.indices[:IMAGES]})
    facts = [bench.model.config.to_dict(), method.name, name, torch.get_num_threads(), bench.precision, grids]
    key = hashlib.sha256(json.dumps([*facts, torch.__version__], default=list).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tokenexit" / "latency" / f"{key}.json"


def _keep(path: Path, model: LatencyModel) -> None:
    """Save for the next time; where the cache cannot be written, the next time measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            values = {"coefficients": list(model.coefficients), "relative_error": model.relative_error}
            unfinished.write_text(json.dumps(values) + "\n")
    except OSError:
        return
