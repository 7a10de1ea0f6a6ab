"""A compiled package answers as the model does, at any size and threshold, and says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import random_image, tiny_segmenter
from tokenexit.errors import ConfigError
from tokenexit.exporting import export as module
from tokenexit.exporting.export import export_model, open_compiled
from tokenexit.methods import DToP


@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is not installed")
def test_compiled__answers_as_the_model_at_other_sizes_and_thresholds(tmp_path: Path) -> None:
    model = tiny_segmenter("linear", exits=(1,), depth=2)
    found = export_model(model, DToP(0.6, 2), [random_image(21, 30)], tmp_path, "compiled")
    assert found.path.name == "model.compiled.pt2"
    assert [path.name for path in tmp_path.iterdir()] == ["model.compiled.pt2"]
    run, seen = open_compiled(found.path), set()
    for size in ((24, 16), (33, 47)):
        for threshold in (0.5, 0.7):
            image = random_image(*size, seed=size[0])
            labels, logits, exits = run(image[None].numpy(), np.array([threshold], np.float32))
            with torch.no_grad():
                ours = model([image], DToP(threshold, 2))
            assert np.array_equal(exits[0], ours.exit_index[0].numpy())
            np.testing.assert_allclose(logits[0], ours.grid_logits[0].numpy(), rtol=0, atol=1e-4)
            assert np.array_equal(labels[0], torch.as_tensor(ours.labels[0]).numpy())
            seen |= {*exits.ravel().tolist()}
    assert seen == {0, 1}, "some leave and some stay"
    about = json.loads(torch._inductor.aoti_load_package(str(found.path)).get_metadata()["tokenexit"])
    assert about["exits_after_blocks"] == [1]


def test_compiled__without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.exc

    def fails(*_: object, **__: object) -> None:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler: install g"):
        export_model(
            tiny_segmenter("linear", exits=(1,), depth=2), DToP(), [random_image(21, 30)], tmp_path, "compiled"
        )
    assert list(tmp_path.iterdir()) == []
    assert set(module.WRITERS) == set(module.FILES)
