"""Buffers that stay with the process; each test asks a process of its own, as settings of one last."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

FAULTS = """
import resource, sys
from tokenexit.runtime.memory import keep_buffers
kept = keep_buffers() if sys.argv[1] == "keep" else False
import torch
torch.set_num_threads(1)
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)  # 64 MiB, more than glibc ever keeps by itself
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@glibc
def test_keep_buffers__lets_large_buffers_be_used_again_without_asking_the_system() -> None:
    kept, with_it = run(FAULTS, "keep")
    _, without = run(FAULTS, "leave")
    assert kept == "True"
    assert int(with_it) < int(without) / 10


def test_keep_buffers__leaves_settings_of_the_environment_alone() -> None:
    program = "from tokenexit.runtime.memory import keep_buffers; print(keep_buffers())"
    assert run(program, MALLOC_ARENA_MAX="2") == ["False"]
