"""Pictures of every kind in; masks, overlays and exit maps out; bad files and impossible places in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import tokenexit.predicting as predicting
from tests.helpers import tiny_segmenter
from tokenexit.cli.predict import MAX_PIXELS
from tokenexit.errors import ConfigError, DataError
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.predicting import RESULTS, list_pictures, predict_files, save_atomically
from tokenexit.preprocessing import default_labels, load_image
from tokenexit.report.pictures import exit_map
from tokenexit.segmenter import ExitSegmenter
from tokenexit.windows import WindowedOutput

METHOD = DToP(threshold=0.4, keep_per_class=1)


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return tiny_segmenter("fcn")


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values: npt.NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values)


def names(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (19, 21)).astype(np.uint16))


KINDS: dict[str, Callable[[], Image.Image]] = {
    "rgb.jpg": lambda: noise(20, 30),
    "grey.png": lambda: noise(20, 30).convert("L"),
    "rgba.png": lambda: noise(20, 30).convert("RGBA"),
    "grey_alpha.png": lambda: noise(20, 30).convert("LA"),
    "palette.png": lambda: noise(20, 30).convert("P"),
    "one_bit.png": lambda: noise(20, 30).convert("1"),
    "sixteen.png": sixteen_bits,
    "cmyk.jpg": lambda: noise(20, 30).convert("CMYK"),
    "one_pixel.png": lambda: noise(1, 1),
    "wide.png": lambda: noise(2, 300),
    "thin.png": lambda: noise(300, 3),
    "odd.webp": lambda: noise(17, 23),
    "UPPER.PNG": lambda: noise(8, 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_gets_a_palette_mask_of_its_size_equal_to_predict(
    name: str, model: ExitSegmenter, tmp_path: Path
) -> None:
    KINDS[name]().save(tmp_path / name)
    out = tmp_path / "out"
    assert predict_files(model, [tmp_path / name], out, METHOD) == []
    stem = Path(name).stem
    assert names(out) == sorted(f"{stem}{suffix}" for suffix in RESULTS)
    picture, mask = load_image(tmp_path / name), Image.open(out / f"{stem}.png")
    assert mask.mode == "P"
    assert mask.size == picture.size
    expected = model.predict(tmp_path / name, METHOD)
    assert np.asarray(mask).tolist() == expected.labels[0].tolist()
    palette = default_labels(5).palette
    assert mask.getpalette()[:15] == [channel for colour in palette for channel in colour]  # type: ignore[index]
    for suffix in RESULTS[1:]:
        assert Image.open(out / f"{stem}{suffix}").size == picture.size


@pytest.mark.parametrize("method", [Dense(), METHOD, DoViT(threshold=0.4)], ids=lambda method: method.name)
@pytest.mark.parametrize("head", ["atm", "fcn"])
def test_every_method_and_head_that_go_together_predict(head: str, method: Method[object], tmp_path: Path) -> None:
    noise(20, 30).save(tmp_path / "a.png")
    other = tiny_segmenter(head)
    if head == "atm" and method.name == "dovit":
        with pytest.raises(ConfigError, match="ATM exit heads"):
            predict_files(other, [tmp_path / "a.png"], tmp_path / "out", method)
        assert names(tmp_path / "out") == []
        return
    assert predict_files(other, [tmp_path / "a.png"], tmp_path / "out", method) == []
    expected = other.predict(tmp_path / "a.png", method).labels[0]
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == expected.tolist()


def test_the_exif_orientation_is_honoured(model: ExitSegmenter, tmp_path: Path) -> None:
    upright = noise(12, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the camera lay on its side
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert predict_files(model, [tmp_path / "turned.png", tmp_path / "upright.png"], tmp_path / "out", METHOD) == []
    a, b = (Image.open(tmp_path / "out" / f"{name}.png") for name in ("turned", "upright"))
    assert a.size == (40, 12)
    assert np.asarray(a).tolist() == np.asarray(b).tolist()


def test_the_exit_map_lies_on_the_picture_without_the_padding(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(9, 9).save(tmp_path / "a.png")  # three patches of four pixels, of which the last has one
    predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD)
    output = model.predict(tmp_path / "a.png", METHOD)
    stages = output.exit_stage[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:9, :9]
    expected = exit_map(stages.numpy(), output.num_exits, (9, 9), image=noise(9, 9))
    assert np.asarray(Image.open(tmp_path / "out" / "a.exits.png")).tolist() == np.asarray(expected).tolist()


def test_windows_of_the_model_are_used_and_the_exit_map_is_their_mean(tmp_path: Path) -> None:
    windowed = tiny_segmenter("fcn")
    windowed.preprocessing = replace(windowed.preprocessing, window=(8, 8), stride=(5, 5))
    noise(17, 21).save(tmp_path / "a.png")
    predict_files(windowed, [tmp_path / "a.png"], tmp_path / "out", METHOD)
    expected = windowed.predict(tmp_path / "a.png", METHOD)
    assert isinstance(expected, WindowedOutput)
    assert len(expected.boxes[0]) == 3 * 4
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == expected.labels[0].tolist()
    stages = exit_map(expected.exit_stage[0].numpy(), expected.num_exits, (17, 21), image=noise(17, 21))
    assert np.asarray(Image.open(tmp_path / "out" / "a.exits.png")).tolist() == np.asarray(stages).tolist()


def test_a_corrupt_picture_is_reported_and_the_others_are_written(model: ExitSegmenter, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    noise(8, 12).save(folder / "a.png")
    noise(8, 12).save(folder / "sub" / "b.jpg")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("not even named like one")
    failed = predict_files(model, [folder], tmp_path / "out", METHOD)
    assert len(failed) == 3
    for message, name in zip(failed, ("cut.png", "empty.jpg", "text.png")):
        assert message.startswith(f"image '{folder / name}' cannot be ")
        assert "\n" not in message
    assert names(tmp_path / "out") == sorted(f"{name}{suffix}" for name in ("a", "sub/b") for suffix in RESULTS)


def test_a_missing_file_is_reported_and_the_others_are_written(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 12).save(tmp_path / "a.png")
    missing = tmp_path / "missing.png"
    failed = predict_files(model, [missing, tmp_path / "a.png"], tmp_path / "out", METHOD)
    assert failed == [f"image '{missing}' does not exist: check the path."]
    assert len(names(tmp_path / "out")) == 3


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(model: ExitSegmenter, tmp_path: Path) -> None:
    Image.new("1", (7_000, 6_000)).save(tmp_path / "huge.png")  # small as a file, 42 million pixels
    noise(10, 10).save(tmp_path / "hundred.png")
    (huge,) = predict_files(model, [tmp_path / "huge.png"], tmp_path / "out", METHOD, max_pixels=MAX_PIXELS)
    assert huge.endswith("has 6000x7000 pixels, more than max_pixels=33177600: shrink it or raise max_pixels.")
    assert predict_files(model, [tmp_path / "hundred.png"], tmp_path / "out", METHOD, max_pixels=100) == []
    (refused,) = predict_files(model, [tmp_path / "hundred.png"], tmp_path / "out", METHOD, max_pixels=99)
    assert "has 10x10 pixels, more than max_pixels=99" in refused


def test_a_picture_that_does_not_fit_into_memory_is_reported(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8, 12).save(tmp_path / "a.png")

    def full(self: ExitSegmenter, *args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(ExitSegmenter, "predict", full)
    failed = predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD)
    assert failed == [
        f"image '{tmp_path / 'a.png'}' of 8x12 pixels does not fit into memory: shrink it, or take it in windows."
    ]


# -------------------------------------------------------------------------------------------------- what is listed


def test_folders_are_listed_to_their_depth_in_a_stable_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.png", "sub/a.png", ".hidden.png", "._a.jpg", ".git/x.png", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    jobs = list_pictures([tmp_path])
    assert list(jobs.values()) == ["a", "b", os.path.join("sub", "a"), os.path.join("sub", "c")]
    assert list(list_pictures([tmp_path])) == list(jobs)


def test_a_picture_that_is_named_twice_is_predicted_once(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    seen: list[Path] = []

    def watched(paths: Iterable[Path]) -> Iterable[Path]:
        seen.extend(paths)
        return list(seen)

    predict_files(model, [tmp_path / "a.png", tmp_path, tmp_path / "a.png"], tmp_path / "out", METHOD, progress=watched)
    assert seen == [tmp_path / "a.png"]


def test_results_of_an_earlier_call_inside_the_folder_are_no_pictures(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    for _ in range(2):
        assert predict_files(model, [tmp_path], tmp_path / "out", METHOD) == []
    assert names(tmp_path) == sorted(["a.png", *(f"out/a{suffix}" for suffix in RESULTS)])


def test_an_empty_folder_is_refused(model: ExitSegmenter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no picture: name a folder with"):
        predict_files(model, [tmp_path], tmp_path / "out", METHOD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", ["b/a.png", "a.jpg", "a.exits.jpg"])
def test_pictures_whose_results_would_meet_are_refused_before_anything_is_written(
    second: str, model: ExitSegmenter, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.png", second):
        noise(8, 8).save(tmp_path / name)
    with pytest.raises(ConfigError, match=r"would both be written to .*: rename one, or predict them to different"):
        predict_files(model, [tmp_path / "a.png", tmp_path / second], tmp_path / "out", METHOD)
    assert not (tmp_path / "out").exists()


def test_a_picture_is_never_overwritten_by_its_mask(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    for sources in ([tmp_path], [tmp_path / "a.png"]):
        with pytest.raises(ConfigError, match=r"a\.png is a picture and would be overwritten"):
            predict_files(model, sources, tmp_path, METHOD)
    assert (tmp_path / "a.png").read_bytes() == before


# --------------------------------------------------------------------------------------------------- what is written


def test_places_that_cannot_be_written_end_in_one_sentence(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"^results cannot be written to .* \(.*\): choose another folder\.$"):
            predict_files(model, [tmp_path / "a.png"], out, METHOD)


def test_a_full_disk_ends_in_one_sentence_and_leaves_no_half_file(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8, 8).save(tmp_path / "a.png")

    def half(self: Image.Image, target: str, *args: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(ConfigError, match=r"\(No space left on device\): choose another folder"):
        predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD)
    assert names(tmp_path / "out") == []


def test_a_failure_while_drawing_writes_nothing_of_the_picture(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8, 8).save(tmp_path / "a.png")

    def refuses(*args: object, **options: object) -> None:
        raise DataError("no map.")

    monkeypatch.setattr(predicting, "exit_map", refuses)
    assert predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD) == ["no map."]
    assert names(tmp_path / "out") == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    save_atomically(noise(4, 4), target)
    before = target.read_bytes()

    def interrupted(self: Image.Image, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_atomically(noise(4, 4, seed=1), target)
    assert target.read_bytes() == before
    assert names(tmp_path) == ["a.png"]


def test_bf16_predicts_nearly_the_same(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(32, 32).save(tmp_path / "a.png")
    masks = []
    for precision in ("fp32", "bf16"):
        predict_files(model, [tmp_path / "a.png"], tmp_path / precision, Dense(), precision=precision)
        masks.append(np.asarray(Image.open(tmp_path / precision / "a.png")))
    assert (masks[0] == masks[1]).mean() > 0.9
