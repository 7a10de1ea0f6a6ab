"""`tokenexit calibrate` and `tokenexit sweep` as a user types them, and what uses a calibration."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmarks import budgets, shift
from benchmarks import guarantee as experiment

from tests.calibration.test_dense_pass import Noise
from tests.cli.test_cli import fine, wrong
from tests.helpers import tiny_segmenter
from tokenexit.calibration import calibrate as calibration
from tokenexit.calibration import for_bound, planner
from tokenexit.calibration.agreement import fall_off_note
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, true_run
from tokenexit.calibration.temperature import fit_temperature
from tokenexit.cli import main
from tokenexit.inputs.labels import default_labels
from tokenexit.methods import DToP, build_method
from tokenexit.report import sweep as sweeping
from tokenexit.segmenter import ExitSegmenter

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PRICES", (0.0,))
    monkeypatch.setattr(for_bound, "PILOT_RUNS", 3)
    monkeypatch.setattr("tokenexit.calibration.threshold_path.LEVELS", 8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and a dataset of the same ones with masks."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    noise = Noise(12, ((16, 20),))
    for split in ("val", "test"):
        for kind in ("images", "annotations"):
            (root / "set" / kind / split).mkdir(parents=True)
        for i in range(12):
            sample = noise[i]
            sample.image.save(root / "set" / "images" / split / f"{i}.png")
            Image.fromarray(sample.mask.astype("uint8")).save(root / "set" / "annotations" / split / f"{i}.png")
    (root / "set" / "dataset.yaml").write_text(f"classes: {json.dumps(default_labels(5).names)}\n")
    shutil.copytree(root / "set" / "images" / "val", root / "plain")
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_segmenter().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def calibrated(capsys: Captured, model: Path, pictures: Path, *more: str) -> str:
    data = ("--images", pictures / "plain", "--keep-per-class", 1)
    return fine(capsys, "calibrate", model, *data, "--budget", 0.9, *more)


def test_calibrate__a_budget_may_be_written_in_percent(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    fine(capsys, "calibrate", model, "--images", pictures / "plain", "--budget", "90%", "--keep-per-class", 1)
    assert json.loads((model / "calibration.json").read_text())["asked"]["budget"] == 0.9


def test_calibrate__writes_to_the_model_and_says_what_it_reached(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = calibrated(capsys, model, pictures)
    content = json.loads((model / "calibration.json").read_text())
    assert content["promise"] in text
    assert f"{content['reached']['share_of_dense']:.1%} of dense" in text
    assert content["method"]["keep_per_class"] == 1
    assert content["images"] == {"data": str(pictures / "plain"), "count": 12}
    calibrated(capsys, model, pictures, "--out", str(tmp_path / "copy"))
    assert ExitSegmenter.from_pretrained(tmp_path / "copy").calibrated_method() is not None


def test_calibrate__says_where_agreement_with_dense_has_fallen_off(
    model: Path, pictures: Path, capsys: Captured
) -> None:
    text = calibrated(capsys, model, pictures)
    content = json.loads((model / "calibration.json").read_text())
    unlike = content["reached"]["pixels_unlike_dense"]
    assert unlike > 0.05  # weights drawn at random agree nowhere
    note = f"Agreement with dense has fallen off: {unlike:.1%} of the pixels of these 12 images are unlike"
    assert note in text
    assert note in content["promise"]
    by_class = ("--data", "folder", "--data-root", pictures / "set", "--cbt", 0.3, 0.6)
    assert "Agreement with dense has fallen off" in fine(capsys, "calibrate", model, *by_class)
    agreeing = ("--images", pictures / "plain", "--max-disagreement", 0.4, "--confidence", 0.7)
    text = fine(capsys, "calibrate", model, *agreeing)
    assert ("fallen off" in text) == (
        json.loads((model / "calibration.json").read_text())["reached"]["mean_loss"] > 0.05
    )
    assert fall_off_note(0.05, 12) == fall_off_note(float("nan"), 12) == ""


def test_calibrate__takes_a_bound_on_a_labelled_dataset(model: Path, pictures: Path, capsys: Captured) -> None:
    data = ("--data", "folder", "--data-root", pictures / "set", "--limit", 11, "--method", "dovit")
    text = fine(capsys, "calibrate", model, *data, "--max-error-increase", 0.4, "--confidence", 0.7, "--seed", 2)
    assert "With confidence 0.7 over the draw of" in text
    content = json.loads((model / "calibration.json").read_text())
    assert content["images"]["count"] == 11
    assert content["method"]["name"] == "dovit"


def test_calibrate__takes_class_based_thresholds_from_labels(model: Path, pictures: Path, capsys: Captured) -> None:
    data = ("--data", "folder", "--data-root", pictures / "set", "--keep-per-class", 0)
    text = fine(capsys, "calibrate", model, *data, "--cbt", 0.3, 0.6)
    content = json.loads((model / "calibration.json").read_text())
    thresholds = content["method"]["threshold"]
    assert [len(exit) for exit in thresholds] == [5, 5]
    assert (min(thresholds[0]), max(thresholds[0])) == (0.3, 0.6)
    assert content["asked"]["cbt"] == [0.3, 0.6]
    assert f"{content['reached']['share_of_dense']:.1%} of dense multiply-adds\n" in text
    assert ExitSegmenter.from_pretrained(model).calibrated_method() is not None


def test_calibrate__fits_temperatures_first_on_images_that_test_nothing(
    model: Path, pictures: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted_on: list[int] = []
    fit = fit_temperature

    def watched(calibration_set: Any) -> tuple[float, ...]:
        fitted_on.append(len(calibration_set))
        return fit(calibration_set)

    monkeypatch.setattr(calibration, "fit_temperature", watched)
    data = ("--data", "folder", "--data-root", pictures / "set", "--fit-temperature")
    text = fine(capsys, "calibrate", model, *data, "--budget", 0.9)
    content = json.loads((model / "calibration.json").read_text())
    assert f"temperatures: {'/'.join(map(str, content['method']['temperature']))}" in text
    fine(capsys, "calibrate", model, *data, "--max-disagreement", 0.4, "--confidence", 0.7)
    images = json.loads((model / "calibration.json").read_text())["images"]
    assert fitted_on == [12, images["path"]]
    assert images["path"] + images["test"] == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0.6", "--max-disagreement", "0.1"], "not allowed with"),
        (["--cbt", "0.9", "0.8"], "alpha=0.9 and beta=0.8 are no range"),
        (["--cbt", "0.8", "0.9", "--cap", "0.5"], "--cbt follows from labels alone"),
        (["--cbt", "0.8", "0.9"], "CBT needs the truth of training images"),
        (["--budget", "0.8", "--fit-temperature"], "a temperature is fitted to the truth"),
        (["--budget", "0.8", "--fit-temperature", "--temperature", "2"], "give one of the two"),
        ([], "one of the arguments --budget"),
        (["--budget", "0.01"], "out of reach"),
        (["--budget", "-1"], "budget=-1 must be above 0"),
        (["--budget", "60"], "budget=60 must be a share of dense, at most 1: write 0.6, or 60%."),
        (["--budget", "600"], "budget=600 must be a share of dense, at most 1: write 0.6, or 60%."),
        (["--budget", "6x%"], "invalid share value: '6x%'"),
        (["--budget", "0.8", "--threshold", "0.9"], "--threshold is what calibrate chooses: leave it out"),
        (["--cbt", "0.9", "0.99", "--threshold", "0.9"], "--threshold is what calibrate chooses: leave it out"),
        (["--budget", "0.8", "--confidence", "0.5"], "confidence belongs to a bound"),
        (["--max-disagreement", "0.01"], "needs at least 230 images to test on"),
        (["--max-error-increase", "0.2", "--confidence", "0.7"], "no labels"),
        (["--budget", "0.8", "--method", "dense"], "has no thresholds to calibrate"),
        (["--budget", "0.8", "--data", "camvid"], "--images are files and --data is a dataset"),
        (["--budget", "0.8", "--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_calibrate__refuses_in_one_sentence(
    options: list[str], words: str, model: Path, pictures: Path, capsys: Captured
) -> None:
    assert words in wrong(capsys, "calibrate", model, "--images", pictures / "plain", *options)
    assert not (model / "calibration.json").exists()


def test_evaluate_and_predict__use_the_calibration_unless_a_method_is_named(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    calibrated(capsys, model, pictures)
    data = ("--data", "folder", "--data-root", pictures / "set", "--json", tmp_path / "figures.json")
    fine(capsys, "evaluate", model, *data)
    (row,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    method = json.loads((model / "calibration.json").read_text())["method"]
    assert row["method"]["threshold"] == method["threshold"]
    fine(capsys, "evaluate", model, *data, "--method", "dtop", "--threshold", "0.9")
    (row,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert row["method"]["threshold"] == 0.9
    refused = wrong(capsys, "evaluate", model, *data, "--threshold", "0.9")
    assert "options of a method need --method: name it" in refused
    assert main(["predict", str(model), str(pictures / "plain"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""  # the calibration's own images are nothing unusual


def rows_of(capsys: Captured, model: Path, pictures: Path, out: Path, *more: object) -> list[Any]:
    data = ("--data", "folder", "--data-root", pictures / "set", "--limit", 1, "--json", out)
    fine(capsys, "evaluate", model, *data, "--method", *more)
    rows: list[Any] = json.loads(out.read_text())["results"]
    return rows


def test_evaluate__takes_a_calibrations_thresholds_for_its_method_beside_dense_and_others(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    calibrated(capsys, model, pictures)
    method = json.loads((model / "calibration.json").read_text())["method"]
    own = build_method(method).label + " (calibrated)"
    out = tmp_path / "figures.json"
    rows = rows_of(capsys, model, pictures, out, "dense", "dtop", "dovit")
    assert [row["label"] for row in rows] == ["dense", own, "dovit 0.985"]
    assert rows[1]["method"]["threshold"] == method["threshold"]
    rows = rows_of(capsys, model, pictures, out, "dense", "calibrated", "dtop", "--threshold", 0.9, 0.95)
    assert [row["label"] for row in rows] == ["dense", own, "dtop 0.9", "dtop 0.95"]
    same = "/".join(map(str, method["threshold"]))
    (row,) = rows_of(capsys, model, pictures, out, "dtop", "--threshold", same, "--keep-per-class", 1)
    assert row["label"] == own
    (row,) = rows_of(capsys, model, pictures, out, "dtop", "--keep-per-class", 1)  # as it was calibrated
    assert row["label"] == own


def test_evaluate__does_not_mix_a_calibrations_thresholds_with_other_options_or_weights(
    model: Path, pictures: Path, capsys: Captured
) -> None:
    calibrated(capsys, model, pictures)
    data = ("--data", "folder", "--data-root", pictures / "set", "--limit", 1)
    mixed = ("--method", "dtop", "--score", "margin")
    assert wrong(capsys, "evaluate", model, *data, *mixed) == (
        "dtop was calibrated with another --score: give --threshold, too, or leave --score out."
    )
    fine(capsys, "evaluate", model, *data, *mixed, "--threshold", 0.9)
    content = json.loads((model / "calibration.json").read_text())
    (model / "calibration.json").write_text(json.dumps(content | {"model": "another"}))
    stale = wrong(capsys, "evaluate", model, *data, "--method", "dtop")
    assert stale.startswith("--method dtop takes the calibration's thresholds, which are of other weights or damaged")
    assert "dtop 0.9 " in fine(capsys, "evaluate", model, *data, "--method", "dtop", "--threshold", 0.9)
    assert "dovit 0.985 " in fine(capsys, "evaluate", model, *data, "--method", "dovit")


def test_predict__warns_once_of_images_unlike_the_calibrations(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    from PIL import Image

    calibrated(capsys, model, pictures)
    dark = tmp_path / "dark"
    dark.mkdir()
    for i in range(6):
        Image.new("RGB", (20, 16), (3 * i, 0, 0)).save(dark / f"{i}.png")
    arguments = ["predict", str(model), str(dark), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    warning = capsys.readouterr().err
    assert "6 of 6 images have scores unlike the calibration's" in warning
    assert warning.count("\n") == 1
    assert main([*arguments, "--method", "dtop", "--overwrite"]) == 0  # the calibrated one by its name
    assert capsys.readouterr().err == warning
    assert main([*arguments, "--method", "dtop", "--threshold", "0.95", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- sweep


def sweep(capsys: Captured, model: Path, pictures: Path, out: Path, *more: Any) -> str:
    data = ("--data", "folder", "--data-root", pictures / "set", "--limit", 3, "--tune-limit", 4)
    lines = ("--method", "dtop", "dovit", "fixed_ratio", "truncated", "--points", 3, "--input-scale", 0.5, "--out", out)
    full = "--full-range"  # weights drawn at random agree with dense nowhere
    return fine(capsys, "sweep", model, *data, *lines, full, *more)


def test_sweep__writes_curves_and_goes_on_where_it_was(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the plot extra")
    true, calls = sweeping.evaluate, []

    def dies_at_the_third(*args: Any, **options: Any) -> Any:
        calls.append(args[2][0].label)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*args, **options)

    monkeypatch.setattr(sweeping, "evaluate", dies_at_the_third)
    out = tmp_path / "out"
    with pytest.raises(AssertionError):
        sweep(capsys, model, pictures, out, "--threshold", "0.9")
    assert list(json.loads((out / "sweep.json").read_text())["results"]) == ["points", "row 1", "row 2"]
    assert not (out / "sweep.csv").exists()
    text = sweep(capsys, model, pictures, out, "--threshold", "0.9")
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert f"{len(rows)} points" in text
    assert len(calls) == 1 + len(rows)  # the third was run twice, no other
    names = {row["series"] for row in rows}
    assert names == {
        "dense",
        "dense, smaller images",
        "dtop, one threshold",
        "dovit, one threshold",
        "dtop, thresholds chosen",
        "dovit, thresholds chosen",
        "fixed_ratio",
        "truncated",
    }
    for name in ("dtop, thresholds chosen", "fixed_ratio", "truncated"):
        compute = [float(row["gmacs_mean"]) for row in rows if row["series"] == name]
        assert compute == sorted(compute, reverse=True)
        assert len(compute) in (2, 3)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    refused = wrong(capsys, "sweep", model, "--data", "folder", "--data-root", pictures / "set", "--out", out)
    assert "sweep.json was made with" in refused


def test_sweep__spends_no_point_on_the_trivial_ends(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the plot extra")
    sweep(capsys, model, pictures, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "sweep.json").read_text())["results"]
    rows = [results[f"row {n}"] for n in range(1, len(results["points"]) + 1)]
    for name in ("dtop, thresholds chosen", "dovit, thresholds chosen", "fixed_ratio"):
        live = [row["live_after_exit"] for row in rows if row["series"] == name]
        assert live
        assert all(0.0 < own[-1] < 1.0 for own in live), name
    ratios = [row["method"]["ratios"] for row in rows if row["series"] == "fixed_ratio"]
    assert [own[0] for own in ratios] == [0.75, 0.5, 0.25]


def test_plan_method__ends_where_true_runs_stop_agreeing_with_dense_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration_set = CalibrationSet(tiny_segmenter(), Noise(8, ((16, 20),)), tuple(range(8)))
    said: list[str] = []
    shares: list[float] = []
    reference = dense_reference(calibration_set)
    for limit in (0.05, 0.2, 1.0):
        monkeypatch.setattr(sweeping, "FALL_OFF", limit)
        jobs = sweeping.plan_method(calibration_set, DToP(), 4, "classes", say=said.append)
        run = true_run(calibration_set, build_method(jobs[-1].method), reference)
        shares.append(run.mac_ratio)
        assert error(run.confusion, "pixels").mean().item() <= limit
    assert shares[0] > shares[1] + 0.05 > shares[2] + 0.1
    assert len(said) == 2  # all agrees to within 100 %
    assert said[1].startswith("dtop: agreement with dense falls off, points end at ")
    assert said[1].endswith("of the pixels of 8 tuning images unlike dense (--full-range goes on)")
    monkeypatch.setattr(sweeping, "FALL_OFF", 0.0)
    assert sweeping.plan_method(
        calibration_set, DToP(), 4, "classes"
    )  # where nothing agrees there is a point all the same


def test_figure_of_a_sweep__is_not_flattened_by_a_collapse() -> None:
    plt = sweeping._pyplot() if pytest.importorskip("matplotlib", reason="drawing needs the plot extra") else None
    rows = [
        {"series": name, "gmacs_mean": cost, "mIoU": miou}
        for name, cost, miou in (("dense", 9.0, 40.0), ("dovit", 8.0, 39.5), ("dovit", 7.0, 38.0), ("dovit", 5.0, 10.3))
    ]
    figure = sweeping.figure_of(plt, [*rows, {"series": "dovit", "gmacs_mean": 6.0, "mIoU": None}])
    (axes,) = figure.axes
    assert axes.get_ylim()[0] > 37.0
    assert "10.3" in [text.get_text() for text in axes.texts]
    (arrow,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert arrow.get_ydata() == [axes.get_ylim()[0]]
    (flat,) = sweeping.figure_of(plt, rows[:3]).axes
    assert flat.texts == [] or not len(flat.texts)
    plt.close("all")


def test_sweep__refuses_what_is_no_sweep(model: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    data = ("--data", "folder", "--data-root", pictures / "set", "--out", tmp_path / "out")
    assert "holds no results to go on from (it lacks 'results'): choose another --out" in wrong(
        capsys, "sweep", model, *data
    )
    (tmp_path / "out" / "sweep.json").write_text("[" * 100_000)
    assert "is damaged (it nests deeper than 64 levels): choose another --out" in wrong(capsys, "sweep", model, *data)
    assert "has no thresholds" in wrong(
        capsys, "sweep", model, *data[:-1], tmp_path / "new", "--method", "dense", "--tune-limit", 1
    )


# -------------------------------------------------------------------------------------------------------- experiment


def test_guarantee_experiment__runs_the_network_once_per_position_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the plot extra")
    monkeypatch.setattr(experiment, "POSITIONS", 3)
    plot = tmp_path / "plot.png"
    arguments = ["--quick", "--out", str(tmp_path / "run"), "--plot", str(plot)]
    experiment.main(arguments)
    first = json.loads((tmp_path / "run" / "guarantee.json").read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [result["draws"] for result in first["results"]] == [20, 20]

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the network ran again")

    monkeypatch.setattr(experiment, "true_run", never)
    experiment.main(arguments)
    assert json.loads((tmp_path / "run" / "guarantee.json").read_text()) == first
    with pytest.raises(
        SystemExit, match=r"notes\.json was made with bounds=\[0\.1, 0\.3\], not \[0\.1\]: choose another"
    ):
        options = experiment.parser().parse_args([*arguments, "--bounds", "0.1"])
        options.pool, options.path_images, options.size, options.steps = 12, 6, 32, 1
        experiment.run(options)
    capsys.readouterr()


def test_draw_calibrations__are_judged_by_the_risk_of_the_pool() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    risks = np.array([0.01, 0.03, 0.055, 0.2])
    losses = (rng.random((4, 5000)) < risks[:, None]).astype(float)
    result = experiment.draw_calibrations(losses, np.ones((4, 5000)), 0.05, 0.9, 300, 600, seed=1)
    true = losses.mean(1)
    assert set(result["risks"]) <= {0.0, *true}
    assert result["violations"] == sum(risk > 0.05 for risk in result["risks"])
    assert result["share_of_violations"] <= result["allowed_with_noise"]


def test_draw_calibrations__walk_the_path_with_the_function_that_calibrate_walks_it_with(
    model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    class Walked(Exception):
        pass

    def seen(count: int, passes: Any) -> int:
        raise Walked

    monkeypatch.setattr("tokenexit.calibration.risk_control.fixed_sequence", seen)
    with pytest.raises(Walked):
        experiment.draw_calibrations(np.zeros((2, 50)), np.ones((2, 50)), 0.05, 0.9, 1, 60, seed=1)
    with pytest.raises(Walked):
        main(
            [
                "calibrate",
                str(model),
                "--images",
                str(pictures / "plain"),
                "--max-disagreement",
                "0.4",
                "--confidence",
                "0.7",
            ]
        )


def test_shift_study__measures_every_shift_and_goes_on(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(capsys, model, pictures)
    data = ["--data", "folder", "--data-root", str(pictures / "set"), "--limit", "3"]
    other = ["--other", "folder", "--other-root", str(pictures / "set")]
    shifts = ["--shifts", "none", "brightness x 0.25", "blur, radius 4", "noise, sigma 32", "JPEG, quality 8"]
    shift.main([str(model), *data, *other, *shifts, "--json", str(tmp_path / "shift.json")])
    rows = list(json.loads((tmp_path / "shift.json").read_text())["results"].values())
    assert [row["shift"] for row in rows] == [*shifts[1:], "folder"]
    assert rows[0]["disagreement"] == rows[-1]["disagreement"]
    assert len({row["disagreement"] for row in rows}) > 3
    assert all(row["miou"] is not None for row in rows)
    text = capsys.readouterr().out
    assert text.count("\n| ") >= 6

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("something ran again")

    monkeypatch.setattr(shift, "true_run", never)
    shift.main([str(model), *data, *other, *shifts, "--json", str(tmp_path / "shift.json")])
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit, match="was made with limit=3, not 2: choose another --json"):
        shift.main([str(model), *data[:-1], "2", *other, *shifts, "--json", str(tmp_path / "shift.json")])


def test_budget_study__checks_on_other_images_and_goes_on(
    model: Path, pictures: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", "folder", "--data-root", str(pictures / "set"), "--json", str(tmp_path / "budgets.json")]
    arguments = [str(model), *data, "--method", "dtop", "--budgets", "0.9", "0.01", "--hand", "0.2", "0.99"]
    budgets.main(arguments)
    text = capsys.readouterr().out
    assert "budget=0.01 is out of reach" in text
    results = json.loads((tmp_path / "budgets.json").read_text())["results"]
    assert results["dtop to 0.9 on other half (val)"]["images"] == 6
    assert results["dtop to 0.9 on test"]["images"] == 12
    assert text.count("| dtop ") == 3

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("something ran again")

    monkeypatch.setattr(budgets, "true_run", never)
    budgets.main(arguments)
    assert capsys.readouterr().out == text


def test_by_hand__interpolates_and_never_extrapolates() -> None:
    curve = [{"share": 0.4, "miou": 50.0}, {"share": 0.8, "miou": 60.0}]
    assert budgets.by_hand(curve, 0.6) == pytest.approx(55.0)
    assert budgets.by_hand(curve, 0.3) is None
