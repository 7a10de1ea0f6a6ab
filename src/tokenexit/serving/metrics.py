"""Counters and histograms in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64)

COUNTERS = {
    "tokenexit_requests_total": "Requests by route and status.",
    "tokenexit_pictures_total": "Images segmented, by method.",
    "tokenexit_macs_total": "Multiply-adds done for them.",
    "tokenexit_dense_macs_total": "Multiply-adds that Dense would have taken for them.",
    "tokenexit_tokens_total": "Patch tokens of them, by the exit they left at; end for those that stayed.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "tokenexit_request_seconds": ("From the first byte of a request to the last of its answer, by route.", SECONDS),
    "tokenexit_batch_seconds": ("Calls of the model.", SECONDS),
    "tokenexit_batch_pictures": ("Images that shared a call of the model.", IMAGES),
}

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and its labels."""


@dataclass
class _Histogram:
    counts: list[int]
    sum: float = 0.0


class Metrics:
    """Counters and histograms since the start. gauges: help and function of values read on request, by name."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]] | None = None) -> None:
        self.gauges = gauges or {}
        self._counters: dict[Series, float] = {}
        self._histograms: dict[Series, _Histogram] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        series = name, tuple(labels.items())
        with self._lock:
            self._counters[series] = self._counters.get(series, 0) + value

    def observe(self, name: str, value: float, **labels: str) -> None:
        bounds = HISTOGRAMS[name][1]
        with self._lock:
            histogram = self._histograms.setdefault((name, tuple(labels.items())), _Histogram([0] * (len(bounds) + 1)))
            histogram.counts[bisect_left(bounds, value)] += 1
            histogram.sum += value

    def text(self) -> str:
        with self._lock:
            lines = []
            for name, help_ in COUNTERS.items():
                lines += _head(name, help_, "counter")
                lines += [
                    f"{_series(*key)} {_number(value)}" for key, value in self._counters.items() if key[0] == name
                ]
            for name, (help_, bounds) in HISTOGRAMS.items():
                lines += _head(name, help_, "histogram")
                for (own, labels), histogram in self._histograms.items():
                    if own == name:
                        lines += _histogram_lines(name, labels, bounds, histogram)
        for name, (help_, value) in self.gauges.items():
            lines += [*_head(name, help_, "gauge"), f"{name} {_number(value())}"]
        return "\n".join(lines) + "\n"


def _head(name: str, help_: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]


def _number(value: float) -> str:
    """Write a number without rounding: rates are differences of sums that grow for months."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _series(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in labels)
    return f"{name}{{{inside}}}" if inside else name


def _histogram_lines(
    name: str, labels: tuple[tuple[str, str], ...], bounds: tuple[float, ...], histogram: _Histogram
) -> list[str]:
    lines, total = [], 0
    for bound, count in zip([*(f"{b:g}" for b in bounds), "+Inf"], histogram.counts):
        total += count
        lines.append(f"{_series(f'{name}_bucket', (*labels, ('le', bound)))} {total}")
    return [
        *lines,
        f"{_series(f'{name}_sum', labels)} {_number(histogram.sum)}",
        f"{_series(f'{name}_count', labels)} {total}",
    ]
