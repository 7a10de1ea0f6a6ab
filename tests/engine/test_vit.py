import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close, enliven, random_image, tiny_config
from tests.oracles import vit as oracle
from tokenexit.engine.vit import ViT, resize_pos_embed
from tokenexit.errors import ConfigError

CPU = torch.device("cpu")
sides = st.integers(1, 18)


def lively(**changes) -> ViT:
    vit = ViT(tiny_config(**changes)).eval()
    enliven(vit)
    return vit


VARIANTS = [
    {},
    {"class_token": False},
    {"num_registers": 2},
    {"num_registers": 2, "pos_embed_prefix": False, "layer_scale": 1.0},
    {"class_token": False, "num_registers": 1, "mlp": "swiglu", "qkv_bias": False},
    {"pos_embed_mode": "bilinear", "pos_embed_antialias": False, "norm_eps": 1e-5},
    {"rope": "half", "pos_embed": False, "num_registers": 2, "k_bias": False, "layer_scale": 1.0, "norm_eps": 1e-5},
    {"rope": "interleaved", "rope_theta": 10.0},
    {"rope": "interleaved", "rope_theta": 1e4, "rope_reference": 16.0, "mlp": "swiglu", "sub_norm": True},
    {"rope": "interleaved", "rope_reference": 4.0, "attn_norm": True, "k_bias": False, "final_norm": False},
    {"rope": "half", "rope_reference": 5.0, "rope_offset": 1.0, "rope_column_first": True, "norm_pre": True},
    {"mlp": "gelu_tanh", "class_token": False, "pos_embed_prefix": False},
]


@pytest.mark.parametrize("changes", VARIANTS)
@given(size=st.tuples(sides, sides), seed=st.integers(0, 9))
def test_vit__equals_the_plain_one_of_single_images(changes, size, seed):
    vit, image = lively(**changes), random_image(*size, seed)
    state = {name: value.detach().double() for name, value in vit.state_dict().items()}
    x = oracle.embed(state, vit.config, image.double())
    with torch.no_grad():
        tokens = vit.embed([image])
        assert_close(tokens.x, x)
        for i in range(vit.config.depth):
            x = oracle.run_block(state, vit.config, i, x, torch.ones(len(x), dtype=torch.bool), tokens.grids[0])
        tokens = vit.run(tokens, 0, vit.config.depth)
        assert_close(tokens.x, x)
        assert_close(vit.norm(tokens.x), oracle.final_norm(state, vit.config, x))


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
def test_vit__images_of_mixed_sizes_give_what_each_gives_alone(sizes):
    vit = lively(num_registers=1)
    images = [random_image(*size, seed) for seed, size in enumerate(sizes)]
    with torch.no_grad():
        together = vit.run(vit.embed(images), 0, 4)
        alone = [vit.run(vit.embed([image]), 0, 4) for image in images]
    assert together.packing.lengths == tuple(t.packing.total for t in alone)
    assert together.grids == tuple(t.grids[0] for t in alone)
    for part, one in zip(together.x.split(together.packing.lengths), alone):
        assert_close(part, one.x)


@pytest.mark.parametrize("changes", VARIANTS)
def test_run__exited_tokens_are_no_keys_and_no_queries(changes):
    vit, image = lively(**changes), random_image(11, 14)
    state = {name: value.detach().double() for name, value in vit.state_dict().items()}
    with torch.no_grad():
        tokens = vit.embed([image])
        alive = torch.rand(tokens.cells) < 0.5
        x = oracle.embed(state, vit.config, image.double())
        rows = torch.cat([torch.ones(tokens.num_prefix, dtype=torch.bool), alive])
        for i in range(2):
            x = oracle.run_block(state, vit.config, i, x, rows, tokens.grids[0])
        assert_close(vit.run(tokens.keep(alive), 0, 2).x, x[rows])


def test_run__works_with_no_token_left():
    vit = lively(class_token=False)
    with torch.no_grad():
        tokens = vit.embed([random_image(8, 8), random_image(4, 4)])
        empty = vit.run(tokens.keep(torch.zeros(5, dtype=torch.bool)), 0, 4)
    assert empty.x.shape == (0, 32)
    assert empty.live == (0, 0)


def test_run__a_span_of_no_blocks_changes_nothing():
    vit = lively()
    tokens = vit.embed([random_image(8, 8)])
    assert torch.equal(vit.run(tokens, 2, 2).x, tokens.x)


def test_embed__positions_count_over_the_whole_batch_and_prefix_has_none():
    tokens = lively(num_registers=1).embed([random_image(4, 8), random_image(4, 4)])
    assert tokens.position.tolist() == [-1, -1, 0, 1, -1, -1, 2]
    assert tokens.num_prefix == 2


def test_embed__sizes_that_are_no_multiple_of_the_patch_are_padded_right_and_below():
    vit, image = lively(), random_image(5, 6)
    padded = F.pad(image, (0, 2, 0, 3))
    assert torch.equal(vit.embed([image]).x, vit.embed([padded]).x)


def test_state_dict__carries_the_names_of_timm():
    names = set(ViT(tiny_config(num_registers=1, layer_scale=1.0, depth=1)).state_dict())
    block = [
        *(f"{layer}.{part}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
          for part in ("weight", "bias")),
        "ls1.gamma",
        "ls2.gamma",
    ]  # fmt: skip
    outside = ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    assert names == {*outside, "norm.weight", "norm.bias", *(f"blocks.0.{name}" for name in block)}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({}, 13), ({"class_token": False}, 12), ({"pos_embed_prefix": False}, 12), ({"num_registers": 2}, 13)],
)
def test_pos_embed__has_a_row_for_the_class_token_only_where_it_has_a_position(changes, rows):
    assert ViT(tiny_config(**changes)).pos_embed.shape == (1, rows, 32)


# Resizing the position table.


@given(size=st.tuples(st.integers(1, 6), st.integers(1, 6)), mode=st.sampled_from(["bicubic", "bilinear"]))
def test_resize_pos_embed__a_constant_table_stays_constant(size, mode):
    table = torch.full((1, 12, 3), 0.25)
    resized = resize_pos_embed(table, (3, 4), size, mode)
    assert_close(resized, torch.full((1, size[0] * size[1], 3), 0.25))


def test_resize_pos_embed__the_same_grid_is_untouched():
    table = torch.randn(1, 12, 3)
    assert resize_pos_embed(table, (3, 4), (3, 4)) is table


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("new", [(2, 3), (5, 9)])
def test_resize_pos_embed__mode_and_antialias_reach_the_interpolation(mode, antialias, new):
    table = torch.randn(1, 12, 2)
    maps = table.view(3, 4, 2).permute(2, 0, 1)[None]
    expected = F.interpolate(maps, new, mode=mode, antialias=antialias, align_corners=False)
    assert_close(resize_pos_embed(table, (3, 4), new, mode, antialias), expected[0].permute(1, 2, 0).reshape(1, -1, 2))


def test_resize_pos_embed__rows_and_columns_are_not_swapped():
    table = torch.arange(3.0)[:, None].expand(3, 4).reshape(1, 12, 1)  # grows with the row only
    resized = resize_pos_embed(table, (3, 4), (6, 2), antialias=False).view(6, 2)
    assert_close(resized[:, 0], resized[:, 1])
    assert resized[5, 0] > resized[0, 0] + 1


def test_resize_pos_embed__offset_scales_by_the_ratio_with_the_offset():
    table = torch.randn(1, 16, 2)
    maps = table.view(1, 4, 4, 2).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic", align_corners=False)
    resized = resize_pos_embed(table, (4, 4), (6, 3), antialias=False, offset=0.1)
    assert_close(resized, expected.permute(0, 2, 3, 1).reshape(1, 18, 2))
    assert not torch.allclose(resized, resize_pos_embed(table, (4, 4), (6, 3), antialias=False))


def test_resize_pos_embed__an_offset_that_changes_the_size_is_refused():
    with pytest.raises(ConfigError, match=r"pos_embed_offset=1.5 .*use an offset below 1"):
        resize_pos_embed(torch.randn(1, 16, 2), (4, 4), (6, 3), offset=1.5)


def test_resize_pos_embed__keeps_the_type_of_the_table():
    assert resize_pos_embed(torch.randn(1, 12, 2).bfloat16(), (3, 4), (2, 2)).dtype == torch.bfloat16


# Stochastic depth.


def test_drop_path__rises_linearly_from_zero_at_the_first_block():
    vit = ViT(tiny_config(drop_path=0.3))
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path__acts_in_training_only():
    vit = lively(drop_path=0.9)
    tokens = vit.embed([random_image(8, 8)])
    assert torch.equal(vit.run(tokens, 0, 4).x, vit.run(tokens, 0, 4).x)
    vit.train()
    draws = {vit.run(tokens, 3, 4).x.sum().item() for _ in range(20)}
    assert len(draws) > 1
    assert tokens.x.sum().item() in draws, "both branches dropped leaves the tokens as they were"


def test_drop_path__may_spare_attention_as_dovit_does():
    vit = lively(drop_path=0.9, drop_path_attention=False).train()
    tokens = vit.embed([random_image(8, 8)])
    block = vit.blocks[3]
    qkv = block.attn.qkv(block.norm1(tokens.x))
    attended = tokens.x + block.attn.proj(block.attn.attend(qkv, tokens.packing))
    draws = [vit.run(tokens, 3, 4).x for _ in range(20)]
    assert any(torch.equal(x, attended) for x in draws), "a dropped MLP leaves attention's result"
    assert not any(torch.equal(x, tokens.x) for x in draws), "attention is never dropped"


# Compiled blocks.


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="compiling needs a C++ compiler"
)
@pytest.mark.parametrize("bf16", [False, True])
def test_compile_blocks__computes_the_same_for_any_number_of_live_tokens(bf16: bool):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vit, compiled = lively().eval(), lively().eval()
    compiled.load_state_dict(vit.state_dict())
    compiled.compile_blocks()
    with torch.no_grad():
        tokens = vit.embed([random_image(24, 20), random_image(8, 8)])
    graphs = []
    for live_shares in ((1, 2, 5), (3, 4, 7)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for every in live_shares:
                live = tokens.keep(torch.arange(sum(tokens.live)) % every == 0)
                assert_close(compiled.run(live, 0, 4).x, vit.run(live, 0, 4).x, 2e-2 if bf16 else 1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] <= (4 if bf16 else 2), "two for all blocks, and where rows are padded two more by what holds them"
    assert graphs[1] == graphs[0], "none for other lengths"
