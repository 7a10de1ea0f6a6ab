"""Line charts and histograms as SVG text, legible in light and dark, without a library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from tokenexit.errors import ConfigError

_FONT = 13
_COLOURS = (("#1f6fb4", "#6db3f2"), ("#c8501e", "#f39a6b"), ("#0f7f6b", "#4fc3a8"), ("#7a4fb5", "#b99bf0"))
_MARKERS = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",  # circle
    "M-4.6-4.6H4.6V4.6H-4.6Z",  # square
    "M0-6L5.8 4.4H-5.8Z",  # triangle
    "M0-6.4L6.4 0L0 6.4L-6.4 0Z",  # diamond
)
COLLAPSE = 0.75
"""Share of the reference's mIoU below which a point is a collapse, and is drawn at the lower edge."""
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom in drawing units


class Point(NamedTuple):
    """One measurement, with a label beside it. low, high: ends of a whisker, where its uncertainty is known."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points joined by a line in the given order; a single point is a marker alone."""

    name: str
    points: Sequence[Point]


def collapse_floor(values: Sequence[float], reference: float) -> float | None:
    """Return the lower end of the mIoU axis, so that a collapse does not flatten the rest: three quarters of the
    reference; None if no value lies below that."""
    floor = COLLAPSE * reference
    return floor if any(value < floor for value in values) and any(value >= floor for value in values) else None


def line_chart_svg(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str = "",
    width: int = 480,
    height: int = 340,
    floor: float | None = None,
) -> str:
    """Draw a line chart as SVG text, for a page or a file of its own. title: alternative text.

    Series differ by colour and by marker; colours change with the reader's light or dark scheme. Labels that
    would cover something else are left to the marker's tooltip. width, height: drawing units; the chart scales.
    floor: points below it stand on the lower edge as an arrow with their value, and do not stretch the axis.
    """
    points = [point for one in series for point in one.points]
    if not points or not all(math.isfinite(point.x) and math.isfinite(point.y) for point in points):
        raise ConfigError("the chart's series hold no point, or one that is not finite: give finite x and y values.")
    legend, legend_height = _legend([one.name for one in series], width)
    above = [point for point in points if floor is None or point.y >= floor]
    if not above:
        raise ConfigError(f"floor={floor} is above every point of the chart: lower it.")
    heights = [y for p in above for y in (p.y, p.low, p.high) if y is not None and (floor is None or y >= floor)]
    x_ticks, y_ticks = (nice_ticks(min(v), max(v)) for v in ([p.x for p in points], heights))
    left = max(58.0, 34.0 + max(_width(_number(tick, y_ticks)) for tick in y_ticks))  # clear of the turned label
    top, right, bottom = legend_height + 14.0, width - 16.0, height - 50.0

    def position(point: Point) -> tuple[float, float]:
        across = (point.x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = max(0.0, (point.y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = [legend]
    for tick in y_ticks:
        parts.append(_grid_line(position(Point(x_ticks[0], tick))[1], left, right, _number(tick, y_ticks)))
    for tick in x_ticks:
        x = position(Point(tick, y_ticks[0]))[0]
        parts.append(_text(x, bottom + 20, _number(tick, x_ticks), "middle", "tx-soft"))
    parts.append(_axis_labels((left, top, right, bottom), height, x_label, y_label))
    parts += _curves(series, (x_label, y_label), position, floor, (left, legend_height, right, bottom))
    return _svg(parts, title or f"{y_label} against {x_label}", width, height)


def _curves(
    series: Sequence[Series],
    axes: tuple[str, str],
    position: Callable[[Point], tuple[float, float]],
    floor: float | None,
    frame: Box,
) -> list[str]:
    """Draw lines, markers, whiskers and those labels that find a free box in the frame.

    axes: the labels of x and y. position: the drawing position of a point.
    """
    parts = []
    placed = [[position(point) for point in one.points] for one in series]
    taken = [_around(x, y, 6) for spots in placed for x, y in spots]
    taken += [_around(x, y, 2) for spots in placed for x, y in _along(spots)]
    for number, (one, spots) in enumerate(zip(series, placed)):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<g class="tx-{number % 4}"><polyline points="{line}"/>')
        for point, (x, y) in zip(one.points, spots):
            tip = f"{one.name} {point.label}: {axes[0]} {point.x:g}, {axes[1]} {point.y:g}"
            below = floor is not None and point.y < floor
            label = f"{point.y:.1f} below" if below else point.label
            if point.low is not None and point.high is not None and not below:
                ends = [position(point._replace(y=end))[1] for end in (point.low, point.high)]
                parts.append(f'<path class="tx-whisker" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
            parts.append(_arrow(x, y, tip) if below else _marker(number, x, y, tip))
            spot = _free_spot(x, y, label, taken, frame) if label else None
            if spot:
                taken.append(spot)
                parts.append(_text(spot[0], spot[3] - 4, label, "start", "tx-label"))
        parts.append("</g>")
    return parts


def histogram_svg(
    values: Sequence[float], x_label: str, y_label: str, bins: int = 20, width: int = 480, height: int = 240
) -> str:
    """Draw a histogram of at most `bins` bars of equal width between round numbers, as SVG text."""
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError("the histogram has no value, or one that is not finite: give finite values.")
    ticks = nice_ticks(min(values), max(values), bins)
    step = ticks[1] - ticks[0]
    counts = [0] * (len(ticks) - 1)
    for value in values:
        counts[min(len(counts) - 1, int((value - ticks[0]) / step + 1e-9))] += 1
    left, top, right, bottom = 58.0, 14.0, width - 16.0, height - 50.0
    y_ticks = [tick for tick in nice_ticks(0, max(counts), 4) if tick == int(tick)]
    wide, high = (right - left) / len(counts), (bottom - top) / y_ticks[-1]
    parts = []
    for tick in y_ticks:
        parts.append(_grid_line(bottom - tick * high, left, right, f"{tick:.0f}"))
    every = math.ceil(len(ticks) / 8)
    for n, tick in enumerate(ticks):
        if n % every == 0:
            parts.append(_text(left + n * wide, bottom + 20, _number(tick, ticks), "middle", "tx-soft"))
    for n, count in enumerate(counts):
        x, y = left + n * wide, bottom - count * high
        tip = f"{_number(ticks[n], ticks)} to {_number(ticks[n + 1], ticks)}: {count}"
        if count:
            bar = f"M{x + 1:.1f} {bottom:.1f}V{y:.1f}H{x + wide - 1:.1f}V{bottom:.1f}Z"
            parts.append(f'<g class="tx-0"><path class="tx-marker" d="{bar}"><title>{escape(tip)}</title></path></g>')
    parts.append(_axis_labels((left, top, right, bottom), height, x_label, y_label))
    return _svg(parts, f"{y_label} by {x_label}", width, height)


def _grid_line(y: float, left: float, right: float, label: str) -> str:
    """Draw a horizontal grid line with its label."""
    line = f'<path class="tx-grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>'
    return f"{line}\n{_text(left - 9, y + 4.5, label, 'end', 'tx-soft')}"


def _axis_labels(box: Box, height: int, x_label: str, y_label: str) -> str:
    """Draw the labels of both axes around the box."""
    left, top, right, bottom = box
    turned = f"translate(15 {(top + bottom) / 2:.1f}) rotate(-90)"
    across = _text((left + right) / 2, height - 8, x_label, "middle")
    return f'{across}\n<g transform="{turned}">{_text(0, 0, y_label, "middle")}</g>'


def _svg(parts: Sequence[str], name: str, width: int, height: int) -> str:
    """Wrap the parts of a drawing. name: its alternative text."""
    drawing, label = "\n".join(parts), escape(name, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n'
        f"<style>{_chart_style()}</style>\n{drawing}\n</svg>"
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if high - low <= max(1e-12, 1e-9 * max(abs(low), abs(high))):  # labels could not tell them apart
        low, high = low - max(1.0, abs(low) * 0.1), high + max(1.0, abs(high) * 0.1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    # The margin keeps a value that sits on a tick from asking for one more.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def _number(tick: float, ticks: Sequence[float]) -> str:
    """Write a tick with as many decimals as the distance of ticks needs, and at most as many as `float` holds."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{tick:.{min(decimals, 12)}f}".replace("-", "−")


def _legend(names: Sequence[str], width: int) -> tuple[str, float]:
    """Draw marker and name of each series in rows from the top left; also return their height."""
    parts, x, y = [], 12.0, 14.0
    for number, name in enumerate(names):
        needed = 16 + _width(name) + 20
        if x > 12 and x + needed > width:
            x, y = 12.0, y + 20
        parts.append(f'<g class="tx-{number % 4}">{_marker(number, x, y)}{_text(x + 13, y + 4.5, name, "start")}</g>')
        x += needed
    return "\n".join(parts), y + 12


def _marker(number: int, x: float, y: float, tip: str = "") -> str:
    shape = _MARKERS[(number + number // 4) % 4]
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<path class="tx-marker" transform="translate({x:.1f} {y:.1f})" d="{shape}">{title}</path>'


def _arrow(x: float, y: float, tip: str) -> str:
    """Draw an arrow on the lower edge, for a point below it."""
    shape = f'd="M-6-8H6L0 2Z"><title>{escape(tip)}</title></path>'
    return f'<path class="tx-marker tx-below" transform="translate({x:.1f} {y:.1f})" {shape}'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _width(text: str) -> float:
    return 0.56 * _FONT * len(text)  # of common sans-serif faces, on average


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _along(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points along the line, close enough that no label slips between two of them."""
    shares = [i / 24 for i in range(25)]
    return [(x + s * (u - x), y + s * (v - y)) for (x, y), (u, v) in pairwise(spots) for s in shares]


def _free_spot(x: float, y: float, label: str, taken: Sequence[Box], frame: Box) -> Box | None:
    """Return the first free box above, below, right or left of a point, or on its four diagonals."""
    w, h = _width(label), _FONT + 3.0
    corners = [(-w / 2, -h - 8), (-w / 2, 8), (10, -h / 2), (-w - 10, -h / 2)]
    corners += [(6, 5), (-w - 6, -h - 5), (6, -h - 5), (-w - 6, 5)]
    for dx, dy in corners:
        box = (x + dx, y + dy, x + dx + w, y + dy + h)
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _chart_style() -> str:
    light = "".join(f".tx-{i}{{--tx:{c[0]}}}" for i, c in enumerate(_COLOURS))
    dark = "".join(f".tx-{i}{{--tx:{c[1]}}}" for i, c in enumerate(_COLOURS))
    return (
        f"svg{{--tx-ink:#1d2126;--tx-soft:#626a73;--tx-grid:#e3e5e8}}{light}"
        f"text{{font:{_FONT}px system-ui,sans-serif;fill:var(--tx-ink);font-variant-numeric:tabular-nums}}"
        ".tx-soft{fill:var(--tx-soft)}.tx-label{font-size:12px;fill:var(--tx)}.tx-grid{stroke:var(--tx-grid)}"
        "polyline{fill:none;stroke:var(--tx);stroke-width:2;stroke-linejoin:round}.tx-marker{fill:var(--tx)}"
        ".tx-whisker{stroke:var(--tx);stroke-width:1.5;opacity:.55}"
        "@media (prefers-color-scheme:dark){svg{--tx-ink:#e4e7ea;--tx-soft:#98a1ab;--tx-grid:#2c3238}" + dark + "}"
    )
