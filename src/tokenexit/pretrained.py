"""How a model is kept: `config.json` and weights in a folder, on the hub, with its records and its calibration."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenexit.card import CARD_FILE, may_write, model_card
from tokenexit.checkpoints.files import read_tensors
from tokenexit.checkpoints.hub import resolve_folder
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import normalize_head
from tokenexit.hub import push_folder
from tokenexit.methods import Method, build_method
from tokenexit.preprocessing import Preprocessing
from tokenexit.vit import ViTConfig

CONFIG_FILE = "config.json"
CALIBRATION_FILE = "calibration.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE, EVALUATION_FILE = "training.json", "evaluation.json"
"""Records that stay with a model: its training's, and figures of `tokenexit evaluate --json`."""
FORMAT = 1


@dataclass(frozen=True)
class SegmenterConfig:
    """All that rebuilds a model without its weights.

    exits: after how many blocks each exit stands. exit_head: one head specification for all exits, or one for each.
    """

    backbone: ViTConfig
    num_classes: int
    exits: tuple[int, ...] = (3, 6, 9)
    exit_heads: tuple[dict[str, Any], ...] = ()
    decode_head: dict[str, Any] = field(default_factory=lambda: {"kind": "fcn"})

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes={self.num_classes} must be at least 1: name the classes to predict.")
        depth = self.backbone.depth
        if any(not 0 < n < depth for n in self.exits) or list(self.exits) != sorted(set(self.exits)):
            raise ConfigError(
                f"exits={self.exits} must be increasing numbers of blocks between 1 and {depth - 1}: "
                f"this backbone has {depth} blocks."
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone.to_dict(),
            "num_classes": self.num_classes,
            "exits": list(self.exits),
            "exit_heads": list(self.exit_heads),
            "decode_head": self.decode_head,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmenterConfig:
        return cls(
            backbone=ViTConfig(**values["backbone"]),
            num_classes=values["num_classes"],
            exits=tuple(values["exits"]),
            exit_heads=tuple(normalize_head(head) for head in values["exit_heads"]),
            decode_head=normalize_head(values["decode_head"]),
        )


class PretrainedMixin(nn.Module):
    """Saves, loads and recognises an `ExitSegmenter`, whose constructor takes what `SegmenterConfig` holds.

    calibration: contents of `calibration.json`, None for a model that was not calibrated. records: contents of the
        records that were found beside the model, by name.
    """

    config: SegmenterConfig
    preprocessing: Preprocessing
    calibration: Mapping[str, Any] | None
    records: dict[str, Any]

    def calibrated_method(self) -> Method[Any] | None:
        """The method and thresholds that `tokenexit calibrate` chose for this model, or None if it was not calibrated.

        Raises `CheckpointError` for a calibration of other weights, and for one that is damaged.
        """
        if self.calibration is None:
            return None
        if self.calibration.get("model") != self.fingerprint():
            raise CheckpointError(
                f"{CALIBRATION_FILE} was made for other weights: run `tokenexit calibrate` again, delete it, or name a "
                "--method."
            )
        try:
            return build_method(self.calibration["method"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{CALIBRATION_FILE} is damaged ({error}): calibrate again, or delete it.") from None

    def fingerprint(self) -> str:
        """Tells weights from others: a digest of all heads, which every training changes."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            if name.startswith(("exit_heads.", "decode_head.")):
                digest.update(name.encode())
                digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, path: str | Path, card: bool = False, license: str | None = None) -> None:
        """Write `config.json` and `model.safetensors` to a folder, `calibration.json` if there is a calibration, and
        the records that were found beside the model; whatever stood there stays whole until the end.

        card: write `README.md`, too, a model card of all this; one that somebody wrote is left. license: of the
        weights, to stand there."""
        from safetensors.torch import save_file

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "model": self.config.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
        }
        files = {CONFIG_FILE: _json(config)} | {name: _json(record) for name, record in self.records.items()}
        if self.calibration is not None:
            files[CALIBRATION_FILE] = _json(self.calibration)
        if card and may_write(folder / CARD_FILE):
            files[CARD_FILE] = self._card(folder.resolve().name, config, license)
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            save_file(state, Path(unfinished) / WEIGHTS_FILE, metadata={"format": "pt"})
            for name, text in files.items():
                (Path(unfinished) / name).write_text(text)
            for name in (WEIGHTS_FILE, *files):
                os.replace(Path(unfinished) / name, folder / name)

    def _card(self, name: str, config: Mapping[str, Any], license: str | None) -> str:
        parameters = sum(value.numel() for value in self.parameters())
        training, evaluation = (self.records.get(file) for file in (TRAINING_FILE, EVALUATION_FILE))
        return model_card(name, config, parameters, training, evaluation, self.calibration, license)

    def push_to_hub(self, repo_id: str, license: str | None = None, **options: Any) -> str:
        """Save the model with its card in the repository OWNER/NAME of the Hugging Face hub; returns its address.

        options: of `tokenexit.hub.push_folder`, which raises what can go wrong."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(path, card=True, license=license)
            return push_folder(path, repo_id, **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """A saved model, in evaluation mode. Raises `CheckpointError` for a folder that holds none.

        path: a folder, or `hf-hub:OWNER/NAME[@REVISION]`, which is fetched once."""
        folder = resolve_folder(path, (WEIGHTS_FILE, "*.json"))
        config, preprocessing = _read_config(folder)
        model = cls(
            backbone=config.backbone,
            num_classes=config.num_classes,
            exits=config.exits,
            exit_head=config.exit_heads,
            decode_head=config.decode_head,
            preprocessing=preprocessing,
        )
        state = read_tensors(folder / WEIGHTS_FILE)
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        wrong = [name for name in wanted.keys() | state.keys() if wanted.get(name) != _shape(state.get(name))]
        if wrong:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} does not fit {folder / CONFIG_FILE} ({len(wrong)} entries differ, first "
                f"'{min(wrong)}'): save the model again."
            )
        model.load_state_dict(state)
        model.calibration = _read_calibration(folder / CALIBRATION_FILE)
        model.records = _read_records(folder)
        return model.to(device).eval()


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _read_records(folder: Path) -> dict[str, Any]:
    """Those that are there and whole; a model works without them."""
    records = {}
    for name in (TRAINING_FILE, EVALUATION_FILE):
        with suppress(OSError, ValueError):
            records[name] = json.loads((folder / name).read_text())
    return records


def _read_calibration(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): calibrate again, or delete it.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged (no mapping): calibrate again, or delete it.")
    return values


def _read_config(folder: Path) -> tuple[SegmenterConfig, Preprocessing]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: give the folder of a model saved by tokenexit.")
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {values['format']}, this version reads {FORMAT}: update tokenexit."
            )
        return SegmenterConfig.from_dict(values["model"]), Preprocessing.from_dict(values["preprocessing"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): save the model again.") from None
