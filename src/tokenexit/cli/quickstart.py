"""The main job on drawn street scenes: train one model for Dense, DToP and DoViT, calibrate, report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenexit.cli.options import command_parser
from tokenexit.errors import ConfigError

if TYPE_CHECKING:
    from tokenexit.data.base import SegmentationDataset
    from tokenexit.evaluation.results import Evaluation
    from tokenexit.inputs.labels import Labels
    from tokenexit.methods import Method
    from tokenexit.report.html import Block, Figure, Section
    from tokenexit.segmenter import ExitSegmenter
    from tokenexit.training.recipes import Precision


BUDGET = 0.7
"""Share of dense multiply-adds that thresholds are calibrated for."""
PHOTOS, ADAPT_BUDGET = 80, 0.5
"""Scenes that the same model, without its exits, is adapted on, and for which share of dense multiply-adds."""
TUNE_IMAGES, TEST_IMAGES, SHOWN_IMAGES = 24, 80, 6
MEASURED_STEPS = 6


def run_quickstart(out: Path, minutes: float = 2.5, seed: int = 0) -> list[Evaluation]:
    """Train for about `minutes`, calibrate on the val split, compare on the test split, write a report.

    DToP's calibration is saved with the model. Prints one table and the paths of what it wrote. Safe to interrupt: a
    second call starts anew.
    """
    from tokenexit.calibration.calibrate import calibrate
    from tokenexit.calibration.calibration_set import CalibrationSet
    from tokenexit.calibration.store import write_calibration
    from tokenexit.calibration.targets import Budget
    from tokenexit.data.registry import open_dataset
    from tokenexit.evaluation.evaluate import evaluate
    from tokenexit.methods import Dense, DoViT, DToP, build_method
    from tokenexit.report.evaluations import main_table
    from tokenexit.training.loop import train
    from tokenexit.training.recipes import SIZE, scene_recipe

    if minutes <= 0:
        raise ConfigError(f"--minutes {minutes} must be positive.")
    from rich.console import Console
    from rich.progress import track

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print("one small ViT for three methods, on street scenes drawn as training goes")
    steps, precision = pace(minutes * 60, seed)
    console.print(f"{steps} steps in {precision}, the faster precision here, take about {minutes:g} minutes")
    model = train(scene_recipe(out / "model", steps, precision, seed), say=console.print)

    tune = open_dataset("scenes", None, "val", length=TUNE_IMAGES, size=SIZE)
    test = open_dataset("scenes", None, "test", length=TEST_IMAGES, size=SIZE)
    calibration_set, about = CalibrationSet(model, tune, range(TUNE_IMAGES)), {"data": "scenes", "split": "val"}
    found = [calibrate(calibration_set, method, Budget("budget", BUDGET), about=about) for method in (DToP(), DoViT())]
    write_calibration(found[0], out / "model", out / "model")
    methods = [Dense(), *(build_method(one.method) for one in found)]
    console.print(
        f"calibrated on {TUNE_IMAGES} scenes of the val split: {', '.join(method.label for method in methods[1:])}"
    )
    results = evaluate(model, test, methods, progress=lambda images: track(images, description="evaluating"))

    console.print(main_table(results, spread=True).to_rich())
    paths = write_results(out, model, test, methods, results, steps)
    paths |= adapt_scenes(model, out, console.print)
    for name, path in paths.items():
        console.print(f"{name}: {path}", soft_wrap=True)
    return results


def pace(seconds: float, seed: int) -> tuple[int, Precision]:
    """The faster precision on this machine, and how many training steps fit into `seconds` with it."""
    from tokenexit.training.loop import train
    from tokenexit.training.recipes import PRECISIONS, scene_recipe

    with tempfile.TemporaryDirectory() as folder:
        recipe = scene_recipe(Path(folder), MEASURED_STEPS, "fp32", seed)
        train(recipe, say=lambda line: None, progress=False)  # the first pass warms caches and is not timed
        times: dict[Precision, float] = {}
        for precision in PRECISIONS:
            start = time.monotonic()
            train(scene_recipe(Path(folder), MEASURED_STEPS, precision, seed), say=lambda line: None, progress=False)
            times[precision] = time.monotonic() - start
    fastest = min(PRECISIONS, key=lambda precision: times[precision])
    return max(MEASURED_STEPS, int(seconds * MEASURED_STEPS / times[fastest])), fastest


def write_results(
    out: Path,
    model: ExitSegmenter,
    data: SegmentationDataset,
    methods: Sequence[Method[Any]],
    results: Sequence[Evaluation],
    steps: int,
) -> dict[str, Path]:
    """Report, figures and some scenes, alone and beside what came of them; returns their paths by what they are."""
    from tokenexit.prediction.predict_files import save_atomically
    from tokenexit.report.evaluations import write_json
    from tokenexit.report.examples import example
    from tokenexit.report.html import write_report
    from tokenexit.report.pictures import panel

    names = data.labels.names
    write_json(out / "results.json", results, names, {"data": "scenes", "split": "test", "steps": steps})
    rows = [example(model, data[i], methods, data.labels) for i in range(min(SHOWN_IMAGES, len(data)))]
    scenes, images = out / "scenes", out / "pictures"
    for folder in (scenes, images):
        folder.mkdir(parents=True, exist_ok=True)
    for i, figures in enumerate(rows):
        save_atomically(data[i].image, scenes / f"scene-{i}.png")
        sheet = panel([(figure.caption, figure.image) for figure in figures], height=256)
        save_atomically(sheet, images / f"scene-{i}.png")
    report = write_report(
        out / "report.html",
        "Where the compute went",
        report_sections(model, data.labels, rows, results, steps),
        summary=summary(results),
        footer="Made by tokenexit quickstart.",
    )
    paths = {"model": out / "model", "scenes": scenes, "pictures": images}
    return {**paths, "figures": out / "results.json", "report": report}


def adapt_scenes(model: ExitSegmenter, out: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Adapt the model without its exits, as a user's own would be; returns the paths of what was written."""
    from tokenexit.adaptation.adapt import adapt_model
    from tokenexit.adaptation.page import write_page
    from tokenexit.calibration.targets import Budget
    from tokenexit.cli.progress import progress_bars
    from tokenexit.data.registry import open_dataset
    from tokenexit.prediction.predict_files import save_atomically
    from tokenexit.training.recipes import SIZE

    say(f"now as if the model had no exits: adapted on {PHOTOS} scenes without labels")
    photos, cheaper = out / "photos", out / "cheaper"
    scenes = open_dataset("scenes", None, "train", length=PHOTOS, size=SIZE)
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(PHOTOS):
        save_atomically(scenes[i].image, photos / f"scene-{i:03}.png")
    found = adapt_model(model, [photos], Budget("budget", ADAPT_BUDGET), cheaper, say=say, progress=progress_bars())
    page = write_page(found, cheaper / "report.html", command=f"tokenexit adapt {out / 'model'} --images {photos} ...")
    say(found.measured.sentence())
    return {"photos": photos, "cheaper model": cheaper, "its report": page}


def summary(results: Sequence[Evaluation]) -> str:
    dense, *others = results
    said = [
        f"{r.method.name} uses {1 - r.share_of_dense:.0%} fewer multiply-adds than Dense "
        f"at {r.scores.miou - dense.scores.miou:+.2f} mIoU"
        for r in others
    ]
    return f"On {len(dense.gmacs)} held-out street scenes, {' and '.join(said)}."


def report_sections(
    model: ExitSegmenter,
    labels: Labels,
    rows: Sequence[Sequence[Figure]],
    results: Sequence[Evaluation],
    steps: int,
) -> list[Section]:
    import torch

    from tokenexit.report.chart import Point, Series, line_chart_svg
    from tokenexit.report.evaluations import class_table, main_table
    from tokenexit.report.html import Chart, Facts, FigureRow, Legend, Section
    from tokenexit.report.pictures import exit_legend
    from tokenexit.report.tables import Swatch

    others = results[1:]
    facts = [(f"{r.share_of_dense:.0%}", f"of dense multiply-adds, {r.label}") for r in others]
    series = [Series(r.method.name, [Point(r.gmacs_mean, r.scores.miou)]) for r in results]
    chart = line_chart_svg(series, x_label="GMACs per image", y_label="mIoU, percent")
    classes = [Swatch(name, colour) for name, colour in zip(labels.names, labels.palette)]
    exits = exit_legend(len(model.config.exits), model.config.exits)
    examples: list[Block] = [Legend("Classes", classes), Legend("Exits", exits)]
    for i, figures in enumerate(rows):
        examples += [FigureRow(figures[:3], title=f"Scene {i + 1}"), FigureRow(figures[3:])]
    how = (
        f"One ViT of {model.config.backbone.depth} blocks with exits after blocks "
        f"{', '.join(map(str, model.config.exits))} was trained for {steps} steps on scenes drawn by a program; "
        "each step ran Dense, DToP or DoViT. Thresholds, one per exit, were calibrated without labels so that the mean "
        f"multiply-adds on {TUNE_IMAGES} scenes of the val split are at most {BUDGET:.0%} of dense. All figures are "
        f"from the test split; milliseconds are those of this machine with {torch.get_num_threads()} threads."
    )
    return [
        Section("Result", [Facts(facts), main_table(results, spread=True), Chart(chart)]),
        Section("Scenes", examples),
        Section("Classes", [class_table(results, labels.names)]),
        Section("How it was made", [how]),
    ]


def quickstart(arguments: list[str]) -> int:
    parser = command_parser("quickstart", "Train on drawn street scenes and compare Dense, DToP and DoViT in a report.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for the model and the report")
    parser.add_argument("--minutes", type=float, default=2.5, help="approximate time of training")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args(arguments)

    run_quickstart(options.out, minutes=options.minutes, seed=options.seed)
    return 0
