from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.heads.test_eomt import CLASSES, QUERIES, eomt, images
from tokenexit.conversion.convert import converted
from tokenexit.errors import CheckpointError
from tokenexit.methods import Dense
from tokenexit.segmenter import ExitSegmenter

NAMES = {"queries": "q", "classifier": "class_head", "mask.0": "mask_head.0", "mask.1": "mask_head.2"}
NAMES |= {"mask.2": "mask_head.4", "norm": "encoder.backbone.norm"}


def release(model: ExitSegmenter) -> dict[str, Tensor]:
    """A model's weights under the names of EoMT's release on DINOv2."""
    depth, state = model.config.backbone.depth, {}
    for name, value in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "backbone":
            rest = f"encoder.backbone.{rest}"
        elif rest.startswith("blocks."):
            _, n, rest = rest.split(".", 2)
            rest = f"encoder.backbone.blocks.{depth + int(n)}.{rest}"
        elif rest.startswith("upscale_steps."):
            _, n, layer, rest = rest.split(".", 3)
            layer = {"up": "conv1", "mix": "conv2", "norm": "norm"}[layer]
            rest = f"upscale.{n}.{layer}.{rest}"
        else:
            own, _, kind = rest.rpartition(".")
            rest = f"{NAMES[own]}.{kind}"
        state[f"network.{rest}"] = value.clone()
    return state | {"network.attn_mask_probs": torch.zeros(2), "criterion.empty_weight": torch.ones(CLASSES + 1)}


def table_of_patches(**options: Any) -> ExitSegmenter:
    return eomt(exits=(), pos_embed_prefix=False, layer_scale=1.0, num_registers=4, pos_embed_grid=(3, 3), **options)


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "eomt.safetensors")
    return folder / "eomt.safetensors"


def test_release__is_read_as_the_model_that_it_is(tmp_path: Path) -> None:
    model = table_of_patches()
    known = {"num_heads": 2, "pos_embed_antialias": model.config.backbone.pos_embed_antialias}
    again, report = converted(saved(release(model), tmp_path), options=known)
    assert report.kind == "eomt"
    assert report.decode_head is not None
    assert (report.decode_head["layers"], report.decode_head["queries"]) == (2, QUERIES)
    assert [name for name, _ in report.unused] == ["criterion.empty_weight"]
    with torch.no_grad():
        found, wanted = (each(images((24, 24)), Dense()) for each in (again, model))
    torch.testing.assert_close(found.grid_logits[0], wanted.grid_logits[0])
    assert torch.equal(found.queries[0], wanted.queries[0])


def test_unfinished_training_differences_and_unknown_depths__are_refused_in_a_sentence(tmp_path: Path) -> None:
    state = release(table_of_patches())
    probs = "network.attn_mask_probs"
    with pytest.raises(CheckpointError, match="above 0"):
        converted(saved({**state, probs: torch.tensor([0.0, 0.3])}, tmp_path))
    with pytest.raises(CheckpointError, match="do not say how many"):
        converted(saved({name: value for name, value in state.items() if name != probs}, tmp_path))
    near_zero = {name: value * 0.01 if name.endswith("norm1.weight") else value for name, value in state.items()}
    with pytest.raises(CheckpointError, match="differences"):
        converted(saved(near_zero, tmp_path))
