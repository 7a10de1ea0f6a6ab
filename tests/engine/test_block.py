import pytest
import torch
from torch import nn

from tokenexit.engine.block import Attention, Block, drop_path
from tokenexit.engine.tokens import FrozenTokens, Packing

CPU = torch.device("cpu")


def test_block__count_of_work_is_the_textbook_formula():
    block = Block(32, 2, 128)
    n, d = 10, 32
    assert block.ops(n).macs == 12 * n * d * d + 2 * n * n * d
    assert block.ops(n).norm_elements == 2 * n * d


def test_drop_path__is_drawn_once_for_each_image():
    packing = Packing.of([3, 0, 50, 7, 1], CPU)
    seen = set()
    for _ in range(40):
        out = drop_path(0.5, packing, torch.float32)
        assert out.shape == (61, 1)
        for image in out.split(packing.lengths):
            if len(image):
                assert len(image.unique()) == 1
        seen.add(tuple(image[0, 0].item() for image in out.split(packing.lengths) if len(image)))
    assert {value for draw in seen for value in draw} == {0.0, 2.0}
    assert len(seen) > 4, "images are drawn independently"


@pytest.mark.parametrize("options", [{}, {"rope": "half"}, {"k_bias": False}, {"qkv_bias": False}], ids=repr)
@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
def test_block__beside_frozen_tokens_is_the_whole_block_whose_other_rows_are_thrown_away(options, weighed):
    """Two images: some rows are live, the others keys and values alone."""
    torch.manual_seed(0)
    block = Block(16, 2, 32, **options).eval().double()
    x, phases = torch.randn(9, 16).double(), torch.randn(9, 16).double() if "rope" in options else None
    weight = torch.rand(9).double() + 0.5 if weighed else None
    live = [torch.tensor([0, 2, 3]), torch.tensor([5, 8])]
    rest = [torch.tensor([1]), torch.tensor([4, 6, 7])]
    if weight is not None:
        weight[torch.cat(rest)] = 1.0

    def of(rows):
        return torch.cat(rows), Packing.of([len(one) for one in rows], x.device)

    whole = block(x, Packing.of([4, 5], x.device), phases, None, weight)
    (rows, packing), (others, behind) = of(live), of(rest)
    frozen = FrozenTokens(x[others], behind, None if phases is None else phases[others])
    given = None if weight is None else weight[rows]
    own = block(x[rows], packing, None if phases is None else phases[rows], None, given, frozen)
    assert torch.allclose(own, whole[rows], atol=1e-12)


def test_keys_values__of_a_quantised_projection_are_those_of_the_whole_product():
    attention = Attention(16, 2)
    x = torch.randn(5, 16)
    plain = attention.keys_values(x, None)
    attention.qkv = nn.Sequential(attention.qkv)  # no linear layer, as quantised ones are none
    assert torch.allclose(attention.keys_values(x, None), plain, atol=1e-6)
