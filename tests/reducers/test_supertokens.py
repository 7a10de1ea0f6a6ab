"""Supertokens equal a quadtree of loops, for any grids in one batch, and embed windows as smaller images."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers import assert_close, random_image, tiny_segmenter
from tests.oracles import merging as oracle
from tests.reducers.test_matching import check_groups
from tokenexit.engine.rope import Places, rope_phases
from tokenexit.methods import Dense, DToP, Reduced
from tokenexit.reducers import Supertokens
from tokenexit.reducers.supertokens import LabelledSupertokens


def scene(height, width, seed):
    """Flat blocks of 8 pixels, two patches, with noise in some of them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(1, 3, -(-height // 8), -(-width // 8), generator=generator)
    noise = torch.rand(1, 1, *blocks.shape[2:], generator=generator).round()
    flat, noisy = (torch.nn.functional.interpolate(m, scale_factor=8, mode="nearest")[0] for m in (blocks, noise))
    grain = torch.randn(3, height, width, generator=generator)
    return flat[:, :height, :width] + (0.1 + 0.5 * noisy[:, :height, :width]) * grain


def double(model):
    return {name: value.double() for name, value in model.backbone.state_dict().items()}


images_of_sizes = st.lists(st.tuples(st.integers(1, 33), st.integers(1, 37)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    sizes=images_of_sizes,
    seed=st.integers(0, 10**6),
    threshold=st.floats(0.3, 0.99),
    windows=st.sampled_from([(2,), (2, 4), (3,), (2, 4, 8)]),
    policy=st.sampled_from(["similarity", "entropy"]),
    options=st.sampled_from([{}, {"class_token": False, "norm_pre": True}, {"num_registers": 2}]),
)
def test_supertokens__equal_a_quadtree_of_loops(sizes, seed, threshold, windows, policy, options):
    model = tiny_segmenter("linear", depth=1, exits=(), **options)
    images = [scene(*size, seed + i) for i, size in enumerate(sizes)]
    gaps = []

    def chosen(side, row, column, patches, pixels):
        score = oracle.mean_cosine(patches) if policy == "similarity" else oracle.evenness(pixels.float())
        gaps.append(abs(score - threshold))
        return score >= threshold

    config, state = model.config.backbone, double(model)
    expected = [oracle.supertokens(state, config, image.double(), windows, chosen) for image in images]
    assume(min(gaps, default=1) > 1e-5)
    with torch.no_grad():
        tokens = Supertokens(threshold, windows, policy).embed(images, model.backbone)
        prefix = model.backbone.embed(images)
    check_groups(tokens, expected)
    assert torch.equal(tokens.x[tokens.prefix_index()], prefix.x[prefix.prefix_index()])


def test_supertokens__of_one_colour_embed_as_their_patches_do():
    model = tiny_segmenter("linear", depth=1, exits=())
    with torch.no_grad():
        model.backbone.pos_embed.zero_()
        tokens = Supertokens(0.9, (2, 4, 8)).embed([torch.full((3, 32, 44), 0.7)], model.backbone)
    assert tokens.live == (1 + 4 + 8,)  # 8 rows of 11 patches: a window of 8x8, four of 2x2, and a column of patches
    assert_close(tokens.patches().x, tokens.patches().x[:1].expand(len(tokens.patches().x), -1))


def test_supertokens__stand_in_the_middle_of_their_window():
    model = tiny_segmenter("linear", depth=1, exits=(), rope="half", pos_embed=False)
    flat = torch.full((3, 24, 32), 0.7)
    with torch.no_grad():
        tokens = Supertokens(0.9, (2,)).embed([flat], model.backbone)
        half = model.backbone.embed([flat[:, ::2, ::2]])
    assert torch.equal(tokens.phases, half.phases)  # centres of patches twice as large

    radians, periods = Places(16.0, 1.0), torch.ones(1)
    single, pairs = (rope_phases((4, 4), 0, periods, "half", radians, window)[:, 5] for window in (1, 2))
    angles = torch.linspace(0, 3, 4) * 4 + 4  # (index + 1) / 4 * 16, a radian each
    assert_close(single[:4], angles.sin())
    assert_close(pairs[:2], torch.stack([angles[:2].mean(), angles[2:].mean()]).sin())


def test_labelled_supertokens__share_where_one_class_is_true():
    model, image = tiny_segmenter("linear", depth=1, exits=()), random_image(16, 24)
    mask = torch.zeros(16, 24, dtype=torch.int64)
    mask[:, 8:16] = torch.randint(1, 4, (16, 8), generator=torch.Generator().manual_seed(0))
    mask[:8, 16:] = 255  # anything, all of it
    mask[8:, 16:20] = 2
    mask[8:, 20:] = 255  # anything, beside one class
    with torch.no_grad():
        by = LabelledSupertokens(labels=(mask,), sizes=(2,))
        tokens = by.embed([image], model.backbone)
        out = model([image], Reduced(Dense(), by))
    expected = [[0, 0, 2, 3, 4, 4], [0, 0, 8, 9, 4, 4], [12, 12, 14, 15, 16, 16], [12, 12, 20, 21, 16, 16]]
    assert tokens.cover.view(4, 6).tolist() == expected
    assert out.ledger.live == ((12,),)


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_step__is_supertokens_and_exits_in_one_batch_of_unlike_images(head):
    model = tiny_segmenter(head, depth=4)
    step = Reduced(DToP(0.5), Supertokens(0.8))
    images = [scene(32, 48, 1), scene(13, 22, 2), random_image(32, 32)]
    with torch.no_grad():
        out, dense = model(images, step), model(images, Dense())
        alone = [model([image], step) for image in images]
    assert out.ledger.live[0][0] < 96
    assert out.ledger.live[2][0] == 64  # noise has nothing to share
    assert all(one.ledger == out[i].ledger for i, one in enumerate(alone))
    for one, both in zip(alone, out):
        assert_close(both.grid_logits[0], one.grid_logits[0])
    assert any((index < 2).any() for index in out.exit_index)
    assert [a.shape for a in out.grid_logits] == [a.shape for a in dense.grid_logits]


def test_supertokens__of_a_grid_without_whole_windows_are_patches():
    model = tiny_segmenter("fcn", depth=2, exits=(1,))
    images = [torch.ones(3, 3, 40), torch.ones(3, 40, 4)]
    with torch.no_grad():
        out, dense = model(images, Reduced(Dense(), Supertokens(-1.0))), model(images, Dense())
    assert out.ledger.macs == dense.ledger.macs
    assert all(torch.equal(a, b) for a, b in zip(out.grid_logits, dense.grid_logits))


def test_embed_windows__table_is_the_mean_of_its_rows_at_any_size():
    model = tiny_segmenter("linear", depth=1, exits=())
    vit = model.backbone
    with torch.no_grad():
        black = torch.zeros(1, 3, 32, 40)
        single = vit.embed([black[0]]).patches().x.view(8, 10, -1)
        values, places = vit.embed_windows(black, 2)
    mean = single.unflatten(0, (4, 2)).unflatten(2, (5, 2)).mean((1, 3))
    assert places is None
    assert_close(values[0], mean)
