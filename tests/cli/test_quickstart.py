"""The quickstart, shortened to seconds."""

from __future__ import annotations

import io
import json
import re
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenexit.cli import quickstart
from tokenexit.data.registry import open_dataset
from tokenexit.errors import ConfigError
from tokenexit.evaluation.evaluate import evaluate
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training import recipes
from tokenexit.training.config import TrainConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of a few steps on a few small scenes."""
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "SIZE", (32, 48))
        patch.setattr(recipes, "WARMUP_SHARE", 10.0)  # a model that has hardly begun sees one class, of which few stay
        patch.setattr(quickstart, "BATCHES", {8: 1.0})
        patch.setattr(quickstart, "pace", lambda seconds, seed: (3, "fp32"))
        patch.setattr(quickstart, "TUNE_IMAGES", 2)
        patch.setattr(quickstart, "TEST_IMAGES", 4)
        patch.setattr(quickstart, "SHOWN_IMAGES", 2)
        patch.setattr(quickstart, "forward_seconds", lambda model: 1e-6)
        results = quickstart.run_quickstart(out, minutes=1, seed=0)
    return {"out": out, "results": results}


def test_quickstart__compares_the_three_methods_on_held_out_scenes(finished: dict[str, Any]) -> None:
    assert [result.method.name for result in finished["results"]] == ["dense", "dtop", "dovit"]
    assert all(len(result.gmacs) == 4 for result in finished["results"])
    figures = json.loads((finished["out"] / "results.json").read_text())
    assert [row["method"]["name"] for row in figures["results"]] == ["dense", "dtop", "dovit"]
    assert figures["about"]["split"] == "test"


def test_quickstart__writes_a_report_that_needs_no_other_file(finished: dict[str, Any]) -> None:
    page = (finished["out"] / "report.html").read_text()
    assert page.count("<img") == 2 * 7
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_quickstart__writes_an_image_for_every_shown_scene(finished: dict[str, Any]) -> None:
    for folder in ("scenes", "pictures"):
        names = sorted(path.name for path in (finished["out"] / folder).iterdir())
        assert names == ["scene-0.png", "scene-1.png"]
    assert Image.open(finished["out"] / "scenes" / "scene-0.png").size == (48, 32)


def test_quickstart__leaves_a_model_that_loads(finished: dict[str, Any]) -> None:
    model = ExitSegmenter.from_pretrained(finished["out"] / "model")
    assert model.preprocessing.labels is not None
    assert model.preprocessing.labels.names[0] == "sky"


def test_quickstart__saves_the_calibration_that_it_compared(finished: dict[str, Any]) -> None:
    model = ExitSegmenter.from_pretrained(finished["out"] / "model")
    assert model.calibration is not None
    assert model.calibrated_method() == finished["results"][1].method
    assert model.calibration.asked["budget"] == quickstart.BUDGET
    assert model.calibration.images == {"data": "scenes", "split": "val", "count": 2}


def test_quickstart__keeps_the_budget_with_a_threshold_for_each_exit(finished: dict[str, Any]) -> None:
    model = ExitSegmenter.from_pretrained(finished["out"] / "model")
    tuned_on = open_dataset("scenes", None, "val", length=2, size=(32, 48))
    methods = [result.method for result in finished["results"][1:]]
    assert all(len(method.threshold) == 3 for method in methods)
    for result in evaluate(model, tuned_on, methods):
        assert quickstart.BUDGET * 0.9 < result.share_of_dense <= quickstart.BUDGET


def test_quickstart__reports_the_numbers_of_scenes_that_there_were(finished: dict[str, Any]) -> None:
    page = (finished["out"] / "report.html").read_text()
    assert "multiply-adds on 2 scenes of the val split" in page
    assert "figures are from 4 scenes of the test split" in page
    assert len(list((finished["out"] / "photos").iterdir())) == quickstart.PHOTOS
    assert (finished["out"] / "cheaper" / "report.html").exists()


@pytest.fixture(scope="module")
def on_a_slow_machine(finished: dict[str, Any]) -> dict[str, Any]:
    """A second call to the same folder, on a machine whose forward pass takes a minute, as its clock says."""
    out, said = finished["out"], io.StringIO()
    before = {folder: len(list((out / folder).iterdir())) for folder in ("scenes", "pictures")}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(recipes, "SIZE", (32, 48))
        patch.setattr(recipes, "WARMUP_SHARE", 10.0)  # a model that has hardly begun sees one class, of which few stay
        patch.setattr(quickstart, "BATCHES", {8: 1.0})
        patch.setattr(quickstart, "pace", lambda seconds, seed: (3, "fp32"))
        for name, count in {"TUNE_IMAGES": 6, "TEST_IMAGES": 8, "SHOWN_IMAGES": 2}.items():
            patch.setattr(quickstart, name, count)
        for name, count in {"FEWEST_TUNE": 2, "FEWEST_TEST": 3, "FEWEST_SHOWN": 1}.items():
            patch.setattr(quickstart, name, count)
        patch.setattr(quickstart, "forward_seconds", lambda model: 60.0)
        results = quickstart.run_quickstart(out, minutes=1, seed=0)
    return {"out": out, "results": results, "said": " ".join(said.getvalue().split()), "before": before}


@pytest.mark.usefixtures("finished")
def test_a_slow_machine__takes_fewer_scenes_and_says_the_true_numbers(on_a_slow_machine: dict[str, Any]) -> None:
    said = on_a_slow_machine["said"]
    assert "calibrated on 2 scenes of the val split in place of 6, as this machine is slow or busy" in said
    assert "evaluated on 3 scenes of the test split in place of 8, as this machine is slow or busy" in said
    assert all(len(result.gmacs) == 3 for result in on_a_slow_machine["results"])
    page = (on_a_slow_machine["out"] / "report.html").read_text()
    assert "was trained for 3 steps of 8 scenes drawn by a program" in page
    assert "On 3 held-out street scenes" in page
    assert "multiply-adds on 2 scenes of the val split" in page
    assert "figures are from 3 scenes of the test split" in page
    model = ExitSegmenter.from_pretrained(on_a_slow_machine["out"] / "model")
    assert model.calibration is not None
    assert model.calibration.images["count"] == 2


def test_a_slow_machine__leaves_out_what_cannot_be_had_in_time_and_says_so(on_a_slow_machine: dict[str, Any]) -> None:
    said = on_a_slow_machine["said"]
    assert "not adapted as if it had no exits: the 60 scenes that it takes would take too long on this machine" in said
    assert "its report" not in said


def test_a_second_call__leaves_no_scenes_of_the_first(on_a_slow_machine: dict[str, Any]) -> None:
    assert on_a_slow_machine["before"] == {"scenes": 2, "pictures": 2}
    for folder in ("scenes", "pictures"):
        assert [path.name for path in (on_a_slow_machine["out"] / folder).iterdir()] == ["scene-0.png"]


class Clock:
    """A clock that only work moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def slow_training(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[int]:
    """Trainings take so many seconds a step on a fabricated clock; returns the steps of each, as they happen."""
    clock, trained, speed = Clock(monkeypatch), [], {"fp32": fp32, "bf16": bf16}

    def train(recipe: TrainConfig, **_: Any) -> None:
        trained.append(recipe.steps)
        clock.now += recipe.steps * speed[recipe.precision]

    monkeypatch.setattr("tokenexit.training.loop.train", train)
    return trained


def test_pace__takes_the_faster_precision_and_the_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = slow_training(monkeypatch, fp32=0.25, bf16=0.125)
    assert quickstart.pace(60, 0) == (480, "bf16")
    assert trained == [2, 2, 6, 6]


def test_pace__measures_fewer_steps_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = slow_training(monkeypatch, fp32=5.0, bf16=10.0)
    assert quickstart.pace(100, 0) == (20, "fp32")
    assert trained == [2, 2, 3, 3]


Course = quickstart.Course


@pytest.mark.parametrize(
    ("fitting", "course"),
    [
        (500, Course(500, 8, 2.5)),
        (240, Course(240, 8, 2.5)),
        (200, Course(240, 8, 3.0)),
        (130, Course(round(130 * 1.6 * 2 / 1.05), 4, 4.0)),
        (70, Course(round(70 * 1.6 * 4 / 1.2), 2, 4.0)),
        (6, Course(32, 2, 4.0)),
    ],
)
def test_course_of__a_slow_machine_is_longer_and_of_smaller_batches(fitting: int, course: quickstart.Course) -> None:
    assert quickstart.course_of(fitting, None) == pytest.approx(course)


@pytest.mark.parametrize("minutes", [0.5, 10.0])
def test_course_of__takes_the_time_that_was_asked_for(minutes: float) -> None:
    assert quickstart.course_of(100, minutes) == (round(400 / 1.2), 2, minutes)
    assert quickstart.course_of(1000, minutes) == (1000, 8, minutes)


def test_course_of__full_batches_are_those_of_the_recipe(tmp_path: Path) -> None:
    assert max(quickstart.BATCHES) == recipes.scene_recipe(tmp_path, 1, "fp32", 0).batch_size


def test_in_time__takes_the_steps_of_smaller_batches_that_fit_by_their_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = slow_training(monkeypatch, fp32=1.5, bf16=1.5)
    assert quickstart.in_time(Course(331, 2, 4.0), "bf16", 0) == Course(160, 2, 4.0)
    assert quickstart.in_time(Course(100, 2, 4.0), "bf16", 0) == Course(100, 2, 4.0)
    assert trained == [6, 6]
    assert quickstart.in_time(Course(331, 8, 4.0), "bf16", 0) == Course(331, 8, 4.0)
    assert trained == [6, 6]


class Stop(Exception):
    """Ends a quickstart where there is nothing more to see."""


def planned(monkeypatch: pytest.MonkeyPatch, out: Path, minutes: float | None, steps: int) -> tuple[str, int, float]:
    """What a quickstart says of its training, its scenes, and the seconds from its begin after which all shall be done.

    steps: those that fit. Finding that out takes half a minute, and the training three.
    """
    clock, trained, ends = Clock(monkeypatch), [], []
    begun = clock.now

    def pace(seconds: float, seed: int) -> tuple[int, str]:
        clock.now += 30.0
        return steps, "fp32"

    def train(recipe: TrainConfig, say: Any, progress: bool = True) -> None:
        trained.append(recipe.steps * recipe.batch_size)
        clock.now += 180.0 if progress else 0.0  # a measurement shows none

    def calibrated(model: Any, saved: Path, allowance: Any, say: Any) -> None:
        ends.append(allowance.end - begun)
        raise Stop

    monkeypatch.setattr(quickstart, "pace", pace)
    monkeypatch.setattr("tokenexit.training.loop.train", train)
    monkeypatch.setattr(quickstart, "calibrated_methods", calibrated)
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(Stop):
        quickstart.run_quickstart(out, minutes)
    return " ".join(said.getvalue().split()), trained[-1], ends[0]


def test_quickstart__on_a_slow_machine_trains_for_longer_within_the_same_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said, scenes, end = planned(monkeypatch, tmp_path, None, steps=130)
    assert scenes == 396 * 4
    assert "396 steps of 4 scenes in fp32, the faster precision here, take about 4 minutes in place of 2.5" in said
    assert "as this machine is slow or busy" in said
    assert end == pytest.approx(60 * quickstart.ALL_MINUTES)


def test_quickstart__on_a_fast_machine_trains_as_long_as_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said, scenes, end = planned(monkeypatch, tmp_path, None, steps=400)
    assert scenes == 400 * 8
    assert said.endswith("take about 2.5 minutes")
    assert end == pytest.approx(60 * quickstart.ALL_MINUTES)


@pytest.mark.parametrize(("minutes", "after"), [(1.0, 3.5), (10.0, 10.0)])
def test_quickstart__takes_the_time_that_was_asked_for_however_slow_the_machine(
    minutes: float, after: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said, scenes, end = planned(monkeypatch, tmp_path, minutes, steps=100)
    assert scenes == 333 * 2
    assert said.endswith(f"take about {minutes:g} minutes")
    assert end == pytest.approx(30 + 180 + 60 * after)


def test_forward_seconds__is_the_median_of_some_after_one_that_warms(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), iter([90.0, 3.0, 50.0, 2.0])

    class Model:
        def predict(self, image: Image.Image, method: Any) -> None:
            clock.now += next(times)

    assert quickstart.forward_seconds(Model()) == 3.0  # type: ignore[arg-type]


def test_quickstart__refuses_no_time_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--minutes 0"):
        quickstart.run_quickstart(tmp_path, minutes=0)
