"""`adapt` on one model of each kind of source, with random weights: that it opens, fits, plans, tests and saves.

    python docs/evidence/adapt/sources.py --out sources.json

Needs timm and transformers for the rows that name them (`pip install -e '.[parity]'`). Weights are random, so the
figures say that every road ends, and nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenexit
from tokenexit.data.registry import open_dataset

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout, for names of other libraries
from tests.conversion import foreign
from tests.helpers import enliven, tiny_segmenter
from tests.parity import conftest  # noqa: F401 declares what PyPI's torchvision misses beside a CPU build of torch

DIM, DEPTH, CLASSES, PHOTOS, SIZE = 48, 4, 5, 64, (128, 160)


class OwnHead(nn.Module):
    """A decode head of somebody's own: two convolutions over the grid, twice its resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(DIM, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, CLASSES, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.up(torch.relu(self.mix(x)))
        return answer


def timm_vit(_folder: Path) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(img_size=128, patch_size=16, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=0)
    return tokenexit.wrap(lively(module), lively(nn.Conv2d(DIM, CLASSES, 1)))


def timm_own_head(_folder: Path) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(img_size=128, patch_size=16, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=0)
    return tokenexit.wrap(lively(module), lively(OwnHead()))


def transformers_vit(_folder: Path) -> Any:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 96}
    module = ViTModel(ViTConfig(image_size=128, patch_size=16, **sizes), add_pooling_layer=False)
    return tokenexit.wrap(lively(module), lively(nn.Conv2d(DIM, CLASSES, 1)))


def transformers_dinov2(_folder: Path) -> Any:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    module = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=126, patch_size=14, **sizes))
    return tokenexit.wrap(lively(module), lively(nn.Conv2d(DIM, CLASSES, 1)))


def mmsegmentation(folder: Path) -> Any:
    model = tiny_segmenter(
        "fcn", "fcn", exits=(), depth=DEPTH, pos_embed_grid=(4, 4), norm_eps=1e-6, pos_embed_antialias=False
    )
    path = folder / "mmseg.pth"
    torch.save({"state_dict": foreign.mmseg(model.state_dict(), {"decode_head": "fcn"}), "meta": {}}, path)
    return path


def segmenter(folder: Path) -> Any:
    model = tiny_segmenter(
        "linear",
        "mask_transformer",
        exits=(),
        depth=DEPTH,
        pos_embed_grid=(4, 4),
        norm_eps=1e-5,
        pos_embed_mode="bilinear",
    )
    path = folder / "checkpoint.pth"
    torch.save({"model": foreign.segmenter(model.state_dict()), "n_cls": CLASSES, "epoch": 3}, path)
    (folder / "variant.yml").write_text("net_kwargs:\n  n_heads: 2\n  normalization: deit\n")
    return path


def dinov2_linear(folder: Path) -> Any:
    model = tiny_segmenter(
        "linear",
        "dinov2_linear",
        exits=(),
        depth=DEPTH,
        pos_embed_grid=(4, 4),
        layer_scale=1.0,
        pos_embed_antialias=False,
    )
    state = model.state_dict()
    body = foreign.part(state, "backbone.")
    body["mask_token"] = torch.zeros(1, body["pos_embed"].shape[2])
    head = foreign.under("decode_head.", foreign.dinov2_linear(foreign.part(state, "decode_head.")))
    path = folder / "dinov2.pth"
    torch.save({"state_dict": head | foreign.under("backbone.", body)}, path)
    return path


def saved_model(folder: Path) -> Any:
    tiny_segmenter("fcn", "fcn", depth=DEPTH).save_pretrained(folder / "saved")
    return folder / "saved"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "timm ViT, 1x1 convolution": timm_vit,
    "timm ViT, own nn.Module head": timm_own_head,
    "transformers ViT": transformers_vit,
    "transformers DINOv2 with registers": transformers_dinov2,
    "mmsegmentation checkpoint": mmsegmentation,
    "Segmenter release": segmenter,
    "DINOv2 linear head": dinov2_linear,
    "model folder with exits": saved_model,
}


def lively(module: nn.Module) -> nn.Module:
    """Weights of ordinary size, so that scores spread and tokens do leave."""
    torch.manual_seed(0)
    enliven(module)
    return module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes, photos = open_dataset("scenes", None, "train", length=PHOTOS, size=SIZE), folder / "photos"
        photos.mkdir()
        for i in range(PHOTOS):
            scenes[i].image.save(photos / f"{i:03}.png")
        for name, make in SOURCES.items():
            own = folder / name.replace(" ", "-").replace(",", "")
            own.mkdir()
            try:
                source = make(own)
            except ImportError as error:
                rows[name] = {"skipped": f"{error.name} is not installed"}
                continue
            adapted = tokenexit.adapt(source, photos, budget=0.6, out=own / "cheaper", say=lambda _: None)
            calibration = adapted.calibration
            assert calibration is not None
            rows[name] = {"method": calibration.method, "sentence": calibration.guarantee}
            print(f"{name}: {calibration.guarantee}", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
