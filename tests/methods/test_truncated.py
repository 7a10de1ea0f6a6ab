import pytest

from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.heads import HeadSpec
from tokenexit.methods import Dense, Truncated, build_method


def test_truncated__runs_the_blocks_and_the_head_of_a_shallower_network():
    model = tiny_segmenter("fcn", class_token=False)
    images = [random_image(8, 12)]
    ledger, dense = model(images, Truncated(2)).ledger, model(images, Dense()).ledger
    depth, exit = model.config.backbone.depth, model.config.exits[1]
    assert ledger.parts[0].blocks * depth == dense.parts[0].blocks * exit
    assert ledger.parts[0].exit_heads == dense.parts[0].decode_head
    assert ledger.parts[0].decode_head == 0


@pytest.mark.parametrize("after", [0, -1, 3])
def test_truncated__refuses_an_exit_that_is_not_there(after):
    with pytest.raises(ConfigError, match=rf"after must be at .*, got {after}:"):
        tiny_segmenter("fcn").eval()([random_image(4, 4)], build_method({"name": "truncated", "after": after}))


def test_truncated__is_no_way_to_train():
    with pytest.raises(ConfigError, match="train"):
        tiny_segmenter("fcn").train()([random_image(4, 4)], Truncated())


@pytest.mark.parametrize(("exit_head", "decode_head"), [("fcn", "setr_naive"), ("fcn", "setr_pup")])
def test_truncated__refuses_heads_of_two_resolutions(exit_head: HeadSpec, decode_head: HeadSpec):
    model = tiny_segmenter(exit_head, decode_head=decode_head)
    with pytest.raises(ConfigError, match="resolution"):
        model([random_image(4, 4)], Truncated())
