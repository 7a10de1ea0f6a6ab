import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers import SMALL_HEADS, assert_close, enliven, random_image, tiny_config, tiny_segmenter
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import CheckpointError, ConfigError, TokenExitError
from tokenexit.inputs.labels import default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Dense, DoViT, DToP, Gated, build_method
from tokenexit.segmenter import ExitSegmenter

MIXED = [(16, 20), (9, 33), (4, 4)]


def batch(sizes=MIXED):
    return [random_image(*size, i) for i, size in enumerate(sizes)]


def test_forward__takes_one_tensor_or_a_list():
    model, images = tiny_segmenter(), torch.stack(batch([(8, 12)] * 3))
    with torch.no_grad():
        a, b = model(images), model(list(images))
    assert torch.equal(a.logits, b.logits)
    assert a.logits.shape == (3, 5, 8, 12)


def test_forward__without_a_method_is_dense():
    model = tiny_segmenter()
    with torch.no_grad():
        assert torch.equal(model(batch()).grid_logits[0], model(batch(), Dense()).grid_logits[0])


def test_forward__leaves_the_mode_of_the_model_alone():
    model = tiny_segmenter()
    model(batch(), DToP())
    assert not model.training
    model.train()(batch(), DToP())
    assert model.training


def test_forward__one_model_serves_threads_with_different_methods():
    model, images = tiny_segmenter("fcn"), [batch(), batch([(20, 8)]), batch([(8, 8), (16, 4)])]
    jobs = [
        (pictures, method)
        for pictures in images
        for method in (Dense(), DToP(0.4, 1), DToP((0.7, 0.5), 0), DoViT(0.5), DoViT(0.6, scoring="live"))
    ] * 4

    def work(job):
        with torch.inference_mode():
            return model(*job)

    sequential = [work(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        threaded = list(pool.map(work, jobs))
    for a, b in zip(sequential, threaded):
        assert a.ledger == b.ledger
        assert all(torch.equal(x, y) for x, y in zip(a.grid_logits, b.grid_logits))
        assert all(torch.equal(x, y) for x, y in zip(a.exit_index, b.exit_index))


def test_forward__inputs_are_not_changed():
    model, images = tiny_segmenter(), batch()
    before = [image.clone() for image in images]
    model(images, DoViT(0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, images))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], r"images is empty: pass at least one"),
        ([torch.zeros(1, 8, 8)], r"shape \(1, 8, 8\): pass \(3, H, W\) tensors"),
        ([torch.zeros(3, 8)], r"shape \(3, 8\): pass"),
        ([torch.zeros(3, 0, 8)], r"shape \(3, 0, 8\): pass"),
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8, 3)], r"shape \(8, 8, 3\): pass"),
        (torch.zeros(3, 8, 8), r"shape \(8, 8\): pass"),
    ],
)
def test_forward__other_shapes_are_refused(images, words):
    with pytest.raises(ConfigError, match=words):
        tiny_segmenter()(images)


def test_check__refuses_a_method_as_a_call_would():
    model = tiny_segmenter("atm")
    model.check(DToP())
    with pytest.raises(ConfigError) as checked:
        model.check(DoViT())
    with pytest.raises(ConfigError) as called:
        model([random_image(8, 8)], DoViT())
    assert str(checked.value) == str(called.value)


def test_forward__targets_of_another_number_are_refused():
    with pytest.raises(ConfigError, match=r"targets"):
        _ = tiny_segmenter()(batch(), targets=[(8, 8)]).labels


# predict


def test_predict__gives_maps_at_the_sizes_of_the_images(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "street.png"
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    array = rng.integers(0, 255, (21, 13, 3), dtype=np.uint8)
    out = tiny_segmenter().predict([path, Image.open(path), array], DToP(0.5))
    assert [tuple(labels.shape) for labels in out.labels] == [(30, 40), (30, 40), (21, 13)]
    assert torch.equal(out.labels[0], out.labels[1])


def test_predict__of_one_image_is_a_batch_of_one(tmp_path):
    path = tmp_path / "street.png"
    Image.new("RGB", (12, 9), (10, 200, 30)).save(path)
    out = tiny_segmenter().predict(path)
    assert out.labels.shape == (1, 9, 12)
    assert not out.grid_logits[0].requires_grad


def test_predict__in_training_mode_is_refused():
    with pytest.raises(ConfigError, match=r"call model.eval\(\) first"):
        tiny_segmenter().train().predict(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("spec", ["dtop", {"name": "dtop", "threshold": 0.5, "keep_per_class": 1}])
def test_methods__are_welcome_by_name_and_specification(spec):
    model, array = tiny_segmenter(), np.random.default_rng(0).integers(0, 255, (21, 13, 3), dtype=np.uint8)
    method = build_method(spec)
    model.check(spec)
    assert torch.equal(model.predict(array, spec).labels, model.predict(array, method).labels)
    with torch.no_grad():
        for run in (model, model.segment):
            assert torch.equal(run(batch(), spec).grid_logits[0], run(batch(), method).grid_logits[0])
    assert model.pipeline(spec)(Image.fromarray(array))[0]["label"]
    model.preprocessing = Preprocessing(window=8, labels=model.preprocessing.labels)
    assert torch.equal(model.predict(array, spec).labels, model.predict(array, method).labels)


@pytest.mark.parametrize("wrong", ["dtopp", 3, ["dtop"], {"name": "dtop", "threshold": "x"}, {"name": None}])
def test_methods__that_are_none_are_refused_in_one_sentence(wrong):
    with pytest.raises(ConfigError, match=r"(is unknown: choose one of dense|must be .*, got )") as caught:
        tiny_segmenter().predict(np.zeros((8, 8, 3), np.uint8), wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[], ()])
def test_predict__of_no_images_says_what_to_give(images):
    with pytest.raises(ConfigError, match=r"predict got no images: give a path, a PIL image or an array"):
        tiny_segmenter().predict(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_predict__with_weights_of_another_precision_says_so(dtype):
    model = tiny_segmenter()
    model.calibration = Calibration(model=model.fingerprint(), method={"name": "dtop"})
    with pytest.raises(ConfigError, match=rf"predict needs float32 weights, got {dtype}: call model.float\(\)"):
        model.to(dtype).predict(np.zeros((8, 8, 3), np.uint8))


# Configuration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, r"num_classes must be a whole number from 1 to 65535, got 0"),
        ({"num_classes": 2**31}, r"num_classes must be a whole number from 1 to 65535"),
        ({"exits": (1.0, 3)}, r"exits must be a list, each a whole number, got \(1.0, 3\)"),
        (
            {"exits": (0, 2)},
            r"exits=\(0, 2\) must be increasing numbers of blocks between 1 and 3: this .* 4 blocks",
        ),
        ({"exits": (1, 4)}, r"exits=\(1, 4\)"),
        ({"exits": (2, 1)}, r"exits=\(2, 1\)"),
        ({"exits": (2, 2)}, r"exits=\(2, 2\)"),
        ({"exit_head": ["fcn"]}, r"exit_head has 1 heads for 2 exits: give one head, or one for each exit"),
        ({"exit_head": "unet"}, r"head 'unet' is unknown"),
        ({"decode_head": "unet"}, r"head 'unet' is unknown"),
        ({"backbone": "resnet"}, r"backbone 'resnet' is unknown"),
        ({"colour": "red"}, r"no option 'colour'"),
        ({"preprocessing": Preprocessing(labels=default_labels(7))}, r"names 7 classes and num_classes=5"),
    ],
)
def test_construction__impossible_options_are_refused_in_one_sentence(options, words):
    values = {"backbone": tiny_config(), "num_classes": 5, "exits": (1, 3)} | options
    with pytest.raises(ConfigError, match=words) as caught:
        ExitSegmenter(**values)
    assert "\n" not in str(caught.value)


def test_construction__each_exit_may_have_its_own_head():
    model = ExitSegmenter(tiny_config(), 5, (1, 3), ["linear", SMALL_HEADS["atm"]], "fcn")
    assert [head.kind for head in model.exit_heads] == ["softmax", "atm"]


def test_construction__backbone_options_change_the_preset():
    with torch.device("meta"):
        model = ExitSegmenter("vit_tiny_patch16", 5, class_token=False)
    assert not model.config.backbone.class_token
    assert not hasattr(model.backbone, "cls_token")


# Saving


def saved(tmp_path, **options):
    model = tiny_segmenter(["atm", "setr_naive"], "mask_transformer", num_registers=1, layer_scale=0.5, **options)
    model.save_pretrained(tmp_path)
    return model


def test_save__and_load_is_the_same_model_bit_for_bit(tmp_path):
    model = saved(tmp_path)
    again = ExitSegmenter.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.preprocessing == model.preprocessing
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        a, b = model(batch(), Dense()), again(batch(), Dense())
    assert all(torch.equal(x, y) for x, y in zip(a.grid_logits, b.grid_logits))


def test_save__leaves_two_files_and_nothing_half_written(tmp_path):
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save__over_an_older_model_replaces_it(tmp_path):
    saved(tmp_path)
    model = saved(tmp_path, seed=7)
    again = ExitSegmenter.from_pretrained(tmp_path)
    assert torch.equal(again.backbone.pos_embed, model.backbone.pos_embed)


def test_save__a_failure_leaves_the_older_model_whole(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    enliven(model)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save__to_a_folder_that_does_not_exist_makes_it(tmp_path):
    saved(tmp_path / "runs" / "street")
    assert ExitSegmenter.from_pretrained(tmp_path / "runs" / "street").config.num_classes == 5


def test_save__preprocessing_travels_with_the_model(tmp_path):
    preprocessing = Preprocessing(labels=default_labels(5))
    model = ExitSegmenter(tiny_config(), 5, (1, 3), preprocessing=preprocessing)
    model.save_pretrained(tmp_path)
    assert ExitSegmenter.from_pretrained(str(tmp_path)).preprocessing == preprocessing


def refused(tmp_path, words, error=CheckpointError):
    with pytest.raises(error, match=words) as caught:
        ExitSegmenter.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def change_config(tmp_path, change):
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_load__a_folder_without_a_model_is_refused(tmp_path):
    refused(tmp_path, r"holds no config.json: give the folder of a model saved by tokenexit")
    refused(tmp_path / "nowhere", r"holds no config.json")


def test_load__missing_weights_are_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, r"model.safetensors' does not exist")


def test_load__cut_weights_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(tmp_path, r"model.safetensors' is damaged")


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b'"model"', b"null", b"{}", b"\xff\xfe\x00garbage", b""])
def test_load__a_damaged_configuration_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, r"config.json is damaged .*save the model again")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("model"),
        lambda config: config["model"].pop("backbone"),
        lambda config: config["model"]["backbone"].update(colour="red"),
        lambda config: config["model"]["backbone"].update(depth="many"),
        lambda config: config["model"].update(exits=None),
        lambda config: config["model"].update(exits=[99]),
        lambda config: config["model"].update(num_classes=None),
        lambda config: config["model"]["decode_head"].update(kind="unet"),
        lambda config: config.update(preprocessing=None),
    ],
)
def test_load__an_impossible_configuration_is_refused(tmp_path, change):
    saved(tmp_path)
    change_config(tmp_path, change)
    refused(tmp_path, r"config.json")


def test_load__a_newer_format_is_refused_with_the_cure(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, lambda config: config.update(format=99))
    refused(tmp_path, r"has format 99, this version reads 1: update tokenexit")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(exits=[1]) or config["model"].update(exit_heads=["linear"]),
        lambda config: config["model"]["backbone"].update(depth=5),
        lambda config: config["model"]["backbone"].update(mlp_ratio=3.0),
    ],
)
def test_load__weights_of_another_model_are_refused(tmp_path, change):
    saved(tmp_path)
    change_config(tmp_path, change)
    refused(tmp_path, r"model.safetensors does not fit .*entries differ")


def test_load__weights_that_are_not_numbers_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["backbone.pos_embed"][0, 0, 0] = float("nan")
    save_file(state, path)
    refused(tmp_path, r"NaN or infinite values in 'backbone.pos_embed'")


def test_load__errors_are_errors_of_the_package(tmp_path):
    with pytest.raises(TokenExitError):
        ExitSegmenter.from_pretrained(tmp_path)


def test_loaded_model__is_in_evaluation_mode_and_gives_the_same_twice(tmp_path):
    saved(tmp_path)
    model = ExitSegmenter.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = (model(batch(), Dense()).grid_logits for _ in range(2))
    assert_close(a[0], b[0], 0.0)


# ------------------------------------------------------------------------------------------------------ other exits


def test_with_exits__is_the_same_model_with_some_exits_alone_and_shares_its_weights() -> None:
    model = tiny_segmenter("linear", exits=(1, 2, 3))
    model.calibration, model.records = Calibration(guarantee="of three exits"), {"training.json": {}}
    fewer = model.with_exits((1, 3))
    assert (fewer.config.exits, model.config.exits) == ((1, 3), (1, 2, 3))
    assert list(fewer.exit_heads) == [model.exit_heads[0], model.exit_heads[2]]
    assert fewer.backbone is model.backbone
    assert fewer.decode_head is model.decode_head
    assert (fewer.calibration, fewer.records) == (None, {})
    assert model.calibration is not None
    assert len(model.exit_heads) == 3
    images = [random_image(16, 20)]
    with torch.no_grad():
        assert torch.equal(model(images).logits, fewer(images).logits)
        closed = model(images, Gated(DToP((0.4, 0.9, 0.5)), (1,)))
        alone = fewer(images, DToP((0.4, 0.5)))
    assert torch.equal(closed.logits, alone.logits)
    assert closed.ledger.macs == alone.ledger.macs
    assert fewer.fingerprint() != model.fingerprint()
    assert model.with_exits((1, 2, 3)).fingerprint() == model.fingerprint()


def test_with_exits__can_be_saved_without_any(tmp_path: Path) -> None:
    model = tiny_segmenter("linear", exits=(1, 2, 3)).with_exits(())
    model.save_pretrained(tmp_path)
    loaded = ExitSegmenter.from_pretrained(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded([random_image(16, 20)]).logits, model([random_image(16, 20)]).logits)


def test_with_exits__refuses_places_that_are_not_there_or_out_of_order() -> None:
    model = tiny_segmenter("linear", exits=(1, 3))
    with pytest.raises(ConfigError, match=r"exits must be some of \(1, 3\), got 2: it has no exit there"):
        model.with_exits((1, 2))
    with pytest.raises(ConfigError, match="increasing numbers of blocks"):
        model.with_exits((3, 1))
    with pytest.raises(ConfigError, match="increasing numbers of blocks between 1 and 3"):
        model.with_exit_heads((4,), ["linear"], [model.exit_heads[0]])
