"""Multiply-adds of EoMT by size, and their shares at given shares of live tokens: writes cost.json beside it.

Usage: python docs/evidence/eomt/cost.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tokenexit.engine.ops import GIGA
from tokenexit.engine.vit_config import vit_config
from tokenexit.segmenter import ExitSegmenter

MODELS = {
    "S": "dinov2_small_patch14_reg4",
    "B": "dinov2_base_patch14_reg4",
    "L": "dinov2_large_patch14_reg4",
    "g": "dinov2_giant_patch14_reg4",
}
SIZES = (512, 640, 1024)
SEMANTIC, PANOPTIC = (150, 100), (133, 200)
"""Classes and queries of the released models on ADE20K and COCO."""
LIVE = (1.0, 0.6, 0.45, 0.35)
"""Shares of live tokens between exits, the specification's example."""


def build(backbone: str, size: int, classes: int, queries: int, exit_head: str = "linear") -> ExitSegmenter:
    """EoMT with exits after a quarter, a half and three quarters of its blocks, without memory for weights."""
    whole = replace(vit_config(backbone), patch_size=16, pos_embed_grid=(size // 16, size // 16))
    exits = [whole.depth * n // 4 for n in (1, 2, 3)]
    with torch.device("meta"):
        return ExitSegmenter(whole, classes, exits, exit_head, {"kind": "eomt", "queries": queries})


def parts(model: ExitSegmenter, size: int, live: tuple[float, ...] = (1.0,) * 4, leave_joint: bool = False) -> float:
    """Giga multiply-adds of one window, exit heads left out. leave_joint: joint blocks see live tokens alone."""
    grid = model.backbone.patch_embed.grid(size, size)
    patches, prefix = grid[0] * grid[1], model.config.backbone.num_prefix_tokens
    stops = pairwise((0, *model.config.exits, model.config.backbone.depth))
    blocks = sum(
        model.backbone.block_ops(prefix + round(share * patches)).macs * (stop - start)
        for share, (start, stop) in zip(live, stops)
    )
    seen = round(live[-1] * patches) if leave_joint else patches
    return (model.backbone.embed_ops(grid).macs + blocks + model.decode_head.ops(seen, grid).macs) / GIGA


def row(name: str, size: int) -> dict[str, Any]:
    classes, queries = PANOPTIC if size == 640 else SEMANTIC
    model = build(MODELS[name], size, classes, queries)
    dense, dovit, dtop = (
        parts(model, size),
        parts(model, size, LIVE),
        parts(model, size, LIVE, leave_joint=True),
    )
    grid = model.backbone.patch_embed.grid(size, size)
    heads = sum(head.ops(grid[0] * grid[1], grid).macs for head in model.view().exit_heads) / GIGA
    return {
        "model": name,
        "size": size,
        "queries": queries,
        "gmacs": round(dense, 1),
        "dovit_gmacs": round(dovit, 1),
        "dovit_share": round(dovit / dense, 3),
        "dtop_gmacs": round(dtop, 1),
        "dtop_share": round(dtop / dense, 3),
        "linear_exit_heads_gmacs": round(heads, 2),
    }


if __name__ == "__main__":
    rows = [row(name, size) for name in MODELS for size in SIZES]
    text = json.dumps({"live": LIVE, "rows": rows}, indent=1)
    (Path(__file__).parent / "cost.json").write_text(text + "\n")
    print("| EoMT | size | queries | dense | DoViT | share | DToP | share |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        print(
            f"| {r['model']} | {r['size']} | {r['queries']} | {r['gmacs']} | {r['dovit_gmacs']} | "
            f"{r['dovit_share']:.0%} | {r['dtop_gmacs']} | {r['dtop_share']:.0%} |"
        )
