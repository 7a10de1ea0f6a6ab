"""Running a trained model: no gradients, one lowering of each weight."""

from __future__ import annotations

import pytest
import torch

from tokenexit.inference import inference
from tokenexit.segmenter import ExitSegmenter

CPU = torch.device("cpu")


@pytest.fixture
def model() -> ExitSegmenter:
    torch.manual_seed(0)
    return ExitSegmenter("vit_tiny_patch16", 4, [1], embed_dim=32, num_heads=2, depth=2).eval()


def test_inference__builds_no_graph_and_computes_in_the_precision(model: ExitSegmenter) -> None:
    image = torch.rand(3, 32, 48)
    with inference(CPU):
        fp32 = model([image]).grid_logits[0]
    with inference(CPU, "bf16"):
        bf16 = model([image]).grid_logits[0]
        product = model.decode_head(model.backbone.embed([image]).patches()).logits
    assert not fp32.requires_grad
    assert product.dtype == torch.bfloat16
    assert not torch.equal(fp32, bf16)
    assert torch.allclose(fp32, bf16.float(), atol=2e-2)


def test_inference__lowers_a_weight_once_within_the_outermost_block(model: ExitSegmenter) -> None:
    """Seen by changing a weight inside, which nobody should: the copy made first is the one that counts."""
    image = torch.rand(3, 32, 48)
    with inference(CPU, "bf16"):
        with inference(CPU, "bf16"):
            before = model([image]).grid_logits[0]
        with torch.no_grad():
            for block in model.backbone.blocks:
                block.mlp.fc2.weight.mul_(3)
        with inference(CPU, "bf16"):
            inside = model([image]).grid_logits[0]
    with inference(CPU, "bf16"):
        after = model([image]).grid_logits[0]
    assert torch.equal(before, inside)
    assert not torch.equal(before, after)


def test_inference__is_the_same_in_one_block_as_in_many(model: ExitSegmenter) -> None:
    images = [torch.rand(3, 32, 48), torch.rand(3, 16, 16)]
    with inference(CPU, "bf16"):
        held = [model([image]).grid_logits[0] for image in images]
    for image, expected in zip(images, held):
        with inference(CPU, "bf16"):
            assert torch.equal(model([image]).grid_logits[0], expected)
