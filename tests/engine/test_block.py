import torch

from tokenexit.engine.block import Block, drop_path
from tokenexit.engine.tokens import Packing

CPU = torch.device("cpu")


def test_block__count_of_work_is_the_textbook_formula():
    block = Block(32, 2, 128)
    n, d = 10, 32
    assert block.ops(n).macs == 12 * n * d * d + 2 * n * n * d
    assert block.ops(n).norm_elements == 2 * n * d


def test_drop_path__is_drawn_once_for_each_image():
    packing = Packing.of([3, 0, 50, 7, 1], CPU)
    seen = set()
    for _ in range(40):
        out = drop_path(0.5, packing, torch.float32)
        assert out.shape == (61, 1)
        for image in out.split(packing.lengths):
            if len(image):
                assert len(image.unique()) == 1
        seen.add(tuple(image[0, 0].item() for image in out.split(packing.lengths) if len(image)))
    assert {value for draw in seen for value in draw} == {0.0, 2.0}
    assert len(seen) > 4, "images are drawn independently"
