"""Merging of one image, written from the papers: cells in Python sets, loops over pairs, double precision.

A group is a set of cells with a feature; groups are listed in raster order of their first cell, which stands for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Group:
    """Cells that one token stands for; `first` is the cell at which it is."""

    first: int
    cells: set[int]
    feature: Tensor


def singles(features: Tensor) -> list[Group]:
    return [Group(i, {i}, f.double()) for i, f in enumerate(features)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def join(groups: list[Group], onto: dict[int, int], by_size: bool) -> list[Group]:
    """Let groups join others, by their numbers in the list; means are plain or weighted by cells."""
    out = []
    for i, group in enumerate(groups):
        if i in onto:
            continue
        members = [group, *(groups[j] for j in sorted(onto) if onto[j] == i)]
        weights = [len(m.cells) if by_size else 1 for m in members]
        total = torch.stack([w * m.feature for w, m in zip(weights, members)]).sum(0) / sum(weights)
        out.append(Group(group.first, set().union(*(m.cells for m in members)), total))
    return out


def mpm(groups: list[Group]) -> list[Group]:
    def nearest(i: int) -> int:
        others = [j for j in range(len(groups)) if j != i]
        return max(others, key=lambda j: (cosine(groups[i].feature, groups[j].feature), -j))

    if len(groups) < 2:
        return groups
    best = [nearest(i) for i in range(len(groups))]
    return join(groups, {i: best[i] for i in range(len(groups)) if best[best[i]] == i and best[i] < i}, False)


def algm_local(groups: list[Group], grid: tuple[int, int], tau: float) -> list[Group]:
    at = {group.first: i for i, group in enumerate(groups)}
    onto: dict[int, int] = {}
    for row in range(0, grid[0] - 1, 2):
        for column in range(0, grid[1] - 1, 2):
            cells = [(row + r) * grid[1] + column + c for r in (0, 1) for c in (0, 1)]
            if any(cell not in at or len(groups[at[cell]].cells) > 1 for cell in cells):
                continue
            features = [groups[at[cell]].feature for cell in cells]
            pairs = [cosine(a, b) for i, a in enumerate(features) for j, b in enumerate(features) if i != j]
            if sum(pairs) / 12 >= tau:
                onto |= {at[cell]: at[cells[0]] for cell in cells[1:]}
    return join(groups, onto, True)


def matches(groups: list[Group], prefix: int) -> dict[int, tuple[float, int]]:
    """Of every token of set A its best cosine in set B, and with whom."""
    a = [i for i in range(len(groups)) if (i + prefix) % 2 == 0]
    b = [i for i in range(len(groups)) if (i + prefix) % 2 == 1]
    return {i: max(((cosine(groups[i].feature, groups[j].feature), j) for j in b), default=(-math.inf, i)) for i in a}


def algm_global(groups: list[Group], prefix: int, divisor: float) -> list[Group]:
    found = {i: match for i, match in matches(groups, prefix).items() if match[0] > -math.inf}
    if not found:
        return groups
    values = [value for value, _ in found.values()]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    threshold = mean + deviation / divisor - 1e-6
    return join(groups, {i: j for i, (value, j) in found.items() if value >= threshold}, True)


def tome(groups: list[Group], prefix: int, r: int) -> list[Group]:
    found = [(value, -i, j) for i, (value, j) in matches(groups, prefix).items() if value > -math.inf]
    return join(groups, {-i: j for _, i, j in sorted(found, reverse=True)[:r]}, True)


def g2tm(groups: list[Group], grid: tuple[int, int], tau: float) -> list[Group]:
    onto = list(range(len(groups)))

    def flood(i: int, root: int) -> None:
        onto[i] = root
        row, column = divmod(i, grid[1])
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            j = r * grid[1] + c
            inside = 0 <= r < grid[0] and 0 <= c < grid[1]
            if inside and j not in seen and cosine(groups[i].feature, groups[j].feature) > tau:
                seen.add(j)
                flood(j, root)

    seen: set[int] = set()
    for i in range(len(groups)):
        if i not in seen:
            seen.add(i)
            flood(i, i)
    return join(groups, {i: root for i, root in enumerate(onto) if root != i}, False)
