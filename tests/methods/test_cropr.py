"""Token Cropr beyond its oracle: counts, what trains what, and its head's map."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenexit
from tests.heads.test_heads import complete
from tests.helpers import SMALL_HEADS, assert_close, enliven, random_image, tiny_config, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.heads import build_head
from tokenexit.methods import Cropr, Dense, DoViT, DToP, Reduced
from tokenexit.reducers import ALGM, MPM
from tokenexit.segmenter import ExitSegmenter

SIZES = [(16, 20), (9, 33), (4, 4)]


def batch():
    return [random_image(*size, i) for i, size in enumerate(SIZES)]


def run(model, images, method):
    with torch.no_grad():
        return model(images, method)


def test_cropr__of_rate_none_is_dense_bit_for_bit():
    model, images = tiny_segmenter("cropr"), batch()
    out, dense = run(model, images, Cropr(0.0)), run(model, images, Dense())
    assert all(torch.equal(a, b) for a, b in zip(out.grid_logits, dense.grid_logits))
    assert out.ledger.live == dense.ledger.live


def test_cropr__counts_follow_from_the_size_alone_and_all_are_there_in_the_last_block():
    model = tiny_segmenter("cropr", depth=6, exits=(1, 2, 3, 4))
    for seed in range(3):
        images = [random_image(20, 20, seed), random_image(4, 12, seed)]
        assert run(model, images, Cropr(0.2)).ledger.live == ((25, 20, 15, 10, 5, 25), (3, 2, 1, 0, 0, 3))
    assert run(model, images, Cropr(0.2, rejoin=2)).ledger.live[0] == (25, 20, 15, 10, 25, 25)
    published = ExitSegmenter(tiny_config(depth=24), 5, range(1, 23), SMALL_HEADS["cropr"], "linear").eval()
    live = run(published, [random_image(128, 128)], Cropr(40 / 1024)).ledger.live[0]
    assert live == (*(1024 - 40 * n for n in range(23)), 1024)


def test_cropr__goes_with_merging():
    model, images = tiny_segmenter("cropr", depth=5), batch()
    for by in (MPM((1,)), ALGM(0.5, 1, 3)):
        out, alone = (run(model, images, method) for method in (Reduced(Cropr(0.2), by), Cropr(0.2)))
        assert sum(out.ledger.live[0]) < sum(alone.ledger.live[0])
        assert out.ledger.ended[0] <= 20
        for i, image in enumerate(images):
            assert_close(run(model, [image], Reduced(Cropr(0.2), by)).grid_logits[0], out.grid_logits[i])


def test_cropr__losses_of_exits_teach_their_heads_and_not_the_backbone():
    model = tiny_segmenter("cropr").train()
    images, masks = torch.randn(2, 3, 12, 16), torch.randint(0, 5, (2, 12, 16))
    output = model(images, Cropr(0.3))
    auxiliary = sum(record.logits.square().sum() for record in output.exit_records[:-1])
    auxiliary.backward(retain_graph=True)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.exit_heads.parameters())
    tokenexit.segmentation_loss(output, masks, aux_weight=1.0).backward()
    assert model.backbone.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_cropr__the_rate_grows_over_the_first_half_of_the_training():
    method = Cropr(0.04)
    assert [round(method.at(progress).rate, 6) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.02, 0.04, 0.04]
    assert Cropr(0.04, rate_warmup=0.0).at(0.0).rate == 0.04


def test_cropr__a_curve_ends_where_nobody_is_left_at_the_last_exit():
    curve = Cropr().curve(4, 2)
    assert [method.rate for method in curve] == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("grid", [(3, 4), (2, 5)])
def test_cropr_head__map_is_its_definition(grid):
    head = build_head(SMALL_HEADS["cropr"], 32, 5)
    enliven(head)
    state = {name: value.double() for name, value in head.state_dict().items()}
    tokens = complete([grid])
    x = tokens.x.double()

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, (32,), state[f"{name}.weight"], state[f"{name}.bias"])

    rows = []
    for query in state["queries.weight"]:
        weights = [math.exp(float(query @ token) / 32**0.5) for token in x]
        seen = sum(w * token for w, token in zip(weights, x)) / sum(weights)
        hidden = torch.nn.functional.gelu(state["fc1.weight"] @ norm("mlp_norm", seen) + state["fc1.bias"])
        seen = seen + state["fc2.weight"] @ hidden + state["fc2.bias"]
        rows.append(state["classifier.weight"] @ norm("norm", seen) + state["classifier.bias"])
    expected = torch.stack(rows).T.view(1, 5, 3, 4)
    if grid != (3, 4):
        expected = torch.nn.functional.interpolate(expected, grid, mode="bilinear")
    with torch.no_grad():
        assert_close(head(tokens).logits, expected[0].flatten(1).T)
        assert_close(head.score(tokens.x), torch.stack([(state["queries.weight"] @ token).sum() for token in x]))


def test_cropr_head__counts_what_an_operator_counter_measures():
    head, tokens = build_head(SMALL_HEADS["cropr"], 32, 5), complete([(3, 4)])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        head(tokens)
    assert counter.get_total_flops() == 2 * head.ops(12, (3, 4)).macs
    with counter, torch.no_grad():
        head.score(tokens.x)
    assert counter.get_total_flops() == 2 * head.score_ops(12).macs


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m: Cropr(1.5), r"rate must be in \[0, 1\], got 1.5"),
        (lambda m: Cropr(rejoin=0), "rejoin must be at least 1, got 0"),
        (lambda m: Cropr(rate_warmup=2.0), r"rate_warmup must be in \[0, 1\]"),
        (lambda m: m.check(Cropr(rejoin=2)), "rejoin must be at most 1"),
        (lambda m: tiny_segmenter("fcn").check(Cropr()), "exit heads of kind cropr, and this model has others"),
        (lambda m: m.check(DToP()), "a head that needs the whole grid"),
        (lambda m: tiny_segmenter("fcn", SMALL_HEADS["cropr"]), "decode_head must be another than cropr"),
        (lambda m: build_head({"kind": "cropr", "rows": 0}, 32, 5), "rows of head 'cropr' must be"),
        (lambda m: Cropr().for_export(), "cannot be exported"),
    ],
)
def test_cropr__refuses_in_one_sentence(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong(tiny_segmenter("cropr"))


def test_dovit__may_run_on_such_heads_on_the_grid():
    model = tiny_segmenter("cropr")
    assert len(run(model, batch(), DoViT(0.5)).grid_logits) == 3
