"""Fine-tuning against the dense twin on photos without labels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenexit.adaptation.finetune as module
from tests.helpers import tiny_segmenter
from tests.training.tiny import same_weights, silent, weights
from tokenexit.adaptation.finetune import finetune, finetune_config, training_method
from tokenexit.data.scenes import Scenes
from tokenexit.errors import CheckpointError, ConfigError, DataError
from tokenexit.methods import Dense, DoViT, DToP, FixedRatio, Gated, GatedBySize, Method, Truncated
from tokenexit.methods.base import option
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import DistillConfig
from tokenexit.training.distill import distillation_loss, load_teacher

PLAN = Gated(DToP(threshold=(0.3, 0.6)), closed=(0,))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    scenes = Scenes(6, (32, 48))
    for i in range(6):
        scenes[i].image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with exits that have learned nothing, which is its own dense twin."""
    folder = tmp_path_factory.mktemp("source")
    tiny_segmenter("fcn").save_pretrained(folder)
    return folder


def tuned(source: Path, photos: Path, out: Path, method: Method[Any] = PLAN, **options: Any) -> ExitSegmenter:
    given: dict[str, Any] = {"steps": 4, "batch_size": 2, "say": silent, "progress": False, "precision": "fp32"}
    folder = finetune(source, source, [photos], method, out=out, **(given | options))
    assert folder == out
    return ExitSegmenter.from_pretrained(folder)


def config_of(source: Path, photos: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"steps": 800, "out": Path("out"), "method": DToP()} | options
    return finetune_config(source, source, [photos], **given)


# ----------------------------------------------------------------------------------------------------------- end to end


def agreement(model: ExitSegmenter, dense: ExitSegmenter, images: torch.Tensor) -> float:
    with torch.inference_mode():
        ours, theirs = model(images, DToP(threshold=(1.0, 0.5))), dense(images)
    return (ours.logits.argmax(1) == theirs.logits.argmax(1)).float().mean().item()


def test_finetune__brings_a_model_with_exits_nearer_to_its_dense_twin(
    source: Path, photos: Path, tmp_path: Path
) -> None:
    before, after = ExitSegmenter.from_pretrained(source), tuned(source, photos, tmp_path, steps=60, batch_size=4)
    assert (tmp_path / "model.safetensors").is_file()
    images = torch.stack([before.preprocessing.to_tensor(Image.open(photos / f"{i}.png")) for i in range(6)])
    config = DistillConfig(str(source), features=0.5, logits=1.0, exits=0.5)
    teacher = load_teacher(config, before)
    assert teacher is not None
    target = teacher(images, with_records=True)
    losses = [
        distillation_loss(model(images, DToP(threshold=(1.0, 0.6)), with_records=True), target, config).item()
        for model in (before, after)
    ]
    assert 0.0 < losses[1] < 0.95 * losses[0]
    assert agreement(after, teacher, images) > agreement(before, teacher, images)


def test_finetune__changes_the_dense_prediction_and_drops_the_calibration(
    source: Path, photos: Path, tmp_path: Path
) -> None:
    model = tuned(source, photos, tmp_path)
    image = ExitSegmenter.from_pretrained(source).preprocessing.to_tensor(Image.open(photos / "0.png"))[None]
    assert not torch.equal(model(image).logits, ExitSegmenter.from_pretrained(source)(image).logits)
    assert model.calibration is None
    assert model.config == ExitSegmenter.from_pretrained(source).config


def test_finetune__of_a_grid_head_with_lighter_exits_is_trained_with_dovit(photos: Path, tmp_path: Path) -> None:
    tiny_segmenter("fcn", "setr_pup").save_pretrained(tmp_path / "source")
    model = tuned(tmp_path / "source", photos, tmp_path / "out", DoViT(threshold=0.5), steps=2)
    assert all(bool(value.isfinite().all()) for value in weights(model).values())


def test_finetune__killed_and_called_again_ends_with_the_weights_of_one_that_was_not(
    source: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed by the system wherever it is, and this one that goes on."""
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    options: dict[str, Any] = {"steps": 12, "class_balance": 0.5}
    never = weights(tuned(source, photos, tmp_path / "never", **options))
    code = (
        "import sys, torch; from pathlib import Path; import tokenexit.adaptation.finetune as module\n"
        "from tests.adaptation.test_finetune import tuned\n"
        f"torch.set_num_threads({torch.get_num_threads()}); module.CHECKPOINT_EVERY = 2\n"
        "tuned(*map(Path, sys.argv[1:]), steps=12, class_balance=0.5)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(photos), str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    pointer, deadline = tmp_path / "killed" / "checkpoints" / "latest", time.monotonic() + 60
    while not pointer.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    lines: list[str] = []
    assert same_weights(weights(tuned(source, photos, tmp_path / "killed", say=lines.append, **options)), never)
    assert lines[0].startswith(f"resuming {tmp_path / 'killed'} after step ")


# ----------------------------------------------------------------------------------------------------------- the recipe


def test_config__starts_from_the_model_and_learns_from_the_dense_one_alone(source: Path, photos: Path) -> None:
    config = config_of(source, photos, method=PLAN)
    assert config.model.init_from == config.distill.teacher == str(source)
    assert config.model.options == {"drop_path": 0.1}
    assert (config.distill.features, config.distill.logits, config.distill.exits) == (0.5, 1.0, 0.5)
    assert (config.optim.lr, config.optim.head_lr_factor, config.optim.warmup_steps) == (1e-4, 5.0, 50)
    assert (config.aux_weight, config.keep, config.data.name) == (0.0, "last", "photos")
    assert config.data.options["files"] == [f"{i}.png" for i in range(6)]
    assert config.methods == [{"name": "dtop", "threshold": [1.0, 0.6]}]


def test_config__names_photos_relative_to_the_folder_they_share(source: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("x/a.png", "b.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / name)
    config = finetune_config(
        source, source, [tmp_path / "x" / "a.png", tmp_path / "b.png"], DToP(), steps=2, out=tmp_path / "out"
    )
    assert config.data.root == str(tmp_path)
    assert config.data.options == {"files": ["x/a.png", "b.png"]}


@pytest.mark.parametrize(
    ("sizes", "preprocessing", "crop", "batch_size", "ratio", "base"),
    [
        ([(360, 480)], {}, 268, 8, (0.75, 2.0), None),  # whole patches of 4 within 270
        ([(480, 360), (360, 480)], {}, 268, 8, (0.75, 2.0), None),
        ([(360, 480), (900, 600)], {}, 360, 4, (0.5, 2.0), None),
        ([(2000, 3000)], {}, 512, 4, (0.75, 2.0), None),
        ([(2000, 3000)], {"resize": 128}, 96, 8, (0.75, 2.0), (192, 128)),
        ([(2000, 3000)], {"window": (120, 200), "stride": (60, 100)}, 120, 8, (0.75, 2.0), None),
        ([(3, 2)], {}, 4, 8, (0.75, 2.0), None),
    ],
)
def test_config__takes_crop_and_batch_from_the_photos_as_the_model_sees_them(
    sizes: list[tuple[int, int]],
    preprocessing: dict[str, Any],
    crop: int,
    batch_size: int,
    ratio: tuple[float, float],
    base: tuple[int, int] | None,
    tmp_path: Path,
) -> None:
    (tmp_path / "photos").mkdir()
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(tmp_path / "photos" / f"{i}.png")
    model = tiny_segmenter("fcn")
    model.preprocessing = replace(model.preprocessing, **preprocessing)
    model.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "model", tmp_path / "photos")
    assert config.data.crop == (crop, crop)
    assert config.batch_size == batch_size
    assert config.data.ratio == ratio
    assert config.data.resize_base == base
    given = config_of(tmp_path / "model", tmp_path / "photos", crop=(32, 64), batch_size=3)
    assert (given.data.crop, given.batch_size) == ((32, 64), 3)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Dense(), Dense()),
        (DToP(0.9), DToP(0.9)),
        (PLAN, DToP((1.0, 0.6))),
        (Gated(DToP(0.9), (1,)), DToP((0.9, 1.0))),
        (Gated(Gated(DoViT(0.9), (1,)), (0,)), DoViT((1.0, 1.0))),
        (Gated(FixedRatio((0.5, 0.3)), (0,)), FixedRatio((0.5, 0.3))),
        (GatedBySize(DToP(0.9), ((1, (0,)),)), DToP(0.9)),
        (Gated(Truncated(1), (1,)), Dense()),
    ],
)
def test_training_method__is_the_inner_one_in_which_closed_exits_never_fire(
    method: Method[Any], expected: Method[Any]
) -> None:
    assert training_method(method, 2) == expected


# ------------------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True)
class Stopping(DToP):
    """A method after whose stop, an exit's number, nobody is left."""

    stop: int | None = option(None, "number of the exit", kw_only=True)


class Smaller(Gated):
    """A wrapper that shrinks images."""

    @property
    def input_scale(self) -> float:
        return 0.6


def test_training_method__goes_on_behind_a_stop_where_no_exit_fires() -> None:
    assert training_method(Stopping(0.9, stop=1), 3) == Stopping((0.9, 1.0, 1.0))
    assert training_method(Gated(Stopping(0.9, stop=2), (0,)), 3) == Stopping((1.0, 0.9, 1.0))


def test_config__crops_reach_down_to_the_size_at_which_the_method_runs(source: Path, photos: Path) -> None:
    assert config_of(source, photos, method=Smaller(DToP(0.9))).data.ratio == (0.6, 2.0)


def test_finetune__refuses_what_cannot_learn(source: Path, photos: Path, tmp_path: Path) -> None:
    tiny_segmenter("fcn", exits=()).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="dense has no exits to fine-tune with"):
        tuned(tmp_path / "dense", photos, tmp_path / "out")
    tiny_segmenter("fcn", "atm").save_pretrained(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="mixed mixes ATM and softmax heads"):
        tuned(tmp_path / "mixed", photos, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        tuned(tmp_path / "nowhere", photos, tmp_path / "out")
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        tuned(source, photos, tmp_path / "out", steps=0)
    assert not (tmp_path / "out").exists()


def test_finetune__refuses_photos_that_are_none(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        tuned(source, tmp_path / "photos", tmp_path / "out")
    (tmp_path / "photos" / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"a\.png' cannot be decoded"):
        tuned(source, tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finetune__on_other_photos_than_it_began_with_is_refused_briefly(
    source: Path, photos: Path, tmp_path: Path
) -> None:
    tuned(source, photos, tmp_path / "out")
    fewer = [photos / f"{i}.png" for i in range(5)]
    with pytest.raises(ConfigError, match=r"holds a run with data\.options=") as error:
        finetune(source, source, fewer, PLAN, steps=4, batch_size=2, out=tmp_path / "out", say=silent, progress=False)
    assert len(str(error.value)) < 800
