"""What comparisons on Segmenter call ToMe: merging before, and unmerging after, every attention and every MLP.

    python -m benchmarks.sublayer runs/camvid-dense --data camvid --data-root data/camvid --json FILE

Around each sublayer tokens are normalised, matched on what is normalised, merged by plain means, run through it, and
copied back to their places, where they are added to the residual stream, which keeps all tokens. There are no keys, no
sizes and no proportional attention. Source: Expedit (Liang et al., NeurIPS 2022; release), whose rows are quoted. It is
here to set them beside `tokenexit.ToMe`, which merges for good, and is no reducer: exits see all tokens in it.

Rows are dense, this at shares of all rows that merge, class token included, and `ToMe` at shares of the cells in each
block. Multiply-adds count both comparisons of every block.
"""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import model_and_data_parser
from tokenexit.data.base import SegmentationDataset
from tokenexit.data.loader import Spread
from tokenexit.data.registry import open_dataset
from tokenexit.engine import ops
from tokenexit.engine.block import Block
from tokenexit.engine.ops import Ops
from tokenexit.engine.tokens import Tokens
from tokenexit.engine.vit import ViT
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense, Reduced
from tokenexit.reducers import ToMe
from tokenexit.reducers.matching import bipartite, bipartite_ops, most_alike
from tokenexit.runtime.memory import keep_buffers
from tokenexit.segmenter import ExitSegmenter

SHARES = (0.2, 0.3, 0.5)
"""The published ones."""
RATIOS = (0.02, 0.04, 0.06)


class SublayerToMe(ViT):
    """A backbone that shares its weights with another and merges around each sublayer; for `Dense` alone."""

    share: float

    @classmethod
    def of(cls, backbone: ViT, share: float) -> SublayerToMe:
        own: SublayerToMe = copy(backbone)  # type: ignore[assignment]
        own.__class__ = cls
        own.share, own.captured = share, None
        return own

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        for block in self.blocks[start:stop]:
            assert isinstance(block, Block)
            tokens = tokens.with_x(tokens.x + self._attention(block, tokens.with_x(block.norm1(tokens.x))))
            tokens = tokens.with_x(tokens.x + self._mlp(block, tokens.with_x(block.norm2(tokens.x))))
        return tokens

    def _attention(self, block: Block, tokens: Tokens) -> Tensor:
        merged = self._merged(tokens)
        qkv = block.attn.qkv(merged.x)
        if merged.phases is not None:
            qkv = block.attn.rotate(qkv, merged.phases)
        attended = block.attn.attend(qkv, merged.packing)
        return merged.with_x(block.ls1(block.attn.proj(block.attn.norm(attended)))).unmerged().x

    def _mlp(self, block: Block, tokens: Tokens) -> Tensor:
        merged = self._merged(tokens)
        return merged.with_x(block.ls2(block.mlp(merged.x))).unmerged().x

    def _merged(self, tokens: Tokens) -> Tokens:
        """Merge the most similar pairs of two alternating sets by plain means."""
        patches = tokens.patches()
        best, partner = bipartite(patches.x, patches.packing, tokens.num_prefix)
        count = torch.tensor([int(self.share * length) for length in tokens.packing.lengths], device=best.device)
        joins = most_alike(best, patches.packing.image_index(), count)
        into = torch.where(joins, partner, torch.arange(len(partner), device=best.device))
        return tokens.merge(into, torch.ones_like(into))

    def block_ops(self, tokens: int, fed: int | None = None) -> Ops:
        assert fed in (None, tokens), "of dense alone"
        prefix, dim = self.config.num_prefix_tokens, self.config.embed_dim
        live = tokens - prefix
        gone = min(int(self.share * tokens), (live + 1 - prefix % 2) // 2) if live > 1 else 0
        compared = 2 * bipartite_ops(live, prefix, dim)
        return super().block_ops(tokens - gone) + compared + ops.layer_norm(gone, 2 * dim)


def with_sublayer(model: ExitSegmenter, share: float) -> ExitSegmenter:
    """Return the dense model with such a backbone; weights are shared."""
    own = copy(model.with_exits(()))
    own._modules = {**own._modules, "backbone": SublayerToMe.of(model.backbone, share)}
    return own


def main() -> None:
    keep_buffers()
    parser = model_and_data_parser(__doc__)
    parser.add_argument("--limit", type=int, help="number of images, evenly spread over the split; all if not given")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ExitSegmenter.from_pretrained(options.model, torch.device(options.device))
    data: SegmentationDataset = open_dataset(options.data, options.data_root, options.split)
    if options.limit:
        data = Spread(data, options.limit)
    rows = results(model, data, options.precision)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def results(model: ExitSegmenter, data: SegmentationDataset, precision: Any) -> list[dict[str, Any]]:
    """Return figures of all rows, by `tokenexit.evaluate`."""
    blocks = [Reduced(Dense(), ToMe(ratio)) for ratio in RATIOS]
    found = [each.to_dict(data.labels.names) for each in evaluate(model, data, [Dense(), *blocks], precision=precision)]
    for share in SHARES:
        (one,) = evaluate(with_sublayer(model, share), data, [Dense()], precision=precision)
        found.append(one.to_dict(data.labels.names) | {"label": f"around sublayers {share:g}"})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the first row is dense."""
    lines = ["| row | GMACs | of dense | mIoU | ms, one |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        share = row["gmacs_mean"] / rows[0]["gmacs_mean"]
        lines.append(
            f"| {row['label']} | {row['gmacs_mean']:.2f} | {share:.1%} | {row['mIoU']:.2f} "
            f"| {row['latency_ms_median']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
