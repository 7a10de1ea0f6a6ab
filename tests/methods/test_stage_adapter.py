"""DoViT with stage adapters: the decode head reads stopped tokens through that of their exit, and no more changes."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import (
    MARGIN,
    assert_answers,
    assert_close,
    choose_thresholds,
    enliven,
    fix_exit,
    gently_varied,
    random_image,
    tiny_segmenter,
)
from tests.methods.test_behaviours import counted_macs
from tests.oracles import methods as oracle
from tests.oracles.methods import Weights
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.exporting.export import export_model
from tokenexit.exporting.stages import staged_method
from tokenexit.heads import StageAdapter
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, FixedRatio, Reduced
from tokenexit.reducers import ALGM
from tokenexit.segmenter import ExitSegmenter

SOME = [(16, 20), (9, 33), (4, 4)]
DECODE_HEADS = ["linear", "mask_transformer", "setr_naive", "setr_pup", "atm"]


def batch(sizes=SOME, seed=1):
    return [random_image(*size, seed + i) for i, size in enumerate(sizes)]


def run(model, images, method, **options):
    with torch.no_grad():
        return model(images, method, **options)


def thresholds_of(model, images, shares=(0.4, 0.4), **options):
    weights = Weights.of(model)
    return choose_thresholds(lambda taus: oracle.dovit(weights, images, taus, **options), shares)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.grid_logits, b.grid_logits))


@pytest.mark.parametrize("decode_head", DECODE_HEADS)
@given(
    shares=st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.2, 0.7, 1.0])),
    final_norm=st.booleans(),
    options=st.sampled_from([{}, {"rejoin": 1}, {"batch_mode": "mean"}]),
    seed=st.integers(0, 20),
)
def test_stage_adapter__equals_its_oracle(decode_head, shares, final_norm, options, seed):
    model = tiny_segmenter("fcn", decode_head, seed=seed, final_norm=final_norm, stage_adapter=True)
    images = batch([(12, 16)] * 3 if "batch_mode" in options else SOME, seed)
    thresholds = thresholds_of(model, images, shares, **options)
    expected = oracle.dovit(Weights.of(model), images, thresholds, **options)
    assume(all(answer.gap > MARGIN for answer in expected))
    out = run(model, images, DoViT(thresholds, **options))
    assert_answers(out, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("kind", [DoViT, PAUMER])
def test_stage_adapter__untrained_changes_no_bit_and_trained_changes_what_stopped(kind, final_norm, autocast):
    model, images = tiny_segmenter("fcn", final_norm=final_norm), batch()
    options = {"score": kind().score, "blend_weight": kind().blend_weight}
    method, fresh = kind(thresholds_of(model, images, **options)), model.with_stage_adapters()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, out = run(model, images, method), run(fresh, images, method)
        stage = torch.cat([index.flatten() for index in plain.exit_index])
        assert {0, 1, 2} <= set(stage.tolist())
        assert same(plain, out)
    enliven(fresh.stage_adapters)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # another context, as one keeps weights it has cast
        changed = run(fresh, images, method)
    differs = [(a != b).any(dim=0).flatten() for a, b in zip(plain.grid_logits, changed.grid_logits)]
    assert torch.equal(torch.cat(differs), stage < 2)


@pytest.mark.parametrize(
    "method",
    [Dense(), DToP(0.5), FixedRatio((0.6, 0.3)), DoViT(1.0), DoViT(0.6, rejoin=1), PAUMER(0.3, rejoin=1)],
    ids=lambda method: method.label,
)
def test_stage_adapter__is_passed_by_where_no_stopped_token_is_read(method):
    model, images = tiny_segmenter("fcn", stage_adapter=True), batch()
    bare = model.with_exits(model.config.exits)
    bare._modules["stage_adapters"] = torch.nn.ModuleList()
    a, b = run(model, images, method), run(bare, images, method)
    assert same(a, b)
    assert a.ledger == b.ledger


@pytest.mark.parametrize("method", [DoViT(0.6), PAUMER(0.3), Reduced(DoViT(0.6), ALGM(0.9, 1, 3))])
def test_stage_adapter__a_batch_of_n_is_n_batches_of_one(method):
    model = tiny_segmenter("fcn", stage_adapter=True)
    images = [*batch(), gently_varied(16, 24)]
    together = run(model, images, method)
    for i, image in enumerate(images):
        alone = run(model, [image], method)
        assert torch.equal(together.exit_index[i], alone.exit_index[0])
        assert_close(together.grid_logits[i], alone.grid_logits[0])
        assert together.ledger.macs[i] == alone.ledger.macs[0]


def test_stage_adapter__cells_of_a_merged_token_have_the_adapter_of_its_exit():
    """The decode head is linear, so that a cell's logits are those of its own feature."""
    model, image = tiny_segmenter("linear", stage_adapter=True), gently_varied(16, 24)
    method = Reduced(DoViT(0.6, blend_weight=0.0), ALGM(0.5, 1, None))
    out = run(model, [image], method)
    group, logits = out.groups[0].flatten(), out.grid_logits[0].flatten(1).T
    index = out.exit_index[0].flatten()
    assert len(group.unique()) < len(group)
    assert (index < 2).any()
    for cell, cover in enumerate(group.tolist()):
        assert index[cell] == index[cover]
        assert torch.equal(logits[cell], logits[cover])
    bare, seen = tiny_segmenter("linear", final_norm=False), []
    bare.load_state_dict(model.state_dict(), strict=False)  # the same weights; its decode head sees what stopped
    for each in (model, bare):
        each.decode_head.register_forward_hook(lambda head, inputs, out: seen.append(inputs[0].x))
        run(each, [image], method)
    weights = Weights.of(model)
    for cell, exit in enumerate(index.tolist()):
        if exit < 2:
            assert_close(seen[0][cell], oracle.adapt(weights, exit, seen[1][cell].double()))


@pytest.mark.parametrize("decode_head", DECODE_HEADS)
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.6, 0.4), (1.0, 0.4), (1.0, 1.0)])
def test_stage_adapter__the_ledger_equals_what_an_operator_counter_measures(decode_head, thresholds):
    model = tiny_segmenter("fcn", decode_head, stage_adapter=True).requires_grad_(False)
    counted, ledger = counted_macs(model, random_image(15, 22), DoViT(thresholds))
    assert ledger.macs == (counted,)


def test_stage_adapter__costs_c_squared_for_each_stopped_token_of_its_image():
    model = tiny_segmenter("linear", exits=(1,), stage_adapter=True)
    fix_exit(model, 0, [0.9, 0.9, 0.9, 0.3, 0.9, 0.3])
    images = [random_image(8, 8), random_image(4, 8)]
    with_adapters = run(model, images, DoViT(0.5)).ledger
    model._modules["stage_adapters"] = torch.nn.ModuleList()
    without = run(model, images, DoViT(0.5)).ledger
    extra = [a.decode_head - b.decode_head for a, b in zip(with_adapters.parts, without.parts)]
    assert extra == [3 * 32 * 32, 1 * 32 * 32]
    assert with_adapters.dense_macs == without.dense_macs


# Saving, exits, training.


def test_stage_adapter__is_saved_and_older_models_have_none(tmp_path):
    model, images = tiny_segmenter("fcn", stage_adapter=True), batch()
    model.save_pretrained(tmp_path / "with")
    again = ExitSegmenter.from_pretrained(tmp_path / "with")
    assert again.config == model.config
    assert same(run(model, images, DoViT(0.6)), run(again, images, DoViT(0.6)))
    tiny_segmenter("fcn").save_pretrained(tmp_path / "without")
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert "stage_adapter" not in config["model"]
    assert len(ExitSegmenter.from_pretrained(tmp_path / "without").stage_adapters) == 0
    config["model"]["stage_adapter"] = "yes"
    (tmp_path / "without" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stage_adapter"):
        ExitSegmenter.from_pretrained(tmp_path / "without")


def test_stage_adapter__goes_with_its_exit_and_new_exits_have_new_ones():
    model, images = tiny_segmenter("fcn", exits=(1, 2, 3), stage_adapter=True), batch()
    some = model.with_exits((1, 3))
    assert list(some.stage_adapters) == [model.stage_adapters[0], model.stage_adapters[2]]
    assert run(some, images, DoViT((0.5, 0.4))).num_exits == 2
    none = model.with_exits(())
    assert len(none.stage_adapters) == 0
    assert same(run(none, images, DoViT(())), run(model, images, Dense()))
    other = model.with_exit_heads((2,), ["fcn"], [model.exit_heads[0]])
    (fresh,) = other.stage_adapters
    assert isinstance(fresh, StageAdapter)
    assert torch.equal(fresh.norm.weight, model.backbone.norm.weight)
    assert not fresh.linear.weight.any()
    assert fresh.norm.weight is not model.backbone.norm.weight


def test_stage_adapter__norms_begin_as_the_loaded_final_norm(tmp_path):
    from safetensors.torch import save_file

    source = tiny_segmenter("linear")
    save_file({k: v.clone() for k, v in source.backbone.state_dict().items()}, tmp_path / "w.safetensors")
    model = ExitSegmenter(
        source.config.backbone, 5, (1, 3), "linear", "linear", weights=tmp_path / "w.safetensors", stage_adapter=True
    )
    for adapter in model.stage_adapters:
        assert torch.equal(adapter.norm.weight, source.backbone.norm.weight)
        assert torch.equal(adapter.norm.bias, source.backbone.norm.bias)


def test_stage_adapter__learns_from_the_tokens_that_stopped_at_its_exit_alone():
    model, images = tiny_segmenter("linear").with_stage_adapters().train(), batch()
    cells = sum(run(model, images, Dense()).ledger.tokens)
    for n, sure in enumerate((0.9, 0.3)):
        fix_exit(model, n, [sure, 0.3, 0.3, 0.3] * (cells // 4 + 1))
    out = model(images, DoViT(0.5))
    index = torch.cat([stage.flatten() for stage in out.exit_index])
    assert set(index.tolist()) == {0, 2}
    out.exit_records[-1].logits.square().sum().backward()
    first, second = model.stage_adapters
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in first.parameters())
    assert all(value.grad is not None and not value.grad.any() for value in second.parameters()), "zero, and not none"


# Export.


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_stage_adapter__is_exported(format, tmp_path):
    model, images = tiny_segmenter("fcn", stage_adapter=True), batch([(16, 20), (9, 33)])
    thresholds = thresholds_of(model, images)
    assert {0, 1, 2} <= set(run(model, images, DoViT(thresholds)).exit_index[0].flatten().tolist())
    made = export_model(model, DoViT(thresholds), images, tmp_path, format)  # which compares, at more thresholds
    assert made.same_pixels == 1.0


def test_stage_adapter__stages_refuse_it_for_dovit_alone():
    model = tiny_segmenter("fcn", stage_adapter=True)
    with pytest.raises(ConfigError, match=r"stages hold no stage adapters, .*: export to onnx"):
        staged_method(model, DoViT(0.6))
    assert staged_method(model, DToP(0.6)) == DToP(0.6)
