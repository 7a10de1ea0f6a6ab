"""Training with a reducer on: losses on all cells, gradients through means, stochastic depth as in whole blocks."""

import pytest
import torch

import tokenexit
from tests.helpers import gently_varied, random_image, tiny_segmenter
from tests.reducers.test_reduced import NEVER, REDUCING
from tests.training.tiny import silent, tiny_run, write_dataset
from tokenexit.errors import ConfigError
from tokenexit.methods import Cropr, Dense, DoViT, DToP, FixedRatio, Reduced, spec_of
from tokenexit.reducers import ALGM, G2TM, MPM, Supertokens, ToMe, ZeroTPrune, build_reducer
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.loop import train

METHODS = [Dense(), DToP(0.6), DoViT(0.9), FixedRatio((0.6, 0.3)), FixedRatio((0.6, 0.3), rejoin=1)]


def batch():
    return torch.stack([gently_varied(16, 20, 0), random_image(16, 20, 1)])


def trained(method, head="fcn", **options):
    """Loss and gradients of one step."""
    model = tiny_segmenter(head, depth=4, drop_path=0.5, **options).train()
    torch.manual_seed(3)
    output = model(batch(), method)
    masks = torch.randint(0, 5, (2, 16, 20), generator=torch.Generator().manual_seed(0))
    loss = tokenexit.segmentation_loss(output, masks)
    loss.backward()
    return output, loss, {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_training__of_a_rule_that_never_fires_is_that_without_bit_for_bit(method, name):
    _, alone, gradients = trained(method)
    _, beside, others = trained(Reduced(method, NEVER[name]))
    assert torch.equal(alone, beside)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, others[key], atol=1e-7), key


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("head", ["fcn", "mask_transformer", "atm", "cropr"])
def test_training__records_all_cells_and_reaches_every_parameter(head, name):
    methods = [Cropr(0.1)] if head == "cropr" else [Dense(), DToP(0.6), FixedRatio(0.5)]
    for method in methods:
        output, loss, gradients = trained(Reduced(method, REDUCING[name]), head)
        assert torch.isfinite(loss)
        assert sum(output.ledger.live[0]) < 4 * 20
        assert [tuple(record.logits.shape) for record in output.exit_records] == [(40, 5)] * 3
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_training__teaches_a_merged_token_with_the_mean_of_its_cells_answers():
    model = tiny_segmenter("linear", depth=4)
    with torch.no_grad():
        output = model(batch(), Reduced(DToP(0.6), MPM((0,))), with_records=True)
    groups = torch.cat([output.groups[0].flatten(), output.groups[1].flatten()])
    for record in output.exit_records:
        assert torch.equal(record.logits, record.logits[groups])


def test_training__runs_from_a_configuration_with_the_reducer_on(tmp_path):
    data, by = write_dataset(tmp_path / "data"), ToMe(0.1)
    methods = [spec_of(Reduced(DToP(0.36), by)), "dense"]
    train(tiny_run(data, tmp_path / "run", methods=methods, steps=4), say=silent, progress=False)
    model = ExitSegmenter.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert model([gently_varied(24, 32)], Reduced(DToP(0.36), by)).ledger.live[0][0] == 44


@pytest.mark.parametrize(
    ("by", "half", "option"),
    [
        (ALGM(0.8, 1, 3, warmup=0.5), 0.9, "threshold"),
        (G2TM(0.6, 1, warmup=0.5), 0.8, "threshold"),
        (Supertokens(0.5, warmup=0.5), 0.75, "threshold"),
        (ToMe(0.1, warmup=0.5), 0.05, "ratio"),
        (ZeroTPrune((0.6, 0.8), (1, 3), (3,), warmup=0.5), (0.8, 0.9), "keep"),
    ],
)
def test_warmup__goes_from_merging_nothing_to_the_value_in_a_line(by, half, option):
    assert getattr(by.at(0.25), option) == pytest.approx(half)
    assert by.at(0.5) == by.at(1.0) == by
    model = tiny_segmenter("fcn", depth=4)
    with torch.no_grad():
        start = model([random_image(16, 20)], Reduced(Dense(), by).at(0.0))
        end = model([gently_varied(16, 20)], Reduced(Dense(), by).at(1.0))
    if not isinstance(by, ALGM):  # whose second stage is relative
        assert start.ledger.live == ((20,) * 4,)
    assert end.ledger.live[0][-1] < 20
    exits = DToP(0.6, threshold_warmup=0.5)
    assert Reduced(exits, by).at(0.25) == Reduced(exits.at(0.25), by.at(0.25))
    assert build_reducer({"name": by.name, "warmup": 0.5}).warmup == 0.5


def test_warmup__is_a_share_of_the_training_of_reducers_that_merge_an_amount():
    with pytest.raises(ConfigError, match="warmup must be a number from 0 to 1, got 2"):
        ALGM(0.9, warmup=2)
    with pytest.raises(ConfigError, match="'mpm' has no option 'warmup'"):
        build_reducer({"name": "mpm", "warmup": 0.5})
    assert MPM().at(0.0) == MPM()


def test_training__merges_more_with_every_step_of_the_warmup(tmp_path, monkeypatch):
    seen, reduce = [], ToMe.reduce

    def spied(self, site, tokens, qkv):
        seen.append((site.after, self.ratio))
        return reduce(self, site, tokens, qkv)

    monkeypatch.setattr(ToMe, "reduce", spied)
    methods = [{"name": "reduced", "method": "dense", "by": {"name": "tome", "ratio": 0.2, "warmup": 0.75}}]
    config = tiny_run(write_dataset(tmp_path / "d"), tmp_path / "run", methods=methods, steps=4)
    train(config, say=silent, progress=False)
    assert [ratio for after, ratio in seen if after == 0] == pytest.approx([0.0, 0.2 / 3, 0.4 / 3, 0.2])
