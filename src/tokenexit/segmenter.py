"""`ExitSegmenter`: backbone, heads and the loop. This file is the map of the library.

    images -> embed -> blocks -> exit 1 -> blocks -> ... -> last block -> result

The method is an argument of the call and its state a value, so one model serves several methods, thresholds and
threads at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit.card import CARD_FILE, may_write, model_card
from tokenexit.checkpoints.files import read_state_dict, read_tensors
from tokenexit.checkpoints.hub import resolve_folder, resolve_weights
from tokenexit.checkpoints.load import LoadReport, load_backbone
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import Head, HeadSpec, build_head, normalize_head
from tokenexit.hub import push_folder
from tokenexit.ledger import Size, write_ledger
from tokenexit.methods import Dense, Method, Model, build_method
from tokenexit.output import SegmentationOutput, joined
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.pipeline import ImageSegmentation, label_maps
from tokenexit.preprocessing import ImageSource, Preprocessing, default_labels, load_image
from tokenexit.vit import ViT, ViTConfig, vit_config
from tokenexit.windows import Segmentation, segment_windows

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


class ExitSegmenter(nn.Module):
    """A plain ViT segmenter whose tokens may leave early.

    backbone: a preset's name (`tokenexit.vit.PRESETS`) or a `ViTConfig`; `backbone_options` change its fields, for
        example `class_token=False`.
    exits: after how many blocks each exit stands. exit_head: a head for all exits, or a list with one for each.
    decode_head: the head at the end. preprocessing: how pictures become inputs; saved with the model.
    weights: backbone weights to start from, a timm-named `.safetensors` or `.pth` file or `hf-hub:OWNER/NAME`; what was
        loaded, missing, unexpected or resized stands in `load_report`. Raises `CheckpointError` if they do not fit.
    """

    def __init__(
        self,
        backbone: str | ViTConfig = "vit_tiny_patch16",
        num_classes: int = 11,
        exits: Sequence[int] = (3, 6, 9),
        exit_head: HeadSpec | Sequence[HeadSpec] = "fcn",
        decode_head: HeadSpec = "fcn",
        preprocessing: Preprocessing | None = None,
        weights: str | Path | None = None,
        **backbone_options: Any,
    ) -> None:
        super().__init__()
        specs = [exit_head] * len(exits) if isinstance(exit_head, str | Mapping) else list(exit_head)
        if len(specs) != len(exits):
            raise ConfigError(
                f"exit_head has {len(specs)} heads for {len(exits)} exits: give one head, or one for each exit."
            )
        self.config = SegmenterConfig(
            backbone=vit_config(backbone, **backbone_options),
            num_classes=num_classes,
            exits=tuple(exits),
            exit_heads=tuple(normalize_head(spec) for spec in specs),
            decode_head=normalize_head(decode_head),
        )
        self.preprocessing = preprocessing or Preprocessing(labels=default_labels(num_classes))
        labels = self.preprocessing.labels
        if labels is not None and labels.num_classes != num_classes:
            raise ConfigError(
                f"preprocessing names {labels.num_classes} classes and num_classes={num_classes}: make them agree."
            )
        dim = self.config.backbone.embed_dim
        self.backbone = ViT(self.config.backbone)
        self.exit_heads = nn.ModuleList(build_head(spec, dim, num_classes) for spec in specs)
        self.decode_head = build_head(decode_head, dim, num_classes)
        self.load_report: LoadReport | None = None
        self.calibration: Mapping[str, Any] | None = None
        self.records: dict[str, Any] = {}
        if weights is not None:
            path = resolve_weights(weights)
            self.load_report = load_backbone(self.backbone, read_state_dict(path), source=f"weights '{path}'")

    @property
    def device(self) -> torch.device:
        return self.backbone.pos_embed.device

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        method: Method[Any] | None = None,
        targets: Sequence[Size] | None = None,
        with_stages: bool = False,
        labels: Tensor | None = None,
    ) -> SegmentationOutput:
        """Segment a batch.

        images: `(B, 3, H, W)` or a list of `(3, H, W)`, sizes may differ. method: `Dense()` if not given.
        targets: height and width of the maps that the output's `labels` and `logits` return; image sizes if not given.
        with_stages: record the full map of every exit, as training always does for its losses.
        labels: masks `(B, H, W)`, of which the output's `loss` is taken: `segmentation_loss` with its defaults and the
            `ignore_index` of the preprocessing's labels.
        """
        images = _as_list(images)
        if targets is not None and len(targets) != len(images):
            raise ConfigError(f"targets has {len(targets)} sizes for {len(images)} images: give one for each.")
        method = Dense() if method is None else method
        model = self.for_methods(self.training or with_stages or labels is not None)
        method.check(model)
        sizes = tuple((image.shape[1], image.shape[2]) for image in images)
        targets = sizes if targets is None else tuple(targets)
        outputs = [
            self._run([images[i] for i in run], own, model, targets[run.start : run.stop])
            for run, own in self._runs(sizes, method)
        ]
        output = outputs[0] if len(outputs) == 1 else joined(outputs)
        if labels is None:
            return output
        classes = self.preprocessing.labels or default_labels(self.config.num_classes)
        return replace(output, loss=segmentation_loss(output, labels, classes.ignore_index))

    def _runs(self, sizes: Sequence[Size], method: Method[Any]) -> Iterator[tuple[range, Method[Any]]]:
        """Consecutive images that run together, and with what; for most methods, all of them with itself."""
        grids = [self.backbone.patch_embed.grid(*size) for size in sizes]
        stop = cells = 0
        for own, group in groupby(map(method.for_grid, grids)):
            start, first, stop = stop, cells, stop + len(list(group))
            cells += sum(h * w for h, w in grids[start:stop])
            yield range(start, stop), own.of_cells(slice(first, cells))

    def _run(
        self, images: Sequence[Tensor], method: Method[Any], model: Model, targets: tuple[Size, ...]
    ) -> SegmentationOutput:
        """Both papers' flow: blocks, an exit, blocks of those that are left, and the map of all."""
        tokens = self.backbone.embed(images)
        state = method.start(tokens, model)
        lengths: list[tuple[int, ...]] = []
        bounds = (0, *self.config.exits, self.config.backbone.depth)
        for n, (start, stop) in enumerate(pairwise(bounds)):
            tokens = self.backbone.run(tokens, start, stop)
            lengths += [tokens.packing.lengths] * (stop - start)
            if n < model.num_exits:
                tokens, state = method.at_exit(n, tokens, state, model)
        result = method.result(tokens, state, model)

        sizes = tuple((image.shape[1], image.shape[2]) for image in images)
        scale, grids = self.decode_head.scale, tokens.grids
        maps = torch.split(result.logits, [h * w * scale * scale for h, w in grids])
        stages = torch.split(result.exit_stage, [h * w for h, w in grids])
        return SegmentationOutput(
            grid_logits=tuple(m.view(h * scale, w * scale, -1).permute(2, 0, 1) for m, (h, w) in zip(maps, grids)),
            value=result.value,
            exit_stage=tuple(s.view(grid) for s, grid in zip(stages, grids)),
            num_exits=model.num_exits,
            ledger=write_ledger(self.backbone, model.exit_heads, self.decode_head, grids, lengths, result.stages),
            sizes=sizes,
            targets=targets,
            patch_size=self.config.backbone.patch_size,
            upscale=self.decode_head.upscale,
            stages=result.stages,
        )

    def check(self, method: Method[Any]) -> None:
        """Raise `ConfigError`, in one sentence, for a method that cannot run on this model."""
        method.check(self.for_methods())

    def for_methods(self, with_stages: bool = False) -> Model:
        """What a method may know of this model."""
        return Model(
            exit_heads=[head for head in self.exit_heads if isinstance(head, Head)],
            decode_head=self.decode_head,
            norm=self.backbone.norm,
            num_classes=self.config.num_classes,
            has_class_token=self.config.backbone.class_token,
            with_stages=with_stages,
        )

    def segment(
        self,
        images: Tensor | Sequence[Tensor],
        method: Method[Any] | None = None,
        targets: Sequence[Size] | None = None,
        with_stages: bool = False,
    ) -> Segmentation:
        """As a call of the model, but in the windows of its `preprocessing` if it names one."""
        window, stride = self.preprocessing.window, self.preprocessing.stride
        if window is None or stride is None:
            return self(images, method, targets, with_stages)  # type: ignore[no-any-return]
        return segment_windows(
            lambda crops, method: self(crops, method, with_stages=with_stages),
            _as_list(images),
            window,
            stride,
            Dense() if method is None else method,
            patch_size=self.config.backbone.patch_size,
            targets=targets,
        )

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

    @torch.no_grad()
    def predict(self, images: ImageSource | Sequence[ImageSource], method: Method[Any] | None = None) -> Segmentation:
        """Segment pictures: paths, PIL images or arrays, one or a list; maps come back at the pictures' own sizes.

        Pictures are taken whole, or in the windows of `preprocessing` if it names one.
        method: the calibrated one if not given, and `Dense()` for a model that was not calibrated.
        The model must be in evaluation mode, which `from_pretrained` and `eval()` set. Raises `DataError` for a
        picture that cannot be read.
        """
        if self.training:
            raise ConfigError("predict needs the model in evaluation mode: call model.eval() first.")
        sources: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        pictures = [load_image(source) for source in sources]
        tensors = [self.preprocessing.to_tensor(picture).to(self.device) for picture in pictures]
        method = self.calibrated_method() if method is None else method
        return self.segment(tensors, method, targets=[(p.height, p.width) for p in pictures])

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes."""
        return dict(enumerate((self.preprocessing.labels or default_labels(self.config.num_classes)).names))

    def post_process_semantic_segmentation(
        self, outputs: Segmentation, target_sizes: Sequence[Size] | None = None
    ) -> list[Tensor]:
        """Class of every pixel, one `(H, W)` map per picture. See `tokenexit.pipeline.label_maps`."""
        return label_maps(outputs, target_sizes)

    def pipeline(self, method: Method[Any] | None = None) -> ImageSegmentation:
        """What is called with pictures and answers as Hugging Face's `image-segmentation` pipeline does.

        method: as of `predict`."""
        return ImageSegmentation(lambda image: self.predict(image, method), self.id2label)

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
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> ExitSegmenter:
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


def _as_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A batch as a list of `(3, H, W)`; refuses other shapes."""
    batch = list(images)
    if not batch:
        raise ConfigError("images is empty: pass at least one (3, H, W) tensor.")
    for image in batch:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ConfigError(f"an image has shape {tuple(image.shape)}: pass (3, H, W) tensors with H, W >= 1.")
    return batch


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
