"""The main job on drawn street scenes: train one model for Dense, DToP and DoViT, calibrate, report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenexit.cli.allowance import Allowance
from tokenexit.cli.options import add_threads_option, command_parser, start_threads
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
FEWEST_TUNE, FEWEST_TEST, FEWEST_SHOWN = 6, 12, 2
"""Scenes of each phase, and those that it takes however slow the machine is."""
CALIBRATING, EVALUATING, SHOWING, ADAPTING = 50.0, 4.0, 8.0, 16.0
"""Time of one scene in each phase, in forward passes of the dense model; measured."""
MINUTES, MINUTES_AFTER = 2.5, 3.5
"""Minutes of training, and of all that follows; a longer training gives the same to both."""
LONGEST, ALL_MINUTES = 4.0, 7.0
"""Minutes of training on a slow machine, at most, and of the whole command, where no time was asked for."""
ENOUGH_STEPS = 240
"""Steps of training for which a slow machine takes longer, and smaller batches."""
BATCHES = {8: 1.0, 4: 1.05, 2: 1.2}
"""Sizes of batches, and the time of a scene in them as a multiple of that in the first; measured."""


class Course(NamedTuple):
    """How a model is trained: number of steps, scenes of each, and minutes that they take."""

    steps: int
    batch_size: int
    minutes: float


MEASURED_STEPS, WARMING_STEPS = 6, 2
MEASURING = 0.15
"""Share of the training's time for which each precision is measured."""


@dataclass(frozen=True)
class Made:
    """What the report says of how its figures came about: the training, and scenes that thresholds were chosen on."""

    course: Course
    tune_images: int


def run_quickstart(out: Path, minutes: float | None = None, seed: int = 0) -> list[Evaluation]:
    """Train for about `minutes`, calibrate on the val split, compare on the test split, write a report.

    What follows the training gets `MINUTES_AFTER`, or as long as that took if it is more. If no time is asked for, the
    training takes `MINUTES`, or more where few steps fit into them, and all together `ALL_MINUTES`. On a slow machine
    batches are smaller, what follows takes fewer scenes, and the model is not adapted.

    DToP's calibration is saved with the model. Prints one table and the paths of what it wrote. Safe to interrupt: a
    second call starts anew.
    """
    from tokenexit.data.registry import open_dataset
    from tokenexit.evaluation.evaluate import evaluate
    from tokenexit.report.evaluations import main_table
    from tokenexit.training.loop import train
    from tokenexit.training.recipes import SIZE, scene_recipe

    begun = time.monotonic()
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes {minutes} must be positive.")
    from rich.console import Console
    from rich.progress import track

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print("one small ViT for three methods, on street scenes drawn as training goes")
    fitting, precision = pace(60 * (minutes or MINUTES), seed)
    course = in_time(course_of(fitting, minutes), precision, seed)
    slow = f" in place of {MINUTES:g}, as this machine is slow or busy" if course.minutes > (minutes or MINUTES) else ""
    console.print(
        f"{course.steps} steps of {course.batch_size} scenes in {precision}, the faster precision here, take about "
        f"{course.minutes:.2g} minutes{slow}"
    )
    model = train(scene_recipe(out / "model", course.steps, precision, seed, course.batch_size), say=console.print)

    end = time.monotonic() + 60 * max(minutes, MINUTES_AFTER) if minutes else begun + 60 * ALL_MINUTES
    allowance = Allowance(end, lambda: forward_seconds(model))
    methods, tuned_on = calibrated_methods(model, out / "model", allowance, console.print)
    count = allowance.images(TEST_IMAGES, FEWEST_TEST, EVALUATING, later=SHOWN_IMAGES * SHOWING)
    test = open_dataset("scenes", None, "test", length=count, size=SIZE)
    console.print(f"evaluated on {count} scenes of the test split{fewer(count, TEST_IMAGES)}")
    results = evaluate(model, test, methods, progress=lambda images: track(images, description="evaluating"))

    console.print(main_table(results, spread=True).to_rich())
    shown = min(allowance.images(SHOWN_IMAGES, FEWEST_SHOWN, SHOWING), count)
    paths = write_results(out, model, test, methods, results, Made(course, tuned_on), shown)
    paths |= adapt_scenes(model, out, allowance, console.print)
    for name, path in paths.items():
        console.print(f"{name}: {path}", soft_wrap=True)
    return results


def pace(seconds: float, seed: int) -> tuple[int, Precision]:
    """The faster precision on this machine, and how many training steps fit into `seconds` with it.

    On a slow machine fewer steps are measured, so that measuring takes no more than a part of the training's time.
    """
    from tokenexit.training.recipes import PRECISIONS

    with tempfile.TemporaryDirectory() as folder:
        timed_steps(Path(folder), WARMING_STEPS, "fp32", seed)  # warms caches and says no more than the order
        warm = timed_steps(Path(folder), WARMING_STEPS, "fp32", seed) / WARMING_STEPS
        measured = min(MEASURED_STEPS, max(WARMING_STEPS, int(MEASURING * seconds / max(warm, 1e-6))))
        times = {precision: timed_steps(Path(folder), measured, precision, seed) for precision in PRECISIONS}
    fastest = min(PRECISIONS, key=lambda precision: times[precision])
    return max(MEASURED_STEPS, int(seconds * measured / times[fastest])), fastest


def course_of(fitting: int, minutes: float | None) -> Course:
    """The training where so many steps of full batches fit into `minutes`, or into `MINUTES` if none are asked for.

    A few large steps teach a model very little: in a minute of one core, 118 steps of 8 scenes gave 30.5 mIoU, 225 of 4
    gave 35.3 and 343 of 2 gave 36.6.
    """
    longer = 1.0 if minutes else min(LONGEST / MINUTES, max(1.0, ENOUGH_STEPS / fitting))
    scenes = longer * fitting * max(BATCHES)
    for batch_size, each in BATCHES.items():
        steps = round(scenes / (each * batch_size))
        if steps >= ENOUGH_STEPS:
            break
    return Course(steps, batch_size, longer * (minutes or MINUTES))


def in_time(course: Course, precision: Precision, seed: int) -> Course:
    """The same with as many steps as fit into its time by a measurement of its own, if its batches are smaller.

    Where others keep cores busy, threads wait for each other once an operation, however small the batch.
    """
    if course.batch_size == max(BATCHES):
        return course
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_steps(Path(folder), MEASURED_STEPS, precision, seed, course.batch_size) / MEASURED_STEPS
    fitting = int(60 * course.minutes / max(seconds, 1e-6))
    return course._replace(steps=max(MEASURED_STEPS, min(course.steps, fitting)))


def timed_steps(folder: Path, steps: int, precision: Precision, seed: int, batch_size: int = max(BATCHES)) -> float:
    """Seconds of a training of so many steps."""
    from tokenexit.training.loop import train
    from tokenexit.training.recipes import scene_recipe

    start = time.monotonic()
    train(scene_recipe(folder, steps, precision, seed, batch_size), say=lambda line: None, progress=False)
    return time.monotonic() - start


def forward_seconds(model: ExitSegmenter) -> float:
    """Seconds in which the dense model predicts one scene here and now: the median of three, after one that warms."""
    from tokenexit.data.registry import open_dataset
    from tokenexit.methods import Dense
    from tokenexit.training.recipes import SIZE

    image, times = open_dataset("scenes", None, "val", length=1, size=SIZE)[0].image, []
    for _ in range(4):
        start = time.monotonic()
        model.predict(image, Dense())
        times.append(time.monotonic() - start)
    return max(median(times[1:]), 1e-6)


def calibrated_methods(
    model: ExitSegmenter, saved: Path, allowance: Allowance, say: Callable[[str], None]
) -> tuple[list[Method[Any]], int]:
    """Dense, DToP and DoViT with thresholds for the budget, and the number of scenes they were chosen on.

    DToP's calibration is written to the saved model.
    """
    from tokenexit.calibration.calibrate import calibrate
    from tokenexit.calibration.calibration_set import CalibrationSet
    from tokenexit.calibration.store import write_calibration
    from tokenexit.calibration.targets import Budget
    from tokenexit.data.registry import open_dataset
    from tokenexit.methods import Dense, DoViT, DToP, build_method
    from tokenexit.training.recipes import SIZE

    later = TEST_IMAGES * EVALUATING + SHOWN_IMAGES * SHOWING
    count = allowance.images(TUNE_IMAGES, FEWEST_TUNE, CALIBRATING, later)
    tune = CalibrationSet(model, open_dataset("scenes", None, "val", length=count, size=SIZE), range(count))
    budget, about = Budget("budget", BUDGET), {"data": "scenes", "split": "val"}
    found = [calibrate(tune, method, budget, about=about) for method in (DToP(), DoViT())]
    write_calibration(found[0], saved, saved)
    methods = [build_method(one.method) for one in found]
    labels = ", ".join(method.label for method in methods)
    say(f"calibrated on {count} scenes of the val split{fewer(count, TUNE_IMAGES)}: {labels}")
    return [Dense(), *methods], count


def fewer(count: int, most: int) -> str:
    return "" if count == most else f" in place of {most}, as this machine is slow or busy"


def write_results(
    out: Path,
    model: ExitSegmenter,
    data: SegmentationDataset,
    methods: Sequence[Method[Any]],
    results: Sequence[Evaluation],
    made: Made,
    shown: int,
) -> dict[str, Path]:
    """Report, figures and so many scenes, alone and beside what came of them; returns their paths by what they are."""
    from tokenexit.prediction.predict_files import save_atomically
    from tokenexit.report.evaluations import write_json
    from tokenexit.report.examples import example
    from tokenexit.report.html import write_report
    from tokenexit.report.pictures import panel

    names = data.labels.names
    write_json(out / "results.json", results, names, {"data": "scenes", "split": "test", "steps": made.course.steps})
    rows = [example(model, data[i], methods, data.labels) for i in range(shown)]
    scenes, images = out / "scenes", out / "pictures"
    for folder in (scenes, images):
        new_scenes(folder)
    for i, figures in enumerate(rows):
        save_atomically(data[i].image, scenes / f"scene-{i}.png")
        sheet = panel([(figure.caption, figure.image) for figure in figures], height=256)
        save_atomically(sheet, images / f"scene-{i}.png")
    report = write_report(
        out / "report.html",
        "Where the compute went",
        report_sections(model, data.labels, rows, results, made),
        summary=summary(results),
        footer="Made by tokenexit quickstart.",
    )
    paths = {"model": out / "model", "scenes": scenes, "pictures": images}
    return {**paths, "figures": out / "results.json", "report": report}


def new_scenes(folder: Path) -> None:
    """Make a folder for scenes, without those of an earlier call, which may have been more."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene in folder.glob("scene-*.png"):
        scene.unlink()


def adapt_scenes(model: ExitSegmenter, out: Path, allowance: Allowance, say: Callable[[str], None]) -> dict[str, Path]:
    """Adapt the model without its exits, as a user's own would be; returns the paths of what was written.

    Leaves it out, and says so, where the time left is not enough for the fewest photos.
    """
    from tokenexit.adaptation.adapt import adapt_model
    from tokenexit.adaptation.page import write_page
    from tokenexit.adaptation.photos import FEWEST
    from tokenexit.calibration.targets import Budget
    from tokenexit.cli.progress import progress_bars
    from tokenexit.data.registry import open_dataset
    from tokenexit.prediction.predict_files import save_atomically
    from tokenexit.training.recipes import SIZE

    count = allowance.images(PHOTOS, 0, ADAPTING)
    if count < FEWEST:
        say(f"not adapted as if it had no exits: the {FEWEST} scenes that it takes would take too long on this machine")
        return {}
    say(f"now as if the model had no exits: adapted on {count} scenes without labels{fewer(count, PHOTOS)}")
    photos, cheaper = out / "photos", out / "cheaper"
    scenes = open_dataset("scenes", None, "train", length=count, size=SIZE)
    new_scenes(photos)
    for i in range(count):
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
    made: Made,
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
        f"{', '.join(map(str, model.config.exits))} was trained for {made.course.steps} steps of "
        f"{made.course.batch_size} scenes drawn by a program; each step ran Dense, DToP or DoViT. Thresholds, one per "
        "exit, were calibrated without labels so that the mean "
        f"multiply-adds on {made.tune_images} scenes of the val split are at most {BUDGET:.0%} of dense. All figures "
        f"are from {len(results[0].gmacs)} scenes of the test split; milliseconds are those of this machine with "
        f"{torch.get_num_threads()} threads."
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
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"approximate time of training; if not given {MINUTES:g}, and up to {LONGEST:g} on a slow machine",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    add_threads_option(parser)
    options = parser.parse_args(arguments)

    start_threads(options)
    run_quickstart(options.out, minutes=options.minutes, seed=options.seed)
    return 0
