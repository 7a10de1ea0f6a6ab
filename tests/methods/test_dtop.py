import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.calibration.test_dense_pass import calibration_set
from tests.helpers import MARGIN, assert_close, choose_thresholds, fix_exit, random_image, tiny_segmenter
from tests.oracles import methods as oracle
from tests.oracles.methods import Weights
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.dense_pass import DensePass, compose
from tokenexit.calibration.targets import Budget
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP
from tokenexit.methods.reduced import Reduced
from tokenexit.methods.reference import FrozenContext, PrescribedExits
from tokenexit.methods.thresholded import NEVER
from tokenexit.outputs.ledger import with_frozen_keys
from tokenexit.reducers.algm import ALGM
from tokenexit.reducers.coarse_first import CoarseFirst
from tokenexit.reducers.mpm import MPM
from tokenexit.reducers.supertokens import Supertokens
from tokenexit.reducers.tome import ToMe

SOME = [(16, 20), (9, 33), (4, 4)]


def batch(seed=1):
    return [random_image(*size, seed + i) for i, size in enumerate(SOME)]


def run(model, images, method, **options):
    with torch.no_grad():
        return model(images, method, **options)


def is_alone_as_in_a_batch(model, method):
    """Compare exits, maps and costs of each image by itself with those among others."""
    together = run(model, batch(), method)
    for i, image in enumerate(batch()):
        alone = run(model, [image], method)
        assert torch.equal(alone.exit_index[0], together.exit_index[i])
        assert_close(alone.grid_logits[0], together.grid_logits[i])
        assert alone.ledger.macs[0] == together.ledger.macs[i]


# Against the oracle, where heads of several kinds meet and k varies.


@pytest.mark.parametrize(
    ("exit_heads", "decode_head", "finish", "value"),
    [
        (["fcn", "linear"], "mask_transformer", "auto", "logits"),
        (["linear", "setr_naive"], "setr_naive", "auto", "logits"),
        (["atm", "atm"], "atm", "auto", "scores"),
        (["atm", "atm"], "atm", "presence_last", "scores"),
        (["atm", "atm"], "atm", "frozen", "scores"),
        (["atm", "fcn"], "atm", "auto", "scores"),
        (["fcn", "fcn"], "atm", "frozen", "scores"),
        (["atm", "atm"], "linear", "auto", "scores"),
    ],
)
@given(
    k=st.sampled_from([0, 1, 2, 5]),
    shares=st.tuples(st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.4, 0.8])),
    seed=st.integers(0, 20),
    class_token=st.booleans(),
)
def test_dtop__equals_its_oracle_for_mixed_heads_and_any_k(
    exit_heads, decode_head, finish, value, k, shares, seed, class_token
):
    model = tiny_segmenter(exit_heads, decode_head, seed=seed, class_token=class_token)
    weights, images = Weights.of(model), batch(seed)

    def answers(thresholds):
        return [oracle.dtop(weights, image, thresholds, k, finish) for image in images]

    thresholds = choose_thresholds(answers, shares)
    expected = answers(thresholds)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, images, DToP(thresholds, k, finish))
    assert out.value == value
    for i, answer in enumerate(expected):
        assert torch.equal(out.exit_index[i], answer.stage)
        assert_close(out.grid_logits[i], answer.grid)
        assert_close(out[i].logits[0], answer.full)


def equals_its_oracle(model, seed, k, shares, options, oracles_options):
    """Compare exits and maps of a batch with the oracle's, at thresholds at which such shares of tokens leave."""
    weights, images = Weights.of(model), batch(seed)

    def answers(thresholds):
        return [oracle.dtop(weights, image, thresholds, k, **oracles_options) for image in images]

    thresholds = choose_thresholds(answers, shares)
    expected = answers(thresholds)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, images, DToP(thresholds, k, **options))
    for i, answer in enumerate(expected):
        assert torch.equal(out.exit_index[i], answer.stage)
        assert_close(out.grid_logits[i], answer.grid)


@given(
    power=st.sampled_from([0.5, 1.0]),
    k=st.sampled_from([0, 1, 3]),
    shares=st.tuples(st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.4, 0.8])),
    seed=st.integers(0, 20),
    class_token=st.booleans(),
)
def test_context_weight__equals_its_oracle_which_counts_keys(power, k, shares, seed, class_token):
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=seed, class_token=class_token)
    equals_its_oracle(model, seed, k, shares, {"context_weight": power}, {"context_weight": power})


@pytest.mark.parametrize("exit_head", ["fcn", "atm"])
@given(
    window=st.sampled_from([2, 3, 7]),
    k=st.sampled_from([0, 1]),
    shares=st.tuples(st.sampled_from([0.2, 0.5]), st.sampled_from([0.3, 0.6])),
    seed=st.integers(0, 20),
    class_token=st.booleans(),
)
def test_keep_in_window__equals_its_oracle_in_which_the_surest_of_each_square_stays(
    exit_head, window, k, shares, seed, class_token
):
    model = tiny_segmenter(exit_head, exit_head, seed=seed, class_token=class_token)
    equals_its_oracle(model, seed, k, shares, {"keep_in_window": window}, {"window": window})


@given(
    distance=st.sampled_from([1, 2, 3]),
    k=st.sampled_from([0, 1, 3]),
    shares=st.tuples(st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.4, 0.8])),
    seed=st.integers(0, 20),
    options=st.sampled_from([{}, {"class_token": False}, {"rope": "half"}, {"rope": "half", "k_bias": False}]),
)
def test_frozen_context__equals_its_oracle_in_which_some_that_left_are_seen_on(distance, k, shares, seed, options):
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=seed, **options)
    equals_its_oracle(model, seed, k, shares, {"frozen_context": distance}, {"frozen": distance})


def test_frozen_context__of_everybody_is_what_the_reference_line_imposes():
    model, image = tiny_segmenter("fcn", seed=5), random_image(16, 24)
    out = run(model, [image], DToP(0.7, 0, frozen_context=1))
    imposed = run(model, [image], FrozenContext(exit_index=out.exit_index[0].flatten()))
    assert 0 < int((out.exit_index[0] < 2).sum()) < 24
    assert_close(imposed.grid_logits[0], out.grid_logits[0])
    alone = run(model, [image], PrescribedExits(exit_index=out.exit_index[0].flatten()))
    assert out.ledger.macs == with_frozen_keys(alone.ledger, model.backbone).macs


def test_frozen_context__an_image_does_not_depend_on_those_beside_it():
    model, method = tiny_segmenter("fcn", seed=5), DToP(0.7, 0, frozen_context=2)
    is_alone_as_in_a_batch(model, method)


def test_frozen_context__is_counted_for_what_keys_and_values_take():
    model, image = tiny_segmenter("fcn", seed=5), random_image(16, 24)
    out = run(model, [image], DToP((0.0, NEVER), 0, frozen_context=2))  # all 24 leave at once, 6 of them are seen on
    none = run(model, [image], DToP((0.0, NEVER), 0))
    prefix, blocks = model.config.backbone.num_prefix_tokens, model.config.backbone.depth - model.config.exits[0]
    assert out.ledger.macs[0] - none.ledger.macs[0] == blocks * model.backbone.frozen_ops(prefix, 6).macs


def test_frozen_context__leaves_no_bit_changed_where_nobody_leaves():
    model = tiny_segmenter("fcn", seed=5)
    dense, out = (run(model, batch(), method) for method in (Dense(), DToP(NEVER, frozen_context=2)))
    assert all(torch.equal(a, b) for a, b in zip(dense.grid_logits, out.grid_logits))


@pytest.mark.parametrize(
    "by", [Supertokens(0.0, (2,)), CoarseFirst(1), ALGM(0.5, local_block=1, global_block=2), ToMe(0.25)]
)
def test_frozen_context__goes_beside_reducers(by):
    model = tiny_segmenter("fcn", seed=5)
    method = Reduced(DToP((0.6, 0.7), 0, frozen_context=2), by)
    is_alone_as_in_a_batch(model, method)


def test_frozen_context__trains_those_that_are_seen_on():
    """The loss of those that went on reaches frozen tokens, and through them the blocks before their exit."""
    model = tiny_segmenter("fcn", seed=5).train()
    method = DToP((0.6, NEVER), 0, frozen_context=1, detach_canvas=True)
    out = model(batch(), method, with_records=True)
    out.exit_records[-1].logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.blocks.parameters() if p.grad is not None)


def test_keep_in_window__leaves_one_token_of_each_square_and_class_rules_beside_it():
    model, image = tiny_segmenter("fcn"), random_image(24, 40)
    out = run(model, [image], DToP((0.0, NEVER), keep_per_class=0, keep_in_window=4))
    stayed = out.exit_index[0] == 2
    assert stayed.shape == (6, 10)
    for row in range(0, 6, 4):
        for column in range(0, 10, 4):
            assert stayed[row : row + 4, column : column + 4].sum() == 1
    with_k = run(model, [image], DToP((0.0, NEVER), keep_per_class=2, keep_in_window=4)).exit_index[0] == 2
    by_k = run(model, [image], DToP((0.0, NEVER), keep_per_class=2)).exit_index[0] == 2
    assert torch.equal(with_k, stayed | by_k)


def test_keep_in_window__an_image_does_not_depend_on_those_beside_it():
    model, method = tiny_segmenter("fcn", seed=3), DToP(0.3, 0, keep_in_window=3)
    is_alone_as_in_a_batch(model, method)


def test_keep_in_window__is_what_calibration_expects():
    images, method = calibration_set(4), DToP((0.3, NEVER), keep_per_class=1, keep_in_window=2)
    expected = compose(DensePass.of(images, method), method, (0.7, 0.0))
    outputs = [output for _, _, output in images.forward(method, "running")]
    true = torch.cat([index.flatten() for output in outputs for index in output.windows.exit_index])
    assert torch.equal(expected, true)
    found = calibrate(images, method, Budget("budget", 0.9))
    assert found.method["keep_in_window"] == 2
    assert found.reached["share_of_dense"] <= 0.9


def test_context_weight__changes_answers_where_tokens_leave_and_no_bit_where_none_do():
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=3)
    plain, weighed = (run(model, batch(), DToP(0.3, 1, context_weight=power)) for power in (0.0, 1.0))
    assert any((index < 2).any() for index in plain.exit_index)
    assert all(torch.equal(a == 0, b == 0) for a, b in zip(plain.exit_index, weighed.exit_index)), "at the first exit"
    assert not torch.allclose(plain.grid_logits[0], weighed.grid_logits[0])
    never = [run(model, batch(), DToP(1.0, 1, context_weight=power)) for power in (0.0, 1.0)]
    assert all(torch.equal(a, b) for a, b in zip(never[0].grid_logits, never[1].grid_logits))


def test_context_weight__an_image_does_not_depend_on_those_beside_it():
    model, method = tiny_segmenter(["fcn", "linear"], "linear", seed=3), DToP(0.4, 2, context_weight=0.5)
    is_alone_as_in_a_batch(model, method)


def test_context_weight__counts_a_merged_token_for_its_cells():
    """Two alike patches merge before the first exit: who is left inherits from them as from two."""
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=3)
    method = Reduced(DToP(0.4, 2, context_weight=1.0), MPM((1,)))
    out = run(model, batch(), method)
    assert all(torch.isfinite(logits).all() for logits in out.grid_logits)
    for i, image in enumerate(batch()):
        assert_close(run(model, [image], method).grid_logits[0], out.grid_logits[i])


def test_context_weight__of_merged_tokens_does_not_depend_on_who_leaves_in_other_images():
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=3)
    recorded = [run(model, [image], Reduced(Dense(), MPM((0,))), with_records=True) for image in batch()[:2]]
    low, high = sorted(float(one.exit_records[0].logits.softmax(1).max()) for one in recorded)
    assert high - low > MARGIN
    method = Reduced(DToP(((low + high) / 2, NEVER), 0, context_weight=1.0), MPM((0,)))
    together = run(model, batch()[:2], method)
    assert sorted(int((index == 0).any()) for index in together.exit_index) == [0, 1]
    for i, image in enumerate(batch()[:2]):
        assert_close(run(model, [image], method).grid_logits[0], together.grid_logits[i])


def test_context_weight__trains_with_weights_that_carry_no_gradient():
    model = tiny_segmenter(["fcn", "linear"], "linear", seed=3).train()
    out = model(batch(), DToP(0.4, 2, context_weight=0.5))
    sum(logits.sum() for logits in out.grid_logits).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# The rule.


@given(
    rows=st.lists(st.tuples(st.sampled_from([0.3, 0.6, 0.7, 0.8]), st.integers(0, 2)), min_size=9, max_size=9),
    k=st.integers(0, 4),
)
def test_dtop__each_class_keeps_its_k_most_confident_candidates_ties_by_lowest_position(rows, k):
    """Images of 6 and 3 tokens with many exact ties; 0.3 is below the threshold and always stays."""
    model = tiny_segmenter("linear", exits=(2,))
    confidence, label = [r[0] for r in rows], [r[1] for r in rows]
    fix_exit(model, 0, confidence, label)
    out = run(model, [random_image(8, 12), random_image(4, 12)], DToP(0.5, keep_per_class=k))
    stage = torch.cat([s.flatten() for s in out.exit_index]).tolist()
    for start, stop in ((0, 6), (6, 9)):
        for wanted in range(3):
            members = [i for i in range(start, stop) if confidence[i] > 0.5 and label[i] == wanted]
            members.sort(key=lambda i: (-confidence[i], i))
            assert {i for i in members if stage[i] == 1} == set(members[:k])
        assert all(stage[i] == 1 for i in range(start, stop) if confidence[i] < 0.5)


def test_dtop__a_token_exactly_at_the_threshold_stays():
    model = tiny_segmenter("linear", exits=(2,), num_classes=2)
    torch.nn.init.zeros_(model.exit_heads[0].classifier.weight)
    torch.nn.init.zeros_(model.exit_heads[0].classifier.bias)  # both classes at exactly 0.5
    out = run(model, [random_image(8, 8)], DToP(0.5, keep_per_class=0))
    assert (out.exit_index[0] == 1).all()
    out = run(model, [random_image(8, 8)], DToP(0.49, keep_per_class=0))
    assert (out.exit_index[0] == 0).all()


def test_dtop__representatives_compete_again_at_the_next_exit():
    model = tiny_segmenter("linear", exits=(1, 2))
    fix_exit(model, 0, [0.9, 0.8, 0.7, 0.6])
    fix_exit(model, 1, [0.6, 0.9, 0.7, 0.8])
    out = run(model, [random_image(8, 8)], DToP(0.5, keep_per_class=2))
    assert out.exit_index[0].flatten().tolist() == [2, 2, 0, 0]
    out = run(model, [random_image(8, 8)], DToP((0.5, 0.55), keep_per_class=1))
    assert out.exit_index[0].flatten().tolist() == [2, 0, 0, 0]


def test_dtop__k_counts_within_an_image_not_the_batch():
    model = tiny_segmenter("linear", exits=(2,))
    fix_exit(model, 0, [0.9] * 8)
    out = run(model, [random_image(8, 8), random_image(8, 8)], DToP(0.5, keep_per_class=3))
    assert [s.flatten().tolist() for s in out.exit_index] == [[1, 1, 1, 0]] * 2


def test_dtop__each_exit_has_its_own_threshold():
    model = tiny_segmenter("linear", exits=(1, 2))
    for n in range(2):
        fix_exit(model, n, [0.6, 0.7, 0.8, 0.9])
    out = run(model, [random_image(8, 8)], DToP((0.85, 0.65), keep_per_class=0))
    assert out.exit_index[0].flatten().tolist() == [2, 1, 1, 0]


def test_dtop__a_token_is_held_to_the_threshold_of_its_predicted_class():
    model = tiny_segmenter("linear", exits=(1, 2), num_classes=3)
    for n in range(2):
        fix_exit(model, n, [0.8, 0.8, 0.8, 0.9], label=[0, 1, 2, 2])
    out = run(model, [random_image(8, 8)], DToP(((0.7, 0.9, 1.0), 0.85), keep_per_class=0))
    assert out.exit_index[0].flatten().tolist() == [0, 2, 2, 1]


@pytest.mark.parametrize(
    ("score", "leaves"), [("probability", [0, 0, 1, 1]), ("margin", [0, 1, 1, 1]), ("entropy", [0, 1, 1, 1])]
)
def test_dtop__the_score_is_what_meets_the_threshold(score, leaves):
    """Of five classes: margins are about 0.94, 0.75, 0.5, 0.25, entropies' scores about 0.83, 0.52, 0.24, 0.06."""
    model = tiny_segmenter("linear", exits=(2,))
    fix_exit(model, 0, [0.95, 0.8, 0.6, 0.4])
    threshold = {"probability": 0.75, "margin": 0.8, "entropy": 0.6}[score]
    out = run(model, [random_image(8, 8)], DToP(threshold, 0, score=score))
    assert out.exit_index[0].flatten().tolist() == leaves


def test_dtop__temperature_is_of_each_exit_and_moves_scores_but_nothing_on_the_canvas():
    model, images = tiny_segmenter("fcn"), batch()
    plain = run(model, images, DToP(0.9, 0), with_records=True)
    hot = run(model, images, DToP(0.9, 0, temperature=(50.0, 1.0)), with_records=True)
    stage = torch.cat([s.flatten() for s in hot.exit_index])
    assert set(stage.tolist()) == {1, 2}, "nobody is sure at 50"
    assert set(torch.cat([s.flatten() for s in plain.exit_index]).tolist()) == {0, 1, 2}
    assert torch.equal(hot.exit_records[0].logits, plain.exit_records[0].logits)
    assert torch.equal(hot.exit_records[2].logits[stage == 1], hot.exit_records[1].logits[stage == 1])


# The boundary guard.


def test_boundary_guard__whoever_is_beside_another_class_stays():
    """Two images of one row; the border between them is none."""
    model = tiny_segmenter("linear", exits=(2,))
    fix_exit(model, 0, [0.9] * 8, label=[0, 0, 1, 1, 1, 2, 2, 2])
    out = run(model, [random_image(4, 20), random_image(4, 12)], DToP(0.5, 0, boundary_guard=True))
    assert [s.flatten().tolist() for s in out.exit_index] == [[0, 1, 1, 0, 0], [0, 0, 0]]


def test_boundary_guard__goes_by_what_live_tokens_say_now_and_exited_ones_said_last():
    model = tiny_segmenter("linear", exits=(1, 2))
    fix_exit(model, 0, [0.9, 0.9, 0.3, 0.9, 0.3], label=[0, 0, 0, 1, 1])
    # Of the first two, who have left, what the second exit would say is not asked.
    fix_exit(model, 1, [0.9, 0.9, 0.9, 0.9, 0.9], label=[3, 3, 1, 1, 1])
    out = run(model, [random_image(4, 20)], DToP(0.5, 0, boundary_guard=True))
    assert out.exit_index[0].flatten().tolist() == [0, 0, 2, 1, 1]


def test_boundary_guard__whom_it_holds_is_no_candidate_for_retention():
    model = tiny_segmenter("linear", exits=(2,))
    fix_exit(model, 0, [0.7, 0.6, 0.9, 0.8], label=[0, 0, 0, 1])
    out = run(model, [random_image(4, 16)], DToP(0.5, 1, boundary_guard=True))
    assert out.exit_index[0].flatten().tolist() == [1, 0, 1, 1]


def test_boundary_guard__a_cap_goes_before_it():
    model = tiny_segmenter("linear", exits=(2,))
    fix_exit(model, 0, [0.9, 0.8, 0.7, 0.6], label=[0, 1, 0, 1])
    out = run(model, [random_image(4, 16)], DToP(0.5, 0, boundary_guard=True, cap=(0.5,)))
    assert out.exit_index[0].flatten().tolist() == [0, 0, 1, 1]


def test_dtop__prefix_tokens_are_never_scored_and_never_leave():
    model = tiny_segmenter("linear", num_registers=2)
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda block, inputs, out: seen.append(inputs[1].lengths))
    out = run(model, [random_image(8, 8)], DToP(0.0, keep_per_class=0))
    assert seen == [(7,), (3,), (3,), (3,)]
    assert [stage.head_tokens for stage in out.exit_records] == [(4,), (0,), (0,)]


# Canvas and finish.


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_dtop__a_canvas_cell_never_changes_after_its_token_left(head):
    model, images = tiny_segmenter(head), batch()
    weights = Weights.of(model)
    taus = choose_thresholds(lambda t: [oracle.dtop(weights, i, t, 1) for i in images], (0.5, 0.5))
    out = run(model, images, DToP(taus, keep_per_class=1), with_records=True)
    stage = torch.cat([s.flatten() for s in out.exit_index])
    maps = [s.logits for s in out.exit_records]
    assert (stage == 0).any()
    assert (stage == 1).any()
    assert torch.equal(maps[1][stage == 0], maps[0][stage == 0])
    assert torch.equal(maps[2][stage <= 1], maps[1][stage <= 1])
    assert not torch.equal(maps[2][stage == 2], maps[1][stage == 2])


def test_dtop__softmax_results_are_the_canvas_of_the_last_stage():
    model, images = tiny_segmenter("fcn"), batch()
    out = run(model, images, DToP(0.6, keep_per_class=1), with_records=True)
    final = torch.cat([m.flatten(1).T for m in out.grid_logits])
    assert torch.equal(final, out.exit_records[-1].logits)


def test_dtop__presence_last_weighs_early_exits_with_the_last_presence_and_frozen_does_not():
    model, images = tiny_segmenter("atm"), batch()
    weights = Weights.of(model)
    taus = choose_thresholds(lambda t: [oracle.dtop(weights, i, t, 1) for i in images], (0.5, 0.5))
    last = run(model, images, DToP(taus, 1, "presence_last"), with_records=True)
    frozen = run(model, images, DToP(taus, 1, "frozen"), with_records=True)
    assert all(torch.equal(a, b) for a, b in zip(last.exit_index, frozen.exit_index))
    for i in range(len(images)):
        stage = last.exit_index[i]
        assert_close(last.grid_logits[i][:, stage == 2], frozen.grid_logits[i][:, stage == 2])
        if (stage < 2).any():
            assert not torch.allclose(last.grid_logits[i][:, stage < 2], frozen.grid_logits[i][:, stage < 2])


def test_dtop__with_no_token_left_presence_is_that_of_the_last_head_that_saw_one():
    model, images = tiny_segmenter("atm"), [random_image(8, 8, 3), random_image(16, 16, 4)]
    out = run(model, images, DToP((0.0, 1.0), keep_per_class=0), with_records=True)
    assert out.ledger.live == ((4, 0, 0, 0), (16, 0, 0, 0))
    first = out.exit_records[0]
    for later in out.exit_records[1:]:
        assert torch.equal(later.presence, first.presence)
    expected = first.presence[0].softmax(-1)[:, 0] * first.logits[:4].sigmoid()
    assert_close(out.grid_logits[0], expected.T.reshape(5, 2, 2))


def test_dtop__k_representatives_keep_every_exited_class_alive():
    model, images = tiny_segmenter("fcn"), batch()
    out = run(model, images, DToP(0.0, keep_per_class=2), with_records=True)
    for image in range(len(images)):
        cells = slice(sum(out.ledger.tokens[:image]), sum(out.ledger.tokens[: image + 1]))
        labels = out.exit_records[0].logits[cells].argmax(1)
        expected = sum(min(2, int((labels == c).sum())) for c in range(5))
        assert out.ledger.live[image][1] == expected


# Training.


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def trained(detach, head="fcn", threshold=0.4):
    model = tiny_segmenter(head, final_norm=False).train()
    out = model(batch(), DToP(threshold, keep_per_class=1, detach_canvas=detach))
    stage = torch.cat([s.flatten() for s in out.exit_index])
    assert (stage == 0).any()
    assert (stage == 2).any()
    return model, out, stage


@pytest.mark.parametrize("head", ["fcn", "linear", "mask_transformer", "atm"])
def test_training__the_final_loss_reaches_the_exit_head_of_whoever_left_there(head):
    model, out, _ = trained(detach=False, head=head, threshold=0.25)
    assert any(name.startswith("exit_heads.0") for name in gradients(model, out.exit_records[-1].logits.sum()))


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_training__a_detached_canvas_keeps_the_final_loss_from_earlier_heads(head):
    model, out, _ = trained(detach=True, head=head, threshold=0.25)
    reached = gradients(model, out.exit_records[-1].logits.sum())
    assert any(name.startswith("decode_head") for name in reached)
    assert not any(name.startswith("exit_heads") for name in reached)


def test_training__a_detached_canvas_still_trains_each_head_on_its_own_stage():
    model, out, _ = trained(detach=True)
    assert any(name.startswith("exit_heads.0") for name in gradients(model, out.exit_records[0].logits.sum()))


def test_training__decisions_carry_no_gradient():
    model, out, stage = trained(detach=False)
    stayed = out.exit_records[-1].logits[stage == 2]
    reached = gradients(model, stayed.sum())
    assert not any(name.startswith("exit_heads") for name in reached)
    assert any(name.startswith("backbone.blocks.0") for name in reached)


def test_training__blocks_behind_its_exit_learn_nothing_from_an_exited_token():
    model, out, stage = trained(detach=False)
    reached = gradients(model, out.exit_records[-1].logits[stage == 0].sum())
    assert any(name.startswith("backbone.blocks.0.") for name in reached)
    assert not any(name.startswith(("backbone.blocks.1.", "backbone.blocks.3.", "decode_head")) for name in reached)


def test_training__every_stage_is_a_full_canvas():
    _, out, _ = trained(detach=False)
    cells = sum(out.ledger.tokens)
    assert [tuple(stage.logits.shape) for stage in out.exit_records] == [(cells, 5)] * 3


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_training__reaches_every_parameter_when_all_tokens_leave(head):
    """A process whose images have no token left must take part in the reduction of all gradients."""
    model = tiny_segmenter(head, class_token=False).train()
    out = model(batch(), DToP(0.0, keep_per_class=0))
    loss = sum(stage.logits.sum() for stage in out.exit_records)
    loss = loss + sum(stage.presence.sum() for stage in out.exit_records if stage.presence is not None)
    loss.backward()
    missing = {name for name, value in model.named_parameters() if value.grad is None}
    assert {name for name in missing if not name.endswith("presence.bias")} == set()


def test_warm_up__thresholds_fall_from_one_over_the_share_of_the_training():
    method = DToP((0.8, 0.9), threshold_warmup=0.5)
    assert method.at(0.0).threshold == (1.0, 1.0)
    assert method.at(0.25).threshold == pytest.approx((0.9, 0.95))
    assert method.at(0.5).threshold == pytest.approx((0.8, 0.9))
    assert method.at(1.0).threshold == pytest.approx((0.8, 0.9))
    assert method.threshold == (0.8, 0.9), "the method itself is untouched"


def test_warm_up__of_thresholds_by_class_is_for_each():
    method = DToP((0.8, (0.6, 1.0)), threshold_warmup=0.5)
    assert method.at(0.0).threshold == (1.0, (1.0, 1.0))
    assert method.at(0.25).threshold[1] == pytest.approx((0.8, 1.0))
    assert hash(method.at(0.25)) != hash(method)


def test_warm_up__there_is_none_as_published():
    assert DToP(0.9).at(0.0) == DToP(0.9)


def test_defaults__are_the_published_ones():
    assert DToP() == DToP(
        threshold=0.95,
        keep_per_class=5,
        finish="auto",
        detach_canvas=False,
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
        ({"keep_per_class": -1}, r"keep_per_class must be at least 0, got -1: use 0"),
        ({"frozen_context": -1}, r"frozen_context must be at least 0, got -1"),
        ({"frozen_context": 2, "context_weight": 0.5}, r"frozen_context and context_weight do not go together"),
        ({"keep_in_window": 1}, r"keep_in_window must be 0 or at least 2 patches, got 1"),
        ({"keep_in_window": -4}, r"keep_in_window must be 0 or at least 2 patches, got -4"),
        ({"context_weight": 1.5}, r"context_weight must be in .*, got 1.5"),
        ({"finish": "early"}, r"finish must be auto, presence_last, frozen or masks, got 'early'"),
        ({"threshold": 1.2}, r"threshold must be in \[0, 1\], got 1.2"),
        ({"threshold": "high"}, r"threshold must be a number, got 'high'"),
        ({"threshold": None}, r"threshold must be a number, got None"),
        ({"threshold_warmup": -1.0}, r"threshold_warmup must be in .*, got -1.0"),
        ({"threshold_warmup": 2.0}, r"threshold_warmup must be in .*, got 2.0"),
        ({"score": "logit"}, r"score must be probability, margin or entropy, got 'logit'"),
        ({"temperature": 0.0}, r"temperature must be a number above 0, got 0.0"),
        ({"temperature": (1.0, -2.0)}, r"temperature must be a number above 0, got -2.0"),
        ({"temperature": (1.0, (1.0, 2.0))}, r"temperature must be a number above 0, got \(1.0, 2.0\)"),
        ({"temperature": "hot"}, r"temperature must be a number, got 'hot'"),
    ],
)
def test_dtop__impossible_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ConfigError, match=words):
        DToP(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": (0.9, (0.9, 0.8))}, r"threshold of exit 2 has 2 values for 5 classes: give one number, or one"),
        ({"threshold": ((0.9,) * 5,)}, r"threshold has 1 values for 2 exits"),
        ({"temperature": (1.0, 2.0, 3.0)}, r"temperature has 3 values for 2 exits"),
    ],
)
def test_dtop__options_for_another_model_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_segmenter("fcn")(batch(), DToP(**options))


@pytest.mark.parametrize("options", [{"score": "entropy"}, {"temperature": 2.0}, {"temperature": (1.0, 2.0)}])
def test_dtop__what_needs_a_distribution_is_refused_for_atm_exit_heads(options):
    with pytest.raises(ConfigError, match=r"scores of ATM heads are no distribution"):
        tiny_segmenter("atm")(batch(), DToP(**options))
    run(tiny_segmenter(["atm", "fcn"], "atm"), batch(), DToP(temperature=(1.0, 2.0)))


@pytest.mark.parametrize(("exit_head", "decode_head"), [("setr_pup", "fcn"), ("fcn", "setr_pup")])
def test_dtop__heads_that_need_the_grid_are_refused_with_the_alternatives(exit_head, decode_head):
    with pytest.raises(ConfigError, match=r"needs the whole grid: use DoViT, or token heads"):
        tiny_segmenter(exit_head, decode_head)(batch(), DToP())


@pytest.mark.parametrize(("exit_head", "decode_head"), [("fcn", "fcn"), ("atm", "fcn"), (["atm", "fcn"], "atm")])
def test_dtop__presence_last_without_atm_heads_throughout_is_refused(exit_head, decode_head):
    with pytest.raises(ConfigError, match=r"needs ATM heads at every exit and at the end: use finish='frozen'"):
        tiny_segmenter(exit_head, decode_head)(batch(), DToP(finish="presence_last"))


def test_dtop__records_of_mixed_kinds_are_refused():
    model = tiny_segmenter("atm", "fcn")
    with pytest.raises(ConfigError, match=r"mixes ATM and softmax heads, as training does: use one kind"):
        model(batch(), DToP(), with_records=True)
    with pytest.raises(ConfigError, match=r"mixes ATM and softmax heads"):
        model.train()(batch(), DToP())


def test_dtop__exit_heads_are_counted_although_dense_does_not_run_them():
    model, images = tiny_segmenter("fcn"), batch()
    dense, never = run(model, images, Dense()).ledger, run(model, images, DToP(1.0)).ledger
    for a, b in zip(dense.parts, never.parts):
        assert a.exit_heads == 0
        assert b.exit_heads > 0
        assert (a.embed, a.blocks, a.decode_head) == (b.embed, b.blocks, b.decode_head)
    assert dense.share_of_dense == (1.0, 1.0, 1.0)
