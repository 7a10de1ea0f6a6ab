"""Running a trained model: no gradients, one lowering of each weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenexit.runtime import precision as inference_module
from tokenexit.runtime.precision import (
    cpu_instructions,
    inference,
    inference_precision,
    slow_precision,
    training_precision,
)
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


# ------------------------------------------------------------------------------------------------------- precisions


def on_a_cpu_with(monkeypatch: pytest.MonkeyPatch, *instructions: str, machine: str = "x86_64") -> None:
    monkeypatch.setattr(inference_module, "cpu_instructions", lambda: frozenset(instructions))
    monkeypatch.setattr(inference_module.platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("instructions", "machine", "fast"),
    [
        (("avx2", "avx512f"), "x86_64", []),  # where bf16 took ten times as long as fp32
        (("avx512_bf16",), "x86_64", ["bf16"]),
        (("amx_bf16", "amx_fp16"), "AMD64", ["bf16", "fp16"]),
        (("asimd", "bf16"), "aarch64", ["bf16"]),
        (("asimd",), "arm64", []),
        ((), "riscv64", []),
    ],
)
def test_training_precision__is_bf16_where_the_cpu_has_instructions_for_it(
    instructions: tuple[str, ...], machine: str, fast: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu_with(monkeypatch, *instructions, machine=machine)
    assert training_precision("auto", CPU) == ("bf16" if "bf16" in fast else "fp32")
    for precision in ("bf16", "fp16"):
        warning = slow_precision(precision, CPU)
        assert (warning is None) == (precision in fast)
        assert warning is None or warning.startswith(f"precision {precision} is slow on this cpu, which has no")
    assert slow_precision("fp32", CPU) is None
    assert training_precision("bf16", CPU) == "bf16"  # who asks gets it


def test_inference_precision__is_fp32_on_every_cpu_and_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu_with(monkeypatch, "avx512_bf16", "amx_bf16")
    assert inference_precision("auto", CPU) == "fp32"
    assert [inference_precision(asked, CPU) for asked in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precisions__on_cuda_are_those_of_the_card(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = torch.device("cuda")
    assert inference_precision("auto", card) == training_precision("auto", card) == expected
    assert (slow_precision("bf16", card) is None) == (expected == "bf16")
    assert slow_precision("fp16", card) is None


def test_cpu_instructions__are_those_of_this_machine() -> None:
    assert all(isinstance(name, str) and name for name in cpu_instructions())
    if Path("/proc/cpuinfo").is_file():
        assert len(cpu_instructions()) > 5
