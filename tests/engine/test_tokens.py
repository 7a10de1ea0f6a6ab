from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenexit.engine.tokens import Packing, Tokens, cell_packing, pack_grids, scatter, unpack_grids


def packed(grids, prefix=0, channels=2):
    """Tokens whose first feature is their row, so that every one can be told apart."""
    positions, lengths, start = [], [], 0
    for h, w in grids:
        positions += [-1] * prefix + list(range(start, start + h * w))
        lengths.append(prefix + h * w)
        start += h * w
    x = torch.arange(len(positions)).float()[:, None].expand(-1, channels).contiguous()
    return Tokens(x, torch.tensor(positions), Packing.of(lengths, torch.device("cpu")), tuple(grids), prefix)


def test_packing__offsets_are_cumulative_lengths():
    packing = Packing.of([2, 0, 3], torch.device("cpu"))
    assert packing.offsets.tolist() == [0, 2, 2, 5]
    assert packing.offsets.dtype == torch.int32
    assert (packing.total, packing.longest, packing.uniform) == (5, 3, False)


def test_packing__image_index_skips_empty_images():
    assert Packing.of([2, 0, 3], torch.device("cpu")).image_index().tolist() == [0, 0, 2, 2, 2]


def test_packing__equal_lengths_are_uniform_empty_ones_too():
    assert Packing.of([3, 3], torch.device("cpu")).uniform
    assert Packing.of([0, 0], torch.device("cpu")).uniform
    assert Packing.of([], torch.device("cpu")).longest == 0


def test_patches__are_the_tokens_without_prefix_in_order():
    tokens = packed([(1, 2), (2, 2)], prefix=2)
    patches = tokens.patches()
    assert patches.x[:, 0].tolist() == [2, 3, 6, 7, 8, 9]
    assert patches.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert patches.packing.lengths == (2, 4)
    assert patches.num_prefix == 0


def test_prefix_index__names_the_first_rows_of_every_image():
    assert packed([(1, 2), (1, 3)], prefix=2).prefix_index().tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_keep__drops_patches_and_never_a_prefix_token(prefix):
    tokens = packed([(1, 3), (2, 1)], prefix=prefix)
    kept = tokens.keep(torch.tensor([False, True, False, False, False]))
    assert kept.position.tolist() == [-1] * prefix + [1] + [-1] * prefix
    assert kept.packing.lengths == (prefix + 1, prefix)
    assert kept.live == (1, 0)
    assert kept.packing.offsets.tolist() == [0, prefix + 1, 2 * prefix + 1]
    assert kept.grids == tokens.grids


def test_keep__all_and_none_are_ordinary_choices():
    tokens = packed([(2, 2), (1, 1)])
    assert torch.equal(tokens.keep(torch.ones(5, dtype=torch.bool)).x, tokens.x)
    none = tokens.keep(torch.zeros(5, dtype=torch.bool))
    assert none.live == (0, 0)
    assert none.x.shape == (0, 2)
    assert none.cells == 5


@pytest.mark.parametrize("grids", [[(2, 2)], [(2, 2), (1, 1)]])
def test_keep__copies_nothing_where_all_stay(grids):
    tokens = packed(grids, prefix=1)
    assert tokens.keep(torch.ones(tokens.cells, dtype=torch.bool)) is tokens


def test_patches__of_one_image_are_a_view():
    tokens = packed([(2, 3)], prefix=2)
    assert tokens.patches().x.untyped_storage().data_ptr() == tokens.x.untyped_storage().data_ptr()
    assert tokens.patches().position.tolist() == [0, 1, 2, 3, 4, 5]


@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    prefix=st.integers(0, 2),
    data=st.data(),
)
def test_keep__twice_is_keep_once_with_both_masks(grids, prefix, data):
    tokens = packed(grids, prefix)
    n = tokens.cells
    first = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    once = tokens.keep(first)
    m = int(first.sum())
    second = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m, max_size=m)), dtype=torch.bool)
    both = first.clone()
    both[first] = second
    twice, direct = once.keep(second), tokens.keep(both)
    assert torch.equal(twice.x, direct.x)
    assert torch.equal(twice.position, direct.position)
    assert twice.packing.lengths == direct.packing.lengths


def test_cell_packing__counts_all_patches_live_or_not():
    tokens = packed([(2, 2), (1, 3)], prefix=1).keep(torch.zeros(7, dtype=torch.bool))
    assert cell_packing(tokens).lengths == (4, 3)


def test_scatter__writes_rows_and_leaves_the_canvas_it_was_given():
    canvas = torch.zeros(3, 2)
    out = scatter(canvas, torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert out.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert canvas.abs().sum() == 0


def test_scatter__gradients_reach_written_values_and_untouched_rows_only():
    canvas, value = torch.zeros(3, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    scatter(canvas, torch.tensor([1]), value).sum().backward()
    assert canvas.grad.flatten().tolist() == [1, 0, 1]
    assert value.grad.item() == 1


def test_scatter__takes_the_type_of_the_canvas():
    out = scatter(torch.zeros(2, 1), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bfloat16))
    assert out.dtype == torch.float32


def test_unpack_grids__gives_one_batch_for_every_size():
    grids = [(1, 2), (2, 2), (1, 2)]
    rows = torch.arange(8).float()[:, None]
    batches = {tuple(members): maps for members, maps in unpack_grids(rows, grids)}
    assert batches[(0, 2)].tolist() == [[[[0, 1]]], [[[6, 7]]]]
    assert batches[(1,)].tolist() == [[[[2, 3], [4, 5]]]]


@given(
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    scale=st.integers(1, 2),
)
def test_pack_grids__is_the_inverse_of_unpack_grids(grids, scale):
    rows = torch.randn(sum(h * w for h, w in grids) * scale**2, 3)
    assert torch.equal(pack_grids(unpack_grids(rows, grids, scale)), rows)


@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_insert__puts_back_what_was_apart_in_raster_order_bit_for_bit(grids, prefix, seed):
    tokens = packed(grids, prefix)
    generator = torch.Generator().manual_seed(seed)
    first = tokens.keep(torch.rand(sum(tokens.live), generator=generator) < 0.6)
    second = first.keep(torch.rand(sum(first.live), generator=generator) < 0.5)
    gone, later = tokens.apart(first), first.apart(second)
    assert gone.num_prefix == 0
    assert sorted([*gone.position.tolist(), *first.patches().position.tolist()]) == list(range(tokens.cells))
    back = second.insert(later).insert(gone)
    for a, b in ((back.x, tokens.x), (back.position, tokens.position), (back.packing.offsets, tokens.packing.offsets)):
        assert torch.equal(a, b)
    assert back.packing.lengths == tokens.packing.lengths


def weighed(grids, prefix, seed=0):
    tokens = packed(grids, prefix)
    generator = torch.Generator().manual_seed(seed)
    return replace(tokens, weight=torch.rand(len(tokens.position), generator=generator) + 0.5)


def test_weight__goes_with_its_token_and_not_to_heads():
    tokens = weighed(((2, 3), (1, 4)), 2)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    kept = tokens.keep(mask)
    own = {(int(p), float(x)): float(w) for p, x, w in zip(tokens.position, tokens.x[:, 0], tokens.weight)}
    assert [own[int(p), float(x)] for p, x in zip(kept.position, kept.x[:, 0])] == kept.weight.tolist()
    assert kept.patches().weight is None
    assert tokens.unmerged() is tokens


def test_weight__of_merged_tokens_is_their_sum_and_that_of_inserted_ones_their_own():
    tokens = weighed(((1, 4),), 1)
    merged = tokens.merge(torch.tensor([0, 0, 2, 0]))
    prefix, first, second, third, fourth = tokens.weight.tolist()
    assert merged.weight.tolist() == pytest.approx([prefix, first + second + fourth, third])
    group = first + second + fourth
    assert merged.unmerged().weight.tolist() == pytest.approx([prefix, group, group, third, group])
    kept = tokens.keep(torch.tensor([True, False, True, False]))
    assert torch.equal(kept.insert(tokens.apart(kept)).weight, torch.tensor([prefix, first, 1.0, third, 1.0]))
