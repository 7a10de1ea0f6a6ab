"""Tokens that had left come back for the last blocks: last-layer fusion, as an option of DoViT, PAUMER, FixedRatio."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import assert_close, random_image, tiny_segmenter
from tests.oracles import vit as oracle
from tests.oracles.methods import Weights
from tokenexit.calibration.gating import gated_by_size
from tokenexit.errors import ConfigError
from tokenexit.methods import PAUMER, Dense, DoViT, FixedRatio, Gated, Reduced
from tokenexit.methods.thresholded import NEVER
from tokenexit.reducers import MPM

REJOINING: list[DoViT | FixedRatio] = [
    DoViT(0.6, rejoin=1),
    DoViT(0.6, scoring="live", rejoin=2),
    PAUMER(0.5, rejoin=1),
    FixedRatio((0.6, 0.3), rejoin=1),
    FixedRatio((0.6, 0.3), rejoin=3),
]
SIZES = [(16, 20), (9, 33), (4, 4)]


def run(model, images, method):
    with torch.no_grad():
        return model(images, method)


@pytest.mark.parametrize("method", REJOINING, ids=lambda method: method.label)
def test_rejoin__every_token_runs_through_the_last_blocks_and_left_where_it_would_have(method):
    model, images = tiny_segmenter("fcn", depth=6), [random_image(*size, i) for i, size in enumerate(SIZES)]
    out, without = run(model, images, method), run(model, images, replace(method, rejoin=None))
    cells = [index.numel() for index in out.exit_index]
    for a, b in zip(out.exit_index, without.exit_index):
        assert torch.equal(a, b)
    assert any((index < 2).any() for index in out.exit_index)
    for own, other, n in zip(out.ledger.live, without.ledger.live, cells):
        assert own == (*other[: -method.rejoin], *[n] * method.rejoin)
        assert other[-1] < n
    assert out.ledger.ended == tuple(cells)
    assert [len(records) for records in (out.exit_records, without.exit_records)] == [3, 3]


def test_rejoin__of_all_tokens_at_once_is_the_last_block_over_stale_features():
    model, image = tiny_segmenter("fcn", depth=4, exits=(2,)), random_image(8, 12)
    out = run(model, [image], FixedRatio(0.0, rejoin=1))
    weights, vit = Weights.of(model), model.config.backbone
    state, grid, always = weights.backbone, (2, 3), torch.ones(7, dtype=torch.bool)
    x = oracle.embed(state, vit, image.double())
    for block in (0, 1):
        x = oracle.run_block(state, vit, block, x, always, grid)
    alone = torch.tensor([True] + [False] * 6)  # the class token goes on without the others
    x = oracle.run_block(state, vit, 2, x, alone, grid)
    x = oracle.run_block(state, vit, 3, x, always, grid)
    seen = oracle.final_norm(state, vit, x[1:]).float()
    with torch.no_grad():
        logits = model.decode_head(replace(model.backbone.embed([image]).patches(), x=seen)).logits
    assert_close(out.grid_logits[0].flatten(1).T, logits)


@pytest.mark.parametrize("method", [FixedRatio(1.0, rejoin=1), DoViT(NEVER, rejoin=1)])
def test_rejoin__of_nobody_is_dense_bit_for_bit(method):
    model, images = tiny_segmenter("fcn"), [random_image(*size) for size in SIZES]
    out, dense = run(model, images, method), run(model, images, Dense())
    assert all(torch.equal(a, b) for a, b in zip(out.grid_logits, dense.grid_logits))
    assert out.ledger.live == dense.ledger.live


def test_rejoin__of_a_model_without_exits_is_dense():
    model, images = tiny_segmenter("fcn", exits=()), [random_image(*size) for size in SIZES]
    for method in (FixedRatio(0.5, rejoin=4), DoViT(0.5, rejoin=1)):
        assert torch.equal(run(model, images, method).grid_logits[0], run(model, images, Dense()).grid_logits[0])


def test_rejoin__goes_with_closed_exits_and_with_rotary_positions():
    model, images = tiny_segmenter("fcn", rope="half", pos_embed=False), [random_image(*size) for size in SIZES]
    for method in (FixedRatio((0.6, 0.3), rejoin=1), DoViT(0.9, rejoin=1)):
        out = run(model, images, Gated(method, (1,)))
        assert out.ledger.live[0][3] == 20 > out.ledger.live[0][1]
        assert_close(run(model, images[:1], Gated(method, (1,))).grid_logits[0], out.grid_logits[0])


def test_rejoin__trains():
    model = tiny_segmenter("fcn").train()
    for method in (FixedRatio((0.6, 0.3), rejoin=1), DoViT(0.5, rejoin=1)):
        out = model([random_image(16, 20), random_image(16, 20, 1)], method)
        model.zero_grad()
        out.exit_records[-1].logits.square().sum().backward()
        first = model.backbone.blocks[0].mlp.fc1.weight.grad
        assert first.abs().sum() > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m: DoViT(rejoin=0), "rejoin must be at least 1, got 0"),
        (lambda m: FixedRatio(rejoin=-1), "rejoin must be at least 1, got -1"),
        (lambda m: m.check(DoViT(rejoin=2)), "rejoin must be at most 1, the number of blocks behind the last"),
        (lambda m: m.check(FixedRatio(0.5, rejoin=4)), "rejoin must be at most 1"),
        (lambda m: FixedRatio(finish="frozen", rejoin=1), "with rejoin none has: leave one of the two out"),
        (lambda m: gated_by_size(m, DoViT(rejoin=1)), "measured without rejoin"),
        (lambda m: m.check(Reduced(FixedRatio(0.5, rejoin=4), MPM((1,)))), "rejoin must be at most 1"),
    ],
)
def test_rejoin__refuses_in_one_sentence(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong(tiny_segmenter("fcn"))
