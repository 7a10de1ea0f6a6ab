"""Results as users of transformers know them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_segmenter
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Labels
from tokenexit.inputs.preprocessing import Preprocessing
from tokenexit.methods import DToP
from tokenexit.segmenter import ExitSegmenter

NAMES = ("sky", "road", "car", "tree", "pole")
METHOD = DToP(threshold=0.4, keep_per_class=1)


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    model = tiny_segmenter("fcn")
    model.preprocessing = Preprocessing(labels=Labels(NAMES, tuple((k, k, k) for k in range(5))))
    return model


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_id2label__has_the_names_of_the_classes(model: ExitSegmenter) -> None:
    assert model.id2label == dict(enumerate(NAMES))
    assert tiny_segmenter("fcn", num_classes=2).id2label == {0: "class_0", 1: "class_1"}


def test_pipeline__has_a_mask_a_label_and_a_score_of_every_class_in_the_image(
    model: ExitSegmenter, tmp_path: Path
) -> None:
    photo(20, 30).save(tmp_path / "a.png")
    out = model.predict(tmp_path / "a.png", METHOD)
    labels, scores = out.labels[0].numpy(), out.logits[0].softmax(0).amax(0).numpy()
    found = model.pipeline(METHOD)(str(tmp_path / "a.png"))
    assert [segment["label"] for segment in found] == [NAMES[k] for k in np.unique(labels)]
    assert len(found) > 1
    for segment in found:
        assert set(segment) == {"label", "mask", "score"}
        assert (segment["mask"].mode, segment["mask"].size) == ("L", (30, 20))
        mask = np.asarray(segment["mask"])
        np.testing.assert_array_equal(mask, np.where(labels == NAMES.index(segment["label"]), 255, 0))
        assert segment["score"] == pytest.approx(scores[mask == 255].mean(), abs=1e-5)


def test_pipeline__of_a_list_is_a_list_of_what_each_image_gets(model: ExitSegmenter) -> None:
    images = [photo(20, 30), photo(9, 9, seed=1)]
    segment = model.pipeline(METHOD)
    both = segment(images)
    assert [[(s["label"], s["mask"].tobytes()) for s in one] for one in both] == [
        [(s["label"], s["mask"].tobytes()) for s in segment(image)] for image in images
    ]
    with pytest.raises(DataError, match="does not exist"):
        segment("nope.png")


def test_post_process__gives_maps_of_the_asked_sizes(model: ExitSegmenter) -> None:
    outputs = model.predict([photo(20, 30), photo(20, 30, seed=1)], METHOD)
    same = model.post_process_semantic_segmentation(outputs)
    assert isinstance(same, list)
    assert all(torch.equal(a, b) for a, b in zip(same, outputs.labels, strict=True))
    resized = model.post_process_semantic_segmentation(outputs, target_sizes=[(40, 60), (7, 5)])
    expected = model.segment(
        [model.preprocessing.to_tensor(photo(20, 30, seed)) for seed in (0, 1)], METHOD, targets=[(40, 60), (7, 5)]
    )
    assert all(torch.equal(a, b) for a, b in zip(resized, expected.labels, strict=True))
    tensors: Any = torch.tensor([[40, 60], [7, 5]])  # as their data collators give them
    assert [m.shape for m in model.post_process_semantic_segmentation(outputs, tensors)] == [(40, 60), (7, 5)]
    with pytest.raises(ConfigError, match="target_sizes has 1 sizes for 2 images: give one for each"):
        model.post_process_semantic_segmentation(outputs, [(4, 4)])
