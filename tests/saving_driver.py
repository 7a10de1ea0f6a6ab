"""Saves two models over each other and is killed: `python -m tests.saving_driver FOLDER COPIES KILLS SEED`.

After every kill the folder is copied as it stands. One process forks the others, which need not import torch anew.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.helpers import tiny_segmenter
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.segmenter import ExitSegmenter


def versions() -> list[ExitSegmenter]:
    """Two models of different shapes, each with its calibration and record."""
    models = [tiny_segmenter(seed=1, depth=4), tiny_segmenter(seed=2, depth=5)]
    for number, model in enumerate(models):
        model.calibration = Calibration(
            model=model.fingerprint(), method={"name": "dtop", "threshold": 0.5 + number / 10}
        )
        model.records = {"training.json": {"history": [{"step": number}]}}
    return models


def main(folder: Path, copies: Path, kills: int, seed: int) -> None:
    models, rng = versions(), random.Random(seed)
    models[0].save_pretrained(folder)
    for number in range(kills):
        rng.shuffle(models)
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    model.save_pretrained(folder)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.copytree(folder, copies / str(number))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
