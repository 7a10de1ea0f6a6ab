"""Coarse first beside DToP on one image: a list of pieces, each with its cells, that leave or come apart one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.oracles.heads import run_head
from tests.oracles.merging import supertokens
from tests.oracles.methods import Answer, Weights, _dtop_choice, lead, to_image
from tests.oracles.vit import angles, block, embed, final_norm, grid_of, under


@dataclass
class Piece:
    """Some cells with one feature, and its rotary angles; how many patches it stands for, and as how many keys."""

    cells: list[int]
    feature: Tensor
    turn: Tensor
    stands_for: float
    keys: float = 1.0


def coarse_first(
    weights: Weights,
    image: Tensor,
    thresholds: Sequence[float],
    k: int,
    side: int,
    after: int,
    context_weight: float = 0.0,
) -> Answer:
    image, config, exits = image.double(), weights.vit, weights.config.exits
    grid, prefix = grid_of(image, config.patch_size), config.num_prefix_tokens
    n = grid[0] * grid[1]
    patches = embed(weights.backbone, config, image)
    front, patches = patches[:prefix], patches[prefix:]
    turns = angles(config, grid) if config.rope else torch.zeros(prefix + n, 1)
    windows = supertokens(weights.backbone, config, image, (side,), lambda *_: True)
    began = {cell: window.feature for window in windows for cell in window.cells}
    pieces = []
    for window in windows:
        cells = sorted(window.cells)
        middle = torch.stack([turns[prefix + cell] for cell in cells]).mean(0)
        pieces.append(Piece(cells, window.feature, middle, len(cells)))

    canvas, stage = torch.zeros(n, weights.config.num_classes, dtype=torch.float64), torch.full((n,), len(exits))
    answer = Answer(None, torch.empty(0), stage, [])
    for i in range(config.depth):
        x = torch.cat([front, *(piece.feature[None] for piece in pieces)])
        rows = torch.cat([turns[:prefix], *(piece.turn[None] for piece in pieces)])
        keys = torch.tensor([1.0] * prefix + [piece.keys for piece in pieces], dtype=torch.float64)
        everyone = torch.ones(len(x), dtype=torch.bool)
        rope = (rows, config.rope) if config.rope else None
        part = under(weights.backbone, f"blocks.{i}.")
        x = block(part, x, everyone, config.num_heads, config.norm_eps, config.mlp, rope, keys)
        front = x[:prefix]
        pieces = [replace(piece, feature=row) for piece, row in zip(pieces, x[prefix:])]
        answer.live.append(len(pieces))
        if i + 1 in exits and not pieces:
            answer.scores.append(torch.empty(0, dtype=torch.float64))
        elif i + 1 in exits:
            pieces = _exit(weights, exits.index(i + 1), thresholds, k, pieces, canvas, answer)
            if context_weight:
                pieces = [replace(piece, keys=piece.stands_for**context_weight) for piece in pieces]
        if i + 1 == after:
            pieces = [
                Piece(
                    [cell],
                    piece.feature + patches[cell] - began[cell],
                    turns[prefix + cell],
                    piece.stands_for / len(piece.cells),
                    (piece.stands_for / len(piece.cells)) ** context_weight,
                )
                for piece in pieces
                for cell in piece.cells
            ]
            pieces.sort(key=lambda piece: piece.cells[0])
    if pieces:
        seen = final_norm(weights.backbone, config, torch.stack([piece.feature for piece in pieces]))
        for piece, row in zip(pieces, run_head(*weights.head(None), seen)[0]):
            canvas[piece.cells] = row
    answer.grid = canvas.T.reshape(-1, *grid)
    answer.stage = stage.view(grid)
    answer.full = to_image(answer.grid, image, config.patch_size)
    return answer


def _exit(
    weights: Weights,
    e: int,
    thresholds: Sequence[float],
    k: int,
    pieces: list[Piece],
    canvas: Tensor,
    answer: Answer,
) -> list[Piece]:
    """Write what the exit's head says, and return the pieces that stay, with what those of their class leave them."""
    logits = run_head(*weights.head(e), torch.stack([piece.feature for piece in pieces]))[0]
    chances = torch.softmax(logits, dim=1)
    sure = {i: float(row.max()) for i, row in enumerate(chances)}
    named = {i: int(row.argmax()) for i, row in enumerate(chances)}
    ahead = {i: lead(row) for i, row in enumerate(chances)}
    answer.scores.append(torch.tensor(list(sure.values()), dtype=torch.float64))
    leaving, gap = _dtop_choice(sure, named, ahead, dict.fromkeys(sure, thresholds[e]), set(), k)
    answer.gap = min([answer.gap, gap, *ahead.values()])
    for i, piece in enumerate(pieces):
        canvas[piece.cells] = logits[i]
    for i in leaving:
        for cell in pieces[i].cells:
            answer.stage[cell] = e
        heirs = [j for j in sure if j not in leaving and named[j] == named[i]]
        for j in heirs:
            pieces[j].stands_for += pieces[i].stands_for / len(heirs)
    return [piece for i, piece in enumerate(pieces) if i not in leaving]
