"""The losses of mask classification in plain Python, a query, a mask and a point at a time; written from the papers."""

from __future__ import annotations

import math
from itertools import permutations

Map = list[list[float]]
Point = tuple[float, float]


def read(values: Map, point: Point) -> float:
    """Bilinear between the centres of cells, zero beyond the border; points are (x, y) from 0 to 1."""
    height, width = len(values), len(values[0])
    x, y = point[0] * width - 0.5, point[1] * height - 0.5
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * values[row][column]
    return total


def entropy(logits: list[float], inside: list[float]) -> float:
    each = [math.log1p(math.exp(-v)) * t + math.log1p(math.exp(v)) * (1 - t) for v, t in zip(logits, inside)]
    return sum(each) / max(len(each), 1)


def dice(logits: list[float], inside: list[float]) -> float:
    shares = [1 / (1 + math.exp(-v)) for v in logits]
    return 1 - (2 * sum(p * t for p, t in zip(shares, inside)) + 1) / (sum(shares) + sum(inside) + 1)


def probabilities(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(v) / total for v in logits]


def masks_of(labels: list[list[int]], void: int) -> dict[int, Map]:
    classes = sorted({c for row in labels for c in row} - {void})
    return {c: [[float(v == c) for v in row] for row in labels] for c in classes}


def best_pairs(
    mask_logits: list[Map],
    class_logits: list[list[float]],
    labels: list[list[int]],
    void: int,
    points: list[Point],
    counted: bool = False,
) -> dict[int, int]:
    """The query of each class, by trying every way; points are those of matching."""
    ignored: Map = [[float(v == void and not counted) for v in row] for row in labels]
    points = [p for p in points if read(ignored, p) == 0]
    masks = masks_of(labels, void)
    cost = {}
    for q, logits in enumerate(mask_logits):
        for c, mask in masks.items():
            values, inside = [read(logits, p) for p in points], [read(mask, p) for p in points]
            cost[q, c] = -2 * probabilities(class_logits[q])[c] + 5 * entropy(values, inside) + 5 * dice(values, inside)
    ways = permutations(range(len(mask_logits)), len(masks))
    best = min(ways, key=lambda way: sum(cost[q, c] for q, c in zip(way, masks)))
    return dict(zip(masks, best))


def terms(
    mask_logits: list[Map],
    class_logits: list[list[float]],
    labels: list[list[int]],
    void: int,
    pairs: dict[int, int],
    points: dict[int, list[Point]],
    counted: bool = False,
) -> tuple[float, float, float]:
    """Cross-entropy, binary cross-entropy and dice of one image; `points` are those of each class's mask."""
    class_of = {q: c for c, q in pairs.items()}
    last = len(class_logits[0]) - 1
    weights = [1.0 if q in class_of else 0.1 for q in range(len(class_logits))]
    classes = sum(
        -w * math.log(probabilities(logits)[class_of.get(q, last)])
        for q, (w, logits) in enumerate(zip(weights, class_logits))
    )
    ignored: Map = [[float(v == void and not counted) for v in row] for row in labels]
    entropies = dices = 0.0
    for c, mask in masks_of(labels, void).items():
        judged = [p for p in points[c] if read(ignored, p) == 0]
        values, inside = [read(mask_logits[pairs[c]], p) for p in judged], [read(mask, p) for p in judged]
        entropies += entropy(values, inside)
        dices += dice(values, inside)
    return classes / sum(weights), entropies / max(len(pairs), 1), dices / max(len(pairs), 1)
