"""A command in one of several processes: `torchrun -m tests.prediction.driver PIDS RANK SAVES ARGUMENT ...`.

The process of that rank takes all others and those who started them along, as a power cut does, when it has saved that
many images and half of one more; `-1` is a command that comes to its end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from PIL import Image

import tokenexit.prediction.pipeline as pipeline
from tests.training.driver import kill_everybody
from tokenexit.cli import main

SAVE = Image.Image.save


def half_of_one_more(pids: str, saves: int) -> None:
    left = saves

    def save(self: Image.Image, path: Path) -> None:
        nonlocal left
        if left == 0:
            SAVE(self, path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            kill_everybody(pids)
        left -= 1
        SAVE(self, path)

    Image.Image.save = save  # type: ignore[assignment]
    pipeline.WRITERS = 1  # image after image


if __name__ == "__main__":
    pids, rank, saves, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    for name, pid in {"agent": os.getppid(), "process": os.getpid()}.items():
        Path(f"{pids}.{os.environ['RANK']}.{name}.pid").write_text(str(pid))
    if rank == os.environ["RANK"]:
        half_of_one_more(pids, int(saves))
    sys.exit(main(arguments))
