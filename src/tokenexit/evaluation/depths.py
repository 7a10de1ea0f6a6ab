"""Accuracy by depth: the predictions of a model that stops after each exit, all read from one dense pass.

After a short training late blocks can be worse than early ones, and then exits look good for the wrong reason.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenexit.engine.tokens import Packing
from tokenexit.heads import class_scores
from tokenexit.methods import ExitRecord
from tokenexit.methods.base import Value
from tokenexit.outputs.ledger import write_ledger
from tokenexit.outputs.segmentation import SegmentationOutput
from tokenexit.outputs.windows import Segmentation
from tokenexit.segmenter import ExitSegmenter


def stopped(model: ExitSegmenter, dense: Segmentation) -> list[Segmentation]:
    """Return the prediction and cost where all tokens stop at an exit: one output for each exit, and one for the end.

    dense: a pass of `Dense()` with exit records. The outputs are those of `Truncated`, at any resolution of the heads;
    the last one is dense without the exit heads, which only the recording ran.
    """
    return [dense.with_windows(windows) for windows in _stopped(model, dense.windows)]


def _stopped(model: ExitSegmenter, dense: SegmentationOutput) -> list[SegmentationOutput]:
    exits, depth = model.config.exits, model.config.backbone.depth
    prefix = model.config.backbone.num_prefix_tokens
    grids = [dense.grid(i) for i in range(len(dense))]
    tokens = dense.ledger.tokens
    outputs = []
    for n, record in enumerate(dense.exit_records):
        ran = [
            replace(ExitRecord(), head_tokens=tokens) if m == n else ExitRecord()
            for m in range(len(dense.exit_records))
        ]
        blocks = exits[n] if n < len(exits) else depth
        all_tokens, none = [count + prefix for count in tokens], [0] * len(tokens)
        lengths = [all_tokens] * blocks + [none] * (depth - blocks) + [all_tokens if n == len(exits) else none]
        heads = model.view().exit_heads
        out = replace(
            dense,
            exit_index=tuple(torch.full_like(own, n) for own in dense.exit_index),
            ledger=write_ledger(model.backbone, heads, model.decode_head, grids, lengths, ran),
            exit_records=(),
        )
        if n < len(exits):
            assert record.logits is not None, "a pass with exit records has the maps of all exits"
            cells = [count * record.scale**2 for count in tokens]
            softmax = record.kind == "softmax"
            image = Packing.of(cells, record.logits.device).image_index()
            scores = record.logits if softmax else class_scores(record.kind, record.logits, record.presence, image)
            maps = [
                own.view(h * record.scale, w * record.scale, -1).permute(2, 0, 1)
                for own, (h, w) in zip(torch.split(scores, cells), grids)
            ]
            value: Value = "logits" if softmax else "scores"
            out = replace(out, grid_logits=tuple(maps), value=value, upscale=record.upscale, queries=())
        outputs.append(out)
    return outputs
