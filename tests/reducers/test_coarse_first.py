"""Coarse first equals pieces that come apart one by one, and what an exit is sure of leaves with its window."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenexit
from tests.helpers import MARGIN, assert_close, choose_thresholds, gently_varied, random_image, tiny_segmenter
from tests.oracles.coarse_first import coarse_first
from tests.oracles.methods import Weights
from tests.training.tiny import silent, tiny_run, write_dataset
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, FixedRatio, Reduced, Truncated, as_method
from tokenexit.methods.thresholded import NEVER
from tokenexit.reducers import CoarseFirst, Site
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.loop import train

SIZES = [(16, 20), (9, 33), (4, 4), (22, 13)]
OPTIONS = [{}, {"class_token": False}, {"num_registers": 2, "norm_pre": True}, {"rope": "half", "pos_embed": False}]


def batch(seed=0):
    return [
        gently_varied(*size, seed=seed + i) if i % 2 else random_image(*size, seed + i) for i, size in enumerate(SIZES)
    ]


def run(model, images, method, **options):
    with torch.no_grad():
        return model(images, method, **options)


@settings(max_examples=60)
@given(
    k=st.sampled_from([0, 1, 2]),
    shares=st.tuples(st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.4, 0.8])),
    seed=st.integers(0, 20),
    side=st.sampled_from([2, 3]),
    after=st.sampled_from([1, 2, 3]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    options=st.sampled_from(OPTIONS),
)
def test_coarse_first__equals_pieces_that_leave_or_come_apart_one_by_one(k, shares, seed, side, after, power, options):
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=seed, **options)
    weights, images = Weights.of(model), batch(seed)

    def answers(thresholds):
        return [coarse_first(weights, image, thresholds, k, side, after, power) for image in images]

    thresholds = choose_thresholds(answers, shares)
    expected = answers(thresholds)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, images, Reduced(DToP(thresholds, k, context_weight=power), CoarseFirst(after, side)))
    for i, answer in enumerate(expected):
        assert torch.equal(out.exit_index[i], answer.stage)
        assert_close(out.grid_logits[i], answer.grid)
        assert list(out.ledger.live[i]) == answer.live


@pytest.mark.parametrize("options", OPTIONS)
def test_split__of_untouched_tokens_is_the_ordinary_embedding_and_so_are_its_gradients(options):
    model, by = tiny_segmenter("fcn", **options), CoarseFirst()
    backbone = model.backbone
    coarse, fine = by.embed(batch(), backbone), backbone.embed(batch())
    split = by.reduce(Site(1), coarse, None)
    assert sum(coarse.live) < sum(fine.live)
    assert_close(split.x, fine.x)
    assert torch.equal(split.position, fine.position)
    assert split.packing.lengths == fine.packing.lengths
    assert split.detail is None
    assert torch.equal(split.cover, torch.arange(fine.cells))
    assert (split.phases is None) == (fine.phases is None)
    assert split.phases is None or torch.equal(split.phases, fine.phases)
    pull = torch.randn(fine.x.shape, generator=torch.Generator().manual_seed(0))
    own = [(name, p) for name, p in backbone.named_parameters() if not name.startswith(("blocks", "norm."))]
    through, direct = (torch.autograd.grad((x * pull).sum(), [p for _, p in own]) for x in (split.x, fine.x))
    for a, b in zip(through, direct):
        assert_close(a, b)


def test_split__of_what_blocks_have_changed_teaches_both_embeddings():
    backbone = tiny_segmenter("fcn").backbone
    tokens = CoarseFirst().embed(batch(), backbone)
    fine, coarse = tokens.detail.x, tokens.x
    doubled = replace(tokens, x=2 * coarse).split()
    grads = torch.autograd.grad(doubled.patches().x.sum(), (fine, coarse))
    assert (grads[0] == 1).all()
    sizes = torch.ones(len(coarse)).index_copy(0, tokens.patch_index(), tokens.sizes().float())
    prefix = tokens.prefix_index()
    expected = (2 - 1) * sizes.index_fill(0, prefix, 0.0)  # twice what it was, less what stood in the stead
    assert torch.equal(grads[1], expected[:, None].expand_as(coarse))


def test_split__leaves_alone_what_has_left_and_keeps_raster_order():
    tokens = CoarseFirst().embed(batch(), tiny_segmenter("fcn", num_registers=1).backbone)
    stays = torch.arange(sum(tokens.live)) % 3 > 0
    kept = tokens.keep(stays)
    split = kept.split()
    assert torch.equal(split.cover[split.cover], split.cover)
    assert torch.equal(split.cover[split.patches().position], split.patches().position)
    gone = ~torch.isin(tokens.cover, kept.patches().position)
    assert gone.any()
    assert torch.equal(split.cover, torch.where(gone, tokens.cover, torch.arange(tokens.cells)))
    assert torch.equal(split.patches().position, torch.arange(tokens.cells)[~gone])
    assert (split.patches().position.diff() > 0).all()
    assert split.split() is split


def test_split__gives_patches_weights_of_their_own_or_one_and_prefix_tokens_keep_theirs():
    tokens = CoarseFirst().embed([random_image(8, 24)], tiny_segmenter("fcn").backbone)
    weighed = replace(tokens, weight=torch.tensor([3.0, 2.0, 5.0, 6.0]))
    assert weighed.split().weight.tolist() == [3.0] + [1.0] * 12
    own = torch.arange(12) + 0.5
    kept = replace(weighed, detail=replace(tokens.detail, weight=own)).keep(torch.tensor([True, False, True])).split()
    assert kept.position.tolist() == [-1, 0, 1, 4, 5, 6, 7, 10, 11]
    assert kept.weight.tolist() == [3.0, *own[[0, 1, 4, 5, 6, 7, 10, 11]].tolist()]


def test_coarse_first__lets_whole_windows_leave_at_the_exit_and_splits_the_others():
    model, image = tiny_segmenter("fcn"), random_image(32, 44)
    out = run(model, [image], Reduced(DToP(0.6, 1), CoarseFirst(1)))
    left = out.exit_index[0] == 0
    windows = left[:8, :10].unflatten(0, (4, 2)).unflatten(2, (5, 2)).transpose(1, 2).flatten(2)
    whole = windows.all(2)
    assert torch.equal(windows.any(2), whole)
    assert 0 < whole.sum() < 20
    assert out.ledger.live[0][0] == 4 * 5 + 8
    assert out.ledger.live[0][1] == int((~left).sum())
    cells = torch.arange(88).view(8, 11)
    corner = cells.clone()
    corner[:, :10] = (cells[:8:2, :10:2]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    alone = torch.cat([torch.zeros(8, 10, dtype=torch.bool), torch.ones(8, 1, dtype=torch.bool)], 1)
    assert torch.equal(out.groups[0], torch.where(left & ~alone, corner, cells))
    rows = out.grid_logits[0].flatten(1).T
    assert torch.equal(rows, rows[out.groups[0].flatten()])


@pytest.mark.parametrize("options", OPTIONS)
def test_coarse_first__without_an_exit_before_splits_all(options):
    model = tiny_segmenter("fcn", exits=(2, 3), **options)
    blend = {} if options.get("class_token", True) else {"blend_weight": 0.0}
    dense = run(model, batch(), Reduced(Dense(), CoarseFirst(1)))
    assert dense.ledger.live[0] == (2 * 2 + 4, 20, 20, 20)
    assert all(torch.equal(g.flatten(), torch.arange(g.numel())) for g in (g - g.min() for g in dense.groups))
    for method in (DToP(NEVER), DoViT(NEVER, **blend), DoViT(NEVER, scoring="live", **blend), PAUMER(NEVER)):
        for after in (1, 3):
            alone = run(model, batch(), Reduced(Dense(), CoarseFirst(after)))
            out = run(model, batch(), Reduced(method, CoarseFirst(after)))
            assert all(torch.equal(a, b) for a, b in zip(out.grid_logits, alone.grid_logits))
            assert all((index == 2).all() for index in out.exit_index)
            assert out.ledger.live == alone.ledger.live


def test_dovit__scores_live_tokens_as_the_grid_where_they_come_apart_between_exits():
    model = tiny_segmenter("fcn", exits=(1, 3))
    methods = [DoViT(0.9, min_improvement=0.05, scoring=scoring) for scoring in ("grid", "live")]
    for by in (CoarseFirst(1), CoarseFirst(2)):
        grid, live = (run(model, batch(), Reduced(method, by)) for method in methods)
        assert any((index == 1).any() for index in grid.exit_index)
        assert all(torch.equal(a, b) for a, b in zip(grid.exit_index, live.exit_index))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grid.grid_logits, live.grid_logits))


@pytest.mark.parametrize("method", [FixedRatio((0.1, 0.1), rejoin=1), DoViT(0.6, rejoin=1)])
def test_coarse_tokens_that_come_back__are_still_one_for_their_window(method):
    model = tiny_segmenter("fcn")
    out = run(model, batch(), Reduced(method, CoarseFirst(1)))
    assert any(len(groups.unique()) < groups.numel() for groups in out.groups)
    for groups, index, logits, grid in zip(out.groups, out.exit_index, out.grid_logits, out.ledger.tokens):
        cells = groups.flatten() - groups.min()
        assert torch.equal(index.flatten(), index.flatten()[cells])
        assert (index.flatten()[cells != torch.arange(grid)] == 0).all(), "those that left before the split"
        assert torch.equal(logits.flatten(1).T, logits.flatten(1).T[cells])
    with pytest.raises(tokenexit.ConfigError, match="after must be below 3, the number of blocks before tokens that"):
        model.check(Reduced(method, CoarseFirst(3)))


def test_truncated__ends_before_or_behind_the_split():
    model = tiny_segmenter("fcn")
    first, second = (run(model, batch(), Reduced(Truncated(n), CoarseFirst(1))) for n in (1, 2))
    assert first.ledger.live[0] == (8, 0, 0, 0)
    assert second.ledger.live[0] == (8, 20, 20, 0)
    assert len(first.grid_logits[0].flatten(1).T.unique(dim=0)) == 8
    assert len(second.grid_logits[0].flatten(1).T.unique(dim=0)) == 20


def test_ledger__counts_the_projections_of_patches_and_of_windows_and_no_split():
    model, image = tiny_segmenter("fcn", depth=4), random_image(16, 28)
    out, dense = run(model, [image], Reduced(Dense(), CoarseFirst(1, 3))), run(model, [image], Dense())
    assert out.ledger.parts[0].embed == dense.ledger.parts[0].embed == 4 * 7 * 3 * 16 * 32
    assert out.ledger.parts[0].reduction == 1 * 2 * 3 * 16 * 32


def test_training__runs_from_a_configuration(tmp_path):
    spec = {
        "name": "reduced",
        "method": {"name": "dtop", "threshold": 0.36},
        "by": {"name": "coarse_first", "after": 1},
    }
    assert as_method(spec) == Reduced(DToP(0.36), CoarseFirst(1))
    data = write_dataset(tmp_path / "data")
    train(tiny_run(data, tmp_path / "run", methods=[spec], steps=3), say=silent, progress=False)
    model = ExitSegmenter.from_pretrained(tmp_path / "run")
    assert run(model, [gently_varied(24, 32)], as_method(spec)).ledger.live[0][0] == 12


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: CoarseFirst(0), "after must be at least 1, got 0: it counts blocks"),
        (lambda: CoarseFirst(1, side=1), "side must be at least 2, got 1"),
        (lambda: tiny_segmenter("fcn").check(Reduced(Dense(), CoarseFirst(4))), "at block 5 and this backbone has 4"),
    ],
)
def test_coarse_first__refuses_in_one_sentence(wrong, sentence):
    with pytest.raises(tokenexit.ConfigError, match=sentence):
        wrong()
