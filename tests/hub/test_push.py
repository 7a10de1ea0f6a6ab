"""Models go to the hub and come back; their card fills itself. The hub is a folder here, or not there at all."""

from __future__ import annotations

import builtins
import inspect
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, errors

from tests.heads.test_module import own_segmenter
from tests.helpers import tiny_segmenter
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.errors import CheckpointError
from tokenexit.hub.card import MARK, model_card
from tokenexit.hub.push import push_folder
from tokenexit.segmenter import ExitSegmenter

TRAINING = {
    "config": {
        "out": "/home/me/runs/street",
        "data": {"name": "camvid", "root": "/data/camvid", "crop": [352, 352]},
        "model": {"init_from": None, "weights": "/home/me/vit.safetensors"},
        "optim": {"name": "adamw", "lr": 1e-4},
        "methods": [{"name": "dtop"}],
        "steps": 800,
        "seed": 0,
    },
    "history": [{"step": 400, "miou": 50.0, "gmacs": 3.0}, {"step": 800, "miou": 58.127, "gmacs": 2.5}],
}
EVALUATION = {
    "about": {"data": "camvid", "split": "test", "precision": "fp32", "model": "/home/me/runs/street"},
    "results": [
        {"label": "dense", "mIoU": 57.384, "gmacs_mean": 6.006, "share_of_dense": 1.0},
        {"label": "dtop 0.95", "mIoU": 57.1, "gmacs_mean": 2.9, "share_of_dense": 0.483},
        {"label": "broken", "mIoU": None, "gmacs_mean": 1.0, "share_of_dense": 0.1},
    ],
}


def model(**options: Any) -> ExitSegmenter:
    made = tiny_segmenter("fcn", **options)
    made.records = {"training.json": TRAINING, "evaluation.json": EVALUATION}
    return made


def metadata(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


# ------------------------------------------------------------------------------------------------------------ the card


def test_card__is_filled_with_what_is_known(tmp_path: Path) -> None:
    made = model()
    made.calibration = Calibration(
        asked={"share_of_dense": 0.5},
        guarantee="The mean is 50 %.",
        method={"name": "dtop", "threshold": [0.9, 0.8]},
        reached={"share_of_dense": 0.4971},
        model=made.fingerprint(),
    )
    made.save_pretrained(tmp_path / "street", card=True, license="cc-by-4.0")
    card = (tmp_path / "street" / "README.md").read_text()
    head = metadata(card)
    assert (head["license"], head["pipeline_tag"], head["datasets"]) == ("cc-by-4.0", "image-segmentation", ["camvid"])
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert index["name"] == "street"
    assert result["dataset"] == {"name": "camvid", "type": "camvid", "split": "test"}
    assert [(metric["type"], metric["value"], metric["name"]) for metric in result["metrics"]] == [
        ("mean_iou", 57.38, "mIoU, dense"),
        ("mean_iou", 57.1, "mIoU, dtop 0.95"),
    ]
    for words in (
        "# street",
        "| dtop 0.95 | 57.10 | 2.900 | 48.3% |",
        "| broken |  | 1.000 | 10.0% |",
        "On camvid (test), fp32",
        "The mean is 50 %.",
        "49.7% of dense",
        "0 class_0, 1 class_1",
        "steps 800, seed 0, optimiser adamw",
        "started from vit.safetensors",
        "after block 1, 3",
        "Weights: cc-by-4.0. Code: Apache-2.0. Images and labels of camvid have terms of their own.",
    ):
        assert words in card
    assert "\n\n\n" not in card


def test_card__claims_nothing_that_is_not_known(tmp_path: Path) -> None:
    bare = tiny_segmenter("fcn", exits=())
    bare.save_pretrained(tmp_path / "m", card=True)
    card = (tmp_path / "m" / "README.md").read_text()
    head = metadata(card)
    assert head["license"] == "unknown"
    assert not {"datasets", "model-index"} & set(head)
    assert "None" not in card
    assert [line for line in card.splitlines() if line.startswith("#")] == ["# m", "## Classes", "## Licence"]
    assert "Weights: not stated." in card


def test_card__without_an_evaluation_has_the_last_validation() -> None:
    config = {"model": tiny_segmenter("fcn").config.to_dict(), "preprocessing": {"labels": None}}
    card = model_card("m", config, 10, training=TRAINING)
    assert "On camvid (validation), at the end of training." in card
    assert "| dtop | 58.13 | 2.500 |  |" in card


@pytest.mark.parametrize(("step", "miou"), [(400, "50.00"), (800, "58.13"), (None, "58.13")])
def test_card__shows_the_validation_of_the_weights_that_were_kept(step: int | None, miou: str, tmp_path: Path) -> None:
    made = model()
    made.records = {"training.json": TRAINING | ({} if step is None else {"step": step})}
    made.save_pretrained(tmp_path, card=True)
    card = (tmp_path / "README.md").read_text()
    assert f"| {miou} |" in card
    assert {"50.00", "58.13"} - {miou} == {text for text in ("50.00", "58.13") if text not in card}


@pytest.mark.parametrize("odd", [{}, {"config": 3, "history": 4}, {"results": [1], "about": 2, "history": [{}]}, []])
def test_card__odd_records_are_no_trouble(odd: Any) -> None:
    config = {"model": tiny_segmenter("fcn").config.to_dict(), "preprocessing": {"labels": None}}
    metadata(model_card("m", config, 10, odd, odd, None))


def test_card__that_somebody_wrote_is_left(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    model().save_pretrained(tmp_path, card=True)
    first = path.read_text()
    model().save_pretrained(tmp_path, card=True, license="mit")
    assert path.read_text() != first
    path.write_text("mine")
    model().save_pretrained(tmp_path, card=True)
    assert path.read_text() == "mine"


def test_records__stay_with_a_model_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "a")
    again = ExitSegmenter.from_pretrained(tmp_path / "a")
    assert again.records == {"training.json": TRAINING, "evaluation.json": EVALUATION}
    (tmp_path / "a" / "training.json").write_text("{")
    assert list(ExitSegmenter.from_pretrained(tmp_path / "a").records) == ["evaluation.json"]


# ------------------------------------------------------------------------------------------------------------- the hub


class Hub:
    """What `HfApi` does here, on a folder; the calls are checked against the true signatures."""

    endpoint = "https://hub"

    def __init__(self, root: Path, error: Exception | None = None) -> None:
        self.root, self.error = root, error
        self.calls: list[str] = []

    def _call(self, name: str, *args: Any, **options: Any) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.calls.append(name)
        return inspect.signature(getattr(HfApi, name)).bind(None, *args, **options).arguments

    def create_repo(self, *args: Any, **options: Any) -> None:
        self.private = self._call("create_repo", *args, **options).get("private")
        (self.root / args[0]).mkdir(parents=True, exist_ok=True)

    def create_branch(self, *args: Any, **options: Any) -> None:
        self._call("create_branch", *args, **options)

    def file_exists(self, *args: Any, **options: Any) -> bool:
        self._call("file_exists", *args, **options)
        return (self.root / args[0] / args[1]).exists()

    def hf_hub_download(self, *args: Any, **options: Any) -> str:
        self._call("hf_hub_download", *args, **options)
        return str(self.root / args[0] / args[1])

    def upload_folder(self, *args: Any, **options: Any) -> None:
        given = self._call("upload_folder", *args, **options)
        ignored = set(given["ignore_patterns"] or [])
        for path in Path(given["folder_path"]).iterdir():
            if path.name not in ignored:
                shutil.copy(path, self.root / given["repo_id"] / path.name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Hub]:
    def install(error: Exception | None = None) -> Hub:
        hub = Hub(tmp_path / "hub", error)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: hub)

        def snapshot(repo: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
            return str(hub.root / repo)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        return hub

    return install


def test_push__a_model_comes_back_with_its_card_and_without_places_of_this_machine(hub: Callable[..., Hub]) -> None:
    there, made = hub(), model()
    content = {"model": made.fingerprint(), "method": {"name": "dtop"}, "from": "/home/me/photos"}
    made.calibration = Calibration.from_dict(content)
    assert made.push_to_hub("me/street", license="mit", private=True) == "https://hub/me/street"
    assert there.private is True
    folder = there.root / "me" / "street"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "calibration.json", "config.json", "evaluation.json", "model.safetensors", "training.json"),
    ]
    card = (folder / "README.md").read_text()
    assert "# street" in card
    assert metadata(card)["license"] == "mit"
    assert not any("/home" in path.read_text() for path in [folder / "README.md", *folder.glob("*.json")])
    assert json.loads((folder / "training.json").read_text())["config"]["out"] == "street"
    assert made.records["training.json"] is TRAINING  # the model keeps them

    again = ExitSegmenter.from_pretrained("hf-hub:me/street")
    assert again.fingerprint() == made.fingerprint()
    assert again.calibrated_method() == made.calibrated_method()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


def test_push__leaves_a_card_of_somebodys_own_on_the_hub(hub: Callable[..., Hub]) -> None:
    there = hub()
    model().push_to_hub("me/street")
    model().push_to_hub("me/street", license="mit")
    card = there.root / "me" / "street" / "README.md"
    assert "Weights: mit." in card.read_text()
    card.write_text(card.read_text().replace(MARK, "mine"))
    model(seed=3).push_to_hub("me/street", revision="next")
    assert "mine" in card.read_text()
    assert "create_branch" in there.calls


def with_status(code: int) -> Exception:
    error = RuntimeError("refused")
    error.response = SimpleNamespace(status_code=code)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (with_status(403), "the hub does not let you write to 'me/street': check the owner, or run 'hf auth login'"),
        (with_status(401), "run 'hf auth login' with a token that may write."),
        (errors.HFValidationError("x"), "repo_id='me/street' is no name on the hub: write OWNER/NAME."),
        (ConnectionError("down"), "'me/street' could not be pushed (ConnectionError): check the connection; save_pre"),
    ],
)
def test_push__what_goes_wrong_is_one_sentence(error: Exception, words: str, hub: Callable[..., Hub]) -> None:
    hub(error)
    with pytest.raises(CheckpointError) as caught:
        model().push_to_hub("me/street")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_push__where_no_hub_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    model().save_pretrained(tmp_path / "street")
    with pytest.raises(CheckpointError, match=r"^'me/street' could not be pushed \(\w+\): check the connection; "):
        push_folder(tmp_path / "street", "me/street", token="t")


def test_push_and_fetch__without_the_hubs_library_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        CheckpointError, match=r"^pushing to 'me/street' needs the package huggingface_hub: pip install"
    ):
        model().push_to_hub("me/street")
    with pytest.raises(CheckpointError, match=r"^model 'hf-hub:me/street' needs the package huggingface_hub"):
        ExitSegmenter.from_pretrained("hf-hub:me/street")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model 'me/street' that you may read"),
        (errors.LocalEntryNotFoundError, "could not be fetched (LocalEntryNotFoundError): check the connection"),
    ],
)
def test_fetch__what_goes_wrong_is_one_sentence(
    error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any, **options: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(CheckpointError) as caught:
        ExitSegmenter.from_pretrained("hf-hub:me/street@main")
    assert words in str(caught.value)
    with pytest.raises(CheckpointError, match="is no hub name"):
        ExitSegmenter.from_pretrained("hf-hub:street")


def test_card__of_a_model_with_a_head_of_its_own_says_how_it_is_loaded(tmp_path: Path) -> None:
    own_segmenter("Plain").save_pretrained(tmp_path / "m", card=True)
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'ExitSegmenter.from_pretrained("m", head=MyHead)' in card
    assert "saved as `tests.heads.own_heads:Plain`: load that class as `MyHead` first" in card
