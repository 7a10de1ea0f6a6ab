"""Largest difference of masks and classes from transformers' EoMT with random weights: writes its figures beside it.

    python docs/evidence/eomt/against_transformers.py

Needs transformers (`pip install -e '.[parity]'`). The figure is the largest |ours - theirs| over the larger of 1 and
the largest |theirs|, in fp32, dense, at a square and another size.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout
from tests.parity import (
    conftest,  # noqa: F401 declares what PyPI's torchvision misses beside a CPU build of torch
    test_eomt,
)

from tokenexit.conversion.convert import converted
from tokenexit.methods import Dense

SIZES = ((64, 64), (48, 80))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@torch.no_grad()
def differences(kind: str) -> dict[str, float]:
    found = {"masks": 0.0, "classes": 0.0}
    for size in SIZES:
        theirs, grid = test_eomt.their_model(kind), (size[0] // 16, size[1] // 16)
        if grid != (4, 4):
            test_eomt.reshaped(theirs, kind, grid)
        with tempfile.TemporaryDirectory() as folder:
            options = {} if kind == "dinov3" else {"pos_embed_grid": grid}
            ours, _ = converted(test_eomt.saved(theirs, Path(folder)), options=options)
        image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        wanted, answer = theirs(pixel_values=image), ours(image, Dense())
        classes = wanted.class_queries_logits.softmax(-1)[..., :-1]
        found["masks"] = max(found["masks"], distance(torch.stack(answer.grid_logits), wanted.masks_queries_logits))
        found["classes"] = max(found["classes"], distance(torch.stack(answer.queries), classes))
    return found


if __name__ == "__main__":
    rows = {f"eomt, {kind}": differences(kind) for kind in ("dinov2", "dinov3")}
    (Path(__file__).parent / "against_transformers.json").write_text(json.dumps(rows, indent=1) + "\n")
    for name, row in rows.items():
        print(f"| {name} | transformers | {row['masks']:.1e} | {row['classes']:.1e} |")
