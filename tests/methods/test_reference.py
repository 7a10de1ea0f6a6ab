import pytest
import torch

from tests.helpers import assert_close, random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP, ExitRecord
from tokenexit.methods.reference import PrescribedExits, agreement_exits, random_exits


def stage(labels, classes=3):
    return ExitRecord(logits=torch.nn.functional.one_hot(torch.tensor(labels), classes).float())


def test_agreement_exits__is_the_first_exit_from_which_on_the_answer_stands():
    stages = (stage([0, 1, 2, 0, 1]), stage([0, 0, 2, 1, 1]), stage([0, 0, 1, 0, 2]))
    assert agreement_exits(stages, (5,)).tolist() == [0, 1, 2, 2, 2]


def test_agreement_exits__judges_atm_heads_by_presence_times_mask():
    absent_first = torch.tensor([[[-9.0, 9.0], [9.0, -9.0]]])
    masks = torch.tensor([[2.0, 1.0]])  # the higher mask belongs to an absent class
    atm = ExitRecord(logits=masks, presence=absent_first, kind="atm")
    assert agreement_exits((atm, stage([1], 2)), (1,)).tolist() == [0]
    assert agreement_exits((atm, stage([0], 2)), (1,)).tolist() == [1]


def test_agreement_exits__of_heads_finer_than_tokens_are_refused():
    model, images = tiny_segmenter("setr_pup"), [random_image(8, 8)]
    with torch.no_grad():
        out = model(images, Dense(), with_records=True)
    with pytest.raises(ConfigError, match="one answer per token, and the decode head has more: leave it out"):
        agreement_exits(out.exit_records, out.ledger.tokens)


def test_random_exits__keep_the_counts_and_change_the_places():
    stages = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 2]])
    drawn = random_exits(stages, torch.Generator().manual_seed(0))
    assert drawn.shape == stages.shape
    assert drawn.flatten().sort().values.tolist() == stages.flatten().sort().values.tolist()
    assert not torch.equal(drawn, stages)
    assert torch.equal(drawn, random_exits(stages, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_prescribed__the_exits_of_a_method_give_its_result(head):
    model, images = tiny_segmenter(head), [random_image(16, 20), random_image(9, 33)]
    with torch.no_grad():
        out = model(images, DToP(0.3, keep_per_class=1))
        again = model(images, PrescribedExits(exit_index=torch.cat([s.flatten() for s in out.exit_index])))
    assert sum(int((s < 2).sum()) for s in out.exit_index) > 0
    assert out.ledger == again.ledger
    for a, b in zip(out.grid_logits, again.grid_logits):
        assert torch.equal(a, b)


def test_prescribed__tokens_told_to_stay_are_dense():
    model, images = tiny_segmenter("fcn"), [random_image(8, 8)]
    with torch.no_grad():
        out, dense = model(images, PrescribedExits(exit_index=torch.full((4,), 2))), model(images, Dense())
    assert_close(out.grid_logits[0], dense.grid_logits[0])
