"""ToMe's attention proportional to sizes, in the whole network."""

import pytest
import torch

from tests.helpers import assert_close, gently_varied, random_image, tiny_segmenter
from tests.methods.test_behaviours import counted_macs
from tokenexit.methods import Dense, DToP, FixedRatio, Reduced, build_method, spec_of
from tokenexit.reducers import ToMe

PROPORTIONAL = ToMe(0.1, proportional=True)


def run(model, images, method):
    with torch.no_grad():
        return model(images, method)


@torch.no_grad()
def by_hand(model, image, by):
    """All blocks, with attention to every token once for each cell that it stands for."""
    vit, config = model.backbone, model.config.backbone
    tokens = vit.embed([image])
    for n, block in enumerate(vit.blocks):
        times = torch.cat([torch.ones(tokens.num_prefix, dtype=torch.int64), tokens.sizes()])
        qkv = block.before(tokens.x, None).unflatten(1, (3, config.num_heads, -1))
        q, k, v = qkv.double().unbind(1)
        k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
        weights = (torch.einsum("qnh,knh->nqk", q, k) / config.head_dim**0.5).softmax(-1)
        attended = torch.einsum("nqk,knh->qnh", weights, v).flatten(1).float()
        tokens = tokens.with_x(block.mix(tokens.x, attended))
        tokens = by.reduce(by.sites(config.depth)[n], tokens, qkv)
        tokens = tokens.with_x(block.feed(tokens.x))
    return tokens.unmerged().with_x(vit.norm(tokens.unmerged().x)).patches().x


def test_proportional__equals_attention_to_every_cell_of_a_token():
    model, image = tiny_segmenter("linear", depth=4, exits=()), gently_varied(24, 28)
    features = by_hand(model, image, PROPORTIONAL)
    head = model.decode_head.classifier
    expected = torch.nn.functional.linear(features, head.weight.flatten(1), head.bias)
    out, plain = (run(model, [image], Reduced(Dense(), by)) for by in (PROPORTIONAL, ToMe(0.1)))
    assert_close(out.grid_logits[0].flatten(1).T, expected)
    assert not torch.allclose(plain.grid_logits[0], out.grid_logits[0], atol=1e-3)


@pytest.mark.parametrize("method", [Dense(), DToP(0.6), FixedRatio((0.6, 0.3), rejoin=1)], ids=lambda m: m.label)
def test_proportional__of_a_batch_is_that_of_one_and_merges_nothing_at_ratio_0(method):
    model = tiny_segmenter("fcn", depth=4)
    images = [gently_varied(32, 36), random_image(16, 20), gently_varied(13, 22), random_image(4, 4)]
    together = run(model, images, Reduced(method, PROPORTIONAL))
    for one, image in zip(together, images):
        single = run(model, [image], Reduced(method, PROPORTIONAL))
        assert torch.equal(one.exit_index[0], single.exit_index[0])
        assert one.ledger == single.ledger
        assert_close(one.grid_logits[0], single.grid_logits[0])
    alone, never = run(model, images, method), run(model, images, Reduced(method, ToMe(0.0, proportional=True)))
    for a, b in zip(alone, never):
        assert torch.equal(a.grid_logits[0], b.grid_logits[0])


@pytest.mark.parametrize("embed_dim", [32, 24, 16])
def test_proportional__is_counted_in_the_ledger(embed_dim):
    model = tiny_segmenter("fcn", depth=4, embed_dim=embed_dim).requires_grad_(False)
    counted, ledger = counted_macs(model, gently_varied(15, 22), Reduced(DToP(0.6), PROPORTIONAL))
    assert ledger.macs == (counted,)


def test_proportional__teaches_every_parameter_and_comes_back_from_its_specification():
    model = tiny_segmenter("fcn", depth=4).train()
    model(torch.stack([gently_varied(16, 20)]), Reduced(Dense(), PROPORTIONAL)).grid_logits[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
    assert build_method(spec_of(Reduced(Dense(), PROPORTIONAL))) == Reduced(Dense(), PROPORTIONAL)
