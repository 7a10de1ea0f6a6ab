"""Features of every block and dense answers, on disk: what they are, and what becomes of them in a bad hour."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.adaptation.scenes import dense_model, draw, photos_of
from tokenexit.adaptation import features as module
from tokenexit.adaptation.features import Features, record_features
from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.data.photos import UnlabelledImages
from tokenexit.errors import ConfigError
from tokenexit.outputs.windows import window_boxes

BLOCKS = (1, 2)
PHOTOS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("photos"), PHOTOS)


def in_order(photos: CalibrationSet, seed: int = 0) -> list[torch.Tensor]:
    """The photos as tensors, in the order in which they are recorded."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed)).tolist()
    return [photos.model.preprocessing.to_tensor(photos.data[n].image) for n in order]


def contents(features: Features) -> list[bytes]:
    return [features.rows(block).tobytes() for block in features.blocks] + [features.answers().tobytes()]


@torch.no_grad()
def test_features__are_the_tokens_after_each_block_and_the_dense_scores(folder: Path, tmp_path: Path) -> None:
    photos = photos_of(dense_model(num_registers=1), folder)
    model, found = photos.model, record_features(photos, BLOCKS, tmp_path)
    rows: dict[int, list[torch.Tensor]] = {block: [] for block in BLOCKS}
    scores = []
    for image in in_order(photos):
        for block in BLOCKS:
            rows[block].append(model.backbone.run(model.backbone.embed([image]), 0, block).patches().x)
        scores.append(model([image]).grid_logits[0].softmax(0).flatten(1).T)
    for block in BLOCKS:
        assert np.array_equal(found.rows(block), torch.cat(rows[block]).half().numpy())
    answers = torch.from_numpy(np.array(found.answers())).float()
    assert (answers - torch.cat(scores)).abs().max() < 1e-3
    assert (answers.sum(1) - 1).abs().max() < 2e-3
    assert found.held_out == found.tokens // PHOTOS  # one photo of four
    assert found.tokens == PHOTOS * 6 * 9


@pytest.mark.parametrize("head", ["setr_pup", "atm", "mask_transformer"])
@torch.no_grad()
def test_features__answers_of_all_heads_add_up_to_one_and_name_the_dense_class(
    head: str, folder: Path, tmp_path: Path
) -> None:
    photos = photos_of(dense_model(head), folder)
    found = record_features(photos, BLOCKS, tmp_path)
    answers = torch.from_numpy(np.array(found.answers())).float()
    assert (answers.sum(1) - 1).abs().max() < 3e-3
    scale = photos.model.decode_head.scale
    dense = []
    for image in in_order(photos):
        output = photos.model([image])
        maps = output.grid_logits[0][None]
        scores = maps if output.value == "scores" else maps.softmax(1)
        dense.append(F.avg_pool2d(scores, scale).argmax(1).flatten())
    assert (answers.argmax(1) == torch.cat(dense)).float().mean() > 0.99  # ties in half precision


@torch.no_grad()
def test_features__of_windows_are_those_of_each_window(folder: Path, tmp_path: Path) -> None:
    model = dense_model()
    model.preprocessing = replace(model.preprocessing, window=(16, 20), stride=(8, 16))
    photos = photos_of(model, folder)
    found = record_features(photos, BLOCKS, tmp_path)
    boxes = window_boxes((24, 36), (16, 20), (8, 16))
    assert len(boxes) == 4
    assert found.tokens == PHOTOS * len(boxes) * 4 * 5
    image, (top, left, bottom, right) = in_order(photos)[0], boxes[1]
    tokens = model.backbone.run(model.backbone.embed([image[:, top:bottom, left:right]]), 0, 2)
    assert np.array_equal(found.rows(2)[20:40], tokens.patches().x.half().numpy())


def test_features__within_few_bytes_are_of_fewer_tokens_of_every_photo(folder: Path, tmp_path: Path) -> None:
    photos = photos_of(dense_model(), folder)
    whole = record_features(photos, BLOCKS, tmp_path / "whole")
    of_token = 2 * (2 * whole.channels + whole.classes)
    found = record_features(photos, BLOCKS, tmp_path / "few", most_bytes=of_token * 10 * PHOTOS + 7)
    assert found.tokens == 10 * PHOTOS
    assert found.held_out == 10
    files = [path for path in (tmp_path / "few").iterdir() if path.suffix == ".f16"]
    assert sum(path.stat().st_size for path in files) <= of_token * 10 * PHOTOS + 7
    rows = {row.tobytes() for row in whole.rows(1)[:54]}
    assert all(row.tobytes() in rows for row in found.rows(1)[:10])
    other = record_features(photos, BLOCKS, tmp_path / "other", most_bytes=of_token * 10 * PHOTOS, seed=1)
    assert contents(other) != contents(found)


class Killed(Exception):
    """What ends a pass in these tests."""


def killed_after(photos: CalibrationSet, count: int) -> CalibrationSet:
    class Some(UnlabelledImages):
        seen = 0

        def __getitem__(self, index: int, /) -> Any:
            self.seen += 1
            if self.seen > count:
                raise Killed
            return super().__getitem__(index)

    return replace(photos, data=Some(photos.data.paths, photos.data.labels))  # type: ignore[attr-defined]


def test_features__of_a_killed_pass_go_on_and_end_the_same(folder: Path, tmp_path: Path) -> None:
    photos = photos_of(dense_model(), folder)
    never = record_features(photos, BLOCKS, tmp_path / "never")
    with pytest.raises(Killed):
        record_features(killed_after(photos, 2), BLOCKS, tmp_path / "killed")
    with (tmp_path / "killed" / "block001.f16").open("ab") as file:
        file.write(b"half a row")  # what was begun when the power went
    goes_on = killed_after(photos, 2)  # two more photos are enough
    found = record_features(goes_on, BLOCKS, tmp_path / "killed")
    assert contents(found) == contents(never)
    assert (found.tokens, found.held_out) == (never.tokens, never.held_out)
    assert contents(record_features(killed_after(photos, 0), BLOCKS, tmp_path / "killed")) == contents(never)


@pytest.mark.parametrize("harm", ["shorter", "missing", "no progress", "other blocks"])
def test_features__that_are_not_whole_begin_anew(harm: str, folder: Path, tmp_path: Path) -> None:
    photos = photos_of(dense_model(), folder)
    never = record_features(photos, BLOCKS, tmp_path / "never")
    record_features(photos, (1,) if harm == "other blocks" else BLOCKS, tmp_path / "harmed")
    if harm == "shorter":
        with (tmp_path / "harmed" / "block002.f16").open("ab") as file:
            file.truncate(100)
    elif harm == "missing":
        (tmp_path / "harmed" / "answers.f16").unlink()
    elif harm == "no progress":
        (tmp_path / "harmed" / "progress.json").write_text("{")
    assert contents(record_features(photos, BLOCKS, tmp_path / "harmed")) == contents(never)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_features__on_a_full_disk_end_in_one_sentence_and_go_on(
    code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = photos_of(dense_model(), folder)
    never = record_features(photos, BLOCKS, tmp_path / "never")
    append, calls = module._append, 0

    def full(path: Path, rows: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second row of the second photo, half of which fits
            append(path, rows[: len(rows) // 2])
            raise OSError(code, "no more")
        append(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", full)
        with pytest.raises(ConfigError) as error:
            record_features(photos, BLOCKS, tmp_path / "full")
    assert str(error.value).count("\n") == 0
    assert ("is full: features of these photos take up to" in str(error.value)) == (code != errno.EROFS)
    assert "cannot be written" in str(error.value) or "GiB" in str(error.value)
    assert contents(record_features(killed_after(photos, 3), BLOCKS, tmp_path / "full")) == contents(never)


def test_features__written_to_a_device_that_is_full_say_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "block001.f16").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        module._append(tmp_path / "block001.f16", torch.zeros(4000, 4))
    assert error.value.errno == errno.ENOSPC
