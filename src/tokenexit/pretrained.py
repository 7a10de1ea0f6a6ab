"""A saved model is a folder with `config.json`, weights, its records and its calibration, here or on the hub."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenexit.checkpoints.calibration import CALIBRATE, CALIBRATION_FILE, Calibration, read_calibration
from tokenexit.checkpoints.files import read_tensors, tensor_shapes
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import HeadModule, HeadSpec, ModuleHead, head_from, normalize_head
from tokenexit.heads.module import MODULE, import_path
from tokenexit.hub.card import CARD_FILE, may_write, model_card
from tokenexit.hub.fetch import resolve_folder
from tokenexit.hub.push import push_folder
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import Method, build_method
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.folder import current, replaced_together
from tokenexit.runtime.schema import Between, check, check_fields, check_keys, damaged, misfit, read_json, shown

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE, EVALUATION_FILE = "training.json", "evaluation.json"
"""Records that are saved with a model: its training, and the figures of `tokenexit evaluate --json`."""
MODEL_FILES = (WEIGHTS_FILE, "*.json")
"""What is fetched of a model on the hub."""
FORMAT = 1
WEIGHTS_VERSION = "v2:"
"""Prefix of fingerprints of all weights; older ones, of the heads alone, are bare digits."""

AGAIN = "save the model again"
"""Cure for damaged files."""


class _Data(TypedDict, total=False):
    name: str
    root: str | None
    options: dict[str, Any]


class _Config(TypedDict, total=False):
    data: _Data


class TrainingRecord(TypedDict, total=False):
    """The keys of `training.json` that are read; the rest is kept as it is."""

    config: _Config
    history: list[dict[str, Any]]


class EvaluationRecord(TypedDict, total=False):
    """The keys of `evaluation.json` that are read."""

    about: dict[str, Any]
    results: list[dict[str, Any]]


RECORDS = {TRAINING_FILE: TrainingRecord, EVALUATION_FILE: EvaluationRecord}


@dataclass(frozen=True)
class SegmenterConfig:
    """The configuration that rebuilds a model without its weights.

    Attributes:
        backbone: architecture of the ViT.
        num_classes: number K of classes.
        exits: number of blocks before each exit, increasing.
        exit_heads: specification of each exit's head.
        decode_head: specification of the head at the end.
        stage_adapter: an adapter for each exit, see `StageAdapter`.

    Raises:
        ConfigError: for a value of another type or out of range.
    """

    backbone: ViTConfig
    num_classes: Annotated[int, Between(1, 65535)]
    exits: tuple[int, ...] = (3, 6, 9)
    exit_heads: tuple[dict[str, Any], ...] = ()
    decode_head: dict[str, Any] = field(default_factory=lambda: {"kind": "fcn"})
    stage_adapter: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        joint = self.decode_head.get("kind") == "eomt"  # its head holds blocks of its own, which exits save
        last = self.backbone.depth if joint else self.backbone.depth - 1
        if any(not 0 < n <= last for n in self.exits) or list(self.exits) != sorted(set(self.exits)):
            raise ConfigError(
                f"exits={self.exits} must be increasing numbers of blocks between 1 and {last}: "
                f"this backbone has {self.backbone.depth} blocks."
            )
        if joint and self.backbone.final_norm:
            raise ConfigError("final_norm must be off where the decode head is eomt, which has it: set it to False.")
        if self.decode_head.get("kind") == "cropr":
            raise ConfigError("decode_head must be another than cropr, which scores tokens for exits: choose fcn.")
        if any(head.get("kind") == "eomt" for head in self.exit_heads):
            raise ConfigError(
                "exit_head must be another than eomt, whose blocks are the end of the network: choose fcn."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return lists, mappings, strings and numbers only, as JSON holds them; adapters only where there are some."""
        values = {
            "backbone": self.backbone.to_dict(),
            "num_classes": self.num_classes,
            "exits": list(self.exits),
            "exit_heads": list(self.exit_heads),
            "decode_head": self.decode_head,
        }
        return values | ({"stage_adapter": True} if self.stage_adapter else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmenterConfig:
        """Build a configuration from what `to_dict` returns. Raises `ConfigError` for unknown or wrong values."""
        names = [f.name for f in fields(cls)]
        check_keys("model", values, known=names, needed=[name for name in names if name != "stage_adapter"])
        check_keys("backbone", values["backbone"], known=[f.name for f in fields(ViTConfig)])
        for name in ("exits", "exit_heads"):
            check(name, values[name], list[Any])
        return cls(
            backbone=ViTConfig(**values["backbone"]),
            num_classes=values["num_classes"],
            exits=tuple(values["exits"]),
            exit_heads=tuple(normalize_head(head) for head in values["exit_heads"]),
            decode_head=normalize_head(values["decode_head"]),
            stage_adapter=values.get("stage_adapter", False),
        )


class PretrainedMixin(nn.Module):
    """Saves, loads and recognises an `ExitSegmenter`, whose constructor takes what `SegmenterConfig` holds.

    calibration: thresholds chosen for these weights, None for a model that was not calibrated. records: contents of
        the records that were found beside the model, by name.
    """

    config: SegmenterConfig
    preprocessing: Preprocessing
    calibration: Calibration | None
    records: dict[str, Any]

    def calibrated_method(self) -> Method[Any] | None:
        """Return the method and thresholds that `tokenexit calibrate` chose for this model.

        Returns:
            The method, or None for a model that was not calibrated.

        Raises:
            CheckpointError: for a calibration that is damaged or was made for other weights.
        """
        if self.calibration is None:
            return None
        if not self.has_fingerprint(self.calibration.model):
            raise CheckpointError(
                f"{CALIBRATION_FILE} was made for other weights: run `tokenexit calibrate` again, delete it, or name a "
                "--method."
            )
        if not self.calibration.method:
            raise damaged(CALIBRATION_FILE, "it lacks 'method'", CALIBRATE)
        try:
            return build_method(self.calibration.method)
        except ConfigError as error:
            raise damaged(CALIBRATION_FILE, error, CALIBRATE) from None

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights: `v2:` and a digest of backbone, heads and their buffers."""
        return WEIGHTS_VERSION + _digest_of(self)

    def has_fingerprint(self, value: object) -> bool:
        """Return whether `value` is the fingerprint of these weights, or the one that earlier versions wrote."""
        current_version = isinstance(value, str) and value.startswith(WEIGHTS_VERSION)
        return value == (self.fingerprint() if current_version else _digest_of_heads(self))

    def save_pretrained(self, path: str | Path, card: bool = False, license: str | None = None) -> None:
        """Save the model in a folder.

        It writes `config.json` and `model.safetensors`, `calibration.json` if there is a calibration, and the records
        that were found beside the model. They change as one: a call that is killed leaves the model that was there,
        whole, or this one.

        Args:
            path: the folder, made if it is not there.
            card: write a model card, `README.md`, too; one that somebody else wrote is left.
            license: licence of the weights in the card, by the hub's names, such as "apache-2.0".
        """
        from safetensors.torch import save_file

        folder = Path(path)
        config = {
            "format": FORMAT,
            "model": self.config.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
        }
        files = {CONFIG_FILE: _json(config)} | {name: _json(record) for name, record in self.records.items()}
        if self.calibration is not None:
            files[CALIBRATION_FILE] = _json(self.calibration.to_dict())
        state = _apart(self.state_dict())
        with replaced_together(folder) as new:
            if card and may_write(folder / CARD_FILE):
                files[CARD_FILE] = self._card(folder.resolve().name, config, license)
            with atomic_write(new / WEIGHTS_FILE) as unfinished:
                save_file(state, unfinished, metadata={"format": "pt"})
            for name, text in files.items():
                (new / name).write_text(text)

    def _card(self, name: str, config: Mapping[str, Any], license: str | None) -> str:
        parameters = sum(value.numel() for value in self.parameters())
        training, evaluation = (self.records.get(file) for file in (TRAINING_FILE, EVALUATION_FILE))
        return model_card(name, config, parameters, training, evaluation, self.calibration, license)

    def push_to_hub(self, repo_id: str, license: str | None = None, **options: Any) -> str:
        """Save the model with its card in a repository of the Hugging Face hub.

        Args:
            repo_id: OWNER/NAME, made if it is not there.
            license: licence of the weights in the card.
            **options: `private`, `token`, `revision` and `message`, see `tokenexit.hub.push.push_folder`.

        Returns:
            The address of the repository.

        Raises:
            CheckpointError: if huggingface_hub is missing, and for a malformed name, no right to write, no connection.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(path, card=True, license=license)
            return push_folder(path, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", head: HeadModule | None = None
    ) -> Self:
        """Load a saved model, in evaluation mode.

        Args:
            path: a folder, or `hf-hub:OWNER/NAME[@REVISION]`, which is fetched once.
            device: device of the weights.
            head: the decode head of a model that was saved with a module of its own: its class, which is called with
                the saved options, a function that returns it, or a module, of which a copy is taken. Code is never
                found by the path that the model holds.

        Returns:
            The model, with its preprocessing, calibration and records.

        Raises:
            CheckpointError: for a folder without a model, for damaged files, and for weights that do not fit.
            ConfigError: for a module as decode head that is not given, or given and not wanted.
        """
        folder = resolve_folder(path, MODEL_FILES)
        config, preprocessing = read_config(folder)
        weights = current(folder, WEIGHTS_FILE)
        decode_head = _decode_head(config, head, folder)
        try:
            with torch.device("meta"):  # shapes alone: memory is allocated once the weights fit
                model = cls(
                    backbone=config.backbone,
                    num_classes=config.num_classes,
                    exits=config.exits,
                    exit_head=config.exit_heads,
                    decode_head=decode_head,
                    preprocessing=preprocessing,
                    stage_adapter=config.stage_adapter,
                )
        except ConfigError as error:
            raise damaged(folder / CONFIG_FILE, error, AGAIN) from None
        found = tensor_shapes(weights)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if different and isinstance(decode_head, ModuleHead) and min(different).startswith("decode_head."):
            raise CheckpointError(
                f"{weights} holds other weights than head {import_path(decode_head.module)} has ({len(different)} "
                f"entries differ, first '{min(different)}'): give the class that the model was saved with, "
                f"{config.decode_head['import']}."
            )
        if different:
            raise CheckpointError(
                f"{weights} does not fit {folder / CONFIG_FILE} ({len(different)} entries differ, first "
                f"'{min(different)}'): save the model again."
            )
        for part in model.children():
            if part is not decode_head:  # the user's own module may hold what is in no file
                part.to_empty(device="cpu")
        model.load_state_dict(read_tensors(weights))
        model.calibration = read_calibration(current(folder, CALIBRATION_FILE))
        model.records = _read_records(folder)
        return model.to(device).eval()


def _decode_head(config: SegmenterConfig, given: HeadModule | None, folder: Path) -> HeadSpec | ModuleHead:
    """Return the decode head to build, or the one made of the module that the user names."""
    spec = config.decode_head
    if spec["kind"] == MODULE:
        return head_from(given, spec, config.backbone.embed_dim, config.num_classes)
    if given is not None:
        raise ConfigError(f"head is given, and the decode head of {folder} is {spec['kind']}: leave it out.")
    return spec


_DIGESTS: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()
"""The last digest of each model, with the tensors and versions it was made from: a large model takes a second."""


def _digest_of(model: nn.Module) -> str:
    """Return a digest of all names, types, shapes and values. A change in place increments a tensor's version."""
    state = model.state_dict()
    now = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in state.values())
    before, digest = _DIGESTS.get(model, (None, ""))
    if now != before:
        parts = [f"{name} {t.dtype} {tuple(t.shape)} {zlib.crc32(_bytes(t))}" for name, t in state.items()]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        _DIGESTS[model] = now, digest
    return digest


def _digest_of_heads(model: nn.Module) -> str:
    """Return the fingerprint of the first version, from the heads alone."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith(("exit_heads.", "decode_head.")):
            digest.update(name.encode())
            digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return entries that share no memory, which a file cannot hold: the second of two tied ones is a copy."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        value = value.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return apart


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """Read the record of the training or of an evaluation in a model's folder; None if it is missing or damaged."""
    with suppress(FileNotFoundError, CheckpointError):
        values = read_json(current(folder, name), AGAIN, nan_as_null=True)
        if isinstance(values, dict) and misfit("", values, RECORDS[name]) is None:
            return values
    return None


def _read_records(folder: Path) -> dict[str, Any]:
    """Read the records that are there and undamaged; a model works without them."""
    found = {name: read_record(folder, name) for name in RECORDS}
    return {name: record for name, record in found.items() if record is not None}


def read_config(folder: Path) -> tuple[SegmenterConfig, Preprocessing]:
    """Read the configuration and the preprocessing of a saved model, without its weights.

    Raises `CheckpointError` for a folder without a model, and for a damaged file.
    """
    path = current(folder, CONFIG_FILE)
    if not path.exists():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: give the folder of a model saved by tokenexit.")
    values = read_json(path, AGAIN)
    try:
        check("it", values, dict[str, Any])
        if values.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path} has format {shown(values['format'])}, this version reads {FORMAT}: update tokenexit."
            )
        check_keys("it", values, known=tuple(values), needed=("format", "model", "preprocessing"))
        return SegmenterConfig.from_dict(values["model"]), Preprocessing.from_dict(values["preprocessing"])
    except ConfigError as error:
        raise damaged(path, error, AGAIN) from None
