import json
import os
import random

import pytest

from tests.test_pretrained import mutated
from tokenexit.conversion.sidecar import Sidecar, read_sidecar
from tokenexit.errors import CheckpointError, TokenExitError

MUTATIONS = int(os.environ.get("TOKENEXIT_MUTATIONS", "100"))
WHOLE = {
    "huggingface": {
        "config.json": {
            "hidden_act": "gelu",
            "num_attention_heads": 6,
            "layer_norm_eps": 1e-6,
            "image_size": 224,
            "patch_size": [16, 16],
        },
        "preprocessor_config.json": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    },
    "timm": {"config.json": {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}},
    "eomt_huggingface": {
        "config.json": {"num_attention_heads": 6, "layer_norm_eps": 1e-6, "image_size": 512, "patch_size": 16},
        "preprocessor_config.json": {
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.2, 0.2, 0.2],
            "do_split_image": True,
            "size": {"shortest_edge": 512, "longest_edge": None},
        },
    },
    "segmenter": {"variant.yml": {"net_kwargs": {"n_heads": 12, "normalization": "vit"}}},
}
READ = {
    "huggingface": Sidecar(
        {"num_heads": 6, "norm_eps": 1e-6, "pos_embed_grid": (14, 14)},
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("config.json", "preprocessor_config.json"),
    ),
    "timm": Sidecar({}, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ("config.json",)),
    "eomt_huggingface": Sidecar(
        {"num_heads": 6, "norm_eps": 1e-6, "pos_embed_grid": (32, 32)},
        ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        ("config.json", "preprocessor_config.json"),
        window=512,
    ),
    "segmenter": Sidecar({"num_heads": 12}, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ("variant.yml",)),
}


def read(folder, kind):
    return read_sidecar(kind, lambda name: folder / name if (folder / name).exists() else None)


@pytest.mark.parametrize("kind", WHOLE)
def test_read_beside__takes_what_fits(kind, tmp_path):
    for name, content in WHOLE[kind].items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read(tmp_path, kind) == READ[kind]


def test_read_beside__eomt_of_whole_images_has_no_windows(tmp_path):
    about = {"do_split_image": False, "size": {"shortest_edge": 640, "longest_edge": 640}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert read(tmp_path, "eomt_huggingface").window is None


@pytest.mark.parametrize("kind", [*WHOLE, "mmseg"])
def test_read_beside__of_no_files_is_nothing(kind, tmp_path):
    assert read(tmp_path, kind) == Sidecar()


@pytest.mark.parametrize(
    ("kind", "name", "text", "words"),
    [
        ("segmenter", "variant.yml", "net_kwargs: {n_heads: .inf}", "net_kwargs.n_heads must be a whole number"),
        ("segmenter", "variant.yml", "net_kwargs: {n_heads: 12.0}", "net_kwargs.n_heads must be a whole number"),
        ("segmenter", "variant.yml", "net_kwargs: 3", "net_kwargs must be a mapping, got 3"),
        ("segmenter", "variant.yml", "[" * 50_000, "nests too deeply"),
        ("segmenter", "variant.yml", "a: &a [*a, *a]\nnet_kwargs: *a", "nests deeper than 64 levels"),
        ("segmenter", "variant.yml", "x: 2026-99-99", "is damaged"),
        ("huggingface", "config.json", "[" * 100_000, "nests deeper than"),
        ("huggingface", "config.json", '{"num_attention_heads": 1e999}', "no number of JSON"),
        ("huggingface", "config.json", '{"num_attention_heads": 0}', "num_attention_heads must be a whole number"),
        ("huggingface", "config.json", '{"layer_norm_eps": "x"}', "layer_norm_eps must be a number from 0 to 1"),
        ("huggingface", "config.json", '{"image_size": [1], "patch_size": 16}', "image_size must be"),
        ("huggingface", "preprocessor_config.json", '{"image_mean": [1, 2]}', "image_mean must be a list of 3"),
        ("timm", "config.json", '{"pretrained_cfg": {"mean": "x"}}', "pretrained_cfg.mean must be a list of 3"),
    ],
)
def test_read_beside__says_in_one_sentence_what_does_not_fit(kind, name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, kind)
    message = str(caught.value)
    assert words in message
    assert f"{name} beside the weights" in message
    assert message.endswith("repair it, or move the weights elsewhere.")
    assert "\n" not in message


@pytest.mark.parametrize("kind", WHOLE)
def test_attack__mutated_files_end_in_one_sentence_or_are_read(kind, tmp_path):
    rng, messages = random.Random(f"20261124 {kind}"), []
    for _ in range(MUTATIONS):
        for name, content in WHOLE[kind].items():
            (tmp_path / name).write_bytes(mutated(content, rng))
        try:
            read(tmp_path, kind)
        except TokenExitError as error:
            messages.append(str(error))
    assert len(messages) > MUTATIONS / 4
    assert [message for message in messages if "\n" in message or len(message) > 700] == []
    print(f"{kind}: {len(messages)} of {MUTATIONS} refused")
