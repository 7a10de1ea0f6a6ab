"""From configuration to datasets and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import enliven
from tests.training.tiny import HEADS, tiny_run, write_dataset
from tokenexit.data.base import Sample
from tokenexit.data.loader import Cached
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.inputs.labels import default_labels
from tokenexit.methods import PAUMER, Dense, DoViT, DToP, Method, Reduced
from tokenexit.reducers import ALGM
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.build import (
    build_dataset,
    build_model,
    build_preprocessing,
    build_transform,
    check_adapters,
)
from tokenexit.training.config import DataConfig, ModelConfig

LABELS = default_labels(3)
SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "pos_embed_grid": [6, 8]}


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "exits": [1, 2],
        "exit_head": HEADS["fcn"],
        "decode_head": HEADS["fcn"],
        "options": SMALL,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model of three classes."""
    model, _ = build_model(config(), DataConfig(mean=(0.1, 0.2, 0.3)), LABELS)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_fresh_model_takes_classes_and_normalisation_from_the_data() -> None:
    model, report = build_model(config(), DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), LABELS)
    assert report is None
    assert model.training
    assert model.config.num_classes == 3
    assert model.preprocessing.labels == LABELS
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.preprocessing.std == (0.4, 0.5, 0.6)


def test_the_model_later_takes_images_at_the_size_and_in_the_windows_of_the_data() -> None:
    model, _ = build_model(config(), DataConfig(resize=(30, 40), window=(20, 20), stride=(10, 15)), LABELS)
    asked = model.preprocessing
    assert (asked.resize, asked.window, asked.stride) == ((30, 40), (20, 20), (10, 15))
    plain = build_preprocessing(DataConfig(), LABELS)
    assert (plain.resize, plain.window, plain.stride) == ("none", None, None)
    assert build_preprocessing(DataConfig(resize=32), None).resize == 32


def test_training_images_are_cut_from_the_size_that_resize_base_says() -> None:
    sample = Sample(Image.new("RGB", (80, 40)), np.zeros((40, 80), np.uint8), "black")
    data = DataConfig(crop=(64, 64), ratio=(1.0, 1.0), resize_base=(60, 20), cat_max_ratio=1.0)
    seen = build_transform(data)(sample, np.random.default_rng(0))
    assert seen.image.size == (64, 64)
    assert (seen.mask != 255).sum() == 20 * 40  # twice as wide as high, in a box of 60 x 20; the rest is padding


def test_backbone_weights_are_loaded_and_reported(tmp_path: Path) -> None:
    source, _ = build_model(config(), DataConfig(), LABELS)
    state = {name: value.clone() for name, value in source.backbone.state_dict().items()}
    save_file(state | {"head.weight": torch.zeros(4, 16)}, tmp_path / "w.safetensors")
    model, report = build_model(config(weights=str(tmp_path / "w.safetensors")), DataConfig(), LABELS)
    assert report is not None
    assert f"loaded {len(state)} tensors" in report.summary()
    assert "head.weight" in report.summary()
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())


def test_weights_that_do_not_fit_end_in_one_sentence(tmp_path: Path) -> None:
    save_file({"foreign": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        build_model(config(weights=str(tmp_path / "w.safetensors")), DataConfig(), LABELS)


def test_init_from_takes_everything_from_the_saved_model(saved: Path) -> None:
    other = config(init_from=str(saved), exits=[1], options={}, backbone="vit_base_patch16")
    model, _ = build_model(other, DataConfig(mean=(0.9, 0.9, 0.9)), LABELS)
    original = ExitSegmenter.from_pretrained(saved)
    assert model.training
    assert model.config == original.config
    assert model.preprocessing == original.preprocessing
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values()))


def test_init_from__a_model_without_stage_adapters_gets_new_ones_and_keeps_those_it_has(saved: Path) -> None:
    original = ExitSegmenter.from_pretrained(saved)
    torch.manual_seed(0)
    enliven(original)
    original.save_pretrained(saved)
    model, _ = build_model(config(init_from=str(saved), options={}, stage_adapter=True), DataConfig(), LABELS)
    assert model.config.stage_adapter
    image = [torch.randn(3, 24, 32)]
    with torch.no_grad():
        dovit = [each.eval()(image, DoViT(0.6)) for each in (model, original)]
    assert (dovit[0].exit_index[0] < 2).any()
    assert torch.equal(dovit[0].grid_logits[0], dovit[1].grid_logits[0])
    with torch.no_grad():
        model.stage_adapters.state_dict()["0.linear.weight"].uniform_()
    model.save_pretrained(saved)
    for asked in (False, True):
        again, _ = build_model(config(init_from=str(saved), options={}, stage_adapter=asked), DataConfig(), LABELS)
        kept, given = again.stage_adapters.state_dict(), model.stage_adapters.state_dict()
        assert all(torch.equal(kept[name], given[name]) for name in given)
    other = config(init_from=str(saved), options={}, new_exits=True, exits=[1])
    fresh, _ = build_model(other, DataConfig(), LABELS)
    new = fresh.stage_adapters.state_dict()
    assert {name.partition(".")[0] for name in new} == {"0"}
    assert not new["0.linear.weight"].any()
    assert torch.equal(new["0.norm.weight"], original.backbone.state_dict()["norm.weight"])


def test_stage_adapters__in_several_processes_every_method_must_use_them() -> None:
    model, _ = build_model(config(stage_adapter=True), DataConfig(), LABELS)
    plain, _ = build_model(config(), DataConfig(), LABELS)
    unused: list[Method[Any]] = [Dense(), DToP(), DoViT(rejoin=1)]
    check_adapters(model, [DoViT(), PAUMER(), Reduced(DoViT(), ALGM())], processes=2)
    for method in unused:
        check_adapters(model, [DoViT(), method], processes=1)
        check_adapters(plain, [DoViT(), method], processes=2)
        with pytest.raises(ConfigError, match=r"learn nothing from a step with .*, which 2 processes would wait for"):
            check_adapters(model, [DoViT(), method], processes=2)


def test_init_from_a_model_of_another_class_count_is_refused_with_both_counts(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"predicts 3 classes, dataset camvid has 5: choose a model of this dataset"):
        build_model(config(init_from=str(saved), options={}), DataConfig(name="camvid"), default_labels(5))


def test_init_from_changes_stochastic_depth_and_nothing_else(saved: Path) -> None:
    model, _ = build_model(config(init_from=str(saved), options={"drop_path": 0.4}), DataConfig(), LABELS)
    assert [block.drop_path for block in model.backbone.blocks] == pytest.approx([0.0, 0.2, 0.4])
    with pytest.raises(ConfigError, match=r"model\.options\.depth cannot change with init_from"):
        build_model(config(init_from=str(saved), options={"depth": 4}), DataConfig(), LABELS)
    with pytest.raises(ConfigError, match=r"drop_path must be a number from 0 to 1, got 1\.5"):
        build_model(config(init_from=str(saved), options={"drop_path": 1.5}), DataConfig(), LABELS)


def test_init_from__may_stretch_rotary_positions_which_is_saved_with_the_model(tmp_path: Path) -> None:
    options = config().options | {"rope": "half", "pos_embed": False}
    build_model(config(options=options), DataConfig(), LABELS)[0].save_pretrained(tmp_path)
    model, _ = build_model(config(init_from=str(tmp_path), options={"rope_rescale": 2.0}), DataConfig(), LABELS)
    assert model.config.backbone.rope_rescale == model.backbone.config.rope_rescale == 2.0
    image = [torch.randn(3, 24, 32)]
    first, second = (model.backbone.embed(image).phases for _ in range(2))
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    resting = ExitSegmenter.from_pretrained(tmp_path).backbone
    assert resting.config.rope_rescale == 2.0
    first, second = (resting.embed(image).phases for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_init_from_may_spare_attention_from_stochastic_depth(saved: Path) -> None:
    """As the releases do; a converted model drops both branches, as its source says nothing."""
    options = {"drop_path": 0.4, "drop_path_attention": False}
    model, _ = build_model(config(init_from=str(saved), options=options), DataConfig(), LABELS)
    assert [block.drop_path for block in model.backbone.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert not any(block.drop_path_attention for block in model.backbone.blocks)
    tokens = model.backbone.embed([torch.randn(3, 24, 32)])
    kept = model.backbone.blocks[2]
    attended = tokens.x + kept.attn.proj(kept.attn.attend(kept.before(tokens.x), tokens.packing))
    draws = [model.backbone.run(tokens, 2, 3).x for _ in range(30)]
    assert any(torch.equal(x, attended) for x in draws), "a dropped MLP leaves attention's result"
    assert not any(torch.equal(x, tokens.x) for x in draws), "attention is never dropped"
    plain, _ = build_model(config(init_from=str(saved), options={"drop_path": 0.4}), DataConfig(), LABELS)
    assert all(block.drop_path_attention for block in plain.backbone.blocks)


def test_weights_and_init_from_exclude_each_other(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.weights and model\.init_from exclude each other"):
        build_model(config(init_from=str(saved), weights="w.pth"), DataConfig(), LABELS)


def test_a_folder_without_a_model_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        build_model(config(init_from=str(tmp_path)), DataConfig(), LABELS)


def test_datasets_are_kept_in_memory_only_if_asked_for(tmp_path: Path) -> None:
    data = tiny_run(write_dataset(tmp_path / "set"), tmp_path / "out").data
    assert not isinstance(build_dataset(data, "train"), Cached)
    data.cache = True
    cached = build_dataset(data, "val")
    assert isinstance(cached, Cached)
    assert len(cached) == 2
