"""Finding weights: local paths as they are, hub names through a stand-in for the hub."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from tokenexit.checkpoints import resolve_weights
from tokenexit.errors import CheckpointError

Asked = list[tuple[str, str, str | None]]


def bare(kind: type[Exception]) -> Exception:
    """A hub error without the HTTP response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Asked]:
    """A hub that has the given files, or answers every request with an error; returns the list of requests."""

    def install(*files: str, error: Exception | None = None) -> Asked:
        asked: Asked = []

        def download(repo: str, file: str, *, revision: str | None = None, **_: Any) -> str:
            asked.append((repo, file, revision))
            if error is not None:
                raise error
            if file not in files:
                raise bare(errors.EntryNotFoundError)
            (tmp_path / Path(file).name).write_bytes(b"weights")
            return str(tmp_path / Path(file).name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return asked

    return install


def refusal(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_weights(source)
    message = str(caught.value)
    assert str(source) in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_local_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    path.touch()
    assert resolve_weights(path) == resolve_weights(str(path)) == path


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vit.pth").touch()
    assert resolve_weights("~/vit.pth") == tmp_path / "vit.pth"


def test_a_path_to_nothing_says_how_hub_names_look() -> None:
    assert "hf-hub:OWNER/NAME" in refusal("timm/vit_tiny")


def test_a_folder_is_no_weight_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_safetensors_are_preferred(hub: Callable[..., Asked]) -> None:
    hub("model.safetensors", "pytorch_model.bin")
    assert resolve_weights("hf-hub:timm/vit_tiny").name == "model.safetensors"


def test_pytorch_weights_are_the_second_choice(hub: Callable[..., Asked]) -> None:
    asked = hub("pytorch_model.bin")
    assert resolve_weights("hf-hub:timm/vit_tiny").name == "pytorch_model.bin"
    assert [file for _, file, _ in asked] == ["model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("source", "request_"),
    [
        ("hf-hub:timm/vit.in1k@v1.0", ("timm/vit.in1k", "model.safetensors", "v1.0")),
        ("hf-hub:timm/vit.in1k/sub/w.pth", ("timm/vit.in1k", "sub/w.pth", None)),
        ("hf-hub:timm/vit.in1k@0a1b/w.pth", ("timm/vit.in1k", "w.pth", "0a1b")),
    ],
)
def test_revision_and_file_are_passed_on(
    hub: Callable[..., Asked], source: str, request_: tuple[str, str, str | None]
) -> None:
    asked = hub("model.safetensors", "sub/w.pth", "w.pth")
    resolve_weights(source)
    assert asked == [request_]


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:vit", "hf-hub:a/b@", "hf-hub:a/b/", "hf-hub:a/b c"])
def test_a_malformed_hub_name_asks_nobody(hub: Callable[..., Asked], source: str) -> None:
    asked = hub("model.safetensors")
    assert "OWNER/NAME[@REVISION][/FILE]" in refusal(source)
    assert asked == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "no model 'a/b'"),
        (errors.GatedRepoError, "access to 'a/b' must be granted"),
        (errors.RevisionNotFoundError, "no revision 'v1'"),
        (errors.EntryNotFoundError, "has no model.safetensors or pytorch_model.bin"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (errors.HFValidationError, "no hub name"),
        (ConnectionError, "ConnectionError"),
        (TimeoutError, "TimeoutError"),
    ],
)
def test_every_failure_of_the_hub_is_one_sentence(
    hub: Callable[..., Asked], error: type[Exception], words: str
) -> None:
    hub(error=bare(error))
    assert words in refusal("hf-hub:a/b@v1")


def test_without_huggingface_hub_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_hub(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    assert "pip install huggingface_hub" in refusal("hf-hub:a/b")
