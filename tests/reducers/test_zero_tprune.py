"""Zero-TPrune equals loops over the graph, and its ranks are those of PageRank."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.oracles import merging as oracle
from tests.reducers.test_matching import check_cover, packed
from tokenexit.reducers import Site, ZeroTPrune
from tokenexit.reducers.zero_tprune import page_rank


@settings(max_examples=40, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    prefix=st.integers(0, 2),
    keep=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    similar=st.sampled_from([0.0, 0.5, 1.0]),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_zero_tprune__equals_loops_over_the_graph(grids, prefix, keep, similar, iterations, seed):
    tokens, _ = packed(grids, prefix, seed)
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(len(tokens.x), 3, 2, 4, generator=generator) * 1.5
    expected, first, row = [], 0, 0
    for h, w in grids:
        q, k = qkv[row : row + prefix + h * w, :2].double().unbind(1)
        answers, gap = oracle.zero_tprune(q, k, prefix, keep, similar, iterations)
        assume(gap > 1e-5)
        expected += [first + answers[i] for i in range(h * w)]
        first, row = first + h * w, row + prefix + h * w
    out = ZeroTPrune((keep,), (2,), (iterations,), similar).reduce(Site(1, True), tokens, qkv)
    assert out.cover.tolist() == expected
    check_cover(out)
    patches = tokens.patches().x
    assert torch.equal(out.patches().x, patches[out.patches().position])  # whoever stays is as it was, bit for bit


def test_page_rank__is_the_leading_eigenvector_and_keeps_its_sum():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 1, 8, generator=generator)
    rank = page_rank(q, k, 200)
    attention = (q[:, 0] @ k[:, 0].T / 8**0.5).softmax(1).double().numpy()
    values, vectors = np.linalg.eig(attention.T)
    leading = vectors[:, np.argmax(values.real)].real
    assert np.allclose(rank.numpy(), leading / leading.sum() * 12, atol=1e-4)
    assert float(page_rank(q, k, 1).sum()) == pytest.approx(12, abs=1e-4)


def test_page_rank__follows_a_permutation_and_leaves_out_heads_that_say_nothing():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 10, 2, 8, generator=generator)
    order = torch.randperm(10, generator=generator)
    assert torch.allclose(page_rank(q[order], k[order], 3), page_rank(q, k, 3)[order], atol=1e-5)
    flat = torch.cat([q, torch.zeros(10, 1, 8)], 1), torch.cat([k, torch.zeros(10, 1, 8)], 1)
    assert torch.allclose(page_rank(*flat, 3), page_rank(q, k, 3), atol=1e-6)  # its ranks are all one
    nothing = torch.zeros(10, 2, 8)
    assert torch.allclose(page_rank(nothing, nothing, 3), torch.ones(10))  # nobody else is there to ask


def test_zero_tprune__drops_first_whom_nobody_attends_to():
    tokens, _ = packed([(3, 3)], 1, 0)
    qkv = torch.zeros(10, 3, 1, 2)
    qkv[:, 0, 0, 0] = 3.0  # all look into one direction
    qkv[:, 1, 0, 0] = 1.0
    qkv[5, 1, 0, 0] = -4.0  # the fourth patch is not there
    out = ZeroTPrune((0.9,), (1,), (2,), share_similar=0.0).reduce(Site(0, True), tokens, qkv)
    assert out.patches().position.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert out.cover[4] == 0  # the keys of all others are alike: the lowest answers


def test_zero_tprune__of_equal_tokens_keeps_its_count():
    tokens, _ = packed([(4, 4)], 0, 0)
    out = ZeroTPrune((0.5,), (1,), (2,)).reduce(Site(0, True), tokens, torch.ones(16, 3, 2, 4))
    assert out.live == (8,)
