"""EoMT against transformers' modules with random weights: masks, classes and maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import enliven
from tokenexit.conversion.convert import converted
from tokenexit.methods import Dense

pytestmark = pytest.mark.library("transformers")

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 16,
    "num_blocks": 2,
    "num_queries": 6,
    "num_labels": 7,
    "num_upscale_blocks": 2,
    "num_register_tokens": 4,
}


def their_model(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "dinov2":
        model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**COMMON))
    else:
        rope = {"rope_type": "default", "rope_theta": 100.0}
        config = transformers.EomtDinov3Config(
            **COMMON, intermediate_size=192, layer_norm_eps=1e-5, rope_parameters=rope
        )
        model = transformers.EomtDinov3ForUniversalSegmentation(config)
    enliven(model)
    model.attn_mask_probs.zero_()
    return model.eval()


def reshaped(model: Any, kind: str, grid: tuple[int, int]) -> None:
    """Let transformers' model take another grid than its square one."""
    model.grid_size = grid
    if kind == "dinov2":
        rows = model.embeddings.position_embeddings.weight
        cells = grid[0] * grid[1]
        model.embeddings.position_embeddings = torch.nn.Embedding(cells, rows.shape[1])
        model.embeddings.position_ids = torch.arange(cells)[None]


def saved(model: Any, folder: Path) -> Path:
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_eomt_of_transformers__has_the_same_masks_and_classes(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = their_model(kind)
    grid = (size[0] // 16, size[1] // 16)
    if grid != (4, 4):
        reshaped(theirs, kind, grid)
    options = {} if kind == "dinov3" else {"pos_embed_grid": grid}
    ours, report = converted(saved(theirs, tmp_path), options=options)
    assert report.kind == "eomt_huggingface"
    assert ours.config.backbone.depth == 3
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted = theirs(pixel_values=image)
        found = ours(image, Dense())
    masks = torch.stack(found.grid_logits)
    torch.testing.assert_close(masks, wanted.masks_queries_logits, rtol=1e-4, atol=1e-5 * float(masks.abs().max()))
    classes = wanted.class_queries_logits.softmax(-1)[..., :-1]
    torch.testing.assert_close(torch.stack(found.queries), classes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 200), (150, 64), (64, 64), (90, 128), (45, 30)])
def test_windows__of_a_converted_model_give_the_labels_of_their_processor(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """From a photo to its labels: resize, evenly spread windows, masks, sums, the photo's own size.

    Of sizes whose longer side comes out whole: elsewhere transformers cuts off what the release rounds.
    """
    from PIL import Image
    from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil

    theirs = their_model("dinov2")
    processor = EomtImageProcessorPil(do_split_image=True, size={"shortest_edge": 64, "longest_edge": None})
    saved(theirs, tmp_path)
    processor.save_pretrained(tmp_path)
    ours, _ = converted(tmp_path)
    assert (ours.preprocessing.resize, ours.preprocessing.window, ours.preprocessing.stride) == (64, (64, 64), "even")
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    photo = Image.fromarray(pixels.numpy())
    inputs = processor(photo, return_tensors="pt")
    with torch.no_grad():
        found = ours.predict(photo, Dense())
        wanted = theirs(pixel_values=inputs["pixel_values"])
    assert len(inputs["pixel_values"]) == found.window_counts[0]
    wanted.patch_offsets = inputs["patch_offsets"]
    labels = processor.post_process_semantic_segmentation(wanted, target_sizes=[size])[0]
    assert (found.labels[0] == labels).float().mean() > 0.99


def test_labels__are_those_of_the_published_order(tmp_path: Path) -> None:
    theirs = their_model("dinov2")
    ours, _ = converted(saved(theirs, tmp_path))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs(pixel_values=image)
        found = ours(image, Dense())
    masks = torch.nn.functional.interpolate(wanted.masks_queries_logits, (64, 64), mode="bilinear").sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", wanted.class_queries_logits.softmax(-1)[..., :-1], masks)
    assert (found.labels == scores.argmax(1)).float().mean() > 0.999  # type: ignore[union-attr]
    torch.testing.assert_close(found.logits, scores, rtol=1e-4, atol=1e-5)
