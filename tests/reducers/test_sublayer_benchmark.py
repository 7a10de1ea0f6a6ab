"""Merging around each sublayer, as comparisons have it: against loops, and against its authors' multiply-adds."""

import pytest
import torch
from benchmarks.sublayer import SublayerToMe, results, table, with_sublayer

from tests.calibration.test_dense_pass import Noise
from tests.helpers import assert_close, gently_varied, tiny_segmenter
from tests.methods.test_behaviours import counted_macs
from tests.oracles import merging as oracle
from tokenexit.engine.ops import GIGA
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import vit_config
from tokenexit.methods import Dense


def merged_by_hand(h, prefix, share):
    """Groups of the oracle's matching on features `(prefix + P, C)`; sizes are one, so that its means are plain."""
    return oracle.tome(oracle.singles(h[prefix:]), prefix, int(share * len(h)))


def spread(prefix, groups, values):
    rows = {cell: values[prefix + i] for i, group in enumerate(groups) for cell in group.cells}
    return torch.stack([*values[:prefix], *(rows[cell] for cell in sorted(rows))])


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_sublayer__equals_loops_over_pairs_around_attention_and_mlp(share):
    vit = tiny_segmenter("linear", depth=2, exits=()).double().backbone
    prefix, config = vit.config.num_prefix_tokens, vit.config
    with torch.no_grad():
        tokens = vit.embed([gently_varied(16, 20).double()])
        x = tokens.x
        for block in vit.blocks:
            h = block.norm1(x)
            groups = merged_by_hand(h, prefix, share)
            small = torch.cat([h[:prefix], torch.stack([group.feature for group in groups])])
            q, k, v = block.attn.qkv(small).unflatten(1, (3, config.num_heads, -1)).unbind(1)
            weights = (torch.einsum("qnh,knh->nqk", q, k) / config.head_dim**0.5).softmax(-1)
            x = x + spread(prefix, groups, block.attn.proj(torch.einsum("nqk,knh->qnh", weights, v).flatten(1)))
            h = block.norm2(x)
            groups = merged_by_hand(h, prefix, share)
            small = torch.cat([h[:prefix], torch.stack([group.feature for group in groups])])
            x = x + spread(prefix, groups, block.mlp(small))
        out = SublayerToMe.of(vit, share).run(tokens, 0, 2)
    assert_close(out.x, x)
    assert out.live == (20,)


def test_sublayer__of_share_0_is_dense_and_counts_what_runs():
    model, image = tiny_segmenter("fcn", depth=4).requires_grad_(False), gently_varied(15, 22)
    with torch.no_grad():
        assert_close(with_sublayer(model, 0.0)([image], Dense()).grid_logits[0], model([image], Dense()).grid_logits[0])
    for share in (0.0, 0.3, 0.9):
        counted, ledger = counted_macs(with_sublayer(model, share), image, Dense())
        assert ledger.macs == (counted,)


@pytest.mark.parametrize(("share", "published"), [(0.2, 516.23), (0.3, 448.70), (0.5, 321.29)])
def test_sublayer__saves_what_its_authors_say_of_vit_l(share, published):
    with torch.device("meta"):
        dense = ViT(vit_config("vit_large_patch16", depth=24))
    small, compared = SublayerToMe.of(dense, share), 2 * 800 * 800 * 1024  # which they do not count
    saved = 24 * (dense.block_ops(1601).macs - small.block_ops(1601).macs + compared) / GIGA
    assert saved == pytest.approx(658.98 - published, rel=0.01)


def test_results__have_a_row_for_each_and_the_dense_model_as_it_was():
    model = tiny_segmenter("fcn", depth=4)
    rows = results(model, Noise(2), "fp32")
    assert [row["label"] for row in rows][-3:] == [f"around sublayers {share}" for share in (0.2, 0.3, 0.5)]
    costs = [row["gmacs_mean"] for row in rows[-3:]]
    assert costs == sorted(costs, reverse=True)
    assert table(rows).count("\n") == 8
    assert type(model.backbone) is ViT
