"""Reading weight files: what is taken out of them, and what is refused in one sentence."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tokenexit.checkpoints import read_state_dict, read_tensors
from tokenexit.errors import CheckpointError

WEIGHTS = {"cls_token": torch.ones(1, 1, 2), "norm.weight": torch.arange(2.0)}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert path.name in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = WEIGHTS) -> None:
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".PTH"])
def test_pytorch_files_are_read(tmp_path: Path, suffix: str) -> None:
    assert_same(read_state_dict(saved(tmp_path / f"vit{suffix}", WEIGHTS)))


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "vit.safetensors")
    assert_same(read_state_dict(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_precision_becomes_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in WEIGHTS.items()}, tmp_path / "vit.safetensors")
    state = read_state_dict(tmp_path / "vit.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert_same(state)


def test_integer_entries_keep_their_type(tmp_path: Path) -> None:
    state = read_state_dict(saved(tmp_path / "vit.pth", {"bn.num_batches_tracked": torch.tensor(7)}))
    assert state["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS},
        {"model": WEIGHTS, "optimizer": {"lr": 0.1}, "epoch": 3},
        {"model_state": WEIGHTS},
        {"model": {"state_dict": WEIGHTS}},
        {"state_dict_ema": WEIGHTS, "state_dict": {"norm.weight": torch.zeros(2)}},
    ],
    ids=["state_dict", "among_other_things", "model_state", "nested", "averaged_before_raw"],
)
def test_the_state_dict_is_taken_out_of_its_container(tmp_path: Path, content: Any) -> None:
    assert_same(read_state_dict(saved(tmp_path / "vit.pth", content)))


def test_two_models_in_one_file_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "vit.pth", {"model": WEIGHTS, "state_dict": WEIGHTS})
    assert "several models (state_dict, model)" in refusal(path)


@given(prefixes=st.lists(st.sampled_from(["module."]), max_size=3), backbone=st.booleans())
def test_wrapping_prefixes_are_taken_off_the_names(
    tmp_path_factory: pytest.TempPathFactory, prefixes: list[str], backbone: bool
) -> None:
    prefix = "".join(prefixes) + ("backbone." if backbone else "")
    path = tmp_path_factory.mktemp("prefix") / "vit.pth"
    assert_same(read_state_dict(saved(path, {prefix + key: value for key, value in WEIGHTS.items()})))


def test_heads_beside_the_backbone_keep_their_names(tmp_path: Path) -> None:
    head = torch.zeros(1)
    state = read_state_dict(
        saved(tmp_path / "seg.pth", {"backbone.norm.weight": torch.ones(2), "decode_head.bias": head})
    )
    assert list(state) == ["norm.weight", "decode_head.bias"]


def test_names_that_would_meet_without_the_prefix_keep_it(tmp_path: Path) -> None:
    weights = {"backbone.norm.weight": torch.ones(2), "norm.weight": torch.zeros(2)}
    assert_same(read_state_dict(saved(tmp_path / "seg.pth", weights)), weights)


def test_read_tensors_leaves_names_as_they_are(tmp_path: Path) -> None:
    weights = {"module.backbone.norm.weight": torch.ones(2)}
    assert_same(read_tensors(saved(tmp_path / "vit.pth", weights)), weights)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.safetensors")


def test_a_folder_is_no_weight_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth"])
@pytest.mark.parametrize("content", [b"<!doctype html>" * 50, b"\x00" * 1000, b"garbage"])
def test_a_foreign_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "damaged or no" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pth"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    save_file(WEIGHTS, path) if path.suffix == ".safetensors" else torch.save(WEIGHTS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert "damaged or no" in refusal(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "vit.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(tmp_path / "vit.safetensors")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vit.onnx").write_bytes(b"content")
    assert ".safetensors" in refusal(tmp_path / "vit.onnx")


class Hostile:
    """Runs something as soon as it is unpickled."""

    def __init__(self, run: Any, *given: Any) -> None:
        self.run, self.given = run, given

    def __reduce__(self) -> Any:
        return self.run, self.given


def test_objects_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, out=Path("runs"))
    assert_same(read_state_dict(saved(tmp_path / "vit.pth", {"args": args, "model": WEIGHTS})))


def test_pickled_objects_are_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hostile = [Hostile(exec, f"open({str(trace)!r}, 'w')"), Hostile(subprocess.call, ["touch", str(trace)])]
    for n, content in enumerate([*hostile, {"nested": hostile}, Hostile(getattr, hostile[0], "run")]):
        assert_same(read_state_dict(saved(tmp_path / f"{n}.pth", {"args": content, "model": WEIGHTS})))
    assert not trace.exists()
    torch.load(tmp_path / "0.pth", weights_only=False)
    assert trace.exists(), "the file is as hostile as it should be"


@pytest.mark.parametrize(
    "hostile",
    [Hostile(os.system, "touch trace"), Hostile(sys.exit, 3), Hostile(Path.touch, Path("trace"))],
    ids=["system", "exit", "method"],
)
def test_objects_that_cannot_be_passed_over_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(saved(tmp_path / "vit.pth", {"args": hostile, "model": WEIGHTS}))
    assert "not loaded for safety" in message
    assert "save its state dict alone" in message
    assert not (tmp_path / "trace").exists()
    assert_same(read_state_dict(saved(tmp_path / "alone.pth", WEIGHTS)))


def test_an_object_in_the_place_of_a_weight_is_refused(tmp_path: Path) -> None:
    content = {"model": WEIGHTS | {"norm.bias": argparse.Namespace(lr=0.1)}}
    assert "under 'norm.bias', not a tensor" in refusal(saved(tmp_path / "vit.pth", content))


def test_files_with_objects_are_read_from_several_threads(tmp_path: Path) -> None:
    known = set(torch.serialization.get_safe_globals())  # torch keeps a set: its list has no order
    paths = []
    for n in range(8):
        kind = type(f"Kind{n}", (), {"__module__": __name__})
        globals()[kind.__name__] = kind
        paths.append(saved(tmp_path / f"{n}.pth", {"args": kind(), "model": WEIGHTS}))
        del globals()[kind.__name__]
    with ThreadPoolExecutor(8) as pool:
        for state in pool.map(read_state_dict, paths * 4):
            assert_same(state)
    assert set(torch.serialization.get_safe_globals()) == known, "nothing stays allowed"


@pytest.mark.parametrize(
    "content", [[1, 2], {}, 3.0, {"epoch": 3}, {"norm.weight": WEIGHTS["norm.weight"], "epoch": 3}]
)
def test_anything_but_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    assert "state dict" in refusal(saved(tmp_path / "vit.pth", content))


def test_a_sparse_tensor_is_refused_by_name(tmp_path: Path) -> None:
    assert "'norm.weight'" in refusal(saved(tmp_path / "vit.pth", {"norm.weight": torch.eye(2).to_sparse()}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_the_first_name(tmp_path: Path, value: float) -> None:
    bad = torch.tensor([0.0, value])
    message = refusal(saved(tmp_path / "vit.pth", {"fine": torch.ones(2), "first": bad, "second": bad}))
    assert "'first'" in message
    assert "NaN or infinite" in message


def test_the_real_file_is_read_whole(vit_tiny_weights: Path) -> None:
    state = read_state_dict(vit_tiny_weights)
    assert len(state) == 152
    assert state["pos_embed"].shape == (1, 197, 192)
    assert {value.dtype for value in state.values()} == {torch.float32}
