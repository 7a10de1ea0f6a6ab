"""Auto-gating: exits that cost more time on this machine than they save are passed over.

An exit pays if its head, rule and compaction take less time than the blocks behind it save. On a small image, with a
narrow backbone or an expensive head, it may not. What that costs is measured once for a model, device and precision and
kept in the user's cache folder; the choice then follows from the size of the image alone, never from what is in it or
in the batch, so that the same image always meets the same exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tokenexit.calibration.latency import Latency, latency_on_this_machine
from tokenexit.engine.tokens import Grid
from tokenexit.errors import ConfigError
from tokenexit.methods import Method, MethodLike, Reduced, Resized, as_method
from tokenexit.methods.gated import Gated, GatedBySize
from tokenexit.methods.thresholded import blocks_of_live_tokens
from tokenexit.runtime.precision import Precision
from tokenexit.segmenter import ExitSegmenter

Way = tuple[float, int, tuple[int, ...]]
"""Milliseconds, minus the number of open exits, and which these are."""

RUNGS = tuple(dict.fromkeys(round(1.05**n) for n in range(284)))
"""Numbers of patches between which changes are looked for: up to a million, in steps of 5 %."""
ASSUMED_LEAVING = 1 / 3
"""Share of the live tokens that leaves at an exit where no calibration says otherwise; about that of both papers."""


@dataclass(frozen=True)
class Gating:
    """Which exits are closed at a number of tokens, and why.

    expected_ms: of the blocks and the open exits; open_ms: with every exit open; dense_ms: with none.
    """

    tokens: int
    closed: tuple[int, ...]
    reasons: tuple[str, ...]
    expected_ms: float
    open_ms: float
    dense_ms: float

    def apply(self, method: Method[Any]) -> Method[Any]:
        return Gated(method, self.closed) if self.closed else method


def choose_exits(
    costs: Latency,
    exits: Sequence[int],
    depth: int,
    tokens: int,
    live_after: Sequence[float],
    last: int | None = None,
) -> Gating:
    """The set of open exits with the least expected time, of all sets; of equals the one with more exits.

    exits: after how many blocks each stands. depth: number of blocks that a token is spared by leaving, of all that
        exits stand before. tokens: patches of the image. live_after: share of them that is live after each exit if all
        are open; who would have left at a closed exit leaves at the next open one. last: the exit at which the network
        ends, if there is one: it stays open, and nothing runs behind it.
    """
    end = depth if last is None else exits[last]

    def expected(opened: Sequence[int]) -> float:
        ms, live, block = 0.0, 1.0, 0
        for n in opened:
            ms += (exits[n] - block) * costs.block(live * tokens) + costs.exit(n, live * tokens, tokens)
            live, block = live_after[n], exits[n]
        return ms + (end - block) * costs.block(live * tokens)

    def cheapest(live: float, block: int, later: Mapping[int, Way]) -> Way:
        """From behind `block` to the end, through the exits in `later` or past them."""
        ms = costs.block(live * tokens)
        ways: list[Way] = [] if last in later else [((end - block) * ms, 0, ())]
        for n, (rest, fewer, opened) in later.items():
            until = (exits[n] - block) * ms + costs.exit(n, live * tokens, tokens)
            ways.append((until + rest, fewer - 1, (n, *opened)))
        return min(ways)

    numbers = range(len(exits) if last is None else last + 1)
    behind: dict[int, Way] = {}
    for n in reversed(numbers):  # what an open exit leaves behind it does not depend on those before
        behind[n] = cheapest(live_after[n], exits[n], behind)
    *_, best = cheapest(1.0, 0, behind)
    least = expected(best)
    reasons = []
    for n in numbers:
        other = expected([m for m in numbers if (m in best) != (m == n)])
        takes = f"exit {n + 1} after block {exits[n]} takes {costs.exits[n](tokens):.2f} ms on {tokens} tokens"
        if n == last:
            reasons.append(f"{takes}: open, as the method stops there")
        elif n in best:
            reasons.append(f"{takes}: open, as without it an image is expected to take {other - least:.2f} ms longer")
        else:
            reasons.append(f"{takes}: closed, as with it an image is expected to take {other - least:.2f} ms longer")
    closed = tuple(n for n in numbers if n not in best)
    return Gating(tokens, closed, tuple(reasons), least, expected(numbers), depth * costs.block(1.0 * tokens))


def gate(model: ExitSegmenter, method: MethodLike, grid: Grid, precision: Precision = "fp32") -> Gating:
    """Which exits of `method` pay on this machine for an image of this grid.

    The share of tokens that leaves is what the model's calibration saw, or a third of the live ones at each exit.
    """
    return _choices(model, as_method(method), precision)(grid[0] * grid[1])


def gated_by_size(model: ExitSegmenter, method: MethodLike, precision: Precision = "fp32") -> Method[Any]:
    """`method` with the exits that pay, at every size; as it is if all of them always pay, or it has no gates.

    Raises `ConfigError` for a method that `model` cannot run.
    """
    method = as_method(method)
    model.check(method)
    if isinstance(method, Resized):  # gates see the resized images
        return replace(method, method=gated_by_size(model, method.method, precision))
    if isinstance(method, Reduced):
        raise ConfigError("which exits pay is measured without merged tokens: close exits of the method inside.")
    if not method.may_gate:
        return method
    if method.sites(model.config.backbone.depth):
        raise ConfigError("which exits pay is measured without rejoin: leave it out, or run all exits.")
    choose = _choices(model, method, precision)
    closed = tuple(changes(lambda tokens: choose(tokens).closed))
    return GatedBySize(method, closed) if closed else method


def changes(closed: Callable[[int], tuple[int, ...]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """From which numbers of patches on other exits are closed than below, and which; below one, none are."""
    if closed(1):
        yield 1, closed(1)
    for low, high in pairwise(RUNGS):
        while closed(low) != closed(high):
            before, after = low, high
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if closed(middle) == closed(low) else (before, middle)
            yield after, closed(after)
            low = after


def _choices(model: ExitSegmenter, method: Method[Any], precision: Precision) -> Callable[[int], Gating]:
    """By the number of patches."""
    config = model.config
    reached = None if model.calibration is None else model.calibration.live_after_exit
    number = len(config.exits)
    assumed = [(1 - ASSUMED_LEAVING) ** (n + 1) for n in range(number)]
    live_after = assumed if reached is None or len(reached) < number else reached[-number:]
    costs = latency_on_this_machine(model, method, precision)
    depth, last = blocks_of_live_tokens(method, model.view()), method.last_exit
    return lambda tokens: choose_exits(costs, config.exits, depth, tokens, live_after, last)
