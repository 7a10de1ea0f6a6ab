"""The only file of the comparison that knows the library's names.

Modules and attributes may be moved and renamed: then this file follows, and neither the cases nor the record change.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, true_run
from tokenexit.calibration.dense_pass import DensePass, MacTable, compose, live_counts
from tokenexit.data.base import Sample
from tokenexit.engine import recurring_rows
from tokenexit.engine.vit_config import ViTConfig
from tokenexit.exporting.graph import ExitGraph, threshold_table
from tokenexit.inputs.labels import default_labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import METHODS, build_method, reference
from tokenexit.outputs.ledger import dense_gmacs
from tokenexit.outputs.losses import segmentation_loss
from tokenexit.segmenter import ExitSegmenter

__all__ = ["Sample", "build_method", "default_labels", "dense_gmacs", "segmentation_loss"]


def make_model(
    exit_head: Any, decode_head: Any, exits: Sequence[int], num_classes: int, window: Any, **backbone: Any
) -> ExitSegmenter:
    """A fresh model. window: None, or height and width of windows and their stride."""
    cut = {} if window is None else {"window": window[0], "stride": window[1]}
    preprocessing = Preprocessing(labels=default_labels(num_classes), **cut)
    return ExitSegmenter(ViTConfig(**backbone), num_classes, tuple(exits), exit_head, decode_head, preprocessing)


def call(model: ExitSegmenter, images: Sequence[Tensor], method: Any, records: bool = False) -> Any:
    """A call of the model, with rows as they are: padded ones, which are younger, have other bits in bf16.

    records: keep what every exit said.
    """
    with patch.object(recurring_rows, "new_numbers_cost", return_value=False):
        return model(images, method, **{_named(type(model).forward, "with_records", "with_stages"): records})


def known_methods() -> set[str]:
    """Names of the methods that can be built."""
    return set(METHODS)


def prescribed(exit_map: Tensor) -> Any:
    """The method that lets every token leave where it is told to."""
    kind = _either(reference, "PrescribedExits", "Imposed")
    return kind(**{_named(kind, "exit_index", "exit_stage"): exit_map})


def exit_maps(output: Any) -> Sequence[Tensor]:
    """Where tokens left, one map per image."""
    maps: Sequence[Tensor] = _either(output, "exit_index", "exit_stage")
    return maps


def exit_records(output: Any) -> Sequence[Any]:
    """What each exit and the decode head said."""
    records: Sequence[Any] = _either(output, "exit_records", "stages")
    return records


def graph_answers(model: ExitSegmenter, method: Any, image: Tensor) -> dict[str, Tensor]:
    """What the exported graph computes, run as an ordinary module."""
    with torch.no_grad():
        answers = ExitGraph(model, method)(image[None], threshold_table(model, method))
    return dict(zip(("labels", "grid_logits", "exit_map"), answers))


def composed(model: ExitSegmenter, data: Any, method: Any, limits: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """What calibration reads from one dense pass, and exits and costs at these limits on 1 - score."""
    dense = DensePass.of(CalibrationSet(model, data, tuple(range(len(data)))), method)
    costs = MacTable(model, method, dense.grids)
    found: dict[str, Any] = {
        "doubt": _either(dense, "uncertainty", "doubt"),
        "label": dense.label,
        "said": dense.said,
        "dense": costs.dense,
    }
    for average in ("pixels", "classes"):
        found[f"losses of {average}"] = dense.losses(average)
    for limit in limits:
        exits = compose(dense, method, limit)
        live = live_counts(dense, exits)
        found[f"exits at {limit}"], found[f"live at {limit}"], found[f"macs at {limit}"] = exits, live, costs.macs(live)
    return found


def measured(model: ExitSegmenter, data: Any, method: Any) -> dict[str, Any]:
    """A run on calibration images: what it costs, and how its labels compare with the dense model's."""
    calibration_set = CalibrationSet(model, data, tuple(range(len(data))))
    run = true_run(calibration_set, method, dense_reference(calibration_set))
    return {"macs": run.macs, "live": run.live, "confusion": run.confusion}


def _either(owner: Any, new: str, old: str) -> Any:
    return getattr(owner, new) if hasattr(owner, new) else getattr(owner, old)


def _named(function: Any, new: str, old: str) -> str:
    return new if new in inspect.signature(function).parameters else old
