"""Rows are padded to numbers that recur where new numbers are dear; nothing else about a run changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers import assert_close, enliven, random_image, tiny_config
from tokenexit.engine import attention, recurring_rows, vit
from tokenexit.engine.recurring_rows import in_recurring_rows, new_numbers_cost, recurring
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.engine.vit import ViT


@given(st.integers(0, 100_000))
def test_recurring__is_the_next_of_few_numbers(rows):
    number = recurring(rows)
    assert rows <= number < rows + max(16, rows / 16)
    assert number % 16 == 0
    assert recurring(number) == number


def test_recurring__numbers_are_few():
    assert len({recurring(rows) for rows in range(1, 10_001)}) <= 100


@given(st.integers(0, 1000), st.integers(1, 40))
def test_recurring__of_a_graph_is_the_next_multiple(rows, multiple):
    number = recurring(rows, multiple)
    assert rows <= number < rows + multiple
    assert number % multiple == 0


def test_recurring__grows_with_the_rows():
    numbers = [recurring(rows) for rows in range(3000)]
    assert numbers == sorted(numbers)


@given(st.integers(0, 70), st.integers(0, 9))
def test_in_recurring_rows__is_what_the_function_gives_of_these_rows(rows, seed):
    torch.manual_seed(seed)
    layer, x, seen = nn.Linear(3, 5).double(), torch.randn(rows, 3).double(), []
    tokens = Tokens(x, torch.arange(rows), Packing.of([rows], x.device), ((1, rows),), 0)

    def function(rows):
        seen.append(len(rows))
        return layer(rows)

    assert torch.allclose(in_recurring_rows(function, tokens), layer(x), atol=1e-12)
    assert seen == [recurring(rows)]


def test_new_numbers_cost__on_a_cpu_in_lowered_precision_alone():
    x = torch.zeros(3, 4)
    assert not new_numbers_cost(x)
    assert not new_numbers_cost(x.to("meta").bfloat16())
    for dtype in (torch.bfloat16, torch.float16):
        assert new_numbers_cost(x.to(dtype))
        with torch.autocast("cpu", dtype):
            assert new_numbers_cost(x)


VARIANTS = [
    {},
    {"class_token": False, "layer_scale": 1.0},
    {"rope": "half", "pos_embed": False, "num_registers": 2, "k_bias": False},
    {"rope": "interleaved", "rope_reference": 4.0, "attn_norm": True, "mlp": "swiglu", "sub_norm": True},
]


def some_of(backbone: ViT, sizes: list[tuple[int, int]], weighed: bool, frozen: bool) -> Tokens:
    """Some tokens of images of these sizes in patches; of the last image none but its prefix."""
    tokens = backbone.embed([random_image(4 * h, 4 * w, seed) for seed, (h, w) in enumerate(sizes)])
    if weighed:
        tokens = replace(tokens, weight=torch.rand(len(tokens.x)) + 0.5)
    stays = torch.rand(tokens.cells) < 0.6
    stays[-sizes[-1][0] * sizes[-1][1] :] = len(sizes) == 1
    stays[0] = False
    if frozen:
        tokens = tokens.freeze(~stays & (torch.rand(len(stays)) < 0.5))
    return tokens.keep(stays)


@pytest.mark.parametrize("changes", VARIANTS, ids=repr)
@pytest.mark.parametrize("products", [False, True], ids=["fused", "products"])
@pytest.mark.parametrize(("weighed", "frozen"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [[(4, 7)], [(4, 5), (3, 3), (6, 7)], [(5, 6), (4, 4)]], ids=str)
def test_run__in_recurring_rows_gives_what_it_gives_without(changes, products, weighed, frozen, sizes, monkeypatch):
    torch.manual_seed(0)
    backbone = ViT(tiny_config(**changes)).eval()
    enliven(backbone)
    if products:
        monkeypatch.setattr(attention, "_fused", attention._products)
    with torch.no_grad():
        tokens = some_of(backbone, sizes, weighed, frozen)
        plain = backbone.run(tokens, 0, 4)
        rows = widths_of_products(backbone)
        monkeypatch.setattr(recurring_rows, "new_numbers_cost", lambda x: True)
        padded = backbone.run(tokens, 0, 4)
    assert_close(padded.x, plain.x)
    assert padded.packing == plain.packing
    assert torch.equal(padded.position, plain.position)
    assert rows
    assert all(recurring(number) == number for number in rows)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_run__in_recurring_rows_has_the_gradients_that_it_has_without(again, monkeypatch):
    torch.manual_seed(0)
    backbone, gradients = ViT(tiny_config(rope="half")).train(), []
    enliven(backbone)
    backbone.grad_checkpointing = again
    tokens = some_of(backbone, [(4, 5), (3, 3), (6, 7)], True, True)
    for padded in (False, True):
        monkeypatch.setattr(recurring_rows, "new_numbers_cost", lambda x, padded=padded: padded)
        backbone.zero_grad()
        backbone.run(tokens, 0, 4).x.square().sum().backward(retain_graph=True)
        gradients.append({name: value.grad for name, value in backbone.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def widths_of_products(module: nn.Module) -> set[int]:
    """The numbers of rows that linear layers meet from here on."""
    rows: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args: rows.add(args[0].shape[0]))
    return rows


def test_run__pads_nothing_where_nobody_has_left(monkeypatch):
    backbone = ViT(tiny_config()).eval()
    monkeypatch.setattr(vit, "images_in_recurring_rows", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone.run(backbone.embed([random_image(12, 16)]), 0, 4)


def test_run__pads_in_bf16_where_some_have_left():
    backbone = ViT(tiny_config()).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = some_of(backbone, [(5, 7)], False, False)
        rows = widths_of_products(backbone)
        backbone.run(tokens, 0, 4)
    assert rows == {recurring(len(tokens.x))}


@pytest.mark.parametrize("multiple", [None, 8])
def test_padding__is_written_behind_the_rows(multiple):
    x = torch.arange(6.0).view(3, 2)
    padded = recurring_rows._padded(x, multiple)
    assert torch.equal(padded[:3], x)
    assert padded[3:].abs().max() == 0
    assert len(padded) == recurring(3, multiple)
    assert recurring_rows._padded(None, multiple) is None
    assert recurring_rows._padded(torch.zeros(16), multiple).shape == (16,)
