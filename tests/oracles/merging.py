"""Merging of one image, written from the papers: cells in Python sets, loops over pairs, double precision.

A group is a set of cells with a feature; groups are listed in raster order of their first cell, which stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.oracles import vit


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


def mean_cosine(window: list[Tensor]) -> float:
    pairs = [cosine(a, b) for i, a in enumerate(window) for j, b in enumerate(window) if i != j]
    return sum(pairs) / len(pairs)


def evenness(pixels: Tensor) -> float:
    """1 minus the entropy of the grey levels of `(3, H, W)`, over its maximum; levels are tenths from -3.2 to 3.2."""
    counts: dict[int, int] = {}
    for value in pixels.mean(0).flatten().tolist():
        level = min(max(math.floor(value / 0.1), -32), 31)
        counts[level] = counts.get(level, 0) + 1
    total = sum(counts.values())
    return 1 + sum(n / total * math.log(n / total) for n in counts.values()) / math.log(64)


def supertokens(
    state: vit.State,
    config,
    image: Tensor,
    sizes: tuple[int, ...],
    chosen: Callable[[int, int, int, list[Tensor], Tensor], bool],
) -> list[Group]:
    """A quadtree of windows, from large to small; `chosen(side, row, column, patches, pixels)` says who shares.

    patches: embedded, of the window, in raster order. pixels: of the window.
    """
    size, (h, w) = config.patch_size, vit.grid_of(image, config.patch_size)
    plain = replace(config, norm_pre=False)
    state = {"patch_embed.proj.bias": torch.zeros(config.embed_dim).double()} | state
    weight, bias = state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"]
    table = vit.embed(state, plain, torch.zeros_like(image))[config.num_prefix_tokens :] - bias
    padded = torch.zeros(3, h * size, w * size, dtype=torch.float64)
    padded[:, : image.shape[1], : image.shape[2]] = image

    def pixels_of(row: int, column: int, side: int) -> Tensor:
        return padded[:, row * size : (row + side) * size, column * size : (column + side) * size]

    def finished(x: Tensor) -> Tensor:
        return vit.layer_norm(state, "norm_pre", x, config.norm_eps) if config.norm_pre else x

    def embedded(pixels: Tensor) -> Tensor:
        return weight @ pixels.flatten() + bias

    groups, taken = [], set[int]()
    for side in (*sorted(sizes, reverse=True), 1):
        for row in range(0, h - side + 1, side):
            for column in range(0, w - side + 1, side):
                cells = [(row + r) * w + column + c for r in range(side) for c in range(side)]
                whole = pixels_of(row, column, side)
                patches = [embedded(pixels_of(row + r, column + c, 1)) for r in range(side) for c in range(side)]
                if taken & set(cells) or (side > 1 and not chosen(side, row, column, patches, whole)):
                    continue
                small = torch.zeros(3, size, size, dtype=torch.float64)
                for y in range(size):
                    for x in range(size):
                        small[:, y, x] = whole[:, y * side : (y + 1) * side, x * side : (x + 1) * side].mean((1, 2))
                feature = finished(embedded(small) + table[cells].mean(0))
                groups.append(Group(cells[0], set(cells), feature))
                taken |= set(cells)
    return sorted(groups, key=lambda group: group.first)


def page_rank(attention: list[Tensor], members: list[int], iterations: int) -> dict[int, float]:
    """Root mean square over heads of the ranks in the graph among members, whose edges sum to one for each again."""
    by_head = []
    for matrix in attention:
        rank = dict.fromkeys(members, 1.0)
        for _ in range(iterations):
            new = dict.fromkeys(members, 0.0)
            for i in members:
                total = sum(float(matrix[i, j]) for j in members)
                for j in members:
                    new[j] += rank[i] * float(matrix[i, j]) / total
            rank = new
        by_head.append(rank)

    def variance(rank: dict[int, float]) -> float:
        return sum((value - 1) ** 2 for value in rank.values()) / len(rank)

    told = [rank for rank in by_head if 0.01 <= variance(rank) <= 0.7] or by_head
    return {i: math.sqrt(sum(rank[i] ** 2 for rank in told) / len(told)) for i in members}


def zero_tprune(
    q: Tensor, k: Tensor, prefix: int, keep: float, similar_share: float, iterations: int
) -> tuple[dict[int, int], float]:
    """Who answers for each patch of one image, by number behind the prefix, and the smallest margin of a choice.

    q, k: `(tokens, heads, channels)` in double precision.
    """
    heads = range(q.shape[1])
    scores = [torch.stack([torch.stack([torch.dot(a, b) for b in k[:, h]]) for a in q[:, h]]) for h in heads]
    attention = [(s / math.sqrt(q.shape[2])).exp() for s in scores]
    patches, gap = list(range(prefix, len(q))), math.inf
    going = max(min(len(patches), 1), int(keep * len(patches) + 1e-9))
    drops = min(round(similar_share * (len(patches) - going)), len(patches) // 2)
    answers = {i: i for i in patches}

    def like(i: int, others: list[int]) -> tuple[float, int]:
        nonlocal gap
        found = sorted(((cosine(k[i].flatten(), k[j].flatten()), -j) for j in others), reverse=True)
        if len(found) > 1:
            gap = min(gap, found[0][0] - found[1][0])
        return found[0][0], -found[0][1]

    def lowest(rank: dict[int, float], of: list[int], count: int) -> list[int]:
        nonlocal gap
        order = sorted(of, key=lambda i: (rank[i], i))
        if 0 < count < len(order):
            gap = min(gap, rank[order[count]] - rank[order[count - 1]])
        return order[:count]

    if drops:
        lower = lowest(page_rank(attention, list(range(len(q))), 1), patches, len(patches) // 2)
        upper = [i for i in patches if i not in lower]
        matches = sorted(((*like(i, upper), i) for i in lower), key=lambda match: (-match[0], match[2]))
        if drops < len(matches):
            gap = min(gap, matches[drops - 1][0] - matches[drops][0])
        answers |= {i: j for _, j, i in matches[:drops]}
    left = [i for i in patches if answers[i] == i]
    if len(left) > going:
        rank = page_rank(attention, [*range(prefix), *left], iterations)
        gone = lowest(rank, left, len(left) - going)
        stay = [i for i in left if i not in gone]
        answers |= {i: like(i, stay)[1] for i in gone}
    return {i - prefix: answers[answers[i]] - prefix for i in patches}, gap
