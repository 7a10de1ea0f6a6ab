"""A method of one's own is one class and one line: every room then takes it, though none has heard of it.

The toy lets tokens leave at random, each with probability 1 - threshold, whatever it shows.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.calibration.test_dense_pass import Noise
from tests.helpers import random_image, tiny_segmenter
from tests.training.tiny import write_dataset
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.targets import Budget
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.cli import main, method_options
from tokenexit.engine.tokens import Packing
from tokenexit.errors import ConfigError
from tokenexit.exporting.export import export_model
from tokenexit.methods import METHODS, Dense, DToP, Gated, Method, build_method, register, spec_of
from tokenexit.methods.base import option
from tokenexit.methods.thresholded import Graded
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.choices import Choices

Captured = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class RandomExits(DToP):
    """DToP whose exits are drawn at random: a token leaves with probability 1 - threshold."""

    name: ClassVar[str] = "random_exits"
    title: ClassVar[str] = "Random exits"

    draw: int = option(0, "number of the random draw")

    def decide(self, n: int, graded: Graded, live: Tensor) -> Tensor:
        cells = Packing.of([h * w for h, w in graded.grids], graded.score.device)
        position = torch.arange(len(graded.score)) if graded.position is None else graded.position
        place = position - cells.offsets[:-1].long().index_select(0, graded.packing.image_index())
        mark = (place.double() * 12.9898 + 78.233 * (n + 1) + self.draw).sin() * 43758.5453
        return super().decide(n, replace(graded, score=mark - mark.floor()), live)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(RandomExits)
    yield
    del METHODS["random_exits"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model of 3 classes and 2 exits."""
    tiny_segmenter("fcn", num_classes=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_toy__is_built_by_name_and_leaves_at_its_rate() -> None:
    method = build_method({"name": "random_exits", "threshold": 0.25, "draw": 3, "keep_per_class": 1})
    assert build_method(spec_of(method)) == method == RandomExits(0.25, 1, draw=3)
    model = tiny_segmenter("fcn").eval()
    images = [random_image(64, 64, seed=seed) for seed in range(2)]
    with torch.no_grad():
        together = model(images, method)
        alone = [model([image], method).exit_index[0] for image in images]
    assert all(torch.equal(a, b) for a, b in zip(alone, together.exit_index))
    left = torch.stack(list(together.exit_index)).eq(0).float().mean().item()
    assert left == pytest.approx(0.75, abs=0.08)


def test_toy__is_calibrated() -> None:
    model = tiny_segmenter("fcn").eval()
    result = calibrate(
        CalibrationSet(model, Noise(6, ((16, 20),)), range(6)), RandomExits(draw=3), Budget("budget", 0.9)
    )
    assert isinstance(result.method, Mapping)
    assert (result.method["name"], result.method["draw"]) == ("random_exits", 3)
    assert result.reached["share_of_dense"] <= 0.9


def test_toy__is_exported(tmp_path: Path) -> None:
    model = tiny_segmenter("fcn", exits=(1,))
    made = export_model(model, RandomExits(0.5, 1), [random_image(12, 20)], tmp_path, "torch")
    assert made.runs == 3  # with its own thresholds, with nobody leaving and with all who may: exits are the model's


def test_toy__is_served() -> None:
    choices = Choices(tiny_segmenter("fcn"))
    offer = next(offer for offer in choices.offers() if offer.name == "random_exits")
    assert (offer.title, offer.refusal) == ("Random exits", None)
    assert choices.choose("random_exits", "0.5/0.4") == RandomExits((0.5, 0.4))
    dialled = choices.choose("random_exits", compute=1.0)
    assert dialled.thresholds == (1.0, 1.0)


def test_toy__answers_over_http() -> None:
    pytest.importorskip("fastapi")
    from tests.serving.live import png, running, small_model

    with running(small_model()) as client:
        (found,) = client.predict(("a.png", png()), method="random_exits", threshold="0.5").json
        assert (found["method"], found["threshold"]) == ("random_exits", [0.5, 0.5])
        assert "random_exits" in [offer["name"] for offer in client.get("/model").json["methods"]]


def test_toy__is_calibrated_evaluated_and_used_on_the_command_line(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 8)
    data = ["--data", "folder", "--data-root", str(write_dataset(tmp_path / "data"))]
    asked = ["--method", "random_exits", "--draw", "7"]
    figures = ["--json", str(tmp_path / "figures.json")]
    assert main(["evaluate", str(model), *data, *asked, "--threshold", "0.5", *figures]) == 0
    (row,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert row["label"] == "random_exits 0.5 draw=7"
    assert row["share_of_dense"] < 1.0
    assert main(["calibrate", str(model), *data, *asked, "--budget", "95%"]) == 0
    assert main(["evaluate", str(model), *data, *figures]) == 0
    (row,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert (row["method"]["name"], row["method"]["draw"]) == ("random_exits", 7)
    capsys.readouterr()
    assert main(["evaluate", str(model), *data, "--method", "dtop", "--draw", "7"]) == 2
    assert capsys.readouterr().err.startswith("tokenexit evaluate: --draw is no option of dtop: ")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("tokenexit predict m i.png --method ra", "random_exits"),
        ("tokenexit evaluate m --dr", "--draw"),
    ],
)
def test_toy__appears_in_completion(line: str, answer: str, tmp_path: Path) -> None:
    code = "from tests.methods.test_toy import RandomExits, register, main; register(RandomExits); main()"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    out = {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked, **out}, timeout=120, check=False)
    assert (tmp_path / "answer").read_text().strip() == answer


def test_toy__in_the_folder_of_methods_is_one_file_and_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Help and completion, which read the source and import nothing, find it there."""
    folder = tmp_path / "methods"
    shutil.copytree(method_options.FOLDER, folder)
    (folder / "random_exits.py").write_text(inspect.getsource(RandomExits))
    registry = (folder / "__init__.py").read_text()
    assert "PAUMER, FixedRatio" in registry
    (folder / "__init__.py").write_text(registry.replace("PAUMER, FixedRatio", "PAUMER, RandomExits, FixedRatio"))
    monkeypatch.setattr(method_options, "FOLDER", folder)
    found = method_options._written.__wrapped__()
    names = [option.name for option in found["random_exits"]]
    assert {"threshold", "keep_per_class", "draw"} <= set(names)
    assert names == [option.name for option in method_options._imported()["random_exits"]]  # type: ignore[index]


class _Bare(Method[Any]):
    name: ClassVar[str] = "bare"
    title: ClassVar[str] = "Bare"


@dataclass(frozen=True)
class _Namesake(DToP):
    name: ClassVar[str] = "dense"


@pytest.mark.parametrize(
    ("kind", "words"),
    [(int, "is no method"), (_Bare, "is no whole dataclass"), (_Namesake, "'dense' is registered already"),
     (replace(Dense()), "is no method")],
    ids=["int", "abstract", "taken", "value"],
)  # fmt: skip
def test_register__refuses_what_is_no_method_and_names_that_are_taken(kind: Any, words: str) -> None:
    before = dict(METHODS)
    with pytest.raises(ConfigError, match=words):
        register(kind)
    assert before == METHODS


def test_register__is_a_decorator_and_may_be_repeated() -> None:
    assert register(RandomExits) is RandomExits
    assert METHODS["random_exits"] is RandomExits
    with pytest.raises(ConfigError, match="registered already"):
        register(type("Other", (Gated,), {}))


def test_a_saved_calibration_of_the_toy_is_read_again(model: Path) -> None:
    own = ExitSegmenter.from_pretrained(model)
    own.calibration = Calibration(model=own.fingerprint(), method=spec_of(RandomExits((0.5, 0.4), draw=2)))
    assert own.calibrated_method() == RandomExits((0.5, 0.4), draw=2)
