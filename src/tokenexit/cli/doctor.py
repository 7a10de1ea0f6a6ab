"""What a person needs to know about this machine before asking why something is slow or fails.

Every finding is a measured or read fact with a verdict; where something is wrong, the finding ends with the cure.
Nothing here raises: a broken installation is what it is made for.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tokenexit.cli.options import command_parser
from tokenexit.runtime.threads import given_threads, idle_cores, load, processors, thread_choice

if TYPE_CHECKING:
    import torch


Status = Literal["ok", "warn", "fail"]

REQUIRED = (
    "torch", "numpy", "pillow", "safetensors", "huggingface_hub", "accelerate", "torchmetrics", "jsonargparse",
    "PyYAML", "rich",
)  # fmt: skip
OPTIONAL = ("matplotlib", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "fastapi", "av")

IMPORT_SECONDS = 120  # a cold import of torch from a slow disk takes a while


class Finding(NamedTuple):
    """topic: what was looked at. finding: what was seen, in words. status: ok, warn (slower or unusual), fail."""

    topic: str
    finding: str
    status: Status = "ok"


def diagnose(seconds: float = 1.0) -> list[Finding]:
    """Look at versions, devices, threads, load, the attention path and the faster precision; never raises.

    seconds: how long the timing of the precisions may take.
    """
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("versions", _versions),
        ("torchvision", _torchvision),
        ("devices", _devices),
        ("threads", _threads),
        ("load", _load),
        ("attention", _attention),
        ("precision", lambda: _precision(seconds)),
    )
    return [finding for topic, check in checks for finding in _guarded(topic, check)]


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines: status, topic, finding."""
    width = max((len(finding.topic) for finding in findings), default=0)
    return "\n".join(f"{status:4}  {topic:{width}}  {finding}" for topic, finding, status in findings)


def _guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of one check; an exception becomes the last of them."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:
        reason = f"{type(error).__name__}: {_last_line(str(error))}"
        findings.append(Finding(topic, f"could not be checked: {reason}", "fail"))
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("tokenexit", _version("tokenexit") or "run from its sources, not installed")
    minimum = _minimum_versions()
    for name in REQUIRED:
        version, needed = _version(name), minimum.get(_canonical(name), "")
        if version is None:
            yield Finding(name, f"not installed, but needed: pip install '{name}{needed and f'>={needed}'}'", "fail")
        elif _numbers(version) < _numbers(needed):
            yield Finding(name, f"{version} is too old: pip install '{name}>={needed}'", "fail")
        else:
            yield Finding(name, version)
    for name in OPTIONAL:
        yield Finding(name, _version(name) or "not installed (optional)")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _minimum_versions() -> dict[str, str]:
    """Lower bounds that the installed package declares, `{"torch": "2.11"}`; empty when run from its sources."""
    try:
        requirements = metadata.requires("tokenexit") or []
    except metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)", text) for text in requirements)
    return {_canonical(match[1]): match[2] for match in matches if match}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _torchvision() -> Iterator[Finding]:
    """torchmetrics and transformers import torchvision wherever it is installed, so a broken one breaks them."""
    if _version("torchvision") is None:
        return
    error = _import_error("torchvision")
    if error is None:
        yield Finding("torchvision import", "works")
    else:
        yield Finding(
            "torchvision import",
            f"fails ({error}) and breaks other packages with it: pip uninstall torchvision, which tokenexit does not "
            f"need, or install the build made for torch {_version('torch')}.",
            "fail",
        )


def _import_error(module: str) -> str | None:
    """Why a fresh Python process cannot import `module`; None if it can.

    In a process of its own, since a half-imported module would stay behind in this one, and may crash it.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {IMPORT_SECONDS} s"
    if result.returncode == 0:
        return None
    return _last_line(result.stderr) or f"exit status {result.returncode}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _devices() -> Iterator[Finding]:
    yield Finding("cpu", _cpu_model())
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"this torch is built for CUDA {built}, no device was found" if built else "a CPU build of torch"
        yield Finding("cuda", f"not available: {reason}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(
            f"cuda:{index}",
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}",
        )


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _threads() -> Iterator[Finding]:
    """Threads that torch starts by itself, or as the environment says, beside those that commands start."""
    import torch

    found, threads, given = processors(), torch.get_num_threads(), given_threads()
    choice = thread_choice(threads, idle_cores())
    idle = "" if choice.idle is None else f", {choice.idle:.1f} of them idle"
    text = f"torch starts {threads}; {found}{idle}"
    if threads > found.cores:
        text += f": more than cores, so they {'' if given else 'would '}wait for each other"
    elif choice.reason:
        timed = f"a small network's pass: {choice.timed}"
        text += f": others keep the rest busy, and fewer threads do as well or better ({timed})"
    if choice.threads == threads:
        yield Finding("threads", text)
    elif given:
        yield Finding("threads", f"{text}; set OMP_NUM_THREADS={choice.threads}, or leave out {given}.", "warn")
    else:
        cure = f"commands start {choice.threads}; for programs of your own set OMP_NUM_THREADS={choice.threads}"
        yield Finding("threads", f"{text}; {cure}.", "warn")


def _load() -> Iterator[Finding]:
    """Load is that of the whole machine, whatever a container may use of it."""
    logical, now = os.cpu_count() or 1, load()
    if now is None:
        yield Finding("load", "this system does not say")
    elif now > logical:
        cure = "times are not those of a quiet machine; measure when it is, and threads above says what commands start"
        yield Finding("load", f"{now:.1f} on {logical} logical CPUs, which others keep busy: {cure}.", "warn")
    else:
        yield Finding("load", f"{now:.1f} on {logical} logical CPUs")


_PATHS = {
    "batched": "images of equal token counts as one batch",
    "loop": "one fused call per image, nothing padded",
    "varlen": "variable-length kernel, nothing padded",
    "padded": "images padded to the longest, padding masked out",
}


def _attention() -> Iterator[Finding]:
    import torch

    from tokenexit.engine.attention import attention_path

    device = _device()
    for dtype in (torch.float32, torch.bfloat16):
        path = attention_path(device, dtype)
        topic = f"attention, {device.type} {str(dtype).removeprefix('torch.')}"
        if path == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
            cure = "pip install 'torch>=2.11'"
            yield Finding(topic, f"needs torch.nn.attention.varlen, which this torch lacks: {cure}", "fail")
        else:
            yield Finding(topic, f"{path}: {_PATHS[path]}")


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _precision(seconds: float) -> Iterator[Finding]:
    """Time one block of a small ViT over one 512x512 image's tokens in both precisions, by turns."""
    import torch

    from tokenexit.engine.block import Block
    from tokenexit.engine.tokens import Packing

    device = _device()
    block = Block(384, 6, 1536).to(device).eval()
    x = torch.zeros(1024, 384, device=device)
    packing = Packing.of([1024], device)

    def once(bf16: bool) -> float:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            start = time.perf_counter()
            block(x, packing)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

    once(False), once(True)  # first calls set up kernels and workspaces
    fp32, bf16 = once(False), once(True)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        fp32, bf16 = min(fp32, once(False)), min(bf16, once(True))
    times = f"a ViT-Small block on 1024 tokens: {1e3 * fp32:.2g} ms in fp32, {1e3 * bf16:.2g} ms in bf16 autocast"
    ratio = fp32 / bf16
    if ratio > 1.1:
        yield Finding("precision", f"bf16 is {ratio:.1f} times as fast on this {device.type} ({times})")
    elif ratio < 0.9:
        yield Finding("precision", f"fp32 is {1 / ratio:.1f} times as fast as bf16 on this {device.type} ({times})")
    else:
        yield Finding("precision", f"fp32 and bf16 are equally fast on this {device.type} ({times})")


def doctor(arguments: list[str]) -> int:
    command_parser("doctor", "Versions, devices, attention path and precision on this machine.").parse_args(arguments)

    findings = diagnose()
    print(format_findings(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0
