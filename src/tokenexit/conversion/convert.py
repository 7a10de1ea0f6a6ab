"""Weights of other libraries are converted to a model folder or a backbone file, with a report of the rest."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenexit.checkpoints.files import read_checkpoint
from tokenexit.checkpoints.load import load_backbone
from tokenexit.conversion.families import SOURCES, Source, detect, not_plain, source_named
from tokenexit.conversion.families.eomt import added_to
from tokenexit.conversion.framework_config import attention_heads_in
from tokenexit.conversion.infer import backbone_config, head_spec, heads_of, preset_of
from tokenexit.conversion.rename import State, rename, under
from tokenexit.conversion.sidecar import Sidecar, read_sidecar
from tokenexit.engine.vit import ViT
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.errors import CheckpointError, ConfigError, TokenExitError
from tokenexit.heads import HEADS, eomt_spec
from tokenexit.hub.fetch import DEFAULT_FILES, HUB_PREFIX, resolve_weights
from tokenexit.inputs.labels import Labels, default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.runtime.atomic import atomic_write
from tokenexit.segmenter import ExitSegmenter

SHOWN = 5
HEADS_IN_STATE = ("decode_head.", "exit_heads.")
FOLDER_FILES = (*DEFAULT_FILES, "checkpoint.pth")

_CLASSIFIER = "an image classifier or projection head"
_UNUSED = (
    (r"criterion\..+|(?:network\.)?encoder\.pixel_(?:mean|std)", "used in training alone, or the known mean and std"),
    (
        r"(?:.*\.)?(?:head|head_dist|fc|fc_norm|pre_logits|cls_classifier|distillation_classifier|classifier)\..+",
        _CLASSIFIER,
    ),
    (r"(?:.*\.)?(?:dino_head|ibot_head)\..+", _CLASSIFIER),
    (r"(?:.*\.)?(?:pooler|attn_pool)\..+", "pools for an image classifier"),
    (r"(?:.*\.)?(?:mask_token|(?:local_cls_norm|lm_head)\..+)", "used in pre-training alone"),
    (r"(?:.*\.)?(?:rope_embed\.periods|rope\.freqs_(?:cos|sin))", "computed here from their formula, in fp32"),
    (r"(?:.*\.)?fpn\d\..+", "a pyramid of features behind the backbone"),
    (r"decoder(?:_\w+)?(?:\..+)?", "the decoder of masked pre-training"),
    (r"decode_head\.conv_seg\..+", "made by the framework, never used by this head"),
    (r"(?:decode_head|exit_heads\.\d+)\.loss_decode\..+", "a constant of the loss, used in training alone"),
    (r"(?:backbone\.)?norm\.(?:weight|bias)", "a last norm, which this model runs without"),
    (r"blocks\.\d+\..+", "a block beyond the depth that was asked for"),
    (r"(?:backbone\.)?(?:cls_token|pos_embed\[:, :1\])", "this model runs without class token"),
)


@dataclass(frozen=True)
class ConversionReport:
    """The report of a conversion: the model that was made, and which weights were used.

    Attributes:
        kind: the source, a name of `SOURCES`.
        destination: the model folder or backbone file.
        backbone: configuration of the backbone.
        loaded: number of entries of the result that took a value.
        preset: the backbone's name in `PRESETS`, if it has one.
        exits: number of blocks before each exit; empty where the source has a backbone alone.
        exit_heads: specification of each exit's head.
        decode_head: specification of the decode head, None where the source has a backbone alone.
        num_classes: number K of classes, None where the source has a backbone alone.
        beside: names of the files beside the weights that were read.
        assumed: settings that neither names nor shapes nor these files give.
        unused: entries that were not used, with the reason.
    """

    kind: str
    destination: Path
    backbone: ViTConfig
    loaded: int
    preset: str | None = None
    exits: tuple[int, ...] = ()
    exit_heads: tuple[dict[str, Any], ...] = ()
    decode_head: dict[str, Any] | None = None
    num_classes: int | None = None
    beside: tuple[str, ...] = ()
    assumed: dict[str, Any] = field(default_factory=dict)
    unused: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """Summarise the conversion in a few lines; unused entries are counted, and the first are named."""
        config = self.backbone
        size = f"{config.embed_dim} channels, {config.depth} blocks, patch {config.patch_size}"
        lines = [
            f"source: {SOURCES[self.kind].title}" + (f", with {', '.join(self.beside)}" if self.beside else ""),
            f"backbone: {self.preset or 'no preset'} ({size})",
        ]
        if self.decode_head is not None:
            lines.append(f"decode head: {_in_words(self.decode_head)}, {self.num_classes} classes")
            lines += [f"exit after block {n}: {_in_words(head)}" for n, head in zip(self.exits, self.exit_heads)]
            if not self.exits:
                lines.append("no exit heads in the source: train them on the frozen backbone")
        if self.assumed:
            values = ", ".join(f"{name}={value}" for name, value in self.assumed.items())
            lines.append(f"assumed, not in the weights: {values}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.unused:
            reasons.setdefault(reason, []).append(name)
        lines += [f"not used ({reason}): {_some(names)}" for reason, names in reasons.items()]
        lines.append(f"wrote {self.loaded} tensors to {self.destination}")
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Assumptions that would make every score wrong without a sign if they do not hold."""
        heads = {f"exit_heads.{n}": head for n, head in enumerate(self.exit_heads)}
        heads |= {"decode_head": self.decode_head} if self.decode_head is not None else {}
        atm = [f"{name}.num_heads" for name, head in heads.items() if head["kind"] == "atm"]
        numbers = sorted({self.assumed[name] for name in atm if name in self.assumed})
        if not numbers:
            return ()
        assumed = " and ".join(map(str, numbers))
        return (
            f"nothing in these weights says how many attention heads ATM decoders have: {assumed} assumed. DToP has "
            "6 (ViT-B), 8 (ViT-L on ADE20K) or 16 (ViT-L on Pascal Context and COCO-Stuff-10K); with a wrong number "
            "every score is off. Say it with head_options (--head-options num_heads=16).",
        )


@dataclass(frozen=True)
class _Weights:
    """The renamed weights of one file, with what is known of them."""

    kind: str
    source: Source
    what: str
    state: State
    meta: Mapping[str, Any]
    beside: Sidecar


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    kind: str = "auto",
    backbone: str | Path | None = None,
    backbone_only: bool = False,
    exits: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> ConversionReport:
    """Convert weights of another library to a model folder, or to a backbone file where there are no heads.

    Args:
        source: a weight file, a folder with one, or `hf-hub:OWNER/NAME`. Configuration files beside it are read.
        destination: a folder for `ExitSegmenter.from_pretrained` where the source has heads; else a `.safetensors` file
            with timm's names, for `weights=`.
        kind: the source of the weights, a name of `SOURCES`; "auto" recognises it by the names of entries.
        backbone: weights of the backbone, where `source` holds a head alone (linear heads of DINOv2 and DINOv3), or
            differences from it (EoMT's release on DINOv3).
        backbone_only: leave the heads out.
        exits: number of blocks before each auxiliary head, where it is not as in the published configurations; an empty
            list leaves the auxiliary heads out.
        options: known fields of `ViTConfig`; they take precedence over what is inferred or assumed.
        head_options: known options of the heads, such as num_heads of ATM heads; likewise.
        preprocessing: mean, std and labels, if other than the source's.

    Returns:
        The model that was made, and which weights were used.

    Raises:
        CheckpointError: for weights that cannot be read, of an unknown source, or with parts that tokenexit's models
            lack; nothing is written.
        ConfigError: for options that cannot work; nothing is written.
    """
    parts = _parts(source, kind, backbone, backbone_only, exits, options)
    target = Path(destination)
    _check_destination(target, bool(parts.heads), parts.main.what, Path(source))
    if parts.heads:
        model, report = _segmenter(parts, exits, head_options, preprocessing)
        with _writable(target):
            model.save_pretrained(target)
        return replace(report, destination=target)
    if head_options:
        raise ConfigError(f"head_options are given and {parts.main.what} give no head: leave them out.")
    loaded, unused = _write_backbone(parts.state, parts.config, parts.body.what, target)
    return _report(parts, loaded, unused, destination=target)


def converted(
    source: str | Path,
    *,
    kind: str = "auto",
    backbone: str | Path | None = None,
    exits: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[ExitSegmenter, ConversionReport]:
    """Convert a segmenter of another library to a model in memory, in evaluation mode; nothing is written.

    Args:
        source: a weight file, a folder with one, or `hf-hub:OWNER/NAME`.
        kind: as in `convert`.
        backbone: as in `convert`.
        exits: as in `convert`.
        options: as in `convert`.
        head_options: as in `convert`.
        preprocessing: as in `convert`.

    Returns:
        The model, and the report, whose destination is empty.

    Raises:
        CheckpointError: as `convert`, and for weights of a backbone alone.
        ConfigError: as `convert`.
    """
    parts = _parts(source, kind, backbone, False, exits, options)
    if not parts.heads:
        raise CheckpointError(f"{parts.main.what} hold a backbone alone: give a segmenter with its decode head.")
    model, report = _segmenter(parts, exits, head_options, preprocessing)
    return model.eval(), report


@dataclass(frozen=True)
class _Parts:
    """What a conversion builds a model of."""

    main: _Weights
    body: _Weights
    state: State
    config: ViTConfig
    assumed: dict[str, Any]
    heads: Mapping[str, State]
    num_exits: int
    left_out: list[str]


def _parts(
    source: str | Path,
    kind: str,
    backbone: str | Path | None,
    backbone_only: bool,
    exits: Sequence[int] | None,
    options: Mapping[str, Any] | None,
) -> _Parts:
    """Read the weights, and infer the backbone and which heads there are."""
    main = _read(source, kind)
    body = main if backbone is None else _read(backbone, "auto")
    if main.source.differences(main.state):
        body = main = _whole(main, body)
    state = main.state if body is main else _joined(main, body)
    # The heads tell some sources apart, so their settings are read before any head is left out.
    heads_by_part = attention_heads_in(main.meta)
    num_heads = {"num_heads": heads_by_part["backbone"]} if "backbone" in heads_by_part and body is main else {}
    with _readable(body.what):
        settings = body.source.settings(state)
    known = {**settings, **num_heads, **body.beside.settings, **(options or {})}
    if known.get("final_norm"):
        state = _pooled_norm_as_last(state)
    left_out = [] if body is main else [key for key in body.state if key.startswith(HEADS_IN_STATE)]
    if backbone_only or (exits is not None and not exits):
        fronts = HEADS_IN_STATE if backbone_only else HEADS_IN_STATE[1:]
        left_out += [key for key in state if key.startswith(fronts)]
        state = {key: value for key, value in state.items() if key not in set(left_out)}
    if not any(key.startswith("backbone.") for key in state):
        raise CheckpointError(f"{main.what} hold a head alone: give the weights of its backbone, too.")
    with _readable(body.what):
        config, assumed = backbone_config(under(state, "backbone."), known, body.what)
    said = {*body.beside.settings, *(options or {})}
    assumed |= {name: getattr(config, name) for name in body.source.assumes if name not in said}
    heads, num_exits = heads_of(state, main.what)
    return _Parts(main, body, state, config, assumed, heads, num_exits, left_out)


def _pooled_norm_as_last(state: State) -> State:
    """Let the norm of pooled patches stand for a last norm that is asked for and is not there, as in EVA-02."""
    if "backbone.norm.weight" in state:
        return state
    pooled = r"(?:backbone\.|visual\.|model\.)?fc_norm\.(weight|bias)"
    return rename(state, ((pooled, r"backbone.norm.\1"),))


def _segmenter(
    parts: _Parts,
    exits: Sequence[int] | None,
    head_options: Mapping[str, Any] | None,
    preprocessing: Preprocessing | None,
) -> tuple[ExitSegmenter, ConversionReport]:
    """Build the model with its weights, and the report without a destination."""
    main, config, num_exits = parts.main, parts.config, parts.num_exits
    with _readable(main.what):
        specs, num_classes, more = _head_specs(parts.heads, config, dict(head_options or {}), main)
    positions, assumed_exits = _exit_positions(main, config.depth, num_exits, exits)
    preprocessing, normalisation = _preprocessing(main, parts.body, parts.state, num_classes, preprocessing)
    model = ExitSegmenter(config, num_classes, positions, specs[:num_exits], specs[-1], preprocessing)
    loaded, unused = _load(model, parts.state, parts.body.what)
    report = _report(
        parts,
        loaded,
        unused,
        exits=positions,
        exit_heads=tuple(specs[:num_exits]),
        decode_head=specs[-1],
        num_classes=num_classes,
        assumed=parts.assumed | more | assumed_exits | normalisation,
    )
    return model, report


def _report(parts: _Parts, loaded: int, unused: Sequence[str], **known: Any) -> ConversionReport:
    common: dict[str, Any] = {
        "kind": parts.main.kind,
        "destination": Path(),
        "backbone": parts.config,
        "loaded": loaded,
        "preset": preset_of(parts.config),
        "beside": parts.body.beside.files,
        "assumed": parts.assumed,
        "unused": _with_reasons(unused) + _all_left_out(parts.left_out),
    }
    return ConversionReport(**(common | known))


def _read(source: str | Path, kind: str) -> _Weights:
    path = _weight_file(source)
    what = f"weights '{path}'"
    state, meta = read_checkpoint(path)
    found = detect(state) if kind == "auto" else kind
    if kind == "auto" and (other := not_plain(state)):
        raise CheckpointError(
            f"{what} are those of {other}: tokens can leave plain ViTs alone, which have one grid from the first block "
            "to the last."
        )
    if found is None:
        raise CheckpointError(
            f"{what} have names of no source that is known (theirs begin with {_some(list(state)[:2])}): "
            f"if they belong to one of {', '.join(SOURCES)}, name it as kind."
        )
    origin = source_named(found)
    if found == "timm" and any(key.startswith(HEADS_IN_STATE) for key in state):
        raise CheckpointError(f"{what} are those of a tokenexit model: load its folder as it is.")
    beside = read_sidecar(found, lambda name: _find_beside(source, path, name))
    with _readable(what):
        renamed = origin.rename(state)
    return _Weights(found, origin, what, renamed, meta, beside)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn the errors of code that trusts shapes into one sentence, for files in which they cannot be right."""
    try:
        yield
    except TokenExitError:
        raise
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{what} hold parts of impossible shapes ({str(error).splitlines()[0]}): "
            "name their kind if it is another, or save them again."
        ) from None


def _weight_file(source: str | Path) -> Path:
    if not (isinstance(source, str) and source.startswith(HUB_PREFIX)):
        folder = Path(source).expanduser()
        if folder.is_dir():
            for name in FOLDER_FILES:
                if (folder / name).is_file():
                    return folder / name
            raise CheckpointError(f"folder '{source}' holds none of {', '.join(FOLDER_FILES)}: name the weight file.")
    return resolve_weights(source)


def _find_beside(source: str | Path, path: Path, name: str) -> Path | None:
    """Find a file of this name beside the weights; of a hub model it is fetched if the hub has it."""
    if (path.parent / name).is_file():
        return path.parent / name
    if isinstance(source, str) and source.startswith(HUB_PREFIX) and name.endswith(".json"):
        model = "/".join(source.split("/")[:2])
        try:
            return resolve_weights(f"{model}/{name}")
        except CheckpointError:
            return None
    return None


def _whole(differences: _Weights, base: _Weights) -> _Weights:
    """Add differences to the weights that they were taken from. Raises `CheckpointError` where these are not given."""
    if base is differences:
        raise CheckpointError(
            f"{differences.what} are differences from DINOv3's weights: give the file of those, too, as backbone "
            "(--backbone FILE)."
        )
    with _readable(base.what):
        state = added_to(base.state, differences.state, base.what)
    return replace(differences, state=state, beside=replace(differences.beside, files=(base.what,)))


def _joined(main: _Weights, body: _Weights) -> State:
    """Put the heads of one file on the backbone of another; a backbone beside the heads is refused."""
    if any(key.startswith("backbone.") for key in main.state):
        raise ConfigError(f"{main.what} hold a backbone of their own: leave out backbone.")
    return {**{k: v for k, v in body.state.items() if not k.startswith(HEADS_IN_STATE)}, **main.state}


def _head_specs(
    heads: Mapping[str, State], backbone: ViTConfig, given: dict[str, Any], main: _Weights
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Return a specification for each head, the number of classes, and what was assumed."""
    what, heads_by_part = main.what, attention_heads_in(main.meta)
    specs: list[dict[str, Any]] = []
    classes: dict[str, int] = {}
    assumed: dict[str, Any] = {}
    for name, head in heads.items():
        known = ({"num_heads": heads_by_part[name]} if name in heads_by_part else {}) | given
        spec, classes[name], more = head_spec(head, backbone.embed_dim, known, f"the {name} of {what}")
        if spec["kind"] == "eomt":
            spec = eomt_spec(backbone, **{key: spec[key] for key in ("layers", "queries", "steps")})
        if spec["kind"] == "atm" and "num_heads" in more:
            published = main.source.atm_heads.get((spec["channels"], classes[name]), more["num_heads"])
            spec["num_heads"] = more["num_heads"] = published
        specs.append(spec)
        assumed |= {f"{name}.{option}": value for option, value in more.items()}
    taken = {option for spec in specs for option in inspect.signature(HEADS[spec["kind"]]).parameters}
    if unknown := set(given) - taken:
        kinds = ", ".join(dict.fromkeys(spec["kind"] for spec in specs))
        raise ConfigError(f"head_options names '{min(unknown)}', which is no option of {kinds}: leave it out.")
    if len(set(classes.values())) > 1:
        raise CheckpointError(f"the heads of {what} predict {classes} classes: tokenexit needs one number for all.")
    return specs, classes["decode_head"], assumed


def _exit_positions(
    main: _Weights, depth: int, count: int, given: Sequence[int] | None
) -> tuple[tuple[int, ...], dict[str, Any]]:
    if given is not None:
        if len(given) != count:
            raise ConfigError(f"exits={tuple(given)} for {count} auxiliary heads in {main.what}: give one for each.")
        return tuple(given), {}
    if count == 0:
        return (), {}
    if (depth, count) not in main.source.exits:
        raise CheckpointError(
            f"{main.what} hold {count} auxiliary heads and do not say after which of their {depth} blocks they stand: "
            "give exits."
        )
    positions = main.source.exits[depth, count]
    return positions, {"exits": positions}


def _preprocessing(
    main: _Weights, body: _Weights, state: State, num_classes: int, given: Preprocessing | None
) -> tuple[Preprocessing, dict[str, Any]]:
    """Return the preprocessing as given, else as the files beside the weights say, else as the source trains."""
    if given is not None:
        labels = given.labels or _labels(main.meta, num_classes)
        return replace(given, labels=labels), {}
    values: dict[str, Any] = {"labels": _labels(main.meta, num_classes)}
    assumed: dict[str, Any] = {}
    if body.beside.normalisation is not None:
        values["mean"], values["std"] = body.beside.normalisation
    else:
        assumed["mean"], assumed["std"] = main.source.normalisation(state)
    if main.beside.window is not None:
        values |= _even_windows(main.beside.window)
    elif (side := main.source.window(state)) is not None:
        assumed |= _even_windows(side)
    return Preprocessing.from_dict(values | assumed), assumed


def _even_windows(side: int) -> dict[str, Any]:
    """Return the fields of a preprocessing that covers a square with an image and spreads windows of it evenly."""
    return {"resize": side, "window": (side, side), "stride": "even"}


def _labels(meta: Mapping[str, Any], num_classes: int) -> Labels:
    """Read class names and colours as mmsegmentation keeps them; numbered classes where they do not fit."""
    data = meta.get("dataset_meta")
    data = data if isinstance(data, Mapping) else meta
    names = data.get("classes", data.get("CLASSES"))
    palette = data.get("palette", data.get("PALETTE"))
    try:
        labels = Labels(tuple(names), tuple(palette), default_labels(num_classes).ignore_index)
    except (ConfigError, TypeError):
        return default_labels(num_classes)
    return labels if labels.num_classes == num_classes else default_labels(num_classes)


def _check_destination(target: Path, has_heads: bool, what: str, source: Path) -> None:
    """Check before anything is built that the name says what is written."""
    if has_heads and (target.suffix == ".safetensors" or target.is_file()):
        raise ConfigError(
            f"{what} have heads, and destination '{target}' is a file: name a folder, or set backbone_only."
        )
    if not has_heads and (target.suffix != ".safetensors" or target.is_dir()):
        raise ConfigError(
            f"{what} give a backbone alone, and destination '{target}' is no .safetensors file: name one."
        )
    folder = source if source.is_dir() else source.parent
    if has_heads and source.exists() and target.exists() and target.resolve() == folder.resolve():
        raise ConfigError(f"destination '{target}' is where the source lies: name another folder.")
    if not has_heads and source.exists() and target.exists() and target.samefile(source):
        raise ConfigError(f"destination '{target}' is the source: name another file.")


def _write_backbone(state: State, config: ViTConfig, what: str, target: Path) -> tuple[int, list[str]]:
    """Write the backbone; returns how many entries were written, and those without a place."""
    from safetensors.torch import save_file

    model = ViT(config)
    report = load_backbone(model, under(state, "backbone."), source=what, pos_embed_grid=config.pos_embed_grid)
    _refuse_missing(report.missing, what)
    _put_file(target, partial(save_file, model.state_dict(), metadata={"format": "pt"}))
    return report.loaded, [*report.unexpected, *(key for key in state if not key.startswith("backbone."))]


def _put_file(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target and rename, so that no half file ever has its name."""
    with _writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as unfinished:
            write(unfinished)


@contextmanager
def _writable(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"destination '{target}' cannot be written ({error.strerror}): choose another.") from None


def _load(model: ExitSegmenter, state: State, what: str) -> tuple[int, list[str]]:
    """Load backbone and heads, all of them; returns how many entries, and those without a place."""
    grid = model.config.backbone.pos_embed_grid
    report = load_backbone(model.backbone, under(state, "backbone."), source=what, pos_embed_grid=grid)
    _refuse_missing(report.missing, what)
    loaded, leftover = report.loaded, list(report.unexpected)
    named = {"decode_head": model.decode_head} | {f"exit_heads.{n}": head for n, head in enumerate(model.exit_heads)}
    for name, head in named.items():
        count, rest = _load_head(head, under(state, f"{name}."), f"the {name} of {what}")
        loaded += count
        leftover += [f"{name}.{key}" for key in rest]
    leftover += [key for key in state if not key.startswith(("backbone.", *HEADS_IN_STATE))]
    return loaded, leftover


def _load_head(head: nn.Module, state: State, what: str) -> tuple[int, list[str]]:
    """Load a head, every entry of which takes a value of its own shape; counters of BatchNorm may be missing."""
    target = head.state_dict()
    unused = [key for key in state if key not in target and key.startswith(("conv_seg.", "loss_decode."))]
    foreign = [key for key in state if key not in target and key not in unused]
    missing = [key for key in target if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    ]
    for problem, names in (("has parts that tokenexit lacks", foreign), ("lacks", missing), ("does not fit", wrong)):
        if names:
            raise CheckpointError(f"{what} {problem} ({_some(names)}): convert the backbone alone.")
    with torch.no_grad():
        for key, value in target.items():
            if key in state:
                value.copy_(state[key])
    return len(target) - sum(key not in state for key in target), unused


def _refuse_missing(missing: Sequence[str], what: str) -> None:
    """Reject missing entries: an inferred norm is there, a forced one may be missing."""
    if missing:
        raise CheckpointError(f"{what} lack {_some(missing)}: leave final_norm to be inferred.")


def _with_reasons(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _reason(name)) for name in names)


def _all_left_out(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, "a head, left out as asked") for name in names)


def _reason(name: str) -> str:
    return next((reason for pattern, reason in _UNUSED if re.fullmatch(pattern, name)), "unknown to tokenexit")


def _in_words(head: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name} {value}" for name, value in head.items() if name != "kind")
    return f"{head['kind']} ({options})" if options else str(head["kind"])


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
