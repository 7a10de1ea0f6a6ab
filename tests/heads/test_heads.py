"""What every head does, by name; a new head gets these by being listed in `HEADS`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import SMALL_HEADS, TOKEN_HEADS, assert_close, enliven
from tests.oracles.heads import run_head
from tokenexit.engine.recurring_rows import recurring
from tokenexit.engine.tokens import Packing, Tokens
from tokenexit.errors import ConfigError
from tokenexit.heads import HEADS, build_head, class_scores, normalize_head, presence_probability

DIM, CLASSES = 32, 5
CPU = torch.device("cpu")


def lively_head(name):
    head = build_head(SMALL_HEADS[name], DIM, CLASSES).eval()
    enliven(head)
    return head


def tokens_of(lengths, grids=None, seed=0):
    """Random patch tokens: complete grids, or that many of some larger grid."""
    generator = torch.Generator().manual_seed(seed)
    grids = grids or tuple((1, max(n, 1)) for n in lengths)
    starts = [sum(h * w for h, w in grids[:i]) for i in range(len(grids))]
    position = torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths)])
    x = torch.randn(sum(lengths), DIM, generator=generator)
    return Tokens(x, position, Packing.of(lengths, CPU), tuple(grids), 0)


def complete(grids, seed=0):
    return tokens_of([h * w for h, w in grids], grids, seed)


def parts(output, head):
    """Each image's logits and presence."""
    presence = output.presence if output.presence is not None else [None] * len(output.packing.lengths)
    return list(zip(output.logits.split(output.packing.lengths), presence))


def test_every_head_is_under_test():
    assert set(SMALL_HEADS) == set(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_head__gives_a_row_for_every_patch_times_its_scale(name):
    head, grids = lively_head(name), [(2, 3), (1, 1), (2, 3)]
    out = head(complete(grids))
    assert out.packing.lengths == tuple(h * w * head.scale**2 for h, w in grids)
    assert out.logits.shape == (sum(out.packing.lengths), CLASSES)  # or as many queries
    assert (out.presence is not None) == (head.kind in ("atm", "masks"))


@pytest.mark.parametrize("name", TOKEN_HEADS)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_token_head__equals_its_definition_on_any_number_of_tokens(name, lengths, seed):
    head, tokens = lively_head(name), tokens_of(lengths, seed=seed)
    state = {key: value.double() for key, value in head.state_dict().items()}
    with torch.no_grad():
        out = head(tokens)
    for (logits, presence), x in zip(parts(out, head), tokens.x.split(lengths)):
        if not len(x):
            assert logits.shape == (0, CLASSES)
            continue
        expected, expected_presence = run_head(state, SMALL_HEADS[name], x.double())
        assert_close(logits, expected)
        if presence is not None:
            assert_close(presence, expected_presence)


@pytest.mark.parametrize("name", HEADS)
def test_head__an_image_does_not_depend_on_its_companions(name):
    head, grids = lively_head(name), [(2, 3), (3, 1), (2, 3), (1, 1)]
    tokens = complete(grids)
    with torch.no_grad():
        together = parts(head(tokens), head)
        for i, x in enumerate(tokens.x.split(tokens.packing.lengths)):
            one = Tokens(x, torch.arange(len(x)), Packing.of([len(x)], CPU), (grids[i],), 0)
            ((logits, presence),) = parts(head(one), head)
            assert_close(together[i][0], logits)
            if presence is not None:
                assert_close(together[i][1], presence)


@pytest.mark.parametrize("name", [name for name in TOKEN_HEADS if HEADS[name].pointwise])
@given(live=st.integers(1, 40), more=st.integers(0, 9))
def test_pointwise_head__pads_its_rows_in_bf16_where_some_tokens_have_left(name, live, more):
    head, tokens, rows = lively_head(name), tokens_of([live], [(1, live + more)]), set()
    head.classifier.register_forward_pre_hook(lambda _, args: rows.add(len(args[0])))
    with torch.no_grad():
        exact = head(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            out = head(tokens)
    assert rows == {live, recurring(live) if more else live}
    assert out.packing == tokens.packing
    assert_close(out.logits.float(), exact.logits, 0.05)


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_token_head__the_order_of_tokens_does_not_matter(name):
    head, tokens = lively_head(name), tokens_of([9])
    order = torch.randperm(9)
    shuffled = Tokens(tokens.x[order], tokens.position[order], tokens.packing, tokens.grids, 0)
    with torch.no_grad():
        assert_close(head(shuffled).logits, head(tokens).logits[order])


@pytest.mark.parametrize("name", HEADS)
def test_head__keeps_nothing_from_call_to_call(name):
    head = lively_head(name)
    before = set(vars(head))
    with torch.no_grad():
        first = head(complete([(2, 2)], seed=1)).logits
        head(complete([(3, 4)], seed=2))
        assert torch.equal(head(complete([(2, 2)], seed=1)).logits, first)
    assert set(vars(head)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", HEADS)
def test_head__works_in_other_precisions(name, dtype):
    head, tokens = lively_head(name), complete([(2, 3), (1, 2)])
    with torch.no_grad():
        expected = head(tokens).logits
        out = head.to(dtype)(tokens.with_x(tokens.x.to(dtype))).logits
    assert_close(out, expected, 1e-1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("lengths", [[1], [0], [1, 0], [0, 0], [1, 1]])
@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_token_head__trains_with_one_token_or_none(name, lengths):
    head = lively_head(name).train()
    out = head(tokens_of(lengths))
    presence = 0 if out.presence is None else out.presence.sum()
    (out.logits.sum() + presence).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in head.buffers())


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_token_head__reaches_every_parameter_even_without_a_token(name):
    """A process whose images have no token left must take part in the reduction of all gradients."""
    head = lively_head(name).train()
    out = head(tokens_of([0, 0]))
    presence = 0 if out.presence is None else out.presence.sum()
    (out.logits.sum() + presence).backward()
    assert [key for key, value in head.named_parameters() if value.grad is None] == []


def test_batch_norm__one_token_is_normalised_with_the_running_statistics():
    head = lively_head("fcn")
    tokens = tokens_of([1])
    expected = head(tokens).logits
    assert_close(head.train()(tokens).logits, expected)


def test_batch_norm__statistics_are_those_of_the_tokens_given():
    head = lively_head("fcn").train()
    norm, tokens = head.norm, tokens_of([6, 0, 3])
    before = norm.running_mean.clone()
    head(tokens)
    seen = head.proj(tokens.x).mean(0)
    assert_close(norm.running_mean, 0.9 * before + 0.1 * seen)


# Work.


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_token_head__work_on_no_token_has_no_part_that_grows_with_tokens(name):
    head = lively_head(name)
    none, one, two = (head.ops(n, (4, 4)).macs for n in range(3))
    assert none <= one < two


# Scores.


def test_presence_probability__is_that_of_the_first_logit():
    assert_close(presence_probability(torch.tensor([[[2.0, 1.0]]])), torch.tensor([[torch.tensor(1.0).sigmoid()]]))


def test_class_scores__of_softmax_heads_sum_to_one_in_fp32():
    scores = class_scores("softmax", torch.randn(4, 3).bfloat16(), None, torch.zeros(4, dtype=torch.int64))
    assert scores.dtype == torch.float32
    assert_close(scores.sum(1), torch.ones(4))


def test_class_scores__of_atm_heads_are_gated_by_the_images_own_presence():
    logits = torch.zeros(2, 1)
    presence = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])
    scores = class_scores("atm", logits, presence, torch.tensor([0, 1]))
    assert_close(scores, torch.tensor([[0.5], [0.0]]))


# Options.


def test_normalize_head__a_name_is_a_head_without_options():
    assert normalize_head("fcn") == {"kind": "fcn"}


def test_normalize_head__unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"head 'unet' is unknown: choose one of linear, fcn, "):
        normalize_head("unet")


def test_normalize_head__unknown_option_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"head 'fcn' has no option 'layers': it takes channels"):
        normalize_head({"kind": "fcn", "layers": 2})
    with pytest.raises(ConfigError, match=r"head 'linear' has no option 'channels': it takes none"):
        normalize_head({"kind": "linear", "channels": 2})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "fcn", "channels": 0}, "channels of head .* must be a whole number from 1 to .*, got 0"),
        ({"kind": "fcn", "channels": -3}, "channels of head .* must be a whole number from 1 to .*, got -3"),
        ({"kind": "atm", "channels": -3}, "channels of head .* must be a whole number from 1 to .*, got -3"),
        ({"kind": "atm", "layers": 0}, "layers of head .* must be a whole number from 1 to .*, got 0"),
        ({"kind": "atm", "channels": 30, "num_heads": 4}, "num_heads=4"),
        ({"kind": "atm", "dropout": 1.5}, "dropout=1.5"),
        ({"kind": "mask_transformer", "layers": -1}, "layers of head .* must be a whole number from 1 to .*, got -1"),
        ({"kind": "mask_transformer", "channels": 30, "num_heads": 4}, "num_heads=4"),
        ({"kind": "mask_transformer", "drop_path": 1.0}, "drop_path=1.0"),
        ({"kind": "setr_pup", "kernel": 2}, "kernel=2"),
        ({"kind": "setr_pup", "steps": 8, "up": 16}, "steps=8 and up=16 gives 4294967296x maps"),
        ({"kind": "atm", "layers": 1_000_000}, "layers of head 'atm' must be a whole number from 1 to 32"),
        ({"kind": "fcn", "channels": 256.0}, "channels of head 'fcn' must be a whole number, got 256.0"),
        ({"kind": "fcn", "channels": 10**6}, "channels of head 'fcn' must be a whole number from 1 to 8192"),
        ({"kind": "atm", "dropout": "x"}, "dropout of head 'atm' must be a number, got 'x'"),
        ({"kind": ["fcn"]}, "is unknown"),
        (7, "a head must be a text or a mapping, got 7"),
        ({"kind": "setr_pup", "steps": 0}, "steps of head .* must be a whole number from 1 to .*, got 0"),
        ({"kind": "setr_pup", "up": 0}, "up of head .* must be a whole number from 1 to .*, got 0"),
    ],
)
def test_build_head__impossible_values_are_refused_by_name_and_value(spec, words):
    with pytest.raises(ConfigError, match=words):
        build_head(spec, DIM, CLASSES)


def test_mask_transformer__drops_the_mlp_of_its_last_layer_alone_for_each_image_by_itself():
    """As mmsegmentation's `segmenter_mask_head.py`: rates linear over the layers from 0, attention spared."""
    plain = lively_head("mask_transformer")
    head = build_head({**SMALL_HEADS["mask_transformer"], "drop_path": 0.5}, DIM, CLASSES)
    head.load_state_dict(plain.state_dict())
    tokens, last = tokens_of([5, 3]), len(plain.blocks) - 1
    assert last == 1

    def with_mlp_times(factor):
        scaled = {
            name: value * factor if name.startswith(f"blocks.{last}.mlp.fc2.") else value
            for name, value in plain.state_dict().items()
        }
        reference = build_head(SMALL_HEADS["mask_transformer"], DIM, CLASSES).eval()
        reference.load_state_dict(scaled)
        return [logits for logits, _ in parts(reference(tokens), reference)]

    choices = (with_mlp_times(0.0), with_mlp_times(2.0))  # what stays is divided by its probability
    seen = set()
    for _ in range(40):
        drawn = [logits for logits, _ in parts(head.train()(tokens), head)]
        fits = [[torch.allclose(x, choice[i], atol=1e-5) for choice in choices] for i, x in enumerate(drawn)]
        assert all(sum(fit) == 1 for fit in fits)
        seen.add(tuple(fit.index(True) for fit in fits))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}, "images are drawn independently"
    assert torch.equal(head.eval()(tokens).logits, plain(tokens).logits), "no effect in evaluation"


def test_mask_transformer__drops_nothing_unless_asked():
    assert [block.drop_path for block in lively_head("mask_transformer").blocks] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["atm", "mask_transformer"])
@pytest.mark.parametrize("dim", [64, 192, 200, 384])
def test_attention_heads__defaults_fit_any_width(name, dim):
    head = build_head(name, dim, CLASSES).eval()
    x = torch.randn(3, dim)
    head(Tokens(x, torch.arange(3), Packing.of([3], CPU), ((1, 3),), 0))
