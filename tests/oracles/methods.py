"""The methods, image by image and class by class, on full grids with masks: straight from the specifications.

Tokens never move. `dtop` and `dovit` follow the official releases; the "mean" mode of DoViT's has one token count for
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.heads import run_head, setr_naive_fine, setr_up_fine
from tests.oracles.vit import State, embed, final_norm, grid_of, run_block, under


@dataclass
class Answer:
    """What an oracle says of one image.

    grid: `(K, h, w)` final map at the patches (None behind a head that has no such map); full: `(K, H, W)`.
    stage: `(h, w)` exit of every token. live: patch tokens in every block. scores: at each exit, those that decide.
    gap: the smallest distance of any decision from tipping over.
    """

    grid: Tensor | None
    full: Tensor
    stage: Tensor
    live: list[int]
    scores: list[Tensor] = field(default_factory=list)
    gap: float = float("inf")


@dataclass
class Weights:
    """A model's configuration and its weights in double precision."""

    config: object  # SegmenterConfig
    state: State

    @classmethod
    def of(cls, model) -> Weights:
        state = {name: value.detach().double() for name, value in model.state_dict().items()}
        return cls(model.config, state)

    @property
    def vit(self):
        return self.config.backbone

    @property
    def backbone(self) -> State:
        return under(self.state, "backbone.")

    def head(self, n: int | None) -> tuple[State, dict]:
        """Weights and specification of exit head `n`, or of the decode head (None)."""
        if n is None:
            state, spec = under(self.state, "decode_head."), dict(self.config.decode_head)
        else:
            state, spec = under(self.state, f"exit_heads.{n}."), dict(self.config.exit_heads[n])
        if spec["kind"] in ("atm", "mask_transformer") and "num_heads" not in spec:
            raise ValueError("oracles want num_heads written out")
        return state, spec


def scores_of(spec: dict, logits: Tensor, presence: Tensor | None) -> Tensor:
    """Per-class scores `(n, K)`: softmax, or presence times sigmoid."""
    if spec["kind"] == "atm":
        assert presence is not None
        return torch.softmax(presence, dim=1)[:, 0] * torch.sigmoid(logits)
    return torch.softmax(logits, dim=1)


def sureness(probabilities: Sequence[float], score: str) -> float:
    """How sure a head is that says these class probabilities."""
    ordered = sorted(probabilities, reverse=True)
    if score == "probability" or len(ordered) == 1:
        return ordered[0]
    if score == "margin":
        return ordered[0] - ordered[1]
    return 1.0 + sum(p * math.log(p) for p in ordered if p > 0.0) / math.log(len(ordered))


def lead(probabilities: Tensor) -> float:
    """How far the highest value is ahead of the second."""
    if len(probabilities) == 1:
        return float("inf")
    first, second = probabilities.sort(descending=True).values[:2].tolist()
    return first - second


def at_border(named: dict[int, int], position: int, grid: tuple[int, int]) -> bool:
    """Whether a patch has another class than the one above, below, left or right of it."""
    row, column = divmod(position, grid[1])
    for i, j in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= i < grid[0] and 0 <= j < grid[1] and named[i * grid[1] + j] != named[position]:
            return True
    return False


def of_exit(value: float | Sequence[float], n: int) -> float:
    return value if isinstance(value, int | float) else value[n]


def to_image(grid: Tensor, image: Tensor, patch: int, upscale: int = 1) -> Tensor:
    """A `(K, a h, a w)` map to the image: the head's own step first, then to the padded size, then cut."""
    h, w = grid_of(image, patch)
    maps = grid[None]
    if upscale > 1:
        maps = F.interpolate(maps, scale_factor=upscale, mode="bilinear", align_corners=False)
    maps = F.interpolate(maps, (h * patch, w * patch), mode="bilinear", align_corners=False)
    return maps[0, :, : image.shape[1], : image.shape[2]]


def adapt(weights: Weights, n: int, x: Tensor) -> Tensor:
    """One feature `(C,)` through the stage adapter of exit `n`: its own norm, and a matrix on top of it."""
    state = under(weights.state, f"stage_adapters.{n}.")
    if weights.vit.final_norm:
        centred = x - x.mean()
        x = centred / torch.sqrt((centred**2).mean() + weights.vit.norm_eps)
        x = x * state["norm.weight"] + state["norm.bias"]
    rows = [float(row @ x) for row in state["linear.weight"]]
    return x + torch.tensor(rows, dtype=torch.float64) + state["linear.bias"]


def decode(weights: Weights, image: Tensor, x: Tensor, stopped: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """Final norm and decode head on a complete grid `(h w, C)`: maps at the patches and at the image.

    stopped: `(h w,)` exit whose adapter is in place of the final norm, where the model has adapters.
    """
    grid, patch = grid_of(image, weights.vit.patch_size), weights.vit.patch_size
    raw, exits = x, len(weights.config.exits)
    x = final_norm(weights.backbone, weights.vit, x)
    if weights.config.stage_adapter and stopped is not None:
        x = torch.stack([x[p] if e == exits else adapt(weights, e, raw[p]) for p, e in enumerate(stopped.tolist())])
    state, spec = weights.head(None)
    if spec["kind"] == "setr_pup":
        return None, to_image(setr_up_fine(state, spec, x, grid), image, patch)
    logits, presence = run_head(state, spec, x)
    if spec["kind"] == "atm":
        logits = scores_of(spec, logits, presence)
    maps = logits.T.reshape(-1, *grid)
    if spec["kind"] == "setr_naive":
        return maps, to_image(setr_naive_fine(state, x, grid), image, patch)
    return maps, to_image(maps, image, patch)


def dense(weights: Weights, image: Tensor) -> Answer:
    image, config = image.double(), weights.vit
    x, grid = embed(weights.backbone, config, image), grid_of(image, config.patch_size)
    for i in range(config.depth):
        x = run_block(weights.backbone, config, i, x, torch.ones(len(x), dtype=torch.bool), grid)
    maps, full = decode(weights, image, x[config.num_prefix_tokens :])
    n = grid[0] * grid[1]
    return Answer(maps, full, torch.full(grid, len(weights.config.exits)), [n] * config.depth)


def dtop(
    weights: Weights,
    image: Tensor,
    thresholds: Sequence[float | Sequence[float]],
    k: int = 5,
    finish: str = "auto",
    score: str = "probability",
    temperature: float | Sequence[float] = 1.0,
    boundary_guard: bool = False,
    cap: Sequence[float] | None = None,
    rejoin: int = 0,
    context_weight: float = 0.0,
    window: int = 0,
    frozen: int = 0,
) -> Answer:
    """DToP on one image. rejoin: before so many last blocks all tokens are there again, and the end answers for all.

    context_weight: those that leave are shared out among live tokens of their class, which then count as more keys.
    window: side of squares of patches in each of which the surest of those that would leave stays, too.
    frozen: of those that leave, the ones on every so many rows and columns are seen on, and stay as they are.
    """
    image, config = image.double(), weights.vit
    grid, prefix, exits = grid_of(image, config.patch_size), config.num_prefix_tokens, weights.config.exits
    n, classes = grid[0] * grid[1], weights.config.num_classes
    specs = [weights.head(i)[1] for i in range(len(exits))] + [weights.head(None)[1]]
    kinds = {spec["kind"] == "atm" for spec in specs}
    if finish == "auto":
        finish = "presence_last" if kinds == {True} else "frozen"
    # What the canvas holds: ATM mask logits to be finished later, class logits, or final scores.
    holds = "mask" if finish == "presence_last" else "logits" if kinds == {False} else "scores"

    x = embed(weights.backbone, config, image)
    alive = torch.ones(n, dtype=torch.bool)
    canvas = torch.zeros(n, classes, dtype=torch.float64)
    stage = torch.full((n,), len(exits))
    last_presence, answer = None, Answer(None, torch.empty(0), stage, [])
    always = torch.ones(prefix, dtype=torch.bool)
    stands_for = [1.0] * n  # how many patches
    named: dict[int, int] = {}  # the class of every token when it was last seen

    def write(which: int | None) -> Tensor:
        nonlocal last_presence
        state, spec = weights.head(which)
        seen = x[prefix:][alive]
        if which is None:
            seen = final_norm(weights.backbone, config, seen)
        if not len(seen):
            return torch.empty(0, classes)
        logits, presence = run_head(state, spec, seen)
        last_presence = presence
        canvas[alive] = scores_of(spec, logits, presence) if holds == "scores" else logits
        return scores_of(spec, logits if which is None else logits / of_exit(temperature, which), presence)

    for i in range(config.depth):
        if i >= config.depth - rejoin:
            alive[:] = True
        counts = torch.tensor([1.0] * prefix + [m**context_weight for m in stands_for], dtype=torch.float64)
        seen, before = alive.clone(), x
        for p in range(n):
            on_crossing = frozen and all(place % frozen == frozen // 2 for place in divmod(p, grid[1]))
            seen[p] = bool(alive[p] or on_crossing)
        after = run_block(weights.backbone, config, i, x, torch.cat([always, seen]), grid, counts)
        x = torch.where(torch.cat([always, alive])[:, None], after, before)
        answer.live.append(int(alive.sum()))
        if i + 1 in exits:
            e = exits.index(i + 1)
            rows = write(e)
            absolute = [p for p in range(n) if alive[p]]
            sure = {p: sureness(row.tolist(), score) for p, row in zip(absolute, rows)}
            answer.scores.append(torch.tensor(list(sure.values()), dtype=torch.float64))
            named |= {p: int(row.argmax()) for p, row in zip(absolute, rows)}
            tau = thresholds[e]
            bound = {p: tau if isinstance(tau, int | float) else tau[named[p]] for p in absolute}
            held = {p for p in absolute if boundary_guard and at_border(named, p, grid)}
            ahead = {p: lead(row) for p, row in zip(absolute, rows)}
            if boundary_guard or not isinstance(tau, int | float):
                answer.gap = min([answer.gap, *ahead.values()])
            square = {p: (p // grid[1] // window, p % grid[1] // window) for p in absolute} if window else {}
            leaving, gap = _dtop_choice(sure, named, ahead, bound, held, k, square)
            answer.gap = min(answer.gap, gap)
            if cap is not None:
                going = sorted((p for p in absolute if p not in leaving), key=lambda p: (sure[p], p))
                limit = int(cap[e] * n + 1e-9)
                if 0 < limit < len(going):
                    answer.gap = min(answer.gap, sure[going[limit]] - sure[going[limit - 1]])
                leaving += going[limit:]
            for p in leaving:
                alive[p] = False
                stage[p] = e
                heirs = [q for q in absolute if q not in leaving and named[q] == named[p]]
                for q in heirs:
                    stands_for[q] += stands_for[p] / len(heirs)
            if context_weight:
                answer.gap = min([answer.gap, *ahead.values()])
    write(None)
    if holds == "mask":
        assert last_presence is not None
        canvas = torch.softmax(last_presence, dim=1)[:, 0] * torch.sigmoid(canvas)
    answer.grid = canvas.T.reshape(-1, *grid)
    answer.stage = stage.view(grid)
    upscale = 4 if specs[-1]["kind"] == "setr_naive" else 1
    answer.full = to_image(answer.grid, image, config.patch_size, upscale)
    return answer


def _dtop_choice(
    sure: dict[int, float],
    named: dict[int, int],
    ahead: dict[int, float],
    bound: dict[int, float],
    held: set[int],
    k: int,
    square: dict[int, tuple[int, int]] | None = None,
) -> tuple[list[int], float]:
    """Positions that leave, and the smallest margin of any choice that was made.

    By position: the score, the class and its lead over the second, the threshold. held: who stays whatever its score.
    square: the window of each position, in which the surest candidate stays; empty for none.
    """
    gap = float("inf")
    candidates = []
    for position, confidence in sure.items():
        gap = min(gap, abs(confidence - bound[position]))
        if confidence > bound[position] and position not in held:
            candidates.append((confidence, position, named[position]))
            gap = min(gap, ahead[position])
    leaving = []
    for label in sorted({c[2] for c in candidates}):
        same = sorted((c for c in candidates if c[2] == label), key=lambda c: (-c[0], c[1]))
        if 0 < k < len(same):
            gap = min(gap, same[k - 1][0] - same[k][0])
        leaving += [position for _, position, _ in same[k:]]
    squares = square or {}
    for place in sorted({squares[p] for _, p, _ in candidates if p in squares}):
        inside = sorted((c for c in candidates if squares[c[1]] == place), key=lambda c: (-c[0], c[1]))
        if len(inside) > 1:
            gap = min(gap, inside[0][0] - inside[1][0])
        leaving = [p for p in leaving if p != inside[0][1]]
    return leaving, gap


def cropr(weights: Weights, image: Tensor, rate: float) -> Answer:
    """Token Cropr on one image: by one inner product with every query the lowest leave, all come back for the end."""
    image, config = image.double(), weights.vit
    grid, prefix, exits = grid_of(image, config.patch_size), config.num_prefix_tokens, weights.config.exits
    n = grid[0] * grid[1]
    x = embed(weights.backbone, config, image)
    alive = torch.ones(n, dtype=torch.bool)
    stage = torch.full((n,), len(exits))
    answer = Answer(None, torch.empty(0), stage.view(grid), [])
    always = torch.ones(prefix, dtype=torch.bool)
    for i in range(config.depth):
        if i == config.depth - 1:
            alive[:] = True
        x = run_block(weights.backbone, config, i, x, torch.cat([always, alive]), grid)
        answer.live.append(int(alive.sum()))
        if i + 1 in exits:
            e = exits.index(i + 1)
            queries = weights.head(e)[0]["queries.weight"]
            score = {p: sum(float(q @ x[prefix + p]) for q in queries) for p in range(n) if alive[p]}
            lowest = sorted(score, key=lambda p: (score[p], p))
            number = round(rate * n)
            if 0 < number < len(lowest):
                answer.gap = min(answer.gap, score[lowest[number]] - score[lowest[number - 1]])
            for p in lowest[:number]:
                alive[p], stage[p] = False, e
    answer.grid, answer.full = decode(weights, image, x[prefix:])
    return answer


def dovit_grades(
    weights: Weights, exit: int, x: Tensor, grid: tuple[int, int], score: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, class and its lead of every patch of the grid: averages over the head's own grid."""
    state, spec = weights.head(exit)
    if spec["kind"] == "setr_naive":
        fine = setr_naive_fine(state, x, grid)
    elif spec["kind"] == "setr_pup":
        fine = setr_up_fine(state, spec, x, grid)
    else:
        fine = run_head(state, spec, x)[0].T.view(-1, *grid)
    tempered, plain = torch.softmax(fine / temperature, dim=0), torch.softmax(fine, dim=0)
    s = fine.shape[1] // grid[0]
    grades, labels, leads = [], [], []
    for i in range(grid[0]):
        for j in range(grid[1]):
            own = [(r, c) for r in range(i * s, (i + 1) * s) for c in range(j * s, (j + 1) * s)]
            grades.append(sum(sureness(tempered[:, r, c].tolist(), score) for r, c in own) / len(own))
            mean = torch.stack([plain[:, r, c] for r, c in own]).mean(0)
            labels.append(int(mean.argmax()))
            leads.append(lead(mean))
    return torch.tensor(grades, dtype=torch.float64), torch.tensor(labels), torch.tensor(leads, dtype=torch.float64)


def dovit(
    weights: Weights,
    images: Sequence[Tensor],
    thresholds: Sequence[float | Sequence[float]],
    min_improvement: float | None = None,
    blend_trigger: float = 0.1,
    blend_weight: float = 0.5,
    batch_mode: str = "exact",
    score: str = "probability",
    temperature: float | Sequence[float] = 1.0,
    boundary_guard: bool = False,
    rejoin: int = 0,
) -> list[Answer]:
    """DoViT on a batch; images only meet in the one count of `batch_mode="mean"`.

    rejoin: before so many last blocks all tokens are there again.
    """
    images, config, exits = [image.double() for image in images], weights.vit, weights.config.exits
    prefix = config.num_prefix_tokens
    grids = [grid_of(image, config.patch_size) for image in images]
    xs = [embed(weights.backbone, config, image) for image in images]
    keep = [torch.ones(h * w, dtype=torch.bool) for h, w in grids]  # the mask that is carried on
    computed = [mask.clone() for mask in keep]  # the group that really runs
    before: list[Tensor | None] = [None] * len(images)
    named: list[dict[int, int]] = [{} for _ in images]  # the class of every patch when it was last computed
    stages = [torch.full((h * w,), len(exits)) for h, w in grids]
    answers = [Answer(None, torch.empty(0), torch.empty(0), []) for _ in images]

    for i in range(config.depth):
        if i in exits:
            e = exits.index(i)
            for b, (x, grid) in enumerate(zip(xs, grids)):
                sure, label, ahead = dovit_grades(weights, e, x[prefix:], grid, score, of_exit(temperature, e))
                tau = thresholds[e]
                bound = tau if isinstance(tau, int | float) else torch.tensor(tau, dtype=torch.float64)[label]
                stop = sure > bound
                answers[b].scores.append(sure)
                margin = (sure - bound).abs()
                if min_improvement is not None and before[b] is not None:  # the first checkpoint has none before it
                    grown = sure - before[b]
                    stop |= grown < min_improvement
                    margin = torch.minimum(margin, (grown - min_improvement).abs())
                before[b] = sure
                if boundary_guard or not isinstance(tau, int | float):
                    margin = torch.minimum(margin, ahead)
                named[b] |= {p: int(label[p]) for p in range(len(label)) if computed[b][p]}
                if boundary_guard:
                    stop &= torch.tensor([not at_border(named[b], p, grid) for p in range(len(label))])
                answers[b].gap = min(answers[b].gap, margin[keep[b]].min().item() if keep[b].any() else 1.0)
                keep[b] = keep[b] & ~stop
            ran, computed = computed, [mask.clone() for mask in keep]
            if batch_mode == "mean":
                total = sum(int(mask.sum()) + 1 for mask in keep)
                count = total // len(keep) - 1  # patches beside the class token
                for b, mask in enumerate(keep):
                    order = [p for p in range(len(mask)) if mask[p]] + [p for p in range(len(mask)) if not mask[p]]
                    computed[b] = torch.zeros_like(mask)
                    computed[b][order[:count]] = True
            for b, x in enumerate(xs):
                stopped = ~computed[b]
                stages[b][stopped & ran[b]] = e
                stages[b][computed[b]] = len(exits)  # in "mean" mode tokens may come back
                # All tokens: the class token counts, as in DoViT's release.
                if blend_weight and int(stopped.sum()) / len(x) > blend_trigger:
                    mean = x[prefix:][stopped].mean(0)
                    x[0] = (1 - blend_weight) * x[0] + blend_weight * mean
        for b in range(len(xs)):
            if i >= config.depth - rejoin:
                computed[b][:] = True
            alive = torch.cat([torch.ones(prefix, dtype=torch.bool), computed[b]])
            xs[b] = run_block(weights.backbone, config, i, xs[b], alive, grids[b])
            answers[b].live.append(int(computed[b].sum()))

    for b, (image, x) in enumerate(zip(images, xs)):
        answers[b].grid, answers[b].full = decode(weights, image, x[prefix:], None if rejoin else stages[b])
        answers[b].stage = stages[b].view(grids[b])
    return answers
