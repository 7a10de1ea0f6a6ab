"""Inference without gradients, in fp32, bf16 or fp16, and the precision that suits a processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
AskedPrecision = Literal["auto", "fp32", "bf16", "fp16"]
LOWERED: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

_X86_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
_ARM_INSTRUCTIONS = {"bf16": ("bf16",), "fp16": ("asimdhp",)}
_FIRST_CUDA_CAPABILITY = {"bf16": (8, 0), "fp16": (7, 0)}


@contextmanager
def inference(device: torch.device, precision: Precision = "fp32") -> Iterator[None]:
    """Disable gradients, and run matrix products in bf16 or fp16 if asked for.

    Hold it open over many calls of a model, and enter it again inside as you like: within the outermost block each
    weight is lowered once; a block around every call lowers all of them every time (5 % of ViT-Base at 512).
    Weights must not change inside. (Gradients are off by `no_grad`: under `inference_mode` autocast keeps no copies.)
    """
    with torch.no_grad(), torch.autocast(device.type, LOWERED.get(precision), enabled=precision in LOWERED):
        yield


def inference_precision(asked: AskedPrecision, device: torch.device) -> Precision:
    """Return the precision that a trained model is run in.

    auto: bf16 on CUDA cards that multiply it fast; fp32 on CPUs, so that figures and calibrations made on one machine
    are found again on another.
    """
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and is_fast("bf16", device) else "fp32"


def training_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision that a model is trained in. auto: bf16 where the processor multiplies it fast, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if is_fast("bf16", device) else "fp32"


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """Return a warning about a precision that this processor emulates; None for one that it multiplies fast."""
    if is_fast(precision, device):
        return None
    return (
        f"precision {precision} is slow on this {device.type}, which has no instructions for it and emulates them, "
        "often several times slower than fp32: choose auto."
    )


def is_fast(precision: Precision, device: torch.device) -> bool:
    """Return whether the processor has instructions that multiply matrices of this precision."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _FIRST_CUDA_CAPABILITY[precision]
    arm = platform.machine().lower() in ("aarch64", "arm64")
    instructions = (_ARM_INSTRUCTIONS if arm else _X86_INSTRUCTIONS)[precision]
    return device.type == "cpu" and not cpu_instructions().isdisjoint(instructions)


@cache
def cpu_instructions() -> frozenset[str]:
    """Return the names of this CPU's instruction sets, as torch and Linux list them; none where neither does."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # older torch does not say
    told = {name for name, there in ask().items() if there is True}
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return frozenset(told)
    listed = next((words for name, _, words in lines if name.strip() in ("flags", "Features")), "")
    return frozenset(told.union(listed.split()))
