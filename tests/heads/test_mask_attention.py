"""What queries see in training, against loops over images, queries and patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.heads.mask_attention import mask_attention

QUERIES, PREFIX = 3, 2


def joined_tokens(grids: list[tuple[int, int]], seed: int) -> Tokens:
    """Live tokens of images, some patches gone; a prefix token and three queries in front of each."""
    generator = torch.Generator().manual_seed(seed)
    parts, lengths, start, prefix = [], [], 0, PREFIX + QUERIES
    for h, w in grids:
        live = torch.nonzero(torch.rand(h * w, generator=generator) < 0.6).flatten() + start
        parts += [torch.full((prefix,), -1), live]
        lengths.append(prefix + len(live))
        start += h * w
    position = torch.cat(parts)
    packing = Packing.of(lengths, position.device)
    return Tokens(torch.zeros(len(position), 4), position, packing, tuple(grids), prefix)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_queries__see_prefix_queries_and_the_live_patches_of_their_masks(
    grids: list[tuple[int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    tokens = joined_tokens(grids, seed)
    logits = [torch.randn(QUERIES, 4 * h, 4 * w) for h, w in grids]
    masked = mask_attention(logits, tokens, QUERIES, 1.0)
    start = cells = 0
    for image, ((h, w), length) in enumerate(zip(grids, tokens.packing.lengths)):
        rows = masked.rows.view(len(grids), QUERIES)[image].tolist()
        assert rows == [start + PREFIX + q for q in range(QUERIES)]
        small = F.interpolate(logits[image][None], (h, w), mode="bilinear", align_corners=False)[0].flatten(1)
        for q in range(QUERIES):
            positions = tokens.position[start : start + length].tolist()
            expected = [p < 0 or bool(small[q, p - cells] > 0) for p in positions]
            expected += [False] * (tokens.packing.longest - length)
            assert masked.visible[image, q].tolist() == expected
        start, cells = start + length, cells + h * w


def test_share__is_that_of_the_queries_whose_mask_applies_and_others_see_all_that_is_live() -> None:
    tokens = joined_tokens([(4, 4)] * 200, 0)
    logits = [torch.full((QUERIES, 16, 16), -1.0)] * 200  # every mask is empty
    torch.manual_seed(0)
    seen = mask_attention(logits, tokens, QUERIES, 0.3).visible.sum(2)
    lengths = torch.tensor(tokens.packing.lengths)[:, None]
    applies = seen == PREFIX + QUERIES
    assert bool((applies | (seen == lengths)).all())
    assert 0.25 < applies.float().mean() < 0.35
    assert bool((mask_attention(logits, tokens, QUERIES, 0.0).visible.sum(2) == lengths).all())


def test_an_image_without_live_patches__leaves_queries_their_prefix() -> None:
    prefix = PREFIX + QUERIES
    packing = Packing.of([prefix], torch.device("cpu"))
    tokens = Tokens(torch.zeros(prefix, 4), torch.full((prefix,), -1), packing, ((2, 2),), prefix)
    masked = mask_attention([torch.ones(QUERIES, 8, 8)], tokens, QUERIES, 1.0)
    assert masked.visible.shape == (1, QUERIES, prefix)
    assert bool(masked.visible.all())
