"""One call opens any trained segmenter that this library can run: its own models, and weights of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokenexit.conversion.convert import converted
from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.heads import HeadModule
from tokenexit.hub.fetch import HUB_PREFIX, resolve_weights
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.pretrained import CONFIG_FILE, TRAINING_FILE
from tokenexit.runtime.folder import current
from tokenexit.runtime.schema import read_json
from tokenexit.segmenter import ExitSegmenter, check_labels

OWN_KEYS = {"format", "model", "preprocessing"}
"""Keys of this library's `config.json`, by which it is told from those of others."""


def open_source(
    source: ExitSegmenter | str | Path,
    *,
    kind: str = "auto",
    backbone: str | Path | None = None,
    exits: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    head: HeadModule | None = None,
) -> ExitSegmenter:
    """Open a trained segmenter, in evaluation mode.

    Args:
        source: a model; the folder of a saved one, here or on the hub; or any weights with a decode head that `convert`
            reads, which are converted in memory.
        kind: for weights of others, see `convert`.
        backbone: likewise.
        exits: an empty list leaves the exits of the source out; else they are kept, and for weights of others these are
            their places, see `convert`.
        options: for weights of others, see `convert`.
        head_options: likewise.
        preprocessing: how images become inputs, if other than the source's.
        head: the class of the decode head, for a saved model with a module of the user's own.

    Returns:
        The model; a model that is given comes back as it is, or shares its weights with the one without exits.

    Raises:
        CheckpointError: for weights that cannot be read, of a backbone alone, or of another architecture than a plain
            ViT.
        ConfigError: for what is no source, and for options that the source does not take.
    """
    if isinstance(source, nn.Module) and not isinstance(source, ExitSegmenter):
        raise ConfigError(
            f"a {type(source).__name__} is no source by itself: give tokenexit.wrap(backbone, head) of its two parts."
        )
    if not isinstance(source, ExitSegmenter | str | Path):
        raise ConfigError(f"a {type(source).__name__} is no source: give a model, a path or hf-hub:OWNER/NAME.")
    foreign: dict[str, Any] = {
        "kind": kind != "auto",
        "backbone": backbone,
        "options": options,
        "head_options": head_options,
    }
    if isinstance(source, ExitSegmenter) or is_own(source):
        foreign["exits"] = exits
        if head is not None and isinstance(source, ExitSegmenter):
            raise ConfigError("head is for a model that is loaded, and this one is there: leave it out.")
        given = [name for name, value in foreign.items() if value]
        if given:
            raise ConfigError(
                f"{given[0]} is for weights of other libraries, and this is a tokenexit model: leave it out."
            )
        model = source if isinstance(source, ExitSegmenter) else ExitSegmenter.from_pretrained(source, head=head)
        if (exits is not None and model.config.exits) or preprocessing is not None:
            model = _changed(model, exits is None, preprocessing or model.preprocessing)
        return model.eval()
    if head is not None:
        raise ConfigError(f"head is for models saved by tokenexit, and '{source}' is none: leave it out.")
    model, _ = converted(
        source,
        kind=kind,
        backbone=backbone,
        exits=exits,
        options=options,
        head_options=head_options,
        preprocessing=preprocessing,
    )
    return model


def is_own(source: str | Path) -> bool:
    """Return whether this is a model that tokenexit saved; of one on the hub `config.json` is fetched."""
    if str(source).startswith(HUB_PREFIX):
        if str(source).count("/") != 1:  # one of its files is named
            return False
        try:
            path = resolve_weights(f"{source}/{CONFIG_FILE}")
        except CheckpointError:  # there is none, or no hub: reading the weights says which
            return False
    else:
        path = current(Path(source).expanduser(), CONFIG_FILE)
    if not path.exists():
        return False
    values = read_json(path, "save the model again")
    return isinstance(values, Mapping) and values.keys() >= OWN_KEYS


def _changed(model: ExitSegmenter, with_exits: bool, preprocessing: Preprocessing) -> ExitSegmenter:
    """Return a model of the same backbone and heads, with other preprocessing, and perhaps without its exits."""
    check_labels(preprocessing, model.config.num_classes)
    changed = model.with_exits(model.config.exits if with_exits else ())
    changed.preprocessing = preprocessing
    changed.calibration = model.calibration if with_exits else None
    changed.records = {name: record for name, record in model.records.items() if with_exits or name == TRAINING_FILE}
    return changed
