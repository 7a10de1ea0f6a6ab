"""What `tokenexit adapt` reaches on CamVid without labels: budgets, exit places, photos, fine-tuning.

    python docs/evidence/adapt/study.py runs/camvid-dense-finetune-seed0 --camvid data/camvid --out seed0.json budgets

The dense model is that of `camvid_vit_tiny.yaml` continued by `camvid_dense_finetune.yaml`. Photos are the 367 training
images without their masks; mIoU is that of the test split, on which nothing was chosen. Results are in the file as they
come, and a second call goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenexit.adaptation.adapt import WORK, Adaptation, adapt_model
from tokenexit.adaptation.heads import fitted_heads, settings
from tokenexit.adaptation.measure import TIMED_PHOTOS
from tokenexit.adaptation.options import Options
from tokenexit.adaptation.photos import split_photos, usable_photos
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.latency import timed_in_turn
from tokenexit.calibration.plans import Held
from tokenexit.calibration.targets import Bound, Budget, CalibrationTarget
from tokenexit.data.photos import UnlabelledImages
from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.inputs.sources import list_images
from tokenexit.methods import Dense, spec_of
from tokenexit.runtime.notebook import Notebook
from tokenexit.segmenter import ExitSegmenter

BUDGETS = (0.5, 0.4, 0.6, 0.7)
BY_HAND = Held(scale=1.0, depth=12, exits=(3, 6, 9))
FEWEST = 20
TIMES = (0.5, 0.35)
PHOTOS = (25, 50, 100, 200, 367)
SCENES = 200

Run = tuple[str, CalibrationTarget, Options, str]
"""Name, target, options, and which photos: "train", or "scenes"."""


def runs(kinds: list[str], dense_ms: Callable[[], float]) -> Iterator[Run]:
    for kind in kinds:
        if kind == "budgets":
            for budget in BUDGETS:
                yield f"auto {budget:g}", Budget("budget", budget), Options(), "train"
                yield f"exits 3 6 9 {budget:g}", Budget("budget", budget), Options(held=BY_HAND), "train"
        if kind == "finetune":
            yield "auto 0.5, fine-tuned", Budget("budget", 0.5), Options(finetune=800), "train"
        if kind == "photos":
            for count in PHOTOS:
                yield f"auto 0.5, {count} photos", Budget("budget", 0.5), Options(limit=count), "train"
        if kind == "elsewhere":
            yield "auto 0.5, photos of scenes", Budget("budget", 0.5), Options(), "scenes"
        if kind == "time":
            whole = dense_ms()
            for share in TIMES:
                yield f"auto, {share:.0%} of dense time", Budget("latency_ms", share * whole), Options(), "train"
        if kind == "bound":
            yield "at most 3 % unlike", Bound("max_disagreement", 0.03), Options(), "train"


def measured(dense: ExitSegmenter, run: Run, photos: Path, data: Path, work: Path) -> dict[str, Any]:
    """Adapt, and run what came of it on the test split."""
    name, target, options, _ = run
    start = time.monotonic()
    out = work / name.replace(" ", "-")
    fit_once(dense, run, photos, work / f"fitted-{run[3]}-{options.limit}-{type(target).__name__}", out)
    found = adapt_model(dense, [photos], target, out, options, fewest=FEWEST, say=print)
    seconds = time.monotonic() - start
    test = open_dataset("camvid", data, "test")
    dense_row, row = evaluate(found.model, test, [Dense(), found.method])
    return {
        **_about(found),
        "seconds": seconds,
        "miou": row.scores.miou,
        "miou_dense": dense_row.scores.miou,
        "miou_minus_dense_interval": row.miou_interval(dense_row),
        "boundary_iou": row.boundary_iou,
        "boundary_iou_dense": dense_row.boundary_iou,
        "share_of_dense_on_test_split": row.share_of_dense,
        "gmacs": row.gmacs_mean,
        "iou": dict(zip(test.labels.names, row.scores.iou)),
    }


def fit_once(dense: ExitSegmenter, run: Run, photos: Path, cache: Path, out: Path) -> None:
    """Fit exit heads where no earlier run has, and lay them where the run finds them: budgets share their heads."""
    _, target, options, _ = run
    paths = usable_photos(list(list_images([photos])), dense.config.backbone.patch_size, options.limit, 0, print)
    split = split_photos(len(paths), target, 0, FEWEST)
    images = CalibrationSet(dense, UnlabelledImages(paths, dense.classes), range(len(paths)))
    cache.mkdir(parents=True, exist_ok=True)
    whole = replace(options, held=Held(), finetune=0)
    notebook = Notebook(cache / "progress.json", settings(dense, paths, target, whole))
    fitted_heads(images.part(split.fit), cache, notebook, whole, print, lambda _: iter)
    shutil.copytree(cache, out / WORK, copy_function=os.link, dirs_exist_ok=True)


def _about(found: Adaptation) -> dict[str, Any]:
    return {
        "plan": str(found.tried[0].plan),
        "method": spec_of(found.method),
        "tried": [
            {
                "kind": one.kind,
                "plan": str(one.plan),
                "mac_ratio": one.run.mac_ratio,
                "price": one.plan.price,
                "ms": one.ms,
                "agreement": one.agreement,
                "loss": one.loss,
            }
            for one in found.tried
        ],
        "heads": {block: head.agreement for block, head in found.heads.items()},
        "photos": str(found.split),
        "on_test_photos": found.measured.to_dict(),
        "sentence": found.measured.sentence(),
        "shortfall": found.shortfall,
    }


def milliseconds(dense: ExitSegmenter, photos: Path) -> float:
    """Return the mean time of the dense model on an image."""
    paths = list(list_images([photos]))
    images = CalibrationSet(dense, UnlabelledImages(paths, dense.classes), range(len(paths)))
    (times,) = timed_in_turn(images, [(dense, Dense())], TIMED_PHOTOS)
    return sum(times) / len(times)


def draw_scenes(folder: Path) -> Path:
    """Write drawn street scenes as photos from elsewhere."""
    scenes = open_dataset("scenes", None, "train", length=SCENES, size=(360, 480))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(SCENES):
        scenes[i].image.save(folder / f"{i:04}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--camvid", type=Path, default=Path("data/camvid"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for fitted heads, which a second call finds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("kinds", nargs="+", choices=("budgets", "finetune", "photos", "elsewhere", "bound", "time"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = ExitSegmenter.from_pretrained(options.model).with_exits(())
    notebook = Notebook(options.out, {"model": dense.fingerprint(), "threads": options.threads})
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        train = options.camvid / "images" / "train"
        for run in runs(options.kinds, lambda: milliseconds(dense, train)):
            photos = train if run[3] == "train" else draw_scenes(work / "scenes")
            row = notebook.once(run[0], lambda: measured(dense, run, photos, options.camvid, work))  # noqa: B023
            print(f"{run[0]}: mIoU {row['miou']:.2f} (dense {row['miou_dense']:.2f}): {row['sentence']}", flush=True)


if __name__ == "__main__":
    main()
