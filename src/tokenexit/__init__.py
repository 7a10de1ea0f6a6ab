"""tokenexit: early exits for the tokens of plain Vision Transformers.

    model = tokenexit.ExitSegmenter.from_pretrained("runs/street")
    out = model.predict("street.jpg", method=tokenexit.DToP(threshold=0.95))
    print(out.labels.shape, out.ledger.gmacs)

Names are loaded when first used, so that `import tokenexit` and `tokenexit --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenexit.version import __version__

_HOME = {
    "ExitSegmenter": "tokenexit.segmenter",
    "SegmentationOutput": "tokenexit.output",
    "segmentation_loss": "tokenexit.outputs.losses",
    "calibrate": "tokenexit.calibration.calibrate",
    "Budget": "tokenexit.calibration.calibrate",
    "Bound": "tokenexit.calibration.calibrate",
    "Bench": "tokenexit.calibration.runs",
    "Dense": "tokenexit.methods",
    "DToP": "tokenexit.methods",
    "DoViT": "tokenexit.methods",
    "Preprocessing": "tokenexit.preprocessing",
    "Labels": "tokenexit.preprocessing",
    "ViTConfig": "tokenexit.vit",
    "TokenExitError": "tokenexit.errors",
}

if TYPE_CHECKING:
    from tokenexit.calibration.calibrate import Bound, Budget, calibrate
    from tokenexit.calibration.runs import Bench
    from tokenexit.errors import TokenExitError
    from tokenexit.methods import Dense, DoViT, DToP
    from tokenexit.output import SegmentationOutput
    from tokenexit.outputs.losses import segmentation_loss
    from tokenexit.preprocessing import Labels, Preprocessing
    from tokenexit.segmenter import ExitSegmenter
    from tokenexit.vit import ViTConfig

__all__ = [
    "Bench",
    "Bound",
    "Budget",
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
