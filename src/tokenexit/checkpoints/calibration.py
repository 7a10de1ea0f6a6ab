"""`Calibration` is the value in `calibration.json`: the thresholds that a model runs with, and what they reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from tokenexit.errors import CheckpointError, ConfigError
from tokenexit.runtime.schema import Between, Share, damaged, misfit, read_json, shown

CALIBRATION_FILE = "calibration.json"
FORMAT = 1
CALIBRATE = "calibrate again, or delete it"
"""Cure for a damaged file."""


class _Reached(TypedDict, total=False):
    live_after_exit: list[Share]
    live_after_exit_quantiles: list[list[Share]]
    share_of_dense: float


class _Scores(TypedDict, total=False):
    edges_of_doubt: list[float]
    mean: list[list[Share]]
    deviation: list[list[Share]]
    images: list[Annotated[int, Between(0, 2**31 - 1)]]
    limit: float


class _Content(TypedDict, total=False):
    model: str
    method: str | dict[str, Any]
    asked: dict[str, Any]
    promise: str
    reached: _Reached
    images: dict[str, Any]
    scores: _Scores


@dataclass(frozen=True)
class Calibration:
    """Thresholds that were chosen for a target, with what they reach and what is guaranteed.

    Attributes:
        asked: the target and its options.
        guarantee: one or two sentences on what holds, and what does not.
        method: the specification that `build_method` takes, empty in a file that lacks it.
        reached: figures on the calibration images.
        images: which images these were.
        made: time of the calibration, UTC.
        made_with: versions and machine.
        model: fingerprint of the weights.
        scores: `ReferenceStatistics.to_dict` of these images, for the drift monitor, None in a file that lacks them.
        others: entries that this version does not know, kept as they are.
    """

    asked: Mapping[str, Any] = field(default_factory=dict)
    guarantee: str = ""
    method: str | Mapping[str, Any] = ""
    reached: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    made: Any = None
    made_with: Any = None
    model: str | None = None
    scores: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method_name(self) -> str | None:
        """The name in `method`, None where it has none."""
        name = self.method.get("name") if isinstance(self.method, Mapping) else self.method
        return name if isinstance(name, str) and name else None

    @property
    def mac_ratio(self) -> float | None:
        """Multiply-adds over dense ones on the calibration images, where the file says so."""
        return self.reached.get("share_of_dense")

    @property
    def live_after_exit(self) -> tuple[float, ...] | None:
        """The share of patch tokens that is live after each exit on the calibration images, where the file says so."""
        shares = self.reached.get("live_after_exit")
        return None if shares is None else tuple(shares)

    @property
    def live_quantiles(self) -> tuple[tuple[float, ...], ...] | None:
        """For each exit, evenly spaced quantiles of that share over the images, least and largest included, or None."""
        quantiles = self.reached.get("live_after_exit_quantiles")
        return None if quantiles is None else tuple(map(tuple, quantiles))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `calibration.json`; empty entries are left out."""
        known = {key: getattr(self, name) for name, key in _KEYS.items()}
        return {"format": FORMAT, **{key: value for key, value in known.items() if value}, **self.others}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Build a calibration from what `to_dict` returns. Raises `ConfigError` for wrong types and bounds."""
        if wrong := misfit("", content, _Content):
            raise ConfigError(f"{wrong}.")
        known = {name: content[key] for name, key in _KEYS.items() if key in content}
        others = {key: value for key, value in content.items() if key not in ("format", *_KEYS.values())}
        return cls(**known, others=others)


_KEYS = {
    "asked": "asked",
    "guarantee": "promise",
    "method": "method",
    "reached": "reached",
    "images": "images",
    "made": "made",
    "made_with": "made_with",
    "model": "model",
    "scores": "scores",
}
"""Fields of a `Calibration` and their keys in the file, in its order."""


def read_calibration(path: Path) -> Calibration | None:
    """Read the calibration in a file, None where there is no file.

    Raises `CheckpointError` for a damaged file, and for one of another format.
    """
    try:
        content = read_json(path, CALIBRATE, nan_as_null=True)
    except FileNotFoundError:
        return None
    if isinstance(content, Mapping) and content.get("format", FORMAT) != FORMAT:
        found = shown(content["format"])
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}: update tokenexit.")
    try:
        return Calibration.from_dict(content)
    except ConfigError as wrong:
        raise damaged(path, wrong, CALIBRATE) from None
