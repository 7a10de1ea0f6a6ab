from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import random_image, tiny_segmenter
from tokenexit.exporting.export import export_model
from tokenexit.methods import DToP


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float ONNX file with two exits, alone in its folder."""
    pytest.importorskip("onnxscript", reason="ONNX needs the export extra")
    model = tiny_segmenter("fcn", exits=(1, 2), depth=3)
    return export_model(model, DToP(0.75, 2), [random_image(21, 30)], tmp_path_factory.mktemp("exported")).path
