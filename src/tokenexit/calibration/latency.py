"""Milliseconds from live tokens: one model of what an image takes on this machine.

    ms = rest(all tokens) + sum over blocks of block(live) + sum over exits of exit(live before it)

Each part is timed alone on noise at a few sizes, in about two seconds, and is a parabola in the number of tokens. What
an exit lets go matters little to what it takes. Gating asks which exits pay, calibration what thresholds would take;
calibration then corrects what it predicts by true runs. Kept in the user's cache folder, one file for each model,
method, device, number of threads and precision; delete the file to measure anew.

Legend: n images, E exits, L patch tokens of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from statistics import median
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.engine.tokens import Tokens
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import timed_forward
from tokenexit.methods import Dense, Method
from tokenexit.methods.base import ModelView
from tokenexit.methods.thresholded import ThresholdMethod, blocks_of_live_tokens
from tokenexit.runtime.cache import cached_path, read_cached, write_cached
from tokenexit.runtime.precision import Precision, inference
from tokenexit.runtime.schema import Between
from tokenexit.segmenter import ExitSegmenter

Array = npt.NDArray[np.float64]
T = TypeVar("T", float, Tensor)

EXITS_SINCE = 2
"""Raised where what an exit takes has changed, so that times measured before are measured anew."""
SIDES = (6, 12, 24, 40)
"""Grids that are timed, in patches: 96 to 640 pixels of a patch-16 backbone."""
REPEATS = 5
TIMED_SIDE, LEAST_RUNS = 32, 3
"""For `seconds_per_mac`: patches along the noise that is timed, so many that the work counts and not the calls."""


_Coefficient = Annotated[float, Between(0, 1e9)]
_Coefficients = tuple[_Coefficient, _Coefficient, _Coefficient]


class _Kept(TypedDict):
    """Latencies in the cache."""

    block: _Coefficients
    exits: list[_Coefficients]
    rest: _Coefficients


@dataclass(frozen=True)
class Curve:
    """Milliseconds of one image with L patch tokens: `a + b L + c L^2`, none of them negative."""

    a: float
    b: float
    c: float

    def __call__(self, tokens: T) -> T:
        return self.a + self.b * tokens + self.c * tokens**2

    @classmethod
    def through(cls, tokens: Sequence[float], ms: Sequence[float]) -> Curve:
        counts = np.asarray(tokens, dtype=np.float64)
        a, b, c = nonnegative_fit(np.stack([np.ones(len(counts)), counts, counts**2], axis=1), np.asarray(ms))
        return cls(a, b, c)


def nonnegative_fit(features: Array, values: Array) -> tuple[float, ...]:
    """Coefficients, none negative, with the least squares of the relative error: the best of all subsets.

    features: `(n, k)` for a small k; values: `(n,)`, above 0.
    """
    weighted, ones = features / values[:, None], np.ones(len(values))
    count = features.shape[1]
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for subset in combinations(range(count), size):
            found = np.linalg.lstsq(weighted[:, subset], ones, rcond=None)[0]
            loss = float(((weighted[:, subset] @ found - 1.0) ** 2).sum())
            if (found >= 0).all() and loss < least - 1e-12:
                best, least = np.zeros(count), loss
                best[list(subset)] = found
    return tuple(map(float, best))


@dataclass(frozen=True)
class Latency:
    """Milliseconds of an image at batch 1, by patch tokens.

    block: one block of the backbone. exits: head, rule and compaction of each exit. rest: embedding, decode head and
    whatever else depends on the image's size alone. scored_on_grid: exit heads run on all patches, whoever is live.
    """

    block: Curve
    exits: tuple[Curve, ...]
    rest: Curve = Curve(0.0, 0.0, 0.0)
    scored_on_grid: bool = False

    def exit(self, n: int, live: T, cells: T) -> T:
        """Milliseconds of exit `n` where so many tokens of so many patches are live."""
        return self.exits[n](cells if self.scored_on_grid else live)

    def ms(self, live: Tensor, exits: Sequence[int], depth: int, last: int | None = None) -> Tensor:
        """`(n, E + 1)` tokens of each image before the first exit and after each, to `(n,)` milliseconds.

        last: the exit at which the network ends, if there is one.
        """
        counts = live.double()
        total = self.rest(counts[:, 0])
        for n, (start, stop) in enumerate(pairwise((0, *exits, depth))):
            if last is not None and n > last:
                break
            total = total + (stop - start) * self.block(counts[:, n])
            if n < len(exits):
                total = total + self.exit(n, counts[:, n], counts[:, 0])
        return total


def check_timed(model: ExitSegmenter) -> None:
    """Reject a model that takes windows: what an image takes here is a function of its tokens, taken whole.

    Raises:
        ConfigError: in one sentence.
    """
    if model.preprocessing.window is not None:
        raise ConfigError("latency_ms is for images taken whole, and this model takes windows: ask for a budget.")


def measure_latency(model: ExitSegmenter, method: Method[Any], precision: Precision = "fp32") -> Latency:
    """Time one block, every exit of `method` and a whole dense pass at a few sizes, one image at a time."""
    device, patch = model.device, model.config.backbone.patch_size
    depth = blocks_of_live_tokens(method, model.view())  # what the others take is in the rest
    generator = torch.Generator().manual_seed(0)
    blocks: list[float] = []
    rests: list[float] = []
    exits: list[list[float]] = [[] for _ in model.config.exits]
    with inference(device, precision):
        for side in SIDES:
            image = torch.randn(3, side * patch, side * patch, generator=generator).to(device)
            tokens, around = model.backbone.embed([image]), model.view()
            blocks.append(median_ms(partial(model.backbone.run, tokens, 0, 1), device))
            for n, times in enumerate(exits):
                times.append(median_ms(_exit_call(n, tokens, method, around), device))
            whole = median_ms(partial(model, [image], Dense()), device)
            rests.append(max(whole - depth * blocks[-1], 1e-3))
    counts = [float(side * side) for side in SIDES]
    through = partial(Curve.through, counts)
    return Latency(through(blocks), tuple(map(through, exits)), through(rests))


def _exit_call(n: int, tokens: Tokens, method: Method[Any], around: ModelView) -> Callable[[], Any]:
    state = method.start(tokens, around)
    return lambda: method.at_exit(n, tokens, state, around)


def median_ms(call: Callable[[], Any], device: torch.device) -> float:
    """The median of `REPEATS` calls behind one that warms up."""
    return median([timed_ms(call, device) for _ in range(REPEATS + 1)][1:])


def timed_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, with all that it leaves to the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def seconds_per_mac(model: ExitSegmenter, seconds: float = 0.0) -> float:
    """Seconds per multiply-add on this machine, to say how long an image of any size takes if no token leaves.

    The best of at least three runs of one block of the backbone, and of as many as `seconds` hold; in a block of
    `inference`. No curve and no cache: this need not be exact, and a caller may learn from its own calls.
    """
    backbone, device, side = model.backbone, model.device, TIMED_SIDE * model.config.backbone.patch_size
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = backbone.embed([noise])
    until, times = time.perf_counter() + seconds, list[float]()
    while len(times) < LEAST_RUNS or time.perf_counter() < until:
        times.append(timed_ms(partial(backbone.run, tokens, 0, 1), device))
    return min(times) / 1e3 / backbone.block_ops(tokens.packing.lengths[0]).macs


def latency_on_this_machine(model: ExitSegmenter, method: Method[Any], precision: Precision = "fp32") -> Latency:
    """`measure_latency`, from the cache if it was measured before."""
    stop = () if method.last_exit is None else (method.last_exit,)
    path = cached_path("latency", model.device, model.config.to_dict(), method.name, precision, EXITS_SINCE, *stop)
    kept = read_cached(path, _Kept)
    if kept is not None and len(kept["exits"]) == len(model.config.exits):
        exits = tuple(Curve(*values) for values in kept["exits"])
        found = Latency(Curve(*kept["block"]), exits, Curve(*kept["rest"]))
    else:
        found = measure_latency(model, method, precision)
        write_cached(
            path, {"block": astuple(found.block), "exits": list(map(astuple, found.exits)), "rest": astuple(found.rest)}
        )
    inner = method.inner
    return replace(found, scored_on_grid=isinstance(inner, ThresholdMethod) and inner.scores_grid)


def timed_in_turn(
    images: CalibrationSet, runs: Sequence[tuple[ExitSegmenter, Method[Any]]], count: int, title: str = "timing"
) -> list[list[float]]:
    """Return milliseconds of every run on at most `count` images, evenly spread: one image at a time, the runs in turn.

    The first image runs once before.
    """
    times: list[list[float]] = [[] for _ in runs]
    for n, position in enumerate(images.progress(title)(images.spread(count))):
        image = images.model.preprocessing.to_tensor(images.data[images.indices[position]].image)
        for _ in range(2 if n == 0 else 1):
            found = [timed_forward(model, image, method, (1, 1), images.precision)[1] for model, method in runs]
        for own, ms in zip(times, found):
            own.append(ms)
    return times


def timed_runs(calibration_set: CalibrationSet, method: Method[Any], title: str = "timing") -> list[float]:
    """Milliseconds of every image by itself; the first image runs once before."""
    times = []
    for position in calibration_set.progress(title)(range(len(calibration_set))):
        image = calibration_set.model.preprocessing.to_tensor(
            calibration_set.data[calibration_set.indices[position]].image
        )
        for _ in range(2 if position == 0 else 1):
            _, ms = timed_forward(calibration_set.model, image, method, (1, 1), calibration_set.precision)
        times.append(ms)
    return times
