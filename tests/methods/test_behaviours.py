"""What every method does, whatever it is: each test runs for all `CASES`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.helpers import MARGIN, assert_close, distance, random_image
from tests.methods.cases import ALL_HEADS, BY_HEAD, CASES, ONCE, WITH_EXITS, model_for
from tests.oracles.methods import Weights
from tokenexit.methods import METHODS, Dense
from tokenexit.methods.thresholded import NEVER
from tokenexit.segmenter import ExitSegmenter

MIXED = [(16, 20), (9, 33), (4, 4), (16, 20), (13, 8)]


def batch(sizes=MIXED, seed=1):
    return [random_image(*size, seed + i) for i, size in enumerate(sizes)]


def test_every_method_is_under_test():
    assert {case.build(0.5).name for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize(("case", "head"), BY_HEAD)
@settings(max_examples=20)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 17), st.integers(1, 21)), min_size=1, max_size=3),
    shares=st.tuples(st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from([0.0, 0.4, 0.8])),
    prefix=st.sampled_from([{}, {"num_registers": 2, "final_norm": False}]),
    seed=st.integers(0, 3),
)
def test_method__equals_its_oracle(case, head, sizes, shares, prefix, seed):
    model, images = model_for(head, seed=seed, **prefix), batch(sizes, seed)
    thresholds = case.thresholds(model, images, shares)
    answers = case.oracle(Weights.of(model), images, thresholds)
    assume(all(answer.gap > MARGIN for answer in answers))
    with torch.no_grad():
        out = model(images, case.build(thresholds))
    for i, answer in enumerate(answers):
        assert torch.equal(out.exit_index[i], answer.stage)
        assert list(out.ledger.live[i]) == answer.live
        if answer.grid is not None:
            assert_close(out.grid_logits[i], answer.grid)
        assert_close(out[i].logits[0], answer.full)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("case", "head"), WITH_EXITS)
def test_method__a_rule_that_never_fires_gives_the_dense_result_bit_for_bit(case, head, autocast):
    method = case.build(NEVER)
    if getattr(method, "min_improvement", None) is not None:  # a second rule: scores in [0, 1] never fall by more
        method = replace(method, min_improvement=-1.0)
    model, images = model_for(head), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, dense = model(images, method), model(images, Dense())
    for a, b in zip(out.grid_logits, dense.grid_logits):
        assert torch.equal(a.float(), b.float())
    assert out.value == dense.value
    assert out.ledger.live == dense.ledger.live
    assert all((stage == 2).all() for stage in out.exit_index)


@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__a_batch_of_n_is_n_batches_of_one(case, head):
    model, images = model_for(head), batch()
    method = case.build(case.thresholds(model, images))
    with torch.no_grad():
        together = model(images, method)
        alone = [model([image], method) for image in images]
    for one, single in zip(together, alone):
        assert torch.equal(one.exit_index[0], single.exit_index[0])
        assert one.ledger == single.ledger
        assert_close(one.grid_logits[0], single.grid_logits[0])
        assert torch.equal(one.labels, single.labels) or distance(one.logits, single.logits) < 1e-5


@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__in_bf16_a_batch_is_its_singles_where_decisions_agree(case, head):
    model, images = model_for(head), batch([(4, 8), (8, 8), (4, 4), (9, 5), (4, 12), (8, 4)])
    method = case.build(case.thresholds(model, images))
    agreed = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for one, image in zip(model(images, method), images):
            single = model([image], method)
            if torch.equal(one.exit_index[0], single.exit_index[0]):
                agreed += 1
                assert_close(one.grid_logits[0], single.grid_logits[0], 4e-2)  # five units in the last place
    assert agreed >= 3


@pytest.mark.parametrize(("case", "head"), WITH_EXITS)
def test_method__something_exits_at_each_exit_in_these_tests(case, head):
    model, images = model_for(head), batch()
    out = model(images, case.build(case.thresholds(model, images)))
    stages = torch.cat([stage.flatten() for stage in out.exit_index])
    assert set(stages.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__live_sets_only_shrink_and_match_the_exit_map(case, head):
    model, images = model_for(head), batch()
    out = model(images, case.build(case.thresholds(model, images)))
    bounds = (0, *model.config.exits, model.config.backbone.depth)
    for stage, live in zip(out.exit_index, out.ledger.live):
        counts = [int((stage >= n).sum()) for n in range(3)]
        if getattr(case.build(0.5), "rejoin", None):  # they all come back before the last block, behind the last exit
            counts[2] = stage.numel()
        assert list(live) == [counts[n] for n in range(3) for _ in range(bounds[n], bounds[n + 1])]


@pytest.mark.parametrize("threshold", [0.0, NEVER])
@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"num_registers": 1, "final_norm": False}])
@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__any_number_of_live_tokens_works(case, head, options, threshold):
    sizes = [(1, 1), (4, 4), (3, 17), (9, 5), (16, 16)]
    model, images = model_for(head, **options), batch(sizes)
    method = case.build(threshold)
    if options.get("class_token") is False and method.name == "dovit":
        method = type(method)(**(vars(method) | {"blend_weight": 0.0}))
    with torch.no_grad():
        out = model(images, method)
    assert [tuple(stages.shape) for stages in out.exit_index] == [(1, 1), (1, 1), (1, 5), (3, 2), (4, 4)]
    assert all(torch.isfinite(logits).all() for logits in out.grid_logits)
    assert [tuple(labels.shape) for labels in out.labels] == sizes


@pytest.mark.parametrize(("case", "head"), ALL_HEADS)
def test_method__a_model_without_exits_is_dense(case, head):
    model, images = model_for(head, exits=()), batch()
    with torch.no_grad():
        out, dense = model(images, case.build(0.5)), model(images, Dense())
    for a, b in zip(out.grid_logits, dense.grid_logits):
        assert torch.equal(a, b)


def counted_macs(model, image, method):
    """Multiply-adds that an operator counter sees, attention on CPU included."""

    def attention(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: attention})
    with counter, torch.no_grad():
        out = model([image], method)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2, out.ledger


@pytest.mark.parametrize("options", [{}, {"class_token": False, "mlp": "swiglu"}, {"num_registers": 2}])
@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__the_ledger_equals_what_an_operator_counter_measures(case, head, options):
    model = model_for(head, **options).requires_grad_(False)
    image = random_image(15, 22)
    method = case.build(0.5)
    if options.get("class_token") is False and method.name == "dovit":
        method = type(method)(**(vars(method) | {"blend_weight": 0.0}))
    else:
        method = case.build(case.thresholds(model, [image]))
    counted, ledger = counted_macs(model, image, method)
    assert ledger.macs == (counted,)


@pytest.mark.parametrize(("case", "head"), BY_HEAD)
def test_method__survives_saving_bit_for_bit(case, head, tmp_path):
    model, images = model_for(head, num_registers=1), batch()
    method = case.build(case.thresholds(model, images))
    model.save_pretrained(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = model(images, method), again(images, method)
    for x, y in zip(a.grid_logits, b.grid_logits):
        assert torch.equal(x, y)
    assert a.ledger == b.ledger


@pytest.mark.parametrize(("case", "head"), ALL_HEADS)
def test_method__recording_exits_changes_no_answer(case, head):
    model, images = model_for(head), batch()
    method = case.build(case.thresholds(model, images))
    with torch.no_grad():
        plain, recorded = model(images, method), model(images, method, with_records=True)
    cells = sum(stage.numel() for stage in plain.exit_index)
    assert all(stage.logits is None for stage in plain.exit_records[:-1])
    assert len(recorded.exit_records) == 3
    for stage in recorded.exit_records:
        assert stage.logits.shape == (cells * stage.scale**2, 5)
    for a, b in zip(plain.grid_logits, recorded.grid_logits):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("case", "head"), ALL_HEADS)
def test_method__training_records_every_exit_and_reaches_every_parameter(case, head):
    model, images = model_for(head).train(), batch()
    out = model(images, case.build(0.3))
    loss = sum(stage.logits.sum() for stage in out.exit_records)
    loss = loss + sum(stage.presence.sum() for stage in out.exit_records if stage.presence is not None)
    loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize(("case", "head"), ONCE)
def test_method__is_a_frozen_value(case, head):
    method = case.build(0.5)
    assert method == case.build(0.5)
    with pytest.raises(AttributeError):
        method.anything = 1


@pytest.mark.parametrize(("case", "head"), WITH_EXITS)
def test_method__thresholds_for_another_number_of_exits_are_refused(case, head):
    with pytest.raises(ValueError, match=r"threshold has 3 values for 2 exits"):
        model_for(head)(batch(), case.build((0.5, 0.5, 0.5)))
