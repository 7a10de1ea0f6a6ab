import math

import torch

from tests.helpers import fix_exit, random_image, tiny_segmenter
from tokenexit.methods import PAUMER, DoViT


def test_paumer__pauses_patches_of_low_entropy():
    model = tiny_segmenter("linear", exits=(2,))
    confidence = [0.99, 0.97, 0.95, 0.9]
    fix_exit(model, 0, confidence)
    entropies = [-p * math.log(p) - (1 - p) * math.log((1 - p) / 4) for p in confidence]
    for threshold in (0.6, 0.8, 0.9, 0.95):
        with torch.no_grad():
            out = model([random_image(8, 8)], PAUMER(threshold))
        paused = [0 if h < (1 - threshold) * math.log(5) else 1 for h in entropies]
        assert out.exit_index[0].flatten().tolist() == paused
    assert {0, 1} == set(paused)


def test_paumer__is_dovit_with_entropy_and_without_blend():
    model, images = tiny_segmenter("fcn"), [random_image(16, 20), random_image(9, 33)]
    with torch.no_grad():
        a, b = model(images, PAUMER(0.6)), model(images, DoViT(0.6, blend_weight=0.0, score="entropy"))
    assert all(torch.equal(x, y) for x, y in zip(a.grid_logits, b.grid_logits))
    assert {0, 2} <= set(torch.cat([s.flatten() for s in a.exit_index]).tolist())


def test_paumer__needs_no_class_token():
    with torch.no_grad():
        out = tiny_segmenter("fcn", class_token=False)([random_image(16, 20)], PAUMER(0.3))
    assert (out.exit_index[0] < 2).any()
