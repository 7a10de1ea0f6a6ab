"""Rotary positions: what a rotation is, and that phases go where their token goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, enliven, random_image, tiny_config, tiny_segmenter
from tests.methods.cases import Weights
from tests.oracles import methods as oracle_methods
from tests.oracles import vit as oracle
from tokenexit.engine.rope import Places, rope_periods, rope_phases, rotate
from tokenexit.engine.tokens import Tokens
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import ConfigError
from tokenexit.exporting.export import export_model
from tokenexit.methods import DoViT, DToP

LIKE = torch.empty(0)
PAIRINGS = ("half", "interleaved")
KINDS: dict[str, dict[str, Any]] = {
    "half": {"rope": "half"},
    "interleaved": {"rope": "interleaved"},
    "eva02": {"rope": "interleaved", "rope_theta": 1e4, "rope_reference": 16.0, "pos_embed": True},
    "pe": {
        "rope": "interleaved",
        "rope_theta": 1e4,
        "rope_reference": 32.0,
        "rope_offset": 1.0,
        "rope_column_first": True,
        "pos_embed": True,
        "norm_pre": True,
    },
}
DINOV3: dict[str, Any] = {"rope": "half", "pos_embed": False, "num_registers": 2, "k_bias": False, "layer_scale": 1.0}


def sharp(**changes: Any) -> ViT:
    """Attention that depends on place: queries and keys are three times as long."""
    torch.manual_seed(0)
    vit = ViT(tiny_config(**(DINOV3 | changes))).eval()
    enliven(vit)
    with torch.no_grad():
        for block in vit.blocks:
            block.get_parameter("attn.qkv.weight")[: 2 * vit.config.embed_dim] *= 3.0
    return vit


def test_periods__are_those_of_dinov3():
    periods = rope_periods(64, 100.0, "fp32", LIKE)
    assert periods.shape == (16,)
    assert periods[0] == 1.0
    assert_close(periods[1:] / periods[:-1], torch.full((15,), 100 ** (1 / 16)))


def test_periods__as_the_release_keeps_them_are_rounded_to_bf16():
    exact, kept = (rope_periods(64, 100.0, precision, LIKE) for precision in ("fp32", "bf16"))
    assert torch.equal(kept, exact.bfloat16().float())
    assert 1e-3 < ((kept - exact).abs() / exact).max() < 2**-8


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate__leaves_prefix_tokens_as_they_are_bit_for_bit(pairing, dtype):
    phases = rope_phases((2, 3), 5, rope_periods(8, 100.0, "fp32", LIKE), pairing)
    x = torch.randn(11, 2, 8).to(dtype)
    out = rotate(x, phases, pairing)
    assert out.dtype == dtype
    assert torch.equal(out[:5], x[:5])
    assert not torch.isclose(out[5:], x[5:]).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rotate__is_computed_in_fp32_and_rounded_once(pairing):
    phases = rope_phases((5, 4), 0, rope_periods(16, 100.0, "fp32", LIKE), pairing)
    x = torch.randn(20, 2, 16).bfloat16()
    assert torch.equal(rotate(x, phases, pairing), rotate(x.float(), phases, pairing).bfloat16())


def test_places__of_a_reference_grid_are_stretched_to_it_and_counted_from_the_offset():
    periods = rope_periods(8, 10000.0, "fp32", LIKE)
    assert_close(periods, torch.tensor([1.0, 100.0]))
    phases = rope_phases((2, 4), 1, periods, "interleaved", Places(16.0))
    assert torch.equal(phases[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    by_hand = [8.0, 8.0, 0.08, 0.08, 12.0, 12.0, 0.12, 0.12]  # row 1 of 2, column 3 of 4
    assert_close(phases[1 + 7, :8], torch.tensor(by_hand).cos())
    assert_close(phases[1 + 7, 8:], torch.tensor(by_hand).sin())
    moved = rope_phases((2, 4), 0, periods, "half", Places(32.0, 1.0, column_first=True))
    by_hand = [32.0, 0.32, 32.0, 0.32] * 2  # column 4 of 4, then row 2 of 2
    assert_close(moved[7, 8:], torch.tensor(by_hand).sin())
    by_hand = [8.0, 0.08, 16.0, 0.16] * 2  # column 1, row 1
    assert_close(moved[0, :8], torch.tensor(by_hand).cos())


def test_places__on_its_reference_grid_a_patch_is_a_radian():
    table = rope_phases((16, 16), 0, torch.ones(1), "interleaved", Places(16.0))
    assert_close(table[:, 0], torch.arange(16.0).cos().repeat_interleave(16))
    assert_close(table[:, 2], torch.arange(16.0).cos().repeat(16))


def test_pairings__are_one_rotation_of_permuted_channels():
    periods = rope_periods(16, 100.0, "fp32", LIKE)
    x = torch.randn(12, 2, 16)
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    half = rotate(x[..., order], rope_phases((3, 4), 0, periods, "half"), "half")
    assert_close(half, rotate(x, rope_phases((3, 4), 0, periods, "interleaved"), "interleaved")[..., order])


def _live(vit: ViT, size: tuple[int, int], seed: int) -> tuple[Tokens, Tensor, Tensor]:
    """The live tokens of a random subset, what the plain ViT gives for them after two blocks, and the subset."""
    image = random_image(*size, seed)
    state = {name: value.detach().double() for name, value in vit.state_dict().items()}
    tokens = vit.embed([image])
    alive = torch.rand(tokens.cells, generator=torch.Generator().manual_seed(seed)) < 0.6
    rows = torch.cat([torch.ones(tokens.num_prefix, dtype=torch.bool), alive])
    x = oracle.embed(state, vit.config, image.double())
    for i in range(2):
        x = oracle.run_block(state, vit.config, i, x, rows, tokens.grids[0])
    return tokens.keep(alive), x[rows], alive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (11, 22), (9, 3)])
@torch.no_grad()
def test_live_tokens__keep_the_phases_of_their_place_in_the_full_grid(kind, size):
    vit = sharp(**KINDS[kind])
    for seed in range(3):
        live, expected, _ = _live(vit, size, seed)
        assert_close(vit.run(live, 0, 2).x, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_live_tokens__with_the_phases_of_their_rank_give_another_result(kind):
    """The control: were phases taken by rank among the live, this comparison would see it."""
    vit = sharp(**KINDS[kind])
    live, expected, alive = _live(vit, (16, 20), 0)
    full = vit.embed([random_image(16, 20, 0)])
    assert full.phases is not None
    by_rank = replace(live, phases=full.phases[: len(live.x)])
    assert not alive.all()
    assert (vit.run(by_rank, 0, 2).x - expected).abs().max() > 0.05


@torch.no_grad()
def test_patches__carry_their_own_phases():
    tokens = sharp().embed([random_image(8, 12), random_image(12, 8)])
    assert tokens.phases is not None
    patches = tokens.patches()
    assert patches.phases is not None
    assert torch.equal(patches.phases, tokens.phases[tokens.position >= 0])


@torch.no_grad()
def test_embed__images_of_mixed_sizes_have_the_phases_that_each_has_alone():
    vit, images = sharp(), [random_image(*size) for size in ((8, 12), (16, 4), (8, 12))]
    together = vit.embed(images)
    alone = [vit.embed([image]).phases for image in images]
    assert together.phases is not None
    assert torch.equal(together.phases, torch.cat([phases for phases in alone if phases is not None]))
    parts = vit.run(together, 0, 4).x.split(together.packing.lengths)
    for part, image in zip(parts, images):
        assert_close(part, vit.run(vit.embed([image]), 0, 4).x)


@torch.no_grad()
def test_embed__under_autocast_phases_stay_in_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        tokens = sharp().embed([random_image(8, 12)])
    assert tokens.phases is not None
    assert tokens.phases.dtype == torch.float32


def drawn_factor(vit: ViT, seed: int) -> Tensor:
    """By how much coordinates are longer in this call, from all angles that stay below a half turn."""
    image = random_image(8, 12)
    with torch.no_grad():
        torch.manual_seed(seed)
        drawn, plain = vit.train().embed([image]).phases, vit.eval().embed([image]).phases
    assert drawn is not None
    assert plain is not None
    prefix, width = vit.config.num_prefix_tokens, vit.config.head_dim
    assert torch.equal(drawn[:prefix], plain[:prefix])
    found, expected = (torch.atan2(t[prefix:, width:], t[prefix:, :width]) for t in (drawn, plain))
    return found / expected


def test_rescale__one_factor_for_all_patches_of_a_call_drawn_in_training_alone():
    vit = sharp(rope_rescale=2.0, rope_reference=1.0, rope_offset=0.5)  # all angles are short
    factors = [drawn_factor(vit, seed) for seed in range(200)]
    for factor in factors:
        assert_close(factor, factor[0, 0].expand_as(factor))
    means = torch.stack([factor.mean() for factor in factors]).log2()
    assert means.min() < -0.9
    assert means.max() > 0.9
    assert means.abs().max() <= 1.0 + 1e-5
    assert means.mean().abs() < 0.15
    assert torch.equal(drawn_factor(vit, 3), factors[3])


def test_rescale__none_leaves_the_random_numbers_of_training_as_they_were():
    vit = sharp().train()
    torch.manual_seed(0)
    vit.embed([random_image(8, 12)])
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(()))


def test_keys_without_bias__what_stands_in_their_third_neither_counts_nor_learns():
    vit, image = sharp(), random_image(8, 12)
    bias, dim = vit.blocks[0].attn.qkv.bias, vit.config.embed_dim
    before = vit.run(vit.embed([image]), 0, 1).x
    with torch.no_grad():
        bias[dim : 2 * dim] = 7.0
    after = vit.run(vit.embed([image]), 0, 1).x
    assert torch.equal(before, after)
    after.square().sum().backward()
    assert not bias.grad[dim : 2 * dim].any()
    assert bias.grad[:dim].any()


def test_gradients__are_the_same_when_blocks_are_computed_again():
    vit, image = sharp(), random_image(8, 12)
    grads = []
    for again in (False, True):
        vit.zero_grad()
        vit.grad_checkpointing = again
        vit.run(vit.embed([image]), 0, 4).x.square().mean().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad.clone())
    assert_close(*grads)


# Methods.

SIZES = ((16, 24), (12, 9))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dtop__is_the_plain_one_on_rotary_positions(kind, captured):
    from tests.engine.test_cuda_graphs import Recorder

    model, images = tiny_segmenter("linear", **(DINOV3 | KINDS[kind])), [random_image(*size) for size in SIZES]
    weights = Weights.of(model)
    if captured:
        model.backbone.capture_blocks(step=8, record=Recorder())
    out = model(images, DToP((0.7, 0.7)))
    for n, image in enumerate(images):
        answer = oracle_methods.dtop(weights, image, (0.7, 0.7))
        assert_close(out.grid_logits[n], answer.grid)
        assert torch.equal(out.exit_index[n], answer.stage)
    assert any((index < 2).any() and (index == 2).any() for index in out.exit_index), "some leave and some stay"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dovit__is_the_plain_one_on_rotary_positions(kind):
    model = tiny_segmenter("linear", seed=int(kind == "pe"), **(DINOV3 | KINDS[kind]))
    images = [random_image(*size) for size in SIZES]
    out = model(images, DoViT((0.85, 0.9)))
    for n, answer in enumerate(oracle_methods.dovit(Weights.of(model), images, (0.85, 0.9))):
        assert_close(out.grid_logits[n], answer.grid)
        assert torch.equal(out.exit_index[n], answer.stage)
    assert any((index < 2).any() and (index == 2).any() for index in out.exit_index), "some leave and some stay"


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        (DINOV3, DToP((0.7, 0.7))),
        (DINOV3, DoViT((0.7, 0.7))),
        (DINOV3 | KINDS["eva02"] | {"mlp": "swiglu", "sub_norm": True, "final_norm": False}, DToP((0.7, 0.7))),
        (DINOV3 | KINDS["pe"] | {"attn_norm": True, "mlp": "gelu_tanh"}, DoViT((0.7, 0.7))),
    ],
    ids=["dinov3 dtop", "dinov3 dovit", "eva02 dtop", "pe dovit"],
)
def test_export__a_graph_rotates_as_the_model_does(backbone, method, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
        pytest.importorskip("onnxruntime", reason="ONNX needs the export extra")
    model = tiny_segmenter("linear", **backbone)
    made = export_model(model, method, [random_image(16, 24), random_image(12, 9)], tmp_path, format=format)
    assert made.runs == 6
    assert made.error < 1e-4


def test_model__with_rotary_positions_is_saved_and_read(tmp_path):
    model = tiny_segmenter("linear", **DINOV3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    image = random_image(12, 9)
    with torch.no_grad():
        assert torch.equal(model([image]).grid_logits[0], again([image]).grid_logits[0])


# Bad options.


def test_config__refuses_heads_that_cannot_be_turned_and_tokens_without_a_place():
    with pytest.raises(ConfigError, match=r"heads have 6 channels: choose num_heads"):
        ViTConfig(embed_dim=12, num_heads=2, rope="half")
    with pytest.raises(ConfigError, match=r"pos_embed=False leaves tokens without a place: set rope"):
        ViTConfig(pos_embed=False)
    with pytest.raises(ConfigError, match=r"rope must be"):
        ViTConfig(rope="quarter")  # type: ignore[arg-type]


def drawn_phases(vit: ViT, seed: int) -> Tensor:
    torch.manual_seed(seed)
    phases = vit.embed([random_image(24, 40), random_image(16, 16)]).phases
    assert phases is not None
    return phases


def test_rescale__draws_one_factor_for_all_images_in_training_and_is_a_function_of_the_seed():
    vit = sharp(rope_rescale=2.0)
    resting = drawn_phases(vit, 0)
    assert torch.equal(resting, drawn_phases(sharp(), 0))
    vit.train()
    assert torch.equal(drawn_phases(vit, 1), drawn_phases(vit, 1))
    assert not torch.equal(drawn_phases(vit, 1), drawn_phases(vit, 2))
    config = vit.config
    for seed in range(20):
        phases, prefix = drawn_phases(vit, seed), config.num_prefix_tokens
        assert torch.equal(phases[:prefix], resting[:prefix])
        # The longest period turns the first patch least: its angle does not wrap, whatever the factor.
        quarter, half = config.head_dim // 4 - 1, config.head_dim
        angles = torch.atan2(phases[..., half + quarter], phases[..., quarter])
        before = torch.atan2(resting[..., half + quarter], resting[..., quarter])
        placed = before.abs() > 1e-3
        factors = (angles / before)[placed]
        assert_close(factors, factors[:1].expand_as(factors))
        assert 0.5 <= factors[0] <= 2.0


def test_rescale__below_one_is_refused():
    with pytest.raises(ConfigError, match="rope_rescale"):
        tiny_config(**(DINOV3 | {"rope_rescale": 0.5}))
