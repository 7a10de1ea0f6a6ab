from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import (
    MARGIN,
    assert_answers,
    assert_close,
    call_view,
    choose_thresholds,
    fix_exit,
    random_image,
    tiny_segmenter,
)
from tests.oracles import methods as oracle
from tests.oracles.methods import Weights
from tokenexit.errors import ConfigError
from tokenexit.methods import DoViT

SOME = [(16, 20), (9, 33), (4, 4)]


def batch(sizes=SOME, seed=1):
    return [random_image(*size, seed + i) for i, size in enumerate(sizes)]


def run(model, images, method, **options):
    with torch.no_grad():
        return model(images, method, **options)


def at_first_exit(model, images, method):
    """Tokens in front of the first exit and behind it."""
    view = call_view(model)
    with torch.no_grad():
        tokens = model.backbone.embed(images)
        after, _ = method.at_exit(0, tokens, method.start(tokens, view), view)
    return tokens, after


# Against the oracle, with options in all mixtures.


@pytest.mark.parametrize(
    ("exit_head", "decode_head"),
    [
        ("fcn", "mask_transformer"),
        ("setr_naive", "setr_naive"),
        (["linear", "setr_pup"], "setr_pup"),
        ("fcn", "atm"),
        ({"kind": "setr_pup", "channels": 8, "steps": 2, "kernel": 1, "up": 4}, "linear"),
    ],
)
@given(
    shares=st.tuples(st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([0.2, 0.7])),
    options=st.fixed_dictionaries(
        {
            "min_improvement": st.sampled_from([None, 0.0, 0.05]),
            "blend_trigger": st.sampled_from([0.0, 0.1, 0.5]),
            "blend_weight": st.sampled_from([0.0, 0.5, 0.9]),
            "score": st.sampled_from(["probability", "margin", "entropy"]),
            "temperature": st.sampled_from([1.0, (0.6, 1.7)]),
            "boundary_guard": st.booleans(),
        }
    ),
    seed=st.integers(0, 20),
)
def test_dovit__equals_its_oracle_for_mixed_heads_and_options(exit_head, decode_head, shares, options, seed):
    model, images = tiny_segmenter(exit_head, decode_head, seed=seed), batch(seed=seed)
    weights = Weights.of(model)
    thresholds = choose_thresholds(lambda taus: oracle.dovit(weights, images, taus, **options), shares)
    expected = oracle.dovit(weights, images, thresholds, **options)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, images, DoViT(thresholds, **options))
    assert_answers(out, expected)


@pytest.mark.parametrize("head", ["fcn", "setr_naive", "mask_transformer"])
@given(
    shares=st.tuples(st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([0.2, 0.7, 1.0])),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    images=st.integers(1, 4),
    seed=st.integers(0, 20),
)
def test_mean_count__equals_its_oracle(head, shares, size, images, seed):
    model, pictures = tiny_segmenter(head, seed=seed), batch([size] * images, seed)
    weights = Weights.of(model)
    options = {"batch_mode": "mean"}
    thresholds = choose_thresholds(lambda taus: oracle.dovit(weights, pictures, taus, **options), shares)
    expected = oracle.dovit(weights, pictures, thresholds, **options)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, pictures, DoViT(thresholds, **options))
    assert len(set(out.ledger.live)) == 1, "one count for the whole batch"
    for i, answer in enumerate(expected):
        assert list(out.ledger.live[i]) == answer.live
        assert torch.equal(out.exit_index[i], answer.stage)
        assert_close(out.grid_logits[i], answer.grid)


def test_mean_count__is_the_floor_of_the_batch_mean_and_may_recall_tokens():
    model = tiny_segmenter("linear", exits=(1, 2))
    # Image 0 wants to keep 4, image 1 wants to keep 1: floor(2.5) = 2 each.
    fix_exit(model, 0, [0.3] * 4 + [0.3, 0.9, 0.9, 0.9])
    # Now nobody is stopped anew; the mask still holds 4 and 1, although 2 and 2 were computed.
    fix_exit(model, 1, [0.3] * 8)
    out = run(model, [random_image(8, 8, 1), random_image(8, 8, 2)], DoViT(0.5, batch_mode="mean"))
    assert out.ledger.live == ((4, 2, 2, 2), (4, 2, 2, 2))
    assert out.exit_index[0].flatten().tolist() == [2, 2, 0, 0]
    assert out.exit_index[1].flatten().tolist() == [2, 2, 0, 0]


def test_mean_count__of_one_image_is_exact():
    model, image = tiny_segmenter("fcn"), random_image(16, 16)
    exact, mean = (run(model, [image], DoViT(0.6, batch_mode=mode)) for mode in ("exact", "mean"))
    assert torch.equal(exact.grid_logits[0], mean.grid_logits[0])
    assert torch.equal(exact.exit_index[0], mean.exit_index[0])


# The blend.


@pytest.mark.parametrize(("stopped", "changes"), [(0, False), (1, False), (2, True), (9, True)])
def test_blend__changes_the_class_token_only_above_the_trigger_share_of_all_tokens(stopped, changes):
    """3 x 3 patches and the class token: one stopped token is exactly the trigger of 0.1, which is not above it."""
    model = tiny_segmenter("linear", exits=(1,))
    fix_exit(model, 0, [0.9] * stopped + [0.3] * (9 - stopped))
    tokens, after = at_first_exit(model, [random_image(12, 12)], DoViT(0.5))
    assert after.live == (9 - stopped,)
    if changes:
        assert_close(after.x[0], 0.5 * (tokens.x[0] + tokens.x[1 : 1 + stopped].mean(0)))
    else:
        assert torch.equal(after.x[0], tokens.x[0])
    assert torch.equal(after.x[1:], tokens.x[1 + stopped :]), "patches are untouched"


def test_blend__weight_mixes_and_registers_stay_as_they_are():
    model = tiny_segmenter("linear", exits=(1,), num_registers=2)
    fix_exit(model, 0, [0.9, 0.9, 0.3, 0.3])
    tokens, after = at_first_exit(model, [random_image(8, 8)], DoViT(0.5, blend_weight=0.25))
    assert_close(after.x[0], 0.75 * tokens.x[0] + 0.25 * tokens.x[3:5].mean(0))
    assert torch.equal(after.x[1:3], tokens.x[1:3])


def test_blend__is_of_each_image_alone():
    model = tiny_segmenter("linear", exits=(1,))
    fix_exit(model, 0, [0.9, 0.9, 0.3, 0.3, 0.3, 0.3])
    tokens, after = at_first_exit(model, [random_image(8, 8), random_image(4, 8)], DoViT(0.5))
    assert after.packing.lengths == (3, 3)
    assert torch.equal(after.x[3:], tokens.x[5:])
    assert not torch.equal(after.x[0], tokens.x[0])


def test_blend__takes_everything_stopped_so_far_again_at_the_next_exit():
    model = tiny_segmenter("linear", exits=(1, 2))
    fix_exit(model, 0, [0.9, 0.3, 0.3, 0.3])
    fix_exit(model, 1, [0.3, 0.9, 0.3, 0.3])
    view, method = call_view(model), DoViT(0.5)
    with torch.no_grad():
        tokens = model.backbone.embed([random_image(8, 8)])
        once, state = method.at_exit(0, tokens, method.start(tokens, view), view)
        twice, _ = method.at_exit(1, once, state, view)
    assert once.position.tolist() == [-1, 1, 2, 3]
    assert twice.position.tolist() == [-1, 2, 3]
    assert_close(twice.x[0], 0.5 * (once.x[0] + tokens.x[1:3].mean(0)))


def test_blend__counts_and_averages_exactly_in_half_precision():
    """Half precision cannot count beyond 256; 400 patches stop here."""
    model = tiny_segmenter("linear", exits=(1,)).to(torch.bfloat16)
    fix_exit(model, 0, [0.9] * 400)
    tokens, after = at_first_exit(model, [random_image(80, 80).bfloat16() + 3], DoViT(0.5))
    expected = 0.5 * (tokens.x[0].float() + tokens.x[1:].float().mean(0))
    assert_close(after.x[0], expected, 1e-2)


# What stopped tokens are.


def test_stopped_features__are_bit_identical_from_exit_to_finish():
    model, images = tiny_segmenter("fcn", final_norm=False), batch()
    weights, seen = Weights.of(model), []
    for head in (*model.exit_heads, model.decode_head):
        head.register_forward_hook(lambda head, inputs, out: seen.append(inputs[0].x))
    taus = choose_thresholds(lambda t: oracle.dovit(weights, images, t), (0.4, 0.4))
    out = run(model, images, DoViT(taus))
    stage = torch.cat([s.flatten() for s in out.exit_index])
    first, second, final = seen
    assert (stage == 0).any()
    assert (stage == 1).any()
    assert torch.equal(first[stage == 0], final[stage == 0])
    assert torch.equal(second[stage <= 1], final[stage <= 1])
    assert not torch.equal(second[stage == 2], final[stage == 2])


def test_decode_head__sees_the_whole_grid_in_order_with_the_final_norm_on_all_of_it():
    model, images, seen = tiny_segmenter("fcn"), batch(), []
    model.decode_head.register_forward_hook(lambda head, inputs, out: seen.append(inputs[0]))
    out = run(model, images, DoViT(0.6))
    (tokens,) = seen
    assert tokens.position.tolist() == list(range(sum(out.ledger.tokens)))
    norm = model.backbone.norm
    plain = (tokens.x - norm.bias) / norm.weight
    assert_close(plain.mean(1), torch.zeros(len(plain)), 1e-4)
    assert_close(plain.std(1, unbiased=False), torch.ones(len(plain)), 1e-3)


def test_exit_heads__score_the_whole_grid_and_live_tokens_only_if_asked():
    model, images = tiny_segmenter("linear"), [random_image(8, 8)]
    fix_exit(model, 0, [0.9, 0.9, 0.9, 0.3])
    fix_exit(model, 1, [0.3] * 4)
    grid, live = (run(model, images, DoViT(0.5, scoring=scoring)) for scoring in ("grid", "live"))
    assert [stage.head_tokens for stage in grid.exit_records] == [(4,), (4,), (4,)]
    assert [stage.head_tokens for stage in live.exit_records] == [(4,), (1,), (4,)]


def test_a_stopped_token__never_resumes_even_if_a_later_head_doubts_it():
    model = tiny_segmenter("linear")
    fix_exit(model, 0, [0.9, 0.3, 0.3, 0.3])
    fix_exit(model, 1, [0.3, 0.9, 0.3, 0.3])
    out = run(model, [random_image(8, 8)], DoViT(0.5))
    assert out.exit_index[0].flatten().tolist() == [0, 1, 2, 2]


# The second criterion.


def test_min_improvement__compares_with_the_previous_exit_and_not_with_nothing():
    model = tiny_segmenter("linear")
    fix_exit(model, 0, [0.3, 0.4, 0.35, 0.45])
    fix_exit(model, 1, [0.31, 0.5, 0.3, 0.48])
    out = run(model, [random_image(8, 8)], DoViT(0.9, min_improvement=0.05))
    assert out.exit_index[0].flatten().tolist() == [1, 2, 1, 1]


def test_min_improvement__is_over_the_last_exit_and_not_over_the_first():
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    fix_exit(model, 0, [0.3, 0.3, 0.3, 0.3])
    fix_exit(model, 1, [0.4, 0.5, 0.6, 0.7])
    fix_exit(model, 2, [0.5, 0.52, 0.7, 0.65])
    out = run(model, [random_image(8, 8)], DoViT(0.9, min_improvement=0.05))
    assert out.exit_index[0].flatten().tolist() == [3, 2, 3, 2]


def test_min_improvement__is_off_by_default():
    model = tiny_segmenter("linear")
    for n in range(2):
        fix_exit(model, n, [0.3] * 4)
    assert (run(model, [random_image(8, 8)], DoViT(0.9)).exit_index[0] == 2).all()


# Thresholds by class, and the boundary guard.


def test_dovit__a_patch_is_held_to_the_threshold_of_its_predicted_class():
    model = tiny_segmenter("linear", num_classes=3)
    for n in range(2):
        fix_exit(model, n, [0.8, 0.8, 0.8, 0.9], label=[0, 1, 2, 2])
    for scoring in ("grid", "live"):
        out = run(model, [random_image(8, 8)], DoViT(((0.7, 0.9, 1.0), 0.85), scoring=scoring))
        assert out.exit_index[0].flatten().tolist() == [0, 2, 2, 1]


@pytest.mark.parametrize("scoring", ["grid", "live"])
def test_boundary_guard__goes_by_classes_as_they_were_when_patches_were_last_computed(scoring):
    """The first two are stopped at once; that the second head would call them otherwise, stale as they are, is no
    boundary."""
    model = tiny_segmenter("linear")
    fix_exit(model, 0, [0.9, 0.9, 0.3, 0.9, 0.3], label=[1, 1, 1, 2, 2])
    fix_exit(model, 1, [0.9, 0.9, 0.9, 0.9, 0.9], label=[3, 3, 1, 2, 2])
    out = run(model, [random_image(4, 20)], DoViT(0.5, boundary_guard=True, scoring=scoring))
    assert out.exit_index[0].flatten().tolist() == [0, 0, 2, 2, 1]


def test_boundary_guard__holds_whom_the_second_criterion_would_stop_and_no_cap():
    model = tiny_segmenter("linear")
    for n in range(2):
        fix_exit(model, n, [0.6, 0.5, 0.4, 0.3], label=[0, 1, 1, 1])
    guarded = DoViT(0.9, min_improvement=0.05, boundary_guard=True)
    assert run(model, [random_image(4, 16)], guarded).exit_index[0].flatten().tolist() == [2, 2, 1, 1]
    capped = replace(guarded, cap=(0.5, 0.5))
    assert run(model, [random_image(4, 16)], capped).exit_index[0].flatten().tolist() == [0, 0, 1, 1]


# Training.


def trained(**options):
    model = tiny_segmenter("linear", final_norm=False).train()
    features = []
    model.backbone.blocks[0].register_forward_hook(lambda block, args, out: features.append(out))
    out = model(batch(), DoViT(options.pop("threshold", 0.9), **options))
    stage = torch.cat([s.flatten() for s in out.exit_index])
    assert (stage == 0).any()
    assert (stage == 2).any()
    return model, out, stage, features[0]


def patch_gradients(loss, features, out):
    """Gradient of `loss` in the features in front of the first exit, class tokens left out."""
    (grad,) = torch.autograd.grad(loss, features)
    return torch.cat([image[1:] for image in grad.split([1 + n for n in out.ledger.tokens])])


def reached(model, loss):
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(names, grads) if grad is not None and grad.abs().sum() > 0}


def test_training__decisions_carry_no_gradient():
    model, out, _, _ = trained()
    names = reached(model, out.exit_records[-1].logits.sum())
    assert not any(name.startswith("exit_heads") for name in names)
    assert any(name.startswith("backbone.blocks.3") for name in names)


def test_training__the_final_loss_flows_into_stopped_features_and_past_the_skipped_blocks():
    model, out, stage, _ = trained(blend_weight=0.0)
    names = reached(model, out.exit_records[-1].logits[stage == 0].sum())
    assert any(name.startswith("backbone.blocks.0.") for name in names)
    assert any(name.startswith("decode_head") for name in names)
    assert not any(
        name.startswith(("backbone.blocks.1.", "backbone.blocks.2.", "backbone.blocks.3.")) for name in names
    )


@pytest.mark.parametrize(("weight", "flows"), [(0.5, True), (0.0, False)])
def test_training__live_tokens_learn_from_stopped_ones_through_the_blend_alone(weight, flows):
    _, out, stage, features = trained(blend_weight=weight, blend_trigger=0.0)
    grad = patch_gradients(out.exit_records[-1].logits[stage == 2].sum(), features, out)
    assert bool((grad[stage == 0].abs().sum() > 0).item()) == flows


def test_training__later_exit_heads_are_trained_on_the_whole_grid_stale_features_included():
    _, out, stage, features = trained(blend_weight=0.0)
    grad = patch_gradients(out.exit_records[1].logits[stage == 0].sum(), features, out)
    assert grad[stage == 0].abs().sum() > 0


@pytest.mark.parametrize("detached", [False, True])
def test_training__detached_exit_heads_teach_the_backbone_nothing(detached):
    model = tiny_segmenter().train()
    out = model(batch(), DoViT(0.5, detach_aux=detached))
    sum(stage.logits.square().sum() for stage in out.exit_records[:-1]).backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    assert reached is not detached
    assert all(p.grad is not None for head in model.exit_heads for p in head.parameters())


@pytest.mark.parametrize("scoring", ["grid", "live"])
def test_training__stages_cover_the_whole_grid_whatever_the_scoring(scoring):
    _, out, _, _ = trained(scoring=scoring)
    cells = sum(out.ledger.tokens)
    assert [tuple(stage.logits.shape) for stage in out.exit_records] == [(cells, 5)] * 3


def test_warm_up__thresholds_fall_from_one_over_the_share_of_the_training():
    method = DoViT(0.9, threshold_warmup=0.875)
    assert method.at(0.0).threshold == 1.0
    assert method.at(0.4375).threshold == pytest.approx(0.95)
    assert method.at(0.875).threshold == pytest.approx(0.9)
    assert method.at(1.0).threshold == pytest.approx(0.9)
    assert replace(method, threshold=0.5).at(1.0).threshold == pytest.approx(0.5)


def test_defaults__are_the_published_ones():
    assert DoViT() == DoViT(
        threshold=0.985,
        min_improvement=None,
        blend_trigger=0.1,
        blend_weight=0.5,
        batch_mode="exact",
        scoring="grid",
        detach_aux=False,
        threshold_warmup=0.0,
        cap=None,
        score="probability",
        temperature=1.0,
        boundary_guard=False,
    )


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": -0.5}, r"threshold must be in \[0, 1\], got -0.5"),
        ({"blend_trigger": 1.5}, r"blend_trigger must be in \[0, 1\], got 1.5"),
        ({"blend_weight": -0.1}, r"blend_weight must be in \[0, 1\], got -0.1"),
        ({"threshold_warmup": 2.0}, r"threshold_warmup must be in \[0, 1\], got 2.0"),
        ({"score": "logit"}, r"score must be probability, margin or entropy, got 'logit'"),
        ({"temperature": (1.0, 0.0)}, r"temperature must be a number above 0, got 0.0"),
        ({"batch_mode": "median"}, r"batch_mode must be exact or mean, got 'median'"),
        ({"scoring": "all"}, r"scoring must be grid or live, got 'all'"),
        ({"scoring": "live", "batch_mode": "mean"}, r"batch_mode='mean' .*use scoring='grid'"),
    ],
)
def test_dovit__impossible_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ConfigError, match=words):
        DoViT(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": (0.9, (0.9, 0.8))}, r"threshold of exit 2 has 2 values for 5 classes: give one number, or one"),
        ({"temperature": (1.0,)}, r"temperature has 1 values for 2 exits"),
    ],
)
def test_dovit__options_for_another_model_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_segmenter("fcn")(batch(), DoViT(**options))


def test_dovit__atm_exit_heads_are_refused_and_an_atm_decode_head_is_not():
    with pytest.raises(ConfigError, match=r"this model has ATM exit heads: use DToP, or exit heads such as fcn"):
        tiny_segmenter("atm", "fcn")(batch(), DoViT())
    assert run(tiny_segmenter("fcn", "atm"), batch(), DoViT(0.6)).value == "scores"


def test_dovit__the_blend_without_a_class_token_is_refused():
    model = tiny_segmenter("fcn", class_token=False)
    with pytest.raises(ConfigError, match=r"build it with class_token=True, or set blend_weight=0"):
        model(batch(), DoViT())
    run(model, batch(), DoViT(0.6, blend_weight=0.0))


@pytest.mark.parametrize("head", ["setr_naive", "setr_pup", "mask_transformer"])
def test_dovit__live_scoring_with_heads_that_look_around_is_refused(head):
    with pytest.raises(ConfigError, match=r"scoring='live' needs exit heads that look at one token at a time"):
        tiny_segmenter(head)(batch(), DoViT(scoring="live"))


def test_mean_count__of_images_of_several_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"one size in a batch: resize them, or use batch_mode='exact'"):
        tiny_segmenter("fcn")(batch(), DoViT(batch_mode="mean"))


def test_mean_count__needs_one_size_and_not_only_one_number_of_patches():
    model = tiny_segmenter("fcn")
    out = run(model, [random_image(8, 16), random_image(16, 8)], DoViT(0.6, batch_mode="mean"))
    assert len(set(out.ledger.live)) == 1
