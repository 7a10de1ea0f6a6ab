import pytest
import torch

from tests.helpers import fix_exit, random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.methods import Dense, DToP, FixedRatio


def run(model, images, method):
    with torch.no_grad():
        return model(images, method)


def test_fixed_ratio__the_least_sure_go_on_and_ties_by_lowest_position():
    model = tiny_segmenter("linear", exits=(1, 2))
    fix_exit(model, 0, [0.9, 0.3, 0.6, 0.6, 0.6, 0.4])
    fix_exit(model, 1, [0.9, 0.9, 0.5, 0.7, 0.9, 0.5])
    out = run(model, [random_image(8, 12)], FixedRatio((0.7, 0.34)))
    assert out.exit_index[0].flatten().tolist() == [0, 1, 2, 1, 0, 2]


def test_fixed_ratio__counts_follow_from_the_size_alone_rounded_down_and_of_all_tokens():
    model = tiny_segmenter("fcn")
    for seed in range(3):
        ledger = run(model, [random_image(12, 12, seed), random_image(4, 8, seed)], FixedRatio((0.75, 0.5))).ledger
        assert ledger.live == ((9, 6, 6, 4), (2, 1, 1, 1))


def test_fixed_ratio__one_number_is_for_all_exits():
    model, images = tiny_segmenter("fcn"), [random_image(12, 12)]
    assert run(model, images, FixedRatio(0.5)).ledger == run(model, images, FixedRatio((0.5, 0.5))).ledger


@pytest.mark.parametrize("head", ["fcn", "atm"])
def test_fixed_ratio__of_one_keeps_everybody_bit_for_bit(head):
    model, images = tiny_segmenter(head), [random_image(12, 16)]
    out, dense = run(model, images, FixedRatio((1.0, 1.0))), run(model, images, Dense())
    assert torch.equal(out.grid_logits[0], dense.grid_logits[0])
    assert out.ledger.live == dense.ledger.live


def test_fixed_ratio__has_the_finish_of_dtop():
    model, images = tiny_segmenter("atm"), [random_image(12, 16)]
    last, frozen = (run(model, images, FixedRatio((0.5, 0.2), finish=f)) for f in ("presence_last", "frozen"))
    assert torch.equal(last.exit_index[0], frozen.exit_index[0])
    assert not torch.equal(last.grid_logits[0], frozen.grid_logits[0])
    same = run(model, images, DToP(1.0, finish="frozen", cap=(0.5, 0.2)))
    assert torch.equal(frozen.grid_logits[0], same.grid_logits[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratios": (0.5, 1.2)}, r"ratios must be a share in \[0, 1\] for each exit, got \(0.5, 1.2\)"),
        ({"ratios": -0.5}, r"ratios must be a share .*got -0.5"),
        ({"ratios": "half"}, r"ratios must be a share .*got 'half'"),
        ({"finish": "early"}, r"finish must be .* got 'early': choose"),
        ({"score": "logit"}, r"score must be .* got 'logit': choose"),
        ({"temperature": 0.0}, r"temperature must be .* got 0.0"),
        ({"ratios": (0.5, 0.4, 0.3)}, r"ratios has 3 values for 2 exits"),
    ],
)
def test_fixed_ratio__impossible_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ConfigError, match=words):
        run(tiny_segmenter("fcn"), [random_image(4, 4)], FixedRatio(**{"ratios": 0.5, **options}))
