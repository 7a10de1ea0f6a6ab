"""Measure a calibration on shifted images: brightness, blur, noise, JPEG, and another place altogether.

    python -m benchmarks.shift runs/camvid-calibrated --data camvid --data-root ../shared/data/camvid --split test
    python -m benchmarks.shift runs/scenes-calibrated --data scenes --other camvid --other-root ../shared/data/camvid

For every shift: how many pixels differ from the dense model on the same images, with the standard error over images,
beside the bound that the calibration guarantees, if it does; what it costs; mIoU of both; and whether the monitor of
`tokenexit predict` would warn. Prints a Markdown table. Interrupted, it goes on with the shift that is missing.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from benchmarks.study import open_notebook
from tokenexit.calibration.calibration_set import (
    CalibrationSet,
    dense_reference,
    drawn,
    error,
    true_run,
    truth_reference,
)
from tokenexit.calibration.drift import Monitor
from tokenexit.calibration.store import reference_statistics_of
from tokenexit.data.base import Sample, SegmentationDataset
from tokenexit.data.registry import open_dataset
from tokenexit.evaluation.metrics import scores
from tokenexit.methods import Dense
from tokenexit.report.tables import Column, Table
from tokenexit.segmenter import ExitSegmenter

Shift = Callable[[Image.Image, int], Image.Image]


def brightness(factor: float) -> Shift:
    return lambda image, _: ImageEnhance.Brightness(image).enhance(factor)


def blur(radius: float) -> Shift:
    """Gaussian, radius in pixels."""
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(radius))


def noise(sigma: float) -> Shift:
    """Gaussian, of 255 grey values; a function of the image's index."""

    def noisy(image: Image.Image, index: int) -> Image.Image:
        pixels = np.asarray(image, dtype=np.float64)
        added = pixels + np.random.default_rng(index).normal(0.0, sigma, pixels.shape)
        return Image.fromarray(added.round().clip(0, 255).astype(np.uint8))

    return noisy


def jpeg(quality: int) -> Shift:
    def packed(image: Image.Image, _: int) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    return packed


SHIFTS: dict[str, Shift] = {
    "none": lambda image, _: image,
    **{f"brightness x {factor}": brightness(factor) for factor in (0.25, 0.5, 0.75, 1.5, 2.0)},
    **{f"blur, radius {radius}": blur(radius) for radius in (1, 2, 4)},
    **{f"noise, sigma {sigma}": noise(sigma) for sigma in (8, 16, 32)},
    **{f"JPEG, quality {quality}": jpeg(quality) for quality in (50, 20, 8)},
}


class Shifted:
    """A dataset whose images are changed; what they show is not."""

    def __init__(self, data: SegmentationDataset, shift: Shift) -> None:
        self.data, self.shift, self.labels = data, shift, data.labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self.data[index]
        return Sample(self.shift(sample.image, index), sample.mask, sample.name)


def measure(calibration_set: CalibrationSet, name: str) -> dict[str, Any]:
    """What the calibrated method does on these images."""
    model = calibration_set.model
    method = model.calibrated_method()
    assert method is not None, "checked when the model was read"
    run = true_run(calibration_set, method, dense_reference(calibration_set), name)
    losses = {average: error(run.confusion, average) for average in ("pixels", "classes")}
    monitor = Monitor(reference_statistics_of(model))
    monitor.add(run.histograms)
    row = {
        "shift": name,
        "images": len(calibration_set),
        "disagreement": losses["pixels"].mean().item(),
        "standard_error": losses["pixels"].std().item() / len(calibration_set) ** 0.5,
        "disagreement_mean_over_classes": losses["classes"].mean().item(),
        "share_of_dense": run.mac_ratio,
        "unusual": monitor.unusual / monitor.images,
        "mean_apart": monitor.apart,
        "warns": monitor.warning() is not None,
        "miou": None,
        "dense_miou": None,
    }
    # Where another dataset has other classes, agreement is all that can be asked.
    if calibration_set.data.labels.names == (model.preprocessing.labels or calibration_set.data.labels).names:
        truth = truth_reference(calibration_set)
        row["miou"] = scores(true_run(calibration_set, method, truth, name).confusion.sum(0)).miou
        row["dense_miou"] = scores(true_run(calibration_set, Dense(), truth, name).confusion.sum(0)).miou
    return row


def table(rows: Sequence[dict[str, Any]], bound: float | None) -> str:
    columns = [
        Column("images"),
        Column("unlike dense", "{}", "right", "Share of pixels, mean over images, with its standard error."),
        Column("bound", "{:.3g}", "right", "On that mean, guaranteed for images like the calibration's only."),
        Column("of dense", "{:.1%}", "right", "Multiply-adds over those of the dense model."),
        Column("mIoU", "{:.2f}", "right"),
        Column("dense mIoU", "{:.2f}", "right"),
        Column("unusual", "{:.0%}", "right", "Images farther from the calibration's than 95 % of those."),
        Column("apart", "{:.0%}", "right", "Share of tokens by which the mean histogram differs, beyond chance."),
        Column("warns", "{}", "right", "Whether `tokenexit predict` would say so."),
    ]
    cells = [
        [
            row["shift"],
            f"{row['disagreement']:.2%}" + (f" ± {spread:.2%}" if spread is not None else ""),
            bound,
            row["share_of_dense"],
            row["miou"],
            row["dense_miou"],
            row["unusual"],
            row["mean_apart"],
            "yes" if row["warns"] else "no",
        ]
        for row in rows
        for spread in [row["standard_error"]]  # None where there is one image
    ]
    return Table(columns, cells).to_markdown()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a calibrated model")
    parser.add_argument("--data", required=True, help="dataset that is shifted; not the calibration's own images")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="number of images of each dataset, drawn at random")
    parser.add_argument("--other", help="another dataset, not shifted")
    parser.add_argument("--other-root", type=Path)
    parser.add_argument("--shifts", nargs="+", choices=list(SHIFTS), default=list(SHIFTS))
    parser.add_argument("--json", type=Path, help="figures, kept as they come")
    options = parser.parse_args(arguments)
    model = ExitSegmenter.from_pretrained(options.model)
    if model.calibrated_method() is None or model.calibration is None:
        raise SystemExit(f"{options.model} is not calibrated: run `tokenexit calibrate` first.")
    bound = model.calibration.asked.get("max_disagreement")
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "shifts")}
    notes = open_notebook(options.json, {**settings, "weights": model.fingerprint(), "bound": bound}, "--json")
    torch.manual_seed(0)
    data = open_dataset(options.data, options.data_root, options.split)
    studied: dict[str, SegmentationDataset] = {name: Shifted(data, SHIFTS[name]) for name in options.shifts}
    if options.other is not None:
        studied[options.other] = open_dataset(options.other, options.other_root, options.split)
    rows = [
        notes.once(name, partial(measure, CalibrationSet(model, own, drawn(len(own), options.limit, 0)), name))
        for name, own in studied.items()
    ]
    print(table(rows, bound))


if __name__ == "__main__":
    main()
