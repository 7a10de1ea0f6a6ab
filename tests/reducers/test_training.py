"""Training with a reducer on: losses on all cells, gradients through means, stochastic depth as in whole blocks."""

import pytest
import torch

import tokenexit
from tests.helpers import gently_varied, random_image, tiny_segmenter
from tests.reducers.test_reduced import NEVER, REDUCING
from tests.training.tiny import silent, tiny_run, write_dataset
from tokenexit.methods import Cropr, Dense, DoViT, DToP, FixedRatio, Reduced, spec_of
from tokenexit.reducers import MPM, ToMe
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
