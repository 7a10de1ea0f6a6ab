"""Merging equals slow oracles of one image each, in batches of any grids, and keeps what a cover promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import merging as oracle
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.reducers import ALGM, G2TM, MPM, Site, ToMe

CHANNELS = 12


def scene(h, w, seed):
    """Features of a grid with flat parts, where neighbours are alike, and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, CHANNELS, -(-h // 3), -(-w // 3), generator=generator)
    flat = torch.nn.functional.interpolate(coarse, scale_factor=3, mode="nearest")[0, :, :h, :w].flatten(1).T
    return flat + 0.3 * torch.randn(h * w, CHANNELS, generator=generator)


def packed(grids, prefix, seed):
    images = [scene(h, w, seed + i) for i, (h, w) in enumerate(grids)]
    x = torch.cat([torch.cat([torch.randn(prefix, CHANNELS), image]) for image in images])
    positions, start = [], 0
    for h, w in grids:
        positions += [-1] * prefix + list(range(start, start + h * w))
        start += h * w
    lengths = [prefix + h * w for h, w in grids]
    tokens = Tokens(x, torch.tensor(positions), Packing.of(lengths, torch.device("cpu")), tuple(grids), prefix)
    return tokens, images


def check_groups(tokens, expected):
    """The live tokens and their cover are the groups of each image."""
    patches, start = tokens.patches(), 0
    assert list(patches.live) == [len(groups) for groups in expected]
    rows = iter(range(len(patches.x)))
    for (h, w), groups in zip(tokens.grids, expected):
        for group in groups:
            row = next(rows)
            assert patches.position[row] == start + group.first
            cells = (patches.cover == start + group.first).nonzero().flatten() - start
            assert set(cells.tolist()) == group.cells
            assert (patches.x[row].double() - group.feature).abs().max() < 1e-5
        start += h * w
    check_cover(tokens)


def check_cover(tokens):
    patches = tokens.patches()
    cover, cells = patches.cover, patches.cells
    image = torch.repeat_interleave(
        torch.arange(len(tokens.grids)), torch.tensor([h * w for h, w in tokens.grids]), output_size=cells
    )
    assert torch.equal(cover[cover], cover)
    assert torch.equal(cover[patches.position], patches.position)
    assert torch.equal(image[cover], image)
    assert int(patches.sizes().sum()) == cells
    for own in patches.position.split(patches.packing.lengths):
        assert torch.equal(own, own.sort().values)


grids_of_images = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3)
batches = {"grids": grids_of_images, "prefix": st.integers(0, 2), "seed": st.integers(0, 10**6)}


@settings(max_examples=40, deadline=None)
@given(**batches)
def test_mpm__equals_the_oracle_twice_in_turn(grids, prefix, seed):
    tokens, images = packed(grids, prefix, seed)
    expected = [oracle.singles(image) for image in images]
    for n in range(2):
        tokens = MPM().reduce(Site(n), tokens, None)
        expected = [oracle.mpm(groups) for groups in expected]
        check_groups(tokens, expected)
    assert set(tokens.sizes().tolist()) <= {1, 2, 3, 4}


@settings(max_examples=40, deadline=None)
@given(**batches, tau=st.floats(0.2, 0.95))
def test_algm__both_stages_equal_the_oracle(grids, prefix, seed, tau):
    tokens, images = packed(grids, prefix, seed)
    algm = ALGM(tau, 1, 5)
    local = [oracle.algm_local(oracle.singles(image), grid, tau) for image, grid in zip(images, grids)]
    tokens = algm.reduce(Site(0, True), tokens, None)
    check_groups(tokens, local)
    tokens = algm.reduce(Site(4, True), tokens, None)
    check_groups(tokens, [oracle.algm_global(groups, prefix, 5) for groups in local])


@settings(max_examples=40, deadline=None)
@given(**batches, tau=st.floats(0.2, 0.95))
def test_g2tm__equals_flooding(grids, prefix, seed, tau):
    tokens, images = packed(grids, prefix, seed)
    tokens = G2TM(tau).reduce(Site(1, True), tokens, None)
    check_groups(tokens, [oracle.g2tm(oracle.singles(image), grid, tau) for image, grid in zip(images, grids)])


@settings(max_examples=40, deadline=None)
@given(**batches, ratio=st.floats(0, 0.5))
def test_tome__equals_the_oracle_on_its_keys(grids, prefix, seed, ratio):
    tokens, _ = packed(grids, prefix, seed)
    heads = tokens.x.unflatten(1, (2, -1))
    qkv = torch.stack([torch.randn_like(heads), torch.stack([2 * heads[:, 0], heads[:, 1]], 1), heads], 1)
    keys = qkv[:, 1].mean(1)
    by_key = ToMe(ratio).reduce(Site(0, True), replace(tokens, x=keys), qkv)
    expected = []
    for (h, w), image in zip(grids, keys.split(tokens.packing.lengths)):
        expected.append(oracle.tome(oracle.singles(image[prefix:]), prefix, int(ratio * h * w + 1e-9)))
    check_groups(by_key, expected)


@settings(max_examples=30, deadline=None)
@given(**batches, gone=st.integers(0, 10**6))
def test_reducers__keep_the_cover_of_what_has_left_and_work_on_any_number_of_tokens(grids, prefix, seed, gone):
    tokens, _ = packed(grids, prefix, seed)
    tokens = ALGM(0.5).reduce(Site(0, True), tokens, None)
    stay = torch.rand(sum(tokens.live), generator=torch.Generator().manual_seed(gone)) < (gone % 4) / 3
    exited = tokens.patches().position[~stay]
    left = torch.isin(tokens.cover, exited)
    live = tokens.keep(stay)
    for reduced in (
        MPM().reduce(Site(2), live, None),
        ALGM(0.5).reduce(Site(4, True), live, None),
        G2TM(0.5).reduce(Site(4, True), live, None),
        ToMe(0.2).reduce(Site(4, True), live, live.x.view(-1, 1, 2, 6).expand(-1, 3, -1, -1)),
    ):
        assert torch.equal(reduced.cover[left], tokens.cover[left])
        assert sum(reduced.live) <= sum(live.live)
        assert int(reduced.sizes().sum()) + int(left.sum()) == reduced.cells


@pytest.mark.parametrize(("reducer", "left"), [(ALGM(0.99, 1, None), 16), (G2TM(0.99), 1), (MPM(), 63)])
def test_reducers__of_equal_tokens_leave(reducer, left):
    x = torch.linspace(1, 2, CHANNELS).expand(64, -1).contiguous()
    tokens = Tokens(x, torch.arange(64), Packing.of([64], x.device), ((8, 8),), 0)
    assert reducer.reduce(reducer.sites(12)[0], tokens, None).live == (left,)


def test_algm__of_equal_tokens_all_of_the_first_set_join_whatever_the_rounding():
    for cells in (64, 256, 1024):
        x = torch.linspace(1, 2, CHANNELS).expand(cells, -1).contiguous()
        tokens = Tokens(x, torch.arange(cells), Packing.of([cells], x.device), ((cells // 8, 8),), 0)
        assert ALGM().reduce(Site(4, True), tokens, None).live == (cells // 2,)


def test_merge__of_a_serpentine_is_one_group():
    grid = (15, 15)
    on = torch.tensor([[r % 2 == 0 or c == (14 if r % 4 == 1 else 0) for c in range(15)] for r in range(15)]).flatten()
    x = torch.where(on[:, None], torch.eye(2)[0], torch.eye(2)[1])
    tokens = Tokens(x, torch.arange(225), Packing.of([225], x.device), (grid,), 0)
    merged = G2TM(0.5).reduce(Site(1, True), tokens, None)
    assert int((merged.cover[on] == 0).sum()) == int(on.sum())


def test_merge__gradients_reach_members_by_their_weight_and_bits_stay_of_who_is_alone():
    x = torch.randn(4, 3, requires_grad=True)
    tokens = Tokens(x, torch.arange(4), Packing.of([4], x.device), ((1, 4),), 0)
    merged = tokens.merge(torch.tensor([0, 0, 2, 3]), torch.tensor([1, 3, 1, 1]))
    assert torch.equal(merged.x[1:], x[2:])
    merged.x[0].sum().backward()
    assert torch.allclose(x.grad[:, 0], torch.tensor([0.25, 0.75, 0.0, 0.0]))


def test_merge__a_weight_of_none_drops_the_features_and_leaves_the_cell_answered():
    x = torch.randn(3, 2)
    tokens = Tokens(x, torch.arange(3), Packing.of([3], x.device), ((1, 3),), 0)
    merged = tokens.merge(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1]))
    assert torch.equal(merged.x, x[[0, 2]])
    assert merged.cover.tolist() == [0, 2, 2]


def test_unmerged__has_every_cell_and_the_prefix_in_order():
    tokens, _ = packed([(2, 3), (3, 2)], 2, 0)
    merged = tokens.merge(torch.tensor([0, 0, 2, 2, 4, 5, 6, 6, 6, 9, 10, 11]))
    whole = merged.unmerged()
    assert torch.equal(whole.position, tokens.position)
    assert whole.packing.lengths == tokens.packing.lengths
    assert torch.equal(
        whole.patches().x,
        merged.spread(torch.zeros(12, CHANNELS).index_copy(0, merged.patches().position, merged.patches().x)),
    )
    assert torch.equal(whole.x[whole.prefix_index()], tokens.x[tokens.prefix_index()])
