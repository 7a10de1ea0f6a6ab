"""A model of drawn street scenes, adapted with photos of CamVid and with scenes: writes a JSON of both.

    python docs/evidence/adapt/elsewhere.py --camvid data/camvid --out docs/evidence/adapt/elsewhere.json

The dense model is the quickstart's, trained for 350 steps. Both are run on 100 scenes of the test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tokenexit.adaptation.adapt import adapt_model
from tokenexit.adaptation.options import Options
from tokenexit.calibration.targets import Budget
from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.methods import Dense
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.loop import train
from tokenexit.training.recipes import SIZE, scene_recipe

STEPS, PHOTOS, TEST = 350, 200, 100


def measured(dense: ExitSegmenter, photos: Path, out: Path) -> dict[str, Any]:
    found = adapt_model(dense, [photos], Budget("budget", 0.5), out, Options(limit=PHOTOS), say=print)
    test = open_dataset("scenes", None, "test", length=TEST, size=SIZE)
    dense_row, row = evaluate(found.model, test, [Dense(), found.method])
    return {
        "plan": str(found.tried[0].plan),
        "sentence": found.measured.sentence(),
        "on_test_photos": found.measured.to_dict(),
        "miou": row.scores.miou,
        "miou_dense": dense_row.scores.miou,
        "miou_minus_dense_interval": row.miou_interval(dense_row),
        "share_of_dense_on_test_split": row.share_of_dense,
    }


def draw_scenes(folder: Path) -> Path:
    scenes = open_dataset("scenes", None, "train", length=PHOTOS, size=SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(PHOTOS):
        scenes[i].image.save(folder / f"{i:04}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, default=Path("data/camvid"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = train(scene_recipe(work / "model", STEPS, "bf16", 0), progress=False).with_exits(())
        sources = {"scenes": draw_scenes(work / "scenes"), "photos of CamVid": options.camvid / "images" / "train"}
        figures: dict[str, dict[str, Any]] = {}
        for name, photos in sources.items():
            figures[name] = measured(dense, photos, work / "adapted" / str(len(figures)))
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
            print(name, figures[name]["miou"], figures[name]["miou_dense"], figures[name]["sentence"], flush=True)


if __name__ == "__main__":
    main()
