"""Images of every kind in; masks, overlays and exit maps out; bad files and impossible places in one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import tokenexit.prediction.outputs as outputs
import tokenexit.prediction.pipeline as pipeline
import tokenexit.prediction.predict_files as predicting
from tests.helpers import tiny_segmenter
from tests.prediction.test_label_studio import as_mask
from tests.prediction.test_rle import read
from tokenexit.calibration.drift import EDGES, Histograms, Monitor, ReferenceStatistics, hook_scores
from tokenexit.cli.predict import MAX_PIXELS, MAX_TOKENS, SAVE
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import load_image
from tokenexit.inputs.labels import default_labels
from tokenexit.inputs.sources import WorkItem, list_images
from tokenexit.methods import Dense, DoViT, DToP, Gated, GatedBySize, Method, Resized, build_method
from tokenexit.outputs.ledger import dense_ops
from tokenexit.outputs.windows import Segmentation, WindowedOutput
from tokenexit.prediction import video
from tokenexit.prediction.pipeline import End, Frame, packed, prefetch
from tokenexit.prediction.predict_files import RECORD, Predicted, predict_files, save_atomically
from tokenexit.prediction.rle import run_lengths
from tokenexit.report.pictures import exit_map, overlay
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

RESULTS = (".png", ".overlay.jpg", ".exits.png")
METHOD = DToP(threshold=0.4, keep_per_class=1)


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return tiny_segmenter("fcn")


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values: npt.NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values)


def names(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too, but for what says how they were made."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return sorted(str(path.relative_to(folder)) for path in files)


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
def test_every_kind_of_image_gets_a_palette_mask_of_its_size_equal_to_predict(
    name: str, model: ExitSegmenter, tmp_path: Path
) -> None:
    KINDS[name]().save(tmp_path / name)
    out = tmp_path / "out"
    assert predict_files(model, [tmp_path / name], out, METHOD).failed == ()
    stem = Path(name).stem
    assert names(out) == sorted(f"{stem}{suffix}" for suffix in RESULTS)
    image, mask = load_image(tmp_path / name), Image.open(out / f"{stem}.png")
    assert mask.mode == "P"
    assert mask.size == image.size
    expected = model.predict(tmp_path / name, METHOD)
    assert np.asarray(mask).tolist() == expected.labels[0].tolist()
    palette = default_labels(5).palette
    assert mask.getpalette()[:15] == [channel for colour in palette for channel in colour]  # type: ignore[index]
    for suffix in RESULTS[1:]:
        assert Image.open(out / f"{stem}{suffix}").size == image.size


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
    assert predict_files(other, [tmp_path / "a.png"], tmp_path / "out", method).failed == ()
    expected = other.predict(tmp_path / "a.png", method).labels[0]
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == expected.tolist()


def test_the_exif_orientation_is_honoured(model: ExitSegmenter, tmp_path: Path) -> None:
    upright = noise(12, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the camera lay on its side
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert (
        predict_files(model, [tmp_path / "turned.png", tmp_path / "upright.png"], tmp_path / "out", METHOD).failed == ()
    )
    a, b = (Image.open(tmp_path / "out" / f"{name}.png") for name in ("turned", "upright"))
    assert a.size == (40, 12)
    assert np.asarray(a).tolist() == np.asarray(b).tolist()


def test_the_exit_map_lies_on_the_image_without_the_padding(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(9, 9).save(tmp_path / "a.png")  # three patches of four pixels, of which the last has one
    predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD)
    output = model.predict(tmp_path / "a.png", METHOD)
    stages = output.exit_index[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:9, :9]
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
    stages = exit_map(expected.exit_index[0].numpy(), expected.num_exits, (17, 21), image=noise(17, 21))
    assert np.asarray(Image.open(tmp_path / "out" / "a.exits.png")).tolist() == np.asarray(stages).tolist()


def test_a_corrupt_image_is_reported_and_the_others_are_written(model: ExitSegmenter, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    noise(8, 12).save(folder / "a.png")
    noise(8, 12).save(folder / "sub" / "b.jpg")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("not even named like one")
    failed = predict_files(model, [folder], tmp_path / "out", METHOD).failed
    assert len(failed) == 3
    for message, name in zip(failed, ("cut.png", "empty.jpg", "text.png")):
        assert message.startswith(f"image '{folder / name}' cannot be ")
        assert "\n" not in message
    assert names(tmp_path / "out") == sorted(f"{name}{suffix}" for name in ("a", "sub/b") for suffix in RESULTS)


def test_a_missing_file_is_reported_and_the_others_are_written(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 12).save(tmp_path / "a.png")
    missing = tmp_path / "missing.png"
    failed = predict_files(model, [missing, tmp_path / "a.png"], tmp_path / "out", METHOD).failed
    assert failed == (f"image '{missing}' does not exist: check the path.",)
    assert len(names(tmp_path / "out")) == 3


def test_images_beyond_the_limit_are_refused_before_they_are_decoded(model: ExitSegmenter, tmp_path: Path) -> None:
    Image.new("1", (7_000, 6_000)).save(tmp_path / "huge.png")  # small as a file, 42 million pixels
    noise(10, 10).save(tmp_path / "hundred.png")
    (huge,) = predict_files(model, [tmp_path / "huge.png"], tmp_path / "out", METHOD, max_pixels=MAX_PIXELS).failed
    assert huge.endswith("has 6000x7000 pixels, more than max_pixels=33177600: shrink it or raise max_pixels.")
    (refused,) = predict_files(model, [tmp_path / "hundred.png"], tmp_path / "out", METHOD, max_pixels=99).failed
    assert "has 10x10 pixels, more than max_pixels=99" in refused
    assert predict_files(model, [tmp_path / "hundred.png"], tmp_path / "out", METHOD, max_pixels=100).failed == ()


def test_an_image_that_does_not_fit_into_memory_is_reported(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8, 12).save(tmp_path / "a.png")

    def full(self: ExitSegmenter, *args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(ExitSegmenter, "segment", full)
    failed = predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD).failed
    assert failed == (
        f"image '{tmp_path / 'a.png'}' of 8x12 pixels does not fit into memory: shrink it, or take it in windows.",
    )


def test_images_of_too_many_tokens_are_refused_with_a_cure(tmp_path: Path) -> None:
    other = tiny_segmenter("fcn")  # of patch 4
    noise(40, 40).save(tmp_path / "a.png")

    def failed(**options: Any) -> tuple[str, ...]:
        return predict_files(other, [tmp_path / "a.png"], tmp_path / "out", METHOD, overwrite=True, **options).failed

    assert failed(max_tokens=99) == (
        f"image '{tmp_path / 'a.png'}' of 40x40 pixels would run as 100 tokens at once, more than 99: take it in "
        "windows (--window 1024), shrink it, or allow more (--max-tokens).",
    )
    assert failed(max_tokens=100) == ()
    other.preprocessing = replace(other.preprocessing, window=(20, 20), stride=(10, 10))
    assert failed(max_tokens=24)[0].startswith(f"image '{tmp_path / 'a.png'}' of 40x40 pixels would run as 25 tokens")
    assert failed(max_tokens=25) == ()
    other.preprocessing = replace(other.preprocessing, window=None, stride=None, resize=8192)
    assert "would run as 4194304 tokens at once, more than 32768" in failed()[0]  # and before it is resized
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        failed(max_tokens=0)


@pytest.mark.parametrize("windowed", [False, True])
def test_images_that_take_long_are_announced_before_they_run(
    windowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_segmenter("fcn")
    if windowed:
        other.preprocessing = replace(other.preprocessing, window=(20, 20), stride=(20, 20))
    folder = folder_of(tmp_path, (8, 8), (40, 40), (40, 40), (80, 80))
    monkeypatch.setattr(pipeline, "PACK_TOKENS", 10)
    monkeypatch.setattr(pipeline.Engine, "seconds_per_mac", 1e-6)
    events: list[str] = []
    segment = ExitSegmenter.segment

    def noted(*args: Any) -> Segmentation:
        events.append(f"{args[1][0].shape[1]}")
        return segment(*args)

    monkeypatch.setattr(ExitSegmenter, "segment", noted)
    monkeypatch.setattr(pipeline, "SLOW_SECONDS", 1e-9)
    predict_files(other, [folder], tmp_path / "out", METHOD, say=events.append)
    said = [event for event in events if not event.isdigit()]
    assert [event for event in events if event.isdigit()] == ["8", "40", "40", "80"]
    assert (events.index(said[0]), events.index(said[1])) == (1, 4)  # the second of one size is no news
    words = f"image '{folder / '1.png'}' of 40x40 pixels has 100 tokens, which take up to about "
    grid, count = ((5, 5), 4) if windowed else ((10, 10), 1)
    macs = count * dense_ops(other.backbone, other.decode_head, grid).macs
    cure = "" if windowed else "; smaller images or --window take less"
    assert said[0] == f"{words}{macs / 1e6:.0f} s here{cure}."
    assert said[1].startswith(f"image '{folder / '3.png'}' of 80x80 pixels has 400 tokens")
    monkeypatch.setattr(pipeline, "SLOW_SECONDS", 1e9)
    quick: list[str] = []
    predict_files(other, [folder], tmp_path / "quick", METHOD, say=quick.append)
    assert quick == []


def test_the_speed_of_this_machine_is_that_of_a_block(model: ExitSegmenter) -> None:
    with inference(model.device):
        paces = [pipeline.Engine(model, METHOD).seconds_per_mac for _ in range(3)]
    assert 1e-16 < min(paces) < max(paces) < 1e-6


@pytest.mark.parametrize(("seconds", "words"), [(9.6, "10 s"), (99.4, "99 s"), (600, "10 min"), (3 * 3600, "3 h")])
def test_durations_are_told_in_words(seconds: float, words: str) -> None:
    assert pipeline.in_words(seconds) == words


def test_failures_are_told_as_they_come(model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, *[(8, 8)] * 4)
    monkeypatch.setattr(pipeline, "PACK_TOKENS", 1)
    (folder / "0.png").write_bytes(b"no image")
    there: list[tuple[str, bool]] = []
    last = tmp_path / "out" / "3.png"
    done = predict_files(
        model,
        [folder],
        tmp_path / "out",
        METHOD,
        say=lambda text: there.append((text, last.exists())),
    )
    assert there == [(done.failed[0], False)]


def test_outputs_that_are_not_finite_fail_their_image_alone(model: ExitSegmenter, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, (8, 8), (8, 8))
    other = tiny_segmenter("fcn")
    other.preprocessing = replace(other.preprocessing, mean=(1.0, 1.0, 1.0), std=(1e-300,) * 3)
    Image.new("RGB", (8, 8), "white").save(folder / "1.png")  # 0 / 0 is no number, and x / 0 none either
    done = predict_files(other, [folder], tmp_path / "out", METHOD)
    assert done.failed == tuple(
        f"image '{folder / f'{n}.png'}' cannot be segmented: the model's output is not finite (NaN or infinity): check "
        "its weights and the mean and std of its preprocessing, or run it in fp32."
        for n in range(2)
    )
    assert names(tmp_path / "out") == []


# -------------------------------------------------------------------------------------------------- what is listed


def test_folders_are_listed_to_their_depth_in_a_stable_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.png", "sub/a.png", ".hidden.png", "._a.jpg", ".git/x.png", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    jobs = list_images([tmp_path])
    assert list(jobs.values()) == ["a", "b", os.path.join("sub", "a"), os.path.join("sub", "c")]
    assert list(list_images([tmp_path])) == list(jobs)


def test_an_image_that_is_named_twice_is_predicted_once(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    seen: list[Path] = []

    def watched(paths: Iterable[Path]) -> Iterable[Path]:
        seen.extend(paths)
        return list(seen)

    predict_files(model, [tmp_path / "a.png", tmp_path, tmp_path / "a.png"], tmp_path / "out", METHOD, progress=watched)
    assert seen == [tmp_path / "a.png"]


def test_results_of_an_earlier_call_inside_the_folder_are_no_images(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    for _ in range(2):
        assert predict_files(model, [tmp_path], tmp_path / "out", METHOD).failed == ()
    assert names(tmp_path) == sorted(["a.png", *(f"out/a{suffix}" for suffix in RESULTS)])


def test_an_empty_folder_is_refused(model: ExitSegmenter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image: name a folder with"):
        predict_files(model, [tmp_path], tmp_path / "out", METHOD)
    assert list(tmp_path.iterdir()) == []


def test_results_that_would_meet_are_refused_all_at_once_before_anything_is_written(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    given = [tmp_path / folder / name for folder in ("x", "y") for name in ("a.png", "b.png")]
    for path in given:
        path.parent.mkdir(exist_ok=True)
        noise(8, 8).save(path)
    with pytest.raises(ConfigError) as refusal:
        predict_files(model, given, tmp_path / "out", METHOD)
    pairs = [f"{given[n]} and {given[n + 2]} to {tmp_path / 'out' / given[n].name}.png" for n in range(2)]
    assert str(refusal.value) == (
        f"results would overwrite each other ({', '.join(pairs)}): rename one of each, or predict them to different "
        "folders."
    )
    assert not (tmp_path / "out").exists()


def test_images_of_one_name_keep_their_suffixes_whatever_is_saved(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for n, name in enumerate(("a.jpg", "a.png", "b.png", "c.bmp", "c.exits.png")):
        noise(8, 8, seed=n).save(folder / name)
    said: list[str] = []
    assert predict_files(model, [folder], out, METHOD, save=["masks", "coco"], say=said.append) == Predicted(5, 0, ())
    apart = ["a.jpg", "a.png", "c.bmp", "c.exits.png"]
    masks = [name for name in names(out) if name.endswith(".png")]
    assert masks == sorted(["b.png", *(f"{name}.png" for name in apart)])
    for name in apart:
        expected = model.predict(folder / name, METHOD).labels[0]
        assert np.asarray(Image.open(out / f"{name}.png")).tolist() == expected.tolist()
    words = ", ".join(f"{folder / name} as {name}" for name in apart)
    assert said == [f"results that would meet are named with the suffixes of their sources: {words}."]
    images = json.loads((out / "coco.index.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == sorted(["b.png", *apart])
    assert predict_files(model, [folder], out, METHOD, save=["masks", "coco"]) == Predicted(0, 5, ())


def test_an_image_is_never_overwritten_by_a_result(model: ExitSegmenter, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "b.gif", "b.jpg.png"):
        noise(8, 8).save(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for given, target in ((["a.png"], "a.png"), (["b.jpg", "b.gif", "b.jpg.png"], "b.jpg.png")):
        with pytest.raises(ConfigError, match=rf"would overwrite what is given as an image \({tmp_path / target} of "):
            predict_files(model, [tmp_path / name for name in given], tmp_path, METHOD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_images_is_no_place_for_results_and_results_are_no_images(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    noise(8, 8).save(folder / "a.jpg")
    with pytest.raises(ConfigError, match=r"in is both a folder of images and the place of results, which later calls"):
        predict_files(model, [folder], folder, METHOD)
    assert names(folder) == ["a.jpg"]
    assert predict_files(model, [folder], folder / "first", METHOD) == Predicted(1, 0, ())
    said: list[str] = []
    assert predict_files(model, [folder], folder / "second", METHOD, say=said.append) == Predicted(1, 0, ())
    assert said == [f"passed over {folder / 'first'}, which holds results of an earlier call ({RECORD})."]
    with pytest.raises(
        DataError, match=r"first holds results of an earlier call \(predictions\.json\): give the folder"
    ):
        predict_files(model, [folder / "first"], tmp_path / "out", METHOD)
    assert predict_files(model, [folder / "a.jpg"], folder, METHOD) == Predicted(1, 0, ())  # one by one, as one likes
    with pytest.raises(ConfigError, match="leave results of earlier calls out"):
        predict_files(model, [folder / "a.jpg", folder / "a.overlay.jpg"], folder, METHOD)


def test_names_that_are_no_text_are_escaped_in_results_and_kept_for_other_tools(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"a.png", b"b\xff.png", "\u00fc.png".encode()):
        path = os.fsdecode(name)
        with open(os.path.join(folder, path), "wb") as file:
            noise(8, 8).save(file, format="PNG")
    for out in (tmp_path / "out", tmp_path / "out.zip"):
        save = ["masks", "coco", "labelstudio"]
        assert predict_files(model, [folder], out, METHOD, save=save) == Predicted(3, 0, ())
        assert predict_files(model, [folder], out, METHOD, save=save) == Predicted(0, 3, ())
    out = tmp_path / "out"
    assert [name for name in names(out) if name.endswith(".png")] == ["a.png", "b%FF.png", "\u00fc.png"]
    tasks = json.loads((out / "labelstudio.json").read_text())
    urls = sorted(task["data"]["image"].partition("?d=")[2] for task in tasks)
    assert urls == ["%C3%BC.png", "a.png", "b%FF.png"]


def test_a_name_that_is_too_long_for_results_fails_alone(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    long = "x" * 245  # its mask and exit map could be named, its overlay not
    for name in ("a", long):
        noise(8, 8).save(folder / f"{name}.png")
    done = predict_files(model, [folder], out, METHOD)
    assert done == Predicted(
        1, 0, (f"{long}.overlay.jpg is too long a name for a file of {out}: shorten the name of the image or video.",)
    )
    assert names(out) == sorted(f"a{suffix}" for suffix in RESULTS)


def test_what_is_no_file_fails_alone_and_is_not_waited_for(model: ExitSegmenter, tmp_path: Path) -> None:
    for name in ("pipe.png", "pipe.mp4"):
        os.mkfifo(tmp_path / name)
    noise(8, 8).save(tmp_path / "a.png")
    given = [tmp_path / "pipe.png", Path("/dev/zero"), tmp_path / "a.png", Path("y" * 300), tmp_path / "pipe.mp4"]
    done = predict_files(model, given, tmp_path / "out", METHOD)
    assert done.images == 1
    assert done.failed[:2] == tuple(f"image '{path}' is no regular file: give an image file." for path in given[:2])
    assert "File name too long" in done.failed[2]
    if find_spec("av") is not None:
        assert done.failed[3] == f"video '{given[4]}' is no regular file: give a video file."


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


def test_a_failure_while_drawing_writes_nothing_of_the_image(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(8, 8).save(tmp_path / "a.png")

    def refuses(*args: object, **options: object) -> None:
        raise DataError("no map.")

    monkeypatch.setattr(outputs, "exit_map", refuses)
    assert predict_files(model, [tmp_path / "a.png"], tmp_path / "out", METHOD).failed == ("no map.",)
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


# ------------------------------------------------------------------------------------------------------- many at once


def folder_of(tmp_path: Path, *sizes: tuple[int, int]) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for n, size in enumerate(sizes):
        noise(*size, seed=n).save(folder / f"{n}.png")
    return folder


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("windowed", [False, True])
def test_images_of_all_sizes_in_packs_get_what_each_gets_alone(
    windowed: bool, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PACK_TOKENS", max_tokens)
    other = tiny_segmenter("fcn")
    if windowed:
        other.preprocessing = replace(other.preprocessing, window=(8, 8), stride=(5, 5))
    folder = folder_of(tmp_path, (20, 30), (9, 9), (4, 4), (33, 5), (20, 30))
    done = predict_files(other, [folder], tmp_path / "out", METHOD)
    assert done == Predicted(images=5, skipped=0, failed=())
    for n in range(5):
        expected = other.predict(folder / f"{n}.png", METHOD).labels[0]
        assert np.asarray(Image.open(tmp_path / "out" / f"{n}.png")).tolist() == expected.tolist()


def test_packs_hold_so_many_tokens_and_one_image_at_least() -> None:
    def frame(height: int, width: int) -> Frame:
        return Frame("", "", "", Image.new("RGB", (1, 1)), torch.zeros(3, height, width))

    small, large, end = frame(4, 8), frame(9, 12), End(WorkItem("a"), 1)  # 2 and 9 patches of 4 pixels
    items: list[Any] = [small, end, small, small, large, large, small, end, end]
    assert [len(pack) for pack in packed(iter(items), 4, 6)] == [4, 1, 1, 3]
    assert [item for pack in packed(iter(items), 4, 6) for item in pack] == items
    assert [len(pack) for pack in packed(iter(items), 4, 100)] == [9]
    assert list(packed(iter([]), 4, 6)) == []


def test_a_method_whose_answers_depend_on_companions_has_none(tmp_path: Path) -> None:
    mean = DoViT(threshold=0.4, batch_mode="mean")
    other = tiny_segmenter("fcn")
    folder = folder_of(tmp_path, (20, 32), (20, 32), (20, 32))
    predict_files(other, [folder], tmp_path / "out", mean)
    for n in range(3):
        expected = other.predict(folder / f"{n}.png", mean).labels[0]
        assert np.asarray(Image.open(tmp_path / "out" / f"{n}.png")).tolist() == expected.tolist()


def test_images_that_do_not_fit_into_memory_together_are_taken_one_by_one(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = ExitSegmenter.segment
    calls: list[int] = []

    def small_memory(self: ExitSegmenter, images: list[torch.Tensor], *rest: Any) -> Any:
        calls.append(len(images))
        if sum(image[0].numel() for image in images) > 700:
            raise torch.OutOfMemoryError("tried to allocate")
        return segment(self, images, *rest)

    monkeypatch.setattr(ExitSegmenter, "segment", small_memory)
    folder = folder_of(tmp_path, (20, 30), (40, 40), (9, 9))
    done = predict_files(model, [folder], tmp_path / "out", METHOD)
    assert calls == [3, 1, 1, 1]
    (message,) = done.failed
    assert message.startswith(f"image '{folder / '1.png'}' of 40x40 pixels does not fit into memory")
    assert names(tmp_path / "out") == sorted(f"{n}{suffix}" for n in (0, 2) for suffix in RESULTS)


def test_the_monitor_sees_every_image_of_a_pack(model: ExitSegmenter, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, (20, 30), (9, 9), (12, 12))
    with hook_scores(model) as seen:
        for n in range(3):
            model.predict(folder / f"{n}.png", METHOD)
    alone = seen.histograms([1, 1, 1])

    class Recorder(Monitor):
        def add(self, histograms: Histograms) -> None:
            self.counts = histograms.counts

    monitor = Recorder(ReferenceStatistics.of(alone))
    predict_files(model, [folder], tmp_path / "out", METHOD, monitor=monitor)
    assert torch.equal(monitor.counts, alone.counts)


def test_images_are_made_one_ahead_in_order_and_errors_come_through() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(4):
            made.append(n)
            yield n
        raise DataError("no more.")

    seen = prefetch(numbers())
    assert next(seen) == 0
    assert [next(seen), next(seen)] == [1, 2]
    assert made[:3] == [0, 1, 2]
    assert next(seen) == 3
    with pytest.raises(DataError, match="no more"):
        next(seen)
    assert list(prefetch([])) == []


# ------------------------------------------------------------------------------------------------- a call goes on


def test_a_second_call_makes_what_is_missing_and_leaves_the_rest(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8), (9, 9), (8, 12)), tmp_path / "out"
    assert predict_files(model, [folder / "0.png"], out, METHOD) == Predicted(1, 0, ())
    assert predict_files(model, [folder], out, METHOD) == Predicted(2, 1, ())
    (out / "1.exits.png").unlink()
    (out / "0.png").write_bytes(b"left as it is")
    assert predict_files(model, [folder], out, METHOD) == Predicted(1, 2, ())
    assert names(out) == sorted(f"{n}{suffix}" for n in range(3) for suffix in RESULTS)
    assert (out / "0.png").read_bytes() == b"left as it is"
    assert predict_files(model, [folder], out, METHOD, save=["masks", "scores"]) == Predicted(3, 0, ())
    assert (out / "0.png").read_bytes() != b"left as it is"
    assert predict_files(model, [folder], out, METHOD) == Predicted(0, 3, ())


def test_overwrite_makes_all_again_and_can_be_gone_on_with(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = folder_of(tmp_path, (8, 8), (9, 9)), tmp_path / "out"
    predict_files(model, [folder], out, METHOD)
    assert predict_files(model, [folder], out, METHOD, overwrite=True) == Predicted(2, 0, ())

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ExitSegmenter, "segment", killed)
        predict_files(model, [folder], out, Dense(), overwrite=True)
    assert predict_files(model, [folder], out, Dense()) == Predicted(2, 0, ())  # none of the old ones is taken for new


def test_predictions_of_another_model_or_method_are_not_mixed_in(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8), (9, 9)), tmp_path / "out"
    predict_files(model, [folder / "0.png"], out, METHOD)
    before = names(out)
    for other, method, what in (
        (tiny_segmenter("fcn", seed=1), METHOD, "weights"),
        (model, replace(METHOD, threshold=0.5), "method"),
    ):
        words = rf"^{out} holds predictions made with other {what}: choose another folder, or --overwrite\.$"
        with pytest.raises(ConfigError, match=words):
            predict_files(other, [folder], out, method)
    assert names(out) == before
    changed = replace(METHOD, threshold=0.5)
    words = rf"^{out} holds predictions of other images made with other method: choose another folder\.$"
    with pytest.raises(ConfigError, match=words):
        predict_files(model, [folder / "1.png"], out, changed, overwrite=True)
    assert names(out) == before
    record = json.loads((out / RECORD).read_text())
    assert (record["weights"], record["method"]["threshold"]) == (model.fingerprint(), METHOD.threshold)


def test_overwriting_with_another_method_leaves_nothing_of_the_older_one(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8)), tmp_path / "out"
    predict_files(model, [folder], out, METHOD, save=["masks", "overlays", "coco"])
    predict_files(model, [folder], out, Dense(), save=["masks"], overwrite=True)
    assert names(out) == ["0.png"]
    assert json.loads((out / RECORD).read_text())["method"] == {"name": "dense"}


def test_files_of_unknown_origin_are_made_again(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8)), tmp_path / "out"
    out.mkdir()
    for suffix in (*RESULTS, ".other.png"):
        (out / f"0{suffix}").write_bytes(b"whose?")
    assert predict_files(model, [folder], out, METHOD) == Predicted(1, 0, ())
    assert Image.open(out / "0.png").size == (8, 8)
    assert (out / "0.other.png").read_bytes() == b"whose?"


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_damaged_zip_ends_in_one_sentence_and_stays(where: float, model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8), (9, 9)), tmp_path / "out.zip"
    predict_files(model, [folder / "0.png"], out, METHOD)
    content = bytearray(out.read_bytes())
    start = int(where * len(content))
    content[start : start + 60] = bytes(byte ^ 0x5A for byte in content[start : start + 60])
    out.write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.zip is no zip that can be read: remove it, or choose another name\.$"):
        predict_files(model, [folder], out, METHOD)
    assert out.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.zip"]


def test_a_zip_holds_what_the_folder_would_and_is_gone_on_with(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (8, 8), (9, 9)), tmp_path / "out"
    predict_files(model, [folder], out, METHOD, save=["masks", "coco"])
    packed_ = tmp_path / "out.zip"
    assert predict_files(model, [folder / "1.png"], packed_, METHOD, save=["masks", "coco"]) == Predicted(1, 0, ())
    assert predict_files(model, [folder], packed_, METHOD, save=["masks", "coco"]) == Predicted(1, 1, ())
    assert predict_files(model, [folder], packed_, METHOD, save=["masks", "coco"]) == Predicted(0, 2, ())
    with ZipFile(packed_) as archive:
        assert sorted(archive.namelist()) == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
        for name in archive.namelist():
            assert archive.read(name) == (out / name).read_bytes(), name
    with pytest.raises(ConfigError, match="predictions made with other method"):
        predict_files(model, [folder], packed_, Dense())


def test_a_folder_keeps_to_the_exits_that_were_closed__on_resized_images_too(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out, scaled = tmp_path / "pictures", tmp_path / "out", Resized(DToP(threshold=0.0), 0.5)
    images.mkdir()
    for name in ("one", "two"):
        noise(32, 32).save(images / f"{name}.png")
    gated = Resized(GatedBySize(scaled.method, ((1, (0,)),)), 0.5)
    monkeypatch.setattr(predicting, "gated_by_size", lambda *_: gated)
    predict_files(model, [images], out, scaled, gate=True)
    (out / "one.png").unlink()
    monkeypatch.setattr(predicting, "gated_by_size", lambda *_: scaled)  # another machine, or another day
    predict_files(model, [images], out, scaled, gate=True)
    assert build_method(json.loads((out / RECORD).read_text())["method"]) == gated


def test_exits_that_do_not_pay_are_passed_over_and_a_folder_keeps_to_the_choice_it_began_with(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "pictures"
    images.mkdir()
    for name, side in (("small", 8), ("large", 32)):
        noise(side, side).save(images / f"{name}.png")
    everyone_leaves = DToP(threshold=0.0, keep_per_class=0)
    closed: list[tuple[int, ...]] = [(0, 1)]
    monkeypatch.setattr(
        predicting, "gated_by_size", lambda model, method, _: GatedBySize(method, ((1, closed[0]), (16, ())))
    )

    def predict(out: Path, **options: Any) -> None:
        predict_files(model, [images], out, everyone_leaves, save=("exits", "masks"), **options)
        record = json.loads((out / RECORD).read_text())["method"]
        assert build_method(record) == (
            GatedBySize(everyone_leaves, ((1, closed[0]), (16, ()))) if options.get("gate") else everyone_leaves
        )

    gated, free = tmp_path / "gated", tmp_path / "free"
    predict(gated, gate=True)
    predict(free)
    same = [
        (gated / f"{name}.exits.png").read_bytes() == (free / f"{name}.exits.png").read_bytes()
        for name in ("small", "large")
    ]
    assert same == [False, True]
    (gated / "small.png").unlink()
    before, closed[0] = closed[0], ()  # another machine, or another day
    predict_files(model, [images], gated, everyone_leaves, save=("exits", "masks"), gate=True)
    assert json.loads((gated / RECORD).read_text())["method"]["closed"] == [[1, list(before)], [16, []]]


@pytest.mark.parametrize(
    ("method", "gate"),
    [
        (DToP(), True),
        (GatedBySize(DToP(), ((1, (0,)),)), False),
        (Resized(GatedBySize(DToP(), ((1, (0,)),)), 0.5), False),
    ],
)
def test_a_monitor_and_exits_closed_by_size_do_not_go_together(
    model: ExitSegmenter, tmp_path: Path, method: Method[Any], gate: bool
) -> None:
    monitor = Monitor(ReferenceStatistics.of(Histograms(torch.zeros(1, 2, len(EDGES) + 1, dtype=torch.int64))))
    with pytest.raises(ConfigError, match="a monitor must see the same exits of all images"):
        predict_files(model, [tmp_path], tmp_path / "out", method, gate=gate, monitor=monitor)


@pytest.mark.parametrize(
    "method", [Gated(METHOD, (0,)), Resized(Gated(METHOD, (0,)), 0.7), Resized(Dense(), 0.5)], ids=repr
)
def test_a_monitor_sees_the_exits_that_are_open_for_every_image(
    model: ExitSegmenter, tmp_path: Path, method: Method[Any]
) -> None:
    folder = folder_of(tmp_path, (20, 30), (9, 9), (12, 12))
    with hook_scores(model) as seen:
        for n in range(3):
            model.predict(folder / f"{n}.png", method)
    alone = seen.histograms([1, 1, 1])
    monitor = Monitor(ReferenceStatistics.of(alone))
    assert predict_files(model, [folder], tmp_path / "out", method, monitor=monitor).failed == ()
    assert monitor.images == 3
    torch.testing.assert_close(monitor.shares, alone.shares().sum(dim=0))
    assert monitor.shares[0].sum() == 0


def test_a_resized_methods_predictions_are_those_of_the_model_at_the_images_size(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, (20, 30), (9, 9))
    method = Resized(METHOD, 0.6)
    assert predict_files(model, [folder], tmp_path / "out", method).failed == ()
    for n, size in enumerate([(20, 30), (9, 9)]):
        with Image.open(tmp_path / "out" / f"{n}.png") as mask:
            found = np.asarray(mask)
        assert found.shape == size
        assert np.array_equal(found, model.predict(folder / f"{n}.png", method).labels[0].numpy())


def test_the_largest_number_of_tokens_is_of_the_resized_image(model: ExitSegmenter, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, (32, 32))
    half = predict_files(model, [folder], tmp_path / "half", Resized(METHOD, 0.5), max_tokens=16)
    assert half.failed == ()
    twice = predict_files(model, [folder], tmp_path / "twice", Resized(METHOD, 2.0), max_tokens=64)
    assert ["would run as 256 tokens at once, more than 64" in str(failed) for failed in twice.failed] == [True]


def test_a_record_of_a_time_before_an_option_is_that_of_its_default(model: ExitSegmenter, tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path, (9, 9), (12, 12)), tmp_path / "out"
    predict_files(model, [folder / "0.png"], out, METHOD)
    record = json.loads((out / RECORD).read_text())
    del record["method"]["stop"]
    (out / RECORD).write_text(json.dumps(record))
    assert predict_files(model, [folder], out, METHOD).failed == ()
    assert json.loads((out / RECORD).read_text())["method"]["stop"] is None
    with pytest.raises(ConfigError, match="made with other method"):
        predict_files(model, [folder], out, replace(METHOD, stop=1))


def test_a_method_without_some_exits_is_recorded(model: ExitSegmenter, tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    method = Gated(METHOD, (0,))
    assert predict_files(model, [tmp_path / "a.png"], tmp_path / "out", method).failed == ()
    assert build_method(json.loads((tmp_path / "out" / RECORD).read_text())["method"]) == method


# ------------------------------------------------------------------------------------------------- what can be kept


def test_scores_are_those_of_the_labels_and_layouts_of_others_hold_the_same_map(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    folder, out = folder_of(tmp_path, (8, 12), (9, 9)), tmp_path / "out"
    predict_files(model, [folder], out, METHOD, save=["scores", "coco", "labelstudio"], image_url="https://x/")
    assert names(out) == sorted(
        [
            *(f".parts/{n}.{kind}.json" for n in range(2) for kind in ("coco", "labelstudio")),
            *("0.scores.png", "1.scores.png", "coco.index.json", "coco.results.json"),
            *("labelstudio.json", "labelstudio.xml"),
        ]
    )
    results = json.loads((out / "coco.results.json").read_text())
    index = json.loads((out / "coco.index.json").read_text())
    tasks = json.loads((out / "labelstudio.json").read_text())
    for n in range(2):
        output = model.predict(folder / f"{n}.png", METHOD)
        labels = output.labels[0].numpy()
        expected = output.logits[0].softmax(0).amax(0)
        scores = torch.from_numpy(np.array(Image.open(out / f"{n}.scores.png"))) / 255.0
        assert (scores - expected).abs().max() <= 0.5 / 255 + 1e-4

        (image,) = (image for image in index["images"] if image["file_name"] == f"{n}.png")
        mine = [one for one in results if one["image_id"] == image["id"]]
        assert {one["category_id"]: read(one["segmentation"]["counts"]) for one in mine} == run_lengths(labels)

        task = tasks[n]
        assert task["data"]["image"] == f"https://x/{n}.png"
        (prediction,) = task["predictions"]
        stages = (
            output.exit_index[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[: labels.shape[0], : labels.shape[1]]
        )
        certainty = 1.0 - stages.numpy() / output.num_exits
        assert prediction["score"] == pytest.approx(certainty.mean(), abs=1e-4)
        for region, k in zip(prediction["result"], np.unique(labels), strict=True):
            np.testing.assert_array_equal(as_mask(region["value"]["rle"], *labels.shape), labels == k)
            assert region["score"] == pytest.approx(certainty[labels == k].mean(), abs=1e-4)


def test_dense_says_nothing_of_how_hard_an_image_was(model: ExitSegmenter, tmp_path: Path) -> None:
    predict_files(model, [folder_of(tmp_path, (8, 12))], tmp_path / "out", Dense(), save=["labelstudio"])
    (task,) = json.loads((tmp_path / "out" / "labelstudio.json").read_text())
    assert "score" not in task["predictions"][0]


def test_more_classes_than_a_palette_holds_are_sixteen_bits(tmp_path: Path) -> None:
    other = tiny_segmenter("linear", num_classes=300)
    predict_files(other, [folder_of(tmp_path, (8, 12))], tmp_path / "out", METHOD, save=["masks"])
    mask = Image.open(tmp_path / "out" / "0.png")
    assert mask.mode == "I;16"
    assert np.asarray(mask).tolist() == other.predict(tmp_path / "in" / "0.png", METHOD).labels[0].tolist()


@pytest.mark.parametrize("save", [["mask"], []])
def test_what_cannot_be_kept_is_refused(save: list[str], model: ExitSegmenter, tmp_path: Path) -> None:
    words = (
        r"^save(='mask' is unknown| is empty): choose of masks, overlays, exits, scores, coco, labelstudio, video\.$"
    )
    with pytest.raises(ConfigError, match=words):
        predict_files(model, [folder_of(tmp_path, (8, 8))], tmp_path / "out", METHOD, save=save)


def test_the_command_offers_what_can_be_kept() -> None:
    assert (*outputs.OUTPUTS, outputs.VIDEO) == SAVE
    assert MAX_TOKENS == pipeline.MAX_TOKENS
    assert SAVE[:3] == outputs.DEFAULT


# ----------------------------------------------------------------------------------------------------------- videos


def film_of(path: Path, count: int = 5) -> None:
    pytest.importorskip("av")
    with video.encoder(path, Fraction(10)) as add:
        for n in range(count):
            add(noise(24, 32, seed=n))


def test_a_video_leaves_a_mask_for_each_frame_and_goes_on_where_it_was(model: ExitSegmenter, tmp_path: Path) -> None:
    film_of(tmp_path / "v.mp4")
    out = tmp_path / "out"
    assert predict_files(model, [tmp_path / "v.mp4"], out, METHOD, save=["masks"]) == Predicted(5, 0, ())
    assert names(out) == [".parts/v.frames.json", *(f"v/{n:06d}.png" for n in range(1, 6))]
    for n, load in enumerate(video.frames(tmp_path / "v.mp4"), start=1):
        mask = np.asarray(Image.open(out / f"v/{n:06d}.png"))
        assert mask.tolist() == model.predict(load(), METHOD).labels[0].tolist()
    assert predict_files(model, [tmp_path / "v.mp4"], out, METHOD, save=["masks"]) == Predicted(0, 1, ())
    (out / "v" / "000003.png").unlink()
    assert predict_files(model, [tmp_path / "v.mp4"], out, METHOD, save=["masks"]) == Predicted(1, 0, ())
    done = predict_files(model, [tmp_path / "v.mp4"], out, METHOD, save=["masks"], overwrite=True)
    assert done == Predicted(5, 0, ())


def test_the_overlays_of_a_video_or_of_a_folder_become_a_video(model: ExitSegmenter, tmp_path: Path) -> None:
    film_of(tmp_path / "v.mp4")
    folder, out = folder_of(tmp_path, *[(24, 32)] * 3), tmp_path / "out"
    sources = [tmp_path / "v.mp4", folder]
    assert predict_files(model, sources, out, METHOD, save=["video"], fps=5) == Predicted(8, 0, ())
    assert names(out) == [".parts/v.frames.json", "in.overlay.mp4", "v.overlay.mp4"]
    for name, count, rate in (("v", 5, 10), ("in", 3, 5)):
        assert len(list(video.frames(out / f"{name}.overlay.mp4"))) == count
        assert video.rate_of(out / f"{name}.overlay.mp4") == rate
    shown = np.asarray(next(video.frames(out / "in.overlay.mp4"))()).astype(int)
    labels = model.predict(folder / "0.png", METHOD).labels[0].numpy()
    expected = np.asarray(overlay(noise(24, 32, seed=0), labels, default_labels(5).palette)).astype(int)
    assert np.abs(shown - expected).mean() < 30  # of noise, through a codec that halves its colours
    assert predict_files(model, sources, out, METHOD, save=["video"], fps=5) == Predicted(0, 4, ())


def test_a_frame_that_cannot_be_read_spoils_the_film_and_nothing_else(model: ExitSegmenter, tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder, out = folder_of(tmp_path, (24, 32), (24, 32), (24, 32)), tmp_path / "out"
    (folder / "1.png").write_bytes(b"no image")
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    done = predict_files(model, [folder, tmp_path / "cut.mp4"], out, METHOD, save=["masks", "video"])
    assert done.images == 2
    assert [message.split("'")[1] for message in done.failed] == [str(folder / "1.png"), str(tmp_path / "cut.mp4")]
    assert names(out) == ["0.png", "2.png"]
    noise(24, 40).save(folder / "1.png")
    (message,) = predict_files(model, [folder], out, METHOD, save=["masks", "video"]).failed
    assert message.startswith("a frame of 24x40 pixels follows one of 24x32 in in.overlay.mp4")
    assert names(out) == ["0.png", "1.png", "2.png"]


def test_videos_without_pyav_are_passed_over_in_one_sentence(
    model: ExitSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "v.mp4").write_bytes(b"")
    noise(8, 8).save(tmp_path / "a.png")
    done = predict_files(model, [tmp_path / "v.mp4", tmp_path / "a.png"], tmp_path / "out", METHOD)
    assert done.images == 1
    (message,) = done.failed
    assert message.startswith(f"video '{tmp_path / 'v.mp4'}' needs the package av: pip install 'tokenexit[video]'")


def test_a_video_is_no_task_and_never_overwritten(model: ExitSegmenter, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"v\.mp4 is a video, and Label Studio's masks are of images: give its frames"
    ):
        predict_files(model, [tmp_path / "v.mp4"], tmp_path / "out", METHOD, save=["labelstudio"])
    assert not (tmp_path / "out").exists()


def test_videos_of_one_name_are_told_apart(model: ExitSegmenter, tmp_path: Path) -> None:
    film_of(tmp_path / "v.mp4", 1)
    film_of(tmp_path / "v.mov", 1)
    done = predict_files(model, [tmp_path / "v.mp4", tmp_path / "v.mov"], tmp_path / "out", METHOD, save=["masks"])
    assert done == Predicted(2, 0, ())
    masks = [f"v.{kind}/000001.png" for kind in ("mov", "mp4")]
    assert names(tmp_path / "out") == [*(f".parts/v.{kind}.frames.json" for kind in ("mov", "mp4")), *masks]
