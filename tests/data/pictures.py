"""Tiny images and datasets for the tests of this folder."""

from pathlib import Path

import numpy as np
from PIL import Image

from tokenexit.data.base import Sample
from tokenexit.inputs.labels import Labels

LABELS = Labels(("ground", "leaf", "fruit"), ((0, 0, 0), (0, 200, 0), (200, 0, 0)))


def tiny_sample(height: int = 12, width: int = 16, name: str = "tiny", seed: int = 0) -> Sample:
    """A sample whose red channel is the mask value times 40, so that image and mask can be compared."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 4, (height, width)).astype(np.uint8)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[:, :, 0] = mask * 40
    mask[mask == 3] = LABELS.ignore_index
    return Sample(Image.fromarray(pixels), mask, name)


class TinyDataset:
    """`length` tiny samples of growing width; counts how often each was read."""

    def __init__(self, length: int = 5) -> None:
        self.labels = LABELS
        self.length = length
        self.reads = [0] * length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.reads[index] += 1
        return tiny_sample(12, 16 + index, f"tiny{index}", seed=index)


def write_pair(root: Path, split: str, name: str, mask: np.ndarray, suffix: str = ".png") -> None:
    """An image and a mask of one name into the folder layout."""
    for folder in ("images", "annotations"):
        (root / folder / split / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (mask.shape[1], mask.shape[0]), (9, 8, 7)).save(root / "images" / split / f"{name}{suffix}")
    Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")
