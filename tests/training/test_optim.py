"""Which parameters learn how fast, and when."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch

from tests.helpers import tiny_segmenter
from tokenexit.training.config import OptimConfig
from tokenexit.training.optim import build_optimizer, learning_rate, parameter_groups


def rates_and_decays(head: str, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by name."""
    model = tiny_segmenter(head, num_registers=1, layer_scale=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_every_parameter_is_in_exactly_one_group(head: str) -> None:
    model = tiny_segmenter(head)
    grouped = [parameter for group in parameter_groups(model, OptimConfig()) for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_exit_heads_and_decode_head_learn_faster_and_the_backbone_does_not() -> None:
    found = rates_and_decays("fcn", OptimConfig(lr=1e-3, head_lr_factor=7.0))
    for name, (rate, _) in found.items():
        assert rate == pytest.approx(7e-3 if name.startswith(("exit_heads", "decode_head")) else 1e-3), name


def test_stage_adapters_learn_as_heads_and_their_matrices_decay_towards_no_change() -> None:
    model = tiny_segmenter("fcn", stage_adapter=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(lr=1e-3, head_lr_factor=7.0, weight_decay=0.05))
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    own = {name.partition(".")[2]: value for name, value in found.items() if name.startswith("stage_adapters.")}
    assert set(own) == {
        f"{n}.{layer}.{kind}" for n in (0, 1) for layer in ("norm", "linear") for kind in ("weight", "bias")
    }
    for name, (rate, decay) in own.items():
        assert rate == pytest.approx(7e-3)
        assert decay == (0.05 if name.endswith("linear.weight") else 0.0)


def test_norms_biases_embeddings_and_prefix_tokens_do_not_decay() -> None:
    found = rates_and_decays("atm", OptimConfig(weight_decay=0.05))
    spared = {name for name, (_, decay) in found.items() if decay == 0.0}
    for name in found:
        layer = name.rpartition(".")[0]
        embedding = name.endswith(("pos_embed", "cls_token", "reg_token", "queries.weight"))
        vector = name.endswith(("bias", "gamma")) or "norm" in layer.rpartition(".")[2]
        assert (name in spared) == (embedding or vector), name
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"} <= spared
    assert found["backbone.blocks.0.attn.qkv.weight"][1] == 0.05


def test_decay_all_spares_nothing() -> None:
    assert {decay for _, decay in rates_and_decays("atm", OptimConfig(weight_decay=0.05, decay_all=True)).values()} == {
        0.05
    }


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_segmenter("fcn")
    model.backbone.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model, OptimConfig()) for parameter in group["params"]}
    assert grouped.isdisjoint(map(id, model.backbone.parameters()))


def test_optimisers_are_those_of_the_papers() -> None:
    model = tiny_segmenter("fcn")
    adamw = build_optimizer(model, OptimConfig(name="adamw", betas=(0.8, 0.9)))
    sgd = build_optimizer(model, OptimConfig(name="sgd", momentum=0.7))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.7


def rates(config: OptimConfig, steps: int, at: Iterable[int], initial: float = 1.0) -> list[float]:
    return [learning_rate(initial, step, steps, config) for step in at]


def test_rate_decays_polynomially_to_zero() -> None:
    config = OptimConfig(warmup_steps=0, power=0.9)
    assert rates(config, 100, (0, 50, 99, 100)) == pytest.approx([1.0, 0.5**0.9, 0.01**0.9, 0.0])


@pytest.mark.parametrize("initial", [1e-2, 1e-1])
def test_rate_of_every_group_ends_at_the_same_floor(initial: float) -> None:
    config = OptimConfig(lr=1e-2, min_lr=1e-4, warmup_steps=0, power=1.0)
    assert rates(config, 100, (50, 100), initial) == pytest.approx([(initial + 1e-4) / 2, 1e-4])


def test_rate_may_begin_its_decay_later_and_aim_beyond_the_run() -> None:
    config = OptimConfig(warmup_steps=0, power=1.0, decay_start=10, decay_end=50)
    assert rates(config, 30, (0, 10, 20, 29)) == pytest.approx([1.0, 1.0, 0.75, 1 - 19 / 40])


def test_rate_stays_at_its_floor_after_a_decay_that_ends_early() -> None:
    assert rates(OptimConfig(warmup_steps=0, decay_end=10), 30, (10, 29)) == [0.0, 0.0]


def test_warm_up_rises_linearly_from_its_start() -> None:
    config = OptimConfig(warmup_steps=10, warmup_start=0.1, power=0.0)  # no decay beside it
    assert rates(config, 100, (0, 5, 10, 60)) == pytest.approx([0.1, 0.55, 1.0, 1.0])


def test_rate_only_falls_after_the_warm_up() -> None:
    factors = rates(OptimConfig(warmup_steps=20), 200, range(200))
    assert all(a < b for a, b in pairwise(factors[:16]))
    assert all(a > b for a, b in pairwise(factors[20:]))


def test_layer_decay__slows_each_block_against_the_next_and_spares_heads_and_the_final_norm() -> None:
    found = rates_and_decays("fcn", OptimConfig(lr=1e-3, head_lr_factor=7.0, layer_decay=0.5))
    depth = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("backbone.blocks."))
    for name, (rate, _) in found.items():
        if name.startswith("backbone.blocks."):
            expected = 1e-3 * 0.5 ** (depth - 1 - int(name.split(".")[2]))
        elif name.startswith("backbone.norm."):
            expected = 1e-3
        elif name.startswith("backbone."):
            expected = 1e-3 * 0.5 ** (depth - 1)  # embeddings, as the first block
        else:
            expected = 7e-3
        assert rate == pytest.approx(expected), name


def test_backbone__stands_still_in_the_first_warm_up_and_rises_and_decays_after_it() -> None:
    config = OptimConfig(warmup_steps=10, backbone_warmup_steps=20, warmup_start=0.1, power=1.0, decay_start=10)
    heads = [learning_rate(1.0, step, 110, config) for step in (0, 5, 10, 60, 110)]
    assert heads == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])
    backbone = [learning_rate(1.0, step, 110, config, backbone=True) for step in (0, 9, 10, 20, 30, 70, 110)]
    assert backbone == pytest.approx([0.0, 0.0, 0.1, 0.55, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("step", [0, 50, 99, 100, 300])
def test_one_warm_up__is_that_of_backbone_and_heads_alike(step: int) -> None:
    config = OptimConfig(warmup_steps=100)
    assert learning_rate(1.0, step, 400, config, backbone=True) == learning_rate(1.0, step, 400, config)
