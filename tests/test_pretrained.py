"""Models in folders: killed saves, fingerprints, and files that others made."""

import copy
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.calibration.test_calibrate import calibration_set
from tests.helpers import enliven, tiny_segmenter
from tests.saving_driver import versions
from tokenexit.calibration.calibrate import calibrate
from tokenexit.calibration.store import reference_statistics_of
from tokenexit.calibration.targets import Budget
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import CheckpointError, TokenExitError
from tokenexit.methods import DToP
from tokenexit.pretrained import read_record
from tokenexit.segmenter import ExitSegmenter

KILLS = int(os.environ.get("TOKENEXIT_KILLS", "12"))
FIRST_VERSION = "252a0ab0f227f56b"
"""What `fingerprint` of version 0.1.0 before all weights were covered said of `tiny_segmenter()`."""
MUTATIONS = int(os.environ.get("TOKENEXIT_MUTATIONS", "60"))

# ------------------------------------------------------------------------------------------------------ killed saves


def which(folder: Path, models: list[ExitSegmenter]) -> int:
    """The number of the model in a folder, which must be that model in all its parts."""
    found = ExitSegmenter.from_pretrained(folder)
    number = found.config.backbone.depth - 4
    expected = models[number]
    assert found.config == expected.config
    state = found.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert (found.calibration, found.records) == (expected.calibration, expected.records)
    assert found.calibrated_method() is not None
    return number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_save__killed_at_any_moment_leaves_one_model_whole(tmp_path: Path) -> None:
    folder, copies = tmp_path / "model", tmp_path / "copies"
    driver = [sys.executable, "-m", "tests.saving_driver", str(folder), str(copies), str(KILLS), "20261124"]
    subprocess.run(driver, check=True, timeout=300)
    models = versions()
    seen = [which(copy, models) for copy in copies.iterdir()]
    left = sum(path.name.startswith(".") for copy in copies.iterdir() for path in copy.iterdir())
    assert len(seen) == KILLS
    models[0].save_pretrained(folder)
    assert which(folder, models) == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    print(
        f"{KILLS} kills: {seen.count(0)} and {seen.count(1)} whole models, {left} folders unfinished, none at the end"
    )


def test_save__files_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tiny_segmenter().save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o644}


def test_save__over_its_own_loaded_files_is_the_same_model(tmp_path: Path) -> None:
    tiny_segmenter().save_pretrained(tmp_path)
    model = ExitSegmenter.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert ExitSegmenter.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint__covers_every_tensor() -> None:
    model = tiny_segmenter("fcn", num_registers=1, layer_scale=0.5)
    seen = {model.fingerprint()}
    for value in model.state_dict().values():
        value.view(-1)[-1] += 1
        seen.add(model.fingerprint())
    assert len(seen) == 1 + len(model.state_dict())


def test_fingerprint__of_equal_weights_is_the_same() -> None:
    model = tiny_segmenter()
    assert model.fingerprint() == tiny_segmenter().fingerprint() == copy.deepcopy(model).fingerprint()
    assert model.fingerprint().startswith("v2:")


def test_fingerprint__follows_changes_after_it_was_taken() -> None:
    model = tiny_segmenter()
    before = model.fingerprint()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    enliven(model)
    assert model.fingerprint() != before
    model.load_state_dict(state)
    assert model.fingerprint() == before
    model.backbone.pos_embed = torch.nn.Parameter(model.backbone.pos_embed + 1)
    assert model.fingerprint() != before


def test_calibration__of_another_backbone_under_the_same_heads_is_refused() -> None:
    model = tiny_segmenter()
    model.calibration = Calibration(model=model.fingerprint(), method={"name": "dtop"})
    assert model.calibrated_method() == DToP()
    enliven(model.backbone)
    with pytest.raises(CheckpointError, match="made for other weights"):
        model.calibrated_method()


def test_calibration__of_the_first_version_is_known_by_its_heads() -> None:
    model = tiny_segmenter()
    model.calibration = Calibration(model=FIRST_VERSION, method={"name": "dtop"})
    assert model.calibrated_method() == DToP()
    enliven(model.decode_head)
    with pytest.raises(CheckpointError, match="made for other weights"):
        model.calibrated_method()


# --------------------------------------------------------------------------------------------------- files of others


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ExitSegmenter.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def changed(folder: Path, *where: Any, value: Any, file: str = "config.json") -> None:
    content = json.loads((folder / file).read_text())
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (folder / file).write_text(json.dumps(content))


BACKBONE = ("model", "backbone")


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ((*BACKBONE, "layer_scale"), "x", "layer_scale must be a number or None, got 'x'"),
        ((*BACKBONE, "num_heads"), 4.0, "num_heads must be a whole number from 1 to 512, got 4.0"),
        (("model", "exits"), [1.0, 3], "exits must be a list, each a whole number, got"),
        ((*BACKBONE, "depth"), 100_000, "depth must be a whole number from 1 to 128, got 100000"),
        ((*BACKBONE, "depth"), 2**31, "depth must be a whole number from 1 to 128"),
        ((*BACKBONE, "embed_dim"), 40_000, "embed_dim must be a whole number from 1 to 8192"),
        ((*BACKBONE, "colour"), "red", "backbone holds the unknown key 'colour'"),
        (("model", "num_classes"), True, "num_classes must be a whole number"),
        (("model", "decode_head"), {"kind": "atm", "layers": 10**6}, "layers of head 'atm' must be a whole number"),
        (("model", "decode_head"), {"kind": "fcn", "channels": "x"}, "channels of head 'fcn' must be a whole number"),
        (("model", "decode_head"), {"kind": ["fcn"]}, "is unknown"),
        (("model", "exit_heads"), ["fcn"], "exit_head has 1 heads for 2 exits"),
        (("preprocessing", "resize"), [30_000, 30_000], "of 1 to 8192 each"),
        (("preprocessing", "labels"), {"names": ["a"], "palette": [[0, 0, 0]]}, "names 1 classes"),
        (("format",), None, "has format None"),
    ],
)
def test_load__a_configuration_is_held_to_types_and_bounds(
    tmp_path: Path, where: tuple[str, ...], value: Any, words: str
) -> None:
    tiny_segmenter().save_pretrained(tmp_path)
    changed(tmp_path, *where, value=value)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "calibration.json"])
def test_load__deep_nesting_is_refused(tmp_path: Path, file: str) -> None:
    tiny_segmenter().save_pretrained(tmp_path)
    (tmp_path / file).write_text('{"model": ' * 200_000)
    assert "nests deeper than" in refusal(tmp_path)


def test_load__takes_no_memory_before_the_weights_fit(tmp_path: Path) -> None:
    """The largest model that the bounds allow beside the weights of a small one."""
    tiny_segmenter().save_pretrained(tmp_path)
    changed(tmp_path, *BACKBONE, "embed_dim", value=8192)
    changed(tmp_path, *BACKBONE, "depth", value=128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "does not fit" in refusal(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; its weights are 400 GB


def test_load__of_weights_of_other_types_and_places_is_refused(tmp_path: Path) -> None:
    model = tiny_segmenter()
    model.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    state.pop("decode_head.classifier.bias")
    save_file(state, tmp_path / "model.safetensors")
    assert "(1 entries differ, first 'decode_head.classifier.bias')" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("method",), 3, "method must be a text or a mapping, got 3"),
        (("model",), 7, "model must be a text"),
        (("reached",), {"live_after_exit": ["x"]}, "reached.live_after_exit must be a list, each a number from 0 to 1"),
        (("scores",), {"images": [2**70]}, "scores.images must be a list, each a whole number from 0"),
        (("scores",), {"mean": [[0.5], "x"]}, "scores.mean must be"),
        (("asked",), [], "asked must be a mapping"),
    ],
)
def test_load__a_calibration_is_held_to_types_and_bounds(
    tmp_path: Path, where: tuple[str, ...], value: Any, words: str
) -> None:
    model = tiny_segmenter()
    model.calibration = Calibration(model=model.fingerprint(), method={"name": "dtop"})
    model.save_pretrained(tmp_path)
    changed(tmp_path, *where, value=value, file="calibration.json")
    message = refusal(tmp_path)
    assert words in message
    assert message.endswith("calibrate again, or delete it.")


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dtop", "threshold": "x"},
        {"name": "dtop", "keep_per_class": 10**23},
        {"name": "dtop", "keep_per_class": 2.5},
        {"name": ["dtop"]},
        {"name": "gated", "method": 3, "closed": []},
        {"name": "gated", "method": "dtop", "closed": "x"},
        {"threshold": 0.5},
    ],
)
def test_calibrated_method__that_cannot_be_is_refused_in_one_sentence(method: dict[str, Any]) -> None:
    model = tiny_segmenter()
    model.calibration = Calibration(model=model.fingerprint(), method=method)
    with pytest.raises(CheckpointError, match=r"^calibration.json is damaged \(.*\): calibrate again, or delete it\.$"):
        model.calibrated_method()


def test_records__of_other_types_are_passed_over_and_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    model = tiny_segmenter()
    model.records = {"training.json": {"history": [{"loss": float("nan")}]}, "evaluation.json": {"results": []}}
    model.save_pretrained(tmp_path)
    assert read_record(tmp_path, "training.json") == {"history": [{"loss": None}]}
    for text in ('{"history": [3]}', '{"config": {"data": {"name": 3}}}', "[]", "[" * 100_000):
        (tmp_path / "training.json").write_text(text)
        again = ExitSegmenter.from_pretrained(tmp_path)
        assert list(again.records) == ["evaluation.json"]
        again.save_pretrained(tmp_path / "with card", card=True)


# ------------------------------------------------------------------------------------------------------------ attack

ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "x" * 5000, [], {}, [[]], [None], {"a": {"b": []}}, {"kind": "atm"}),
    *(0, 1, -1, 2, 3.0, 4.5, 1e300, -1e300, 1e-300, 255, 65536, 10**6, 2**31, 2**63, 10**25, 30_000),
    *(["fcn"] * 3, [1, 2, 3], [2.0, 4, 6], [30_000, 30_000], [1e300, 1, 1], "dtop", "atm"),
)
RAW = (
    b"",
    b"{",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"NaN",
    b"\xff\xfe",
    b"9" * 6000,
    b'{"a":1,"a":1}',
    b"null",
    b"1e999",
)


def mutated(content: Any, rng: random.Random) -> bytes:
    """A JSON value with one to three places changed, removed or added, or other bytes in its place."""
    if rng.random() < 0.1:
        return rng.choice(RAW)
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        where = content
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(where[key], dict | list) and where[key] and rng.random() < 0.8:
                where = where[key]
                continue
            kind = rng.random()
            if kind < 0.75:
                where[key] = copy.deepcopy(rng.choice(ODD))
            elif kind < 0.9:
                del where[key]
            elif isinstance(where, dict):
                where["x"] = copy.deepcopy(rng.choice(ODD))
            else:
                where += copy.deepcopy(where)
            break
    text = json.dumps(content).encode()
    return text[: rng.randrange(len(text))] if rng.random() < 0.05 else text


@pytest.mark.parametrize("file", ["config.json", "calibration.json", "training.json"])
def test_attack__mutated_files_end_in_one_sentence_or_a_model(file: str, tmp_path: Path) -> None:
    images = calibration_set(6)
    model = images.model
    model.calibration = calibrate(images, DToP(keep_per_class=1), Budget("budget", 0.9))
    model.records = {"training.json": {"config": {"data": {"name": "scenes", "root": None, "options": {}}}}}
    model.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    rng, messages = random.Random(20_26 + len(file)), list[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = Image.new("RGB", (24, 16), (90, 120, 30))
    for _ in range(MUTATIONS):
        (tmp_path / file).write_bytes(mutated(whole, rng))
        try:
            found = ExitSegmenter.from_pretrained(tmp_path)
            found.predict(image, "dense" if file != "calibration.json" else None)
            if found.calibration is not None:
                reference_statistics_of(found)
            read_record(tmp_path, "training.json")
        except TokenExitError as error:
            messages.append(str(error))
    assert [message for message in messages if "\n" in message or len(message) > 700] == []
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_500_000  # KiB
    print(f"{file}: {len(messages)} of {MUTATIONS} refused, memory grew by {grown >> 10} MB")
