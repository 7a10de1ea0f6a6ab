"""tokenexit: early exits for the tokens of plain Vision Transformers.

    model = tokenexit.ExitSegmenter.from_pretrained("runs/street")
    out = model.predict("street.jpg", method=tokenexit.DToP(threshold=0.95))
    print(out.labels.shape, out.ledger.gmacs)

Public names are loaded when first used, so that `import tokenexit` and `tokenexit --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenexit.version import __version__

_HOME = {
    "ExitSegmenter": "tokenexit.segmenter",
    "SegmentationOutput": "tokenexit.outputs.segmentation",
    "segmentation_loss": "tokenexit.outputs.losses",
    "calibrate": "tokenexit.calibration.calibrate",
    "Budget": "tokenexit.calibration.targets",
    "Bound": "tokenexit.calibration.targets",
    "CalibrationSet": "tokenexit.calibration.calibration_set",
    "Dense": "tokenexit.methods",
    "DToP": "tokenexit.methods",
    "DoViT": "tokenexit.methods",
    "Preprocessing": "tokenexit.inputs.preprocessing",
    "Labels": "tokenexit.inputs.labels",
    "ViTConfig": "tokenexit.engine.vit",
    "TokenExitError": "tokenexit.errors",
}

if TYPE_CHECKING:
    from tokenexit.calibration.calibrate import calibrate
    from tokenexit.calibration.calibration_set import CalibrationSet
    from tokenexit.calibration.targets import Bound, Budget
    from tokenexit.engine.vit import ViTConfig
    from tokenexit.errors import TokenExitError
    from tokenexit.inputs.labels import Labels
    from tokenexit.inputs.preprocessing import Preprocessing
    from tokenexit.methods import Dense, DoViT, DToP
    from tokenexit.outputs.losses import segmentation_loss
    from tokenexit.outputs.segmentation import SegmentationOutput
    from tokenexit.segmenter import ExitSegmenter

__all__ = [
    "Bound",
    "Budget",
    "CalibrationSet",
    "DToP",
    "Dense",
    "DoViT",
    "ExitSegmenter",
    "Labels",
    "Preprocessing",
    "SegmentationOutput",
    "TokenExitError",
    "ViTConfig",
    "__version__",
    "calibrate",
    "segmentation_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokenexit' has no attribute '{name}'")
