"""The quickstart, shortened to seconds."""

from __future__ import annotations

import json
import re
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of a few steps on a few small scenes."""
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "SIZE", (32, 48))
        patch.setattr(quickstart, "pace", lambda seconds, seed: (3, "fp32"))
        patch.setattr(quickstart, "TUNE_IMAGES", 2)
        patch.setattr(quickstart, "TEST_IMAGES", 4)
        patch.setattr(quickstart, "SHOWN_IMAGES", 2)
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


def test_quickstart__refuses_no_time_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--minutes 0"):
        quickstart.run_quickstart(tmp_path, minutes=0)
