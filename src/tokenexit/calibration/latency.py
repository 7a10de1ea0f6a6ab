"""Milliseconds from live tokens: a small cost model, measured on this machine.

    ms = a + b (sum over blocks of L) + c (sum over blocks of L^2),   L live tokens of a block, a, b, c >= 0

Fitted to true runs of the method itself, so all it does beside the blocks is in it. Kept in the user's cache folder,
one file for each model, method, device and precision; delete the file to measure anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.cache import cached_path, keep, read_cached
from tokenexit.calibration.runs import Bench
from tokenexit.evaluation.evaluate import timed_forward
from tokenexit.gating import nonnegative_fit
from tokenexit.methods import Method
from tokenexit.runtime.schema import Between

Array = npt.NDArray[np.float64]
REPEATS = 3
IMAGES = 8


_Number = Annotated[float, Between(0, 1e9)]


class _Kept(TypedDict):
    """A model in the cache."""

    coefficients: tuple[_Number, _Number, _Number]
    relative_error: _Number


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
    best = np.array(nonnegative_fit(features, times))
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
    if (kept := read_cached(path, _Kept)) is not None:
        a, b, c = kept["coefficients"]
        return LatencyModel((a, b, c), kept["relative_error"])
    few = bench.part(range(min(IMAGES, len(bench))))
    times: list[float] = []
    live: list[Tensor] = []
    for method in methods:
        runs = [timed_runs(few, method) for _ in range(REPEATS)]
        times += np.median([ms for ms, _ in runs], axis=0).tolist()
        live.append(runs[0][1])
    config = bench.model.config
    model = fit(torch.cat(live), times, config.exits, config.backbone.depth)
    keep(path, {"coefficients": list(model.coefficients), "relative_error": model.relative_error})
    return model


def cache_file(bench: Bench, method: Method[Any]) -> Path:
    """Where the cost model of this model, method, device, threads and precision is kept."""
    grids = sorted({bench.model.preprocessing.to_tensor(bench.data[i].image).shape[1:] for i in bench.indices[:IMAGES]})
    model = bench.model
    return cached_path("latency", model.device, model.config.to_dict(), method.name, bench.precision, grids)
