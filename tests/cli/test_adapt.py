"""The command `adapt`: what it prints, how it ends, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.adaptation.scenes import dense_model, draw
from tokenexit.adaptation import adapt as module
from tokenexit.adaptation import choose, fit
from tokenexit.adaptation.adapt import adapt_model
from tokenexit.cli import main
from tokenexit.cli.adapt import LARGEST_SIZE
from tokenexit.methods.resized import LARGEST
from tokenexit.segmenter import ExitSegmenter


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    dense_model().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MOST_PASSES", 2)
    monkeypatch.setattr(choose, "LADDER", (0.9, 0.5))
    monkeypatch.setattr(adapt_model, "__kwdefaults__", {**(adapt_model.__kwdefaults__ or {}), "fewest": 5})


def adapt(source: Path, photos: Path, out: Path, *options: str) -> int:
    given = ["--images", str(photos), "--out", str(out), "--exit-head", "linear", "--size", "1"]
    target = [] if {"--max-disagreement", "--budget"} & {*options} else ["--budget", "60%"]
    return main(["adapt", str(source), *given, *target, *options])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_adapt__ends_with_the_sentence_and_leaves_model_and_report(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FALL_OFF", 1.0)
    assert adapt(source, photos, tmp_path / "out") == 0
    model = ExitSegmenter.from_pretrained(tmp_path / "out")
    assert model.calibration is not None
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == model.calibration.guarantee
    assert f"model: {tmp_path / 'out'}\nreport: {tmp_path / 'out' / 'report.html'}\n" in printed.out
    assert (tmp_path / "out" / "report.html").is_file()
    assert model.calibration.images["photos"] == str(photos)


def test_adapt__that_does_not_pay_ends_with_status_3_and_the_reason(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FALL_OFF", -1.0)  # any loss is too much
    assert adapt(source, photos, tmp_path / "out", "--exits", "1", "2", "--depth", "3") == 3
    printed = capsys.readouterr()
    assert "tokenexit adapt: this is the best that can be had: agreement with dense has fallen off" in printed.err
    assert ExitSegmenter.from_pretrained(tmp_path / "out").config.exits == (1, 2)
    assert printed.out.splitlines()[-1].endswith("with confidence 0.9")


def test_adapt__within_a_bound_too_tight_for_the_photos_says_how_many_it_takes(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(source, photos, tmp_path / "out", "--max-disagreement", "2%") == 2
    assert "adapting needs at least 228 photos, got 10: max_disagreement=0.02" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapt__with_labels_names_the_dataset(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(source, photos, tmp_path / "out", "--data", "scenes") == 2
    assert "the model predicts 5 classes, the dataset has" in capsys.readouterr().err


def test_adapt__interrupted_ends_with_130_and_the_same_command_goes_on(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "Survey", interrupt)
        assert adapt(source, photos, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "tokenexit adapt: interrupted."
    with monkeypatch.context() as patch:
        patch.setattr("tokenexit.adaptation.heads.fit_head", interrupt)  # no head is fitted again
        assert adapt(source, photos, tmp_path / "out") in (0, 3)
    assert last_line(capsys).endswith("with confidence 0.9")


def test_adapt__refuses_the_folder_of_the_source_and_of_another_model(
    source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(source, photos, source) == 2
    assert "is the source itself" in capsys.readouterr().err
    dense_model(seed=1).save_pretrained(tmp_path / "other")
    assert adapt(source, photos, tmp_path / "other") == 2
    assert "holds another model" in capsys.readouterr().err
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "file").write_text("")
    assert adapt(source, photos, tmp_path / "file") == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert adapt(source, tmp_path / "fotos", tmp_path / "out") == 2
    assert "fotos does not exist: name photos" in capsys.readouterr().err


def test_adapt__of_what_is_no_plain_vit_is_one_sentence(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    weights = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table": torch.zeros(3, 3)}
    torch.save({"state_dict": weights}, tmp_path / "swin.pth")
    assert adapt(tmp_path / "swin.pth", photos, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith("tokenexit adapt: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert adapt(tmp_path / "nowhere", photos, tmp_path / "out") == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["--exits", "none", "--depth", "3"], ["--exits", "2", "--depth", "2"]])
def test_adapt__with_parts_that_do_not_go_together_is_one_sentence(
    words: list[str], source: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(source, photos, tmp_path / "out", *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tokenexit adapt: ")


def test_adapt__takes_sizes_as_large_as_images_may_be_resized() -> None:
    assert LARGEST_SIZE == LARGEST
