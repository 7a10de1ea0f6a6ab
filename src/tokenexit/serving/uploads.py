"""Uploaded files: checks, names, and the tensors made of them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from starlette.formparsers import MultiPartParser
from torch import Tensor

from tokenexit.errors import DataError
from tokenexit.inputs.images import load_image, open_image
from tokenexit.inputs.preprocessing import resized_size, scaled_size
from tokenexit.outputs.ledger import Size
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.pace import dense_macs


@dataclass(frozen=True)
class UploadedImage:
    """An uploaded image as input of the network.

    size: its own height and width. tokens: their number in a batch. macs: multiply-adds of the dense model.
    """

    image: Tensor
    size: Size
    tokens: int
    macs: int

    def resized(self, model: ExitSegmenter, scale: float) -> UploadedImage:
        """Return the same upload with tokens and multiply-adds under a method that resizes images by `scale`."""
        seen = (self.image.shape[1], self.image.shape[2])
        return replace(self, tokens=_tokens(model, scaled_size(seen, scale)), macs=dense_macs(model, seen, scale))


def read_image(model: ExitSegmenter, data: bytes, name: str, max_pixels: int) -> tuple[Image.Image, UploadedImage]:
    """Read the image in a file, and make the input of the network. Raises `DataError` for no image, or a large one.

    max_pixels: of the image, which is not decoded beyond that, and of what the network sees of it. A thin strip is
    small until its short side is resized or padded to a patch.
    """
    image = load_image(_Named(data, name), max_pixels)
    size, patch = (image.height, image.width), model.config.backbone.patch_size
    seen, tokens = _seen(model, size)
    if _too_large(model, tokens, max_pixels):
        raise DataError(
            f"image '{name}' of {size[0]}x{size[1]} pixels is too large for the network, which would see {tokens} "
            f"patches of {patch}x{patch} pixels: crop it."
        )
    return image, UploadedImage(model.preprocessing.to_tensor(image), size, tokens, dense_macs(model, seen))


def macs_by_header(model: ExitSegmenter, data: bytes, max_pixels: int, scale: float = 1.0) -> int:
    """Return the multiply-adds of the dense model for the image in a file, from its header alone.

    scale: by which the method resizes images. It is 0 for what `read_image` refuses anyway, and says why: no image, or
    one that is too large.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            size = image.height, image.width
    except Exception:  # decoders of damaged files raise nearly everything
        return 0
    seen, tokens = _seen(model, size)
    refused = size[0] * size[1] > max_pixels or _too_large(model, tokens, max_pixels)
    return 0 if refused else dense_macs(model, seen, scale)


def _seen(model: ExitSegmenter, size: Size) -> tuple[Size, int]:
    """Return height and width of an image of `size` as the network sees it, and its patches."""
    seen = resized_size(size, model.preprocessing.resize)
    return seen, _tokens(model, seen)


def _tokens(model: ExitSegmenter, size: Size) -> int:
    rows, columns = model.backbone.patch_embed.grid(*size)
    return rows * columns


def _too_large(model: ExitSegmenter, tokens: int, max_pixels: int) -> bool:
    patch = model.config.backbone.patch_size
    return tokens * patch**2 > max(max_pixels, patch**2)


def keep_in_memory(size: int) -> None:
    """Let uploads of up to `size` bytes stay in memory; starlette's default is to put those beyond 1 MB on disk."""
    MultiPartParser.spool_max_size = max(MultiPartParser.spool_max_size, size)


class _Named(io.BytesIO):
    """A file in memory with the name of the upload."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def file_name(sent: str | None, number: int) -> str:
    """Return the name of an upload, without folders and signs that do not belong into names."""
    name = re.split(r"[\\/]", sent or "")[-1]
    return re.sub(r"[^\w .()+-]", "_", name)[-100:].lstrip(". ") or f"image-{number + 1}"


def distinct(names: Sequence[str]) -> list[str]:
    """Make names unique without their suffixes: a second `a.png` or `a.jpg` becomes `a-2.jpg`."""
    taken: set[str] = set()
    out = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        number, free = 1, stem
        while free in taken:
            number += 1
            free = f"{stem}-{number}"
        taken.add(free)
        out.append(f"{free}{suffix}")
    return out
