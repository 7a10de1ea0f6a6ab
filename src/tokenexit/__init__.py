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
    "ViTConfig": "tokenexit.engine.vit_config",
    "Preprocessing": "tokenexit.inputs.preprocessing",
    "Labels": "tokenexit.inputs.labels",
    "load_image": "tokenexit.inputs.images",
    "Dense": "tokenexit.methods",
    "DToP": "tokenexit.methods",
    "DoViT": "tokenexit.methods",
    "PAUMER": "tokenexit.methods",
    "FixedRatio": "tokenexit.methods",
    "Cropr": "tokenexit.methods",
    "Truncated": "tokenexit.methods",
    "Reduced": "tokenexit.methods",
    "Method": "tokenexit.methods",
    "ThresholdMethod": "tokenexit.methods",
    "ALGM": "tokenexit.reducers",
    "MPM": "tokenexit.reducers",
    "ToMe": "tokenexit.reducers",
    "G2TM": "tokenexit.reducers",
    "Supertokens": "tokenexit.reducers",
    "ZeroTPrune": "tokenexit.reducers",
    "CoarseFirst": "tokenexit.reducers",
    "SegmentationOutput": "tokenexit.outputs.segmentation",
    "segmentation_loss": "tokenexit.outputs.losses",
    "train": "tokenexit.training.loop",
    "TrainConfig": "tokenexit.training.config",
    "evaluate": "tokenexit.evaluation.evaluate",
    "Evaluation": "tokenexit.evaluation.results",
    "calibrate": "tokenexit.calibration.calibrate",
    "Calibration": "tokenexit.checkpoints.calibration",
    "Budget": "tokenexit.calibration.targets",
    "Bound": "tokenexit.calibration.targets",
    "CalibrationSet": "tokenexit.calibration.calibration_set",
    "adapt": "tokenexit.adaptation.adapt",
    "predict_files": "tokenexit.prediction.predict_files",
    "convert": "tokenexit.conversion.convert",
    "wrap": "tokenexit.conversion.wrap",
    "export_model": "tokenexit.exporting.export",
    "TokenExitError": "tokenexit.errors",
    "ConfigError": "tokenexit.errors",
    "DataError": "tokenexit.errors",
    "CheckpointError": "tokenexit.errors",
}

if TYPE_CHECKING:
    from tokenexit.adaptation.adapt import adapt
    from tokenexit.calibration.calibrate import calibrate
    from tokenexit.calibration.calibration_set import CalibrationSet
    from tokenexit.calibration.targets import Bound, Budget
    from tokenexit.checkpoints.calibration import Calibration
    from tokenexit.conversion.convert import convert
    from tokenexit.conversion.wrap import wrap
    from tokenexit.engine.vit_config import ViTConfig
    from tokenexit.errors import CheckpointError, ConfigError, DataError, TokenExitError
    from tokenexit.evaluation.evaluate import evaluate
    from tokenexit.evaluation.results import Evaluation
    from tokenexit.exporting.export import export_model
    from tokenexit.inputs.images import load_image
    from tokenexit.inputs.labels import Labels
    from tokenexit.inputs.preprocessing import Preprocessing
    from tokenexit.methods import (
        PAUMER,
        Cropr,
        Dense,
        DoViT,
        DToP,
        FixedRatio,
        Method,
        Reduced,
        ThresholdMethod,
        Truncated,
    )
    from tokenexit.outputs.losses import segmentation_loss
    from tokenexit.outputs.segmentation import SegmentationOutput
    from tokenexit.prediction.predict_files import predict_files
    from tokenexit.reducers import ALGM, G2TM, MPM, CoarseFirst, Supertokens, ToMe, ZeroTPrune
    from tokenexit.segmenter import ExitSegmenter
    from tokenexit.training.config import TrainConfig
    from tokenexit.training.loop import train

__all__ = [
    "ALGM",
    "G2TM",
    "MPM",
    "PAUMER",
    "Bound",
    "Budget",
    "Calibration",
    "CalibrationSet",
    "CheckpointError",
    "CoarseFirst",
    "ConfigError",
    "Cropr",
    "DToP",
    "DataError",
    "Dense",
    "DoViT",
    "Evaluation",
    "ExitSegmenter",
    "FixedRatio",
    "Labels",
    "Method",
    "Preprocessing",
    "Reduced",
    "SegmentationOutput",
    "Supertokens",
    "ThresholdMethod",
    "ToMe",
    "TokenExitError",
    "TrainConfig",
    "Truncated",
    "ViTConfig",
    "ZeroTPrune",
    "__version__",
    "adapt",
    "calibrate",
    "convert",
    "evaluate",
    "export_model",
    "load_image",
    "predict_files",
    "segmentation_loss",
    "train",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("tokenexit.methods")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokenexit' has no attribute '{name}'")
