"""Images with masks: datasets, joint transforms, and batches in an order that any run can repeat.

Names are loaded when first used, so that the names of datasets are known before torch is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenexit.data.base import Sample, SegmentationDataset
    from tokenexit.data.registry import open_dataset
    from tokenexit.inputs.labels import Labels

__all__ = ["Labels", "Sample", "SegmentationDataset", "open_dataset"]

_HOME = {
    "Labels": "tokenexit.inputs.labels",
    "Sample": "tokenexit.data.base",
    "SegmentationDataset": "tokenexit.data.base",
    "open_dataset": "tokenexit.data.registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokenexit.data' has no attribute '{name}'")
