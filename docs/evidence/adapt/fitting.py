"""How long `tokenexit adapt` fits exit heads, in dense passes over the same photos, and how much memory it takes.

    python docs/evidence/adapt/fitting.py --photos 200 --out fitting.json

A ViT-B/16 on drawn street scenes of 512 x 512, its weights random and lively, with a linear head: what it answers is a
function of its features, as with a trained model, so that heads have something to learn. The unit is the time that the
plain model takes for the photos, one at a time, measured before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tokenexit.adaptation.features import record_features
from tokenexit.adaptation.heads import fitted_heads, settings
from tokenexit.adaptation.options import Options, places
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.targets import Budget
from tokenexit.data.photos import UnlabelledImages
from tokenexit.data.registry import open_dataset
from tokenexit.engine.vit_config import PRESETS
from tokenexit.methods import Dense
from tokenexit.runtime.notebook import Notebook
from tokenexit.segmenter import ExitSegmenter

SIDE, CLASSES = 512, 19


def random_model(backbone: str) -> ExitSegmenter:
    torch.manual_seed(0)
    model = ExitSegmenter(PRESETS[backbone], CLASSES, (), "fcn", "linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)  # timm's start weights leave tokens almost as they came
    return model.eval()


def dense_seconds(photos: CalibrationSet) -> float:
    start = time.monotonic()
    for _ in photos.forward(Dense(), "dense"):
        pass
    return time.monotonic() - start


def measure(backbone: str, count: int, work: Path) -> dict[str, Any]:
    model, scenes = random_model(backbone), open_dataset("scenes", None, "train", length=count, size=(SIDE, SIDE))
    paths = [work / f"{i:04}.png" for i in range(count)]
    for i, path in enumerate(paths):
        scenes[i].image.save(path)
    photos = CalibrationSet(model, UnlabelledImages(paths, model.classes), range(count))
    options = Options()
    before, start = dense_seconds(photos), time.monotonic()
    record_features(photos, places(model, options.held), work / "features", seed=options.seed)
    features = time.monotonic() - start
    notebook = Notebook(work / "progress.json", settings(model, paths, Budget("budget", 0.5), options))
    heads = fitted_heads(photos, work, notebook, options, print, lambda _: iter)
    whole = time.monotonic() - start
    dense = (before + dense_seconds(photos)) / 2
    return {
        "photos": count,
        "threads": torch.get_num_threads(),
        "dense_pass_seconds": dense,
        "features_in_dense_passes": features / dense,
        "features_and_heads_in_dense_passes": whole / dense,
        "passes_over_tokens": {block: one.passes for block, one in heads.items()},
        "agreement": {block: one.agreement for block, one in heads.items()},
        "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "weights_gib": sum(p.numel() for p in model.parameters()) * 4 / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_base_patch16")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options.backbone, options.photos, Path(folder))
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps(rows | {options.backbone: row}, indent=1) + "\n")
    json.dump(row, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
