"""Hundreds of odd names and damaged files in one call, and damaged zips: sentences, and nothing half-written."""

from __future__ import annotations

import os
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_segmenter
from tests.prediction.test_predict_files import noise
from tokenexit.cli import main

SEEDS = (0, 1, 2)
OPTIONS = ("--method", "dense", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_segmenter("fcn").save_pretrained(folder)
    return folder


def bytes_of(kind: str, seed: int) -> bytes:
    file = BytesIO()
    noise(6, 8, seed=seed).save(file, format=kind)
    return file.getvalue()


def odd_name(chance: random.Random) -> bytes:
    """Any bytes that a file may be called, of any length, and a usual suffix."""
    length = chance.choice((1, 2, 5, 40, 200, 244, 251))
    alphabets: tuple[bytes, ...] = (
        bytes(set(range(1, 256)) - {ord("/")}),
        b"ab.",
        b" \n\t'\"\\%{}$*?[]-@",
        "äß漢😀".encode(),
    )
    name = bytes(chance.choices(chance.choice(alphabets), k=length)).lstrip(b".") or b"x"
    return name[: 255 - 5] + chance.choice((b".png", b".jpg", b".PNG", b".webp"))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out or added."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(changed))
        stop = start + chance.choice((1, 2, 16, 60))
        changed[start:stop] = chance.choice((b"", chance.randbytes(stop - start), chance.randbytes(stop - start + 7)))
    return bytes(changed) or b"x"


@pytest.mark.parametrize("seed", SEEDS)
def test_odd_names_and_damaged_images__cost_a_sentence_each_and_the_others_are_written(
    seed: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    folder, out = os.fsencode(tmp_path / "in"), tmp_path / "out.zip"
    os.mkdir(folder)
    for name in {odd_name(chance) for _ in range(300)}:
        content = bytes_of("PNG", 0)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(mutated(content, chance) if chance.random() < 0.3 else content)
    save = ("--save", "masks", "coco", "labelstudio")
    status = main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), *save, *OPTIONS])
    printed = capsys.readouterr()
    assert status == 1, printed.err
    assert "Traceback" not in printed.err
    segmented, failed = (int(part.split()[-1]) for part in printed.out.split("\n")[0].split(","))
    images = [name for name in os.listdir(folder) if not name.startswith(b".")]
    assert segmented + failed == len(images)
    assert printed.err.count("\ntokenexit predict: ") + printed.err.startswith("tokenexit predict: ") >= failed > 30
    masks = [path for path in (tmp_path / "out").rglob("*.png") if not path.name.startswith(".")]
    assert len(masks) == segmented > 100
    assert all(np.asarray(Image.open(path)).shape == (6, 8) for path in masks)
    assert not list((tmp_path / "out").rglob(".*.png"))
    assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(out), *save, *OPTIONS]) == 1
    assert capsys.readouterr().out == printed.out  # a zip holds the same names


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_zips__end_in_one_sentence_or_are_gone_on_with(
    seed: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    for n in range(2):
        noise(6, 8, seed=n).save(tmp_path / f"{n}.png")
    out = tmp_path / "out" / "all.zip"
    arguments = ["predict", str(model), "--out", str(out), "--save", "masks", "coco", *OPTIONS]
    assert main([*arguments, str(tmp_path / "0.png")]) == 0
    whole = out.read_bytes()
    refused = 0
    for _ in range(60):
        damaged = mutated(whole, chance)
        out.write_bytes(damaged)
        capsys.readouterr()
        status = main([*arguments, str(tmp_path / "1.png")])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        if status:
            refused += 1
            assert status == 2
            assert said.startswith("tokenexit predict: ")
            assert said.count("\n") == 1
            assert out.read_bytes() == damaged
        assert [path.name for path in out.parent.iterdir()] == ["all.zip"]
    assert refused > 20
