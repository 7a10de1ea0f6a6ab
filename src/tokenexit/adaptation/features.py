"""Features of every block and the dense model's answers, from one dense pass, kept on disk.

Heads are fitted on them afterwards without running the network again. Each block has a file of its own, `(N, C)` in
half precision, and so have the answers, `(N, K)`; N is limited by what the files may hold together. One image is in
memory at a time, and later a slice of one file.

Legend: N kept tokens of all images, C channels, K classes, L blocks.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenexit.calibration.calibration_set import CalibrationSet
from tokenexit.calibration.dense_pass import token_scores
from tokenexit.errors import ConfigError
from tokenexit.methods.base import record_of
from tokenexit.outputs.windows import window_boxes
from tokenexit.runtime.atomic import atomic_write
from tokenexit.runtime.folder import existing_folder
from tokenexit.runtime.precision import inference
from tokenexit.segmenter import ExitSegmenter

MOST_BYTES = 6 << 30
"""What the files of all blocks may hold together; beyond it, fewer tokens of each image are kept."""
SLICE = 1 << 16
"""Tokens that are read from disk at a time."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full."""
LARGEST = 65504.0
"""The largest number in half precision; a few channels of some networks are beyond it and are cut."""


@dataclass(frozen=True)
class Features:
    """Files of a dense pass.

    Attributes:
        folder: where they lie.
        blocks: number of blocks before each place that was recorded, increasing.
        tokens: number N of kept tokens.
        channels: number C of channels.
        classes: number K of classes.
        held_out: number of tokens, the last ones, that no head is fitted on; whole images.
    """

    folder: Path
    blocks: tuple[int, ...]
    tokens: int
    channels: int
    classes: int
    held_out: int

    def rows(self, block: int) -> npt.NDArray[np.float16]:
        """Return the features after so many blocks, `(N, C)`, as a file that is read where it is used."""
        return np.memmap(_file(self.folder, block), np.float16, "r", shape=(self.tokens, self.channels))

    def answers(self) -> npt.NDArray[np.float16]:
        """Return the scores of the dense model for each token, `(N, K)`; they add up to one."""
        return np.memmap(_answers(self.folder), np.float16, "r", shape=(self.tokens, self.classes))

    @cached_property
    def class_shares(self) -> Tensor:
        """Share of the tokens that the dense model gives each class, `(K,)` fp64; read once for all heads."""
        answers, counts = self.answers(), torch.zeros(self.classes, dtype=torch.float64)
        for part in slices(self.tokens, SLICE):
            labels = torch.from_numpy(answers[part].astype("float32")).argmax(1)
            counts += torch.bincount(labels, minlength=self.classes)
        return counts / counts.sum()


def _file(folder: Path, block: int) -> Path:
    return folder / f"block{block:03}.f16"


def _answers(folder: Path) -> Path:
    return folder / "answers.f16"


def record_features(
    photos: CalibrationSet,
    blocks: Sequence[int],
    folder: Path,
    *,
    held_out: float = 0.1,
    most_bytes: int = MOST_BYTES,
    seed: int = 0,
) -> Features:
    """Run the dense model once on every photo and keep features and answers; goes on where a killed call ended.

    Args:
        photos: a model and the photos that heads are fitted on.
        blocks: number of blocks before each place that is recorded.
        folder: where the files are kept.
        held_out: share of the photos whose tokens come last, to judge heads by.
        most_bytes: what all files may hold together.
        seed: seed of the order of photos and of the tokens that are kept.

    Raises:
        ConfigError: if the disk is full, with the space that is needed, or the folder cannot be written.
    """
    model = photos.model
    channels, classes = model.config.backbone.embed_dim, model.config.num_classes
    bytes_of_token = 2 * (channels * len(blocks) + classes)
    kept = max(1, most_bytes // bytes_of_token // len(photos))
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed)).tolist()
    first_held_out = len(photos) - max(1, round(held_out * len(photos)))
    rows = {_file(folder, block): 2 * channels for block in blocks} | {_answers(folder): 2 * classes}
    with _disk_full(folder, bytes_of_token * kept * len(photos)):
        folder.mkdir(parents=True, exist_ok=True)
        progress = _Progress.read(folder, rows)
        progress.cut(rows)
        for position in photos.progress("dense pass")(order[progress.images :]):
            features, answers = _of_photo(photos, position, blocks)
            chosen = _some(len(answers), kept, seed, position)
            for block, own in zip(blocks, features):
                _append(_file(folder, block), own[chosen])
            _append(_answers(folder), answers[chosen])
            progress = progress.after(len(chosen), progress.images >= first_held_out)
            progress.write(folder)
    return Features(folder, tuple(blocks), progress.tokens, channels, classes, progress.held_out)


def _of_photo(photos: CalibrationSet, position: int, blocks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return features after each of `blocks`, `(cells, C)` each, and the dense answers `(cells, K)`, of all windows."""
    model, preprocessing = photos.model, photos.model.preprocessing
    image = preprocessing.to_tensor(photos.data[photos.indices[position]].image).to(model.device)
    features: list[list[Tensor]] = [[] for _ in blocks]
    answers = []
    for top, left, bottom, right in window_boxes(
        (image.shape[1], image.shape[2]), preprocessing.window, preprocessing.stride
    ):
        with inference(model.device, photos.precision):
            window = _window(model, image[:, top:bottom, left:right], blocks)
        for rows, block in zip(features, window[0]):
            rows.append(block)
        answers.append(window[1])
    return [torch.cat(rows) for rows in features], torch.cat(answers)


def _window(model: ExitSegmenter, image: Tensor, blocks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Run the network on one image `(3, h, w)`."""
    tokens, start, features = model.backbone.embed([image]), 0, []
    for block in blocks:
        tokens, start = model.backbone.run(tokens, start, block), block
        features.append(tokens.patches().x.float().cpu())
    tokens = model.backbone.run(tokens, start, model.config.backbone.depth)
    seen = tokens if model.decode_head.takes_prefix else tokens.patches()
    seen = seen.with_x(model.backbone.norm(seen.x))
    out = model.decode_head(seen)
    scores = token_scores(record_of(model.decode_head, seen, out, out.logits), seen.grids)
    return features, (scores / scores.sum(1, keepdim=True).clamp(min=1e-12)).cpu()


def _some(count: int, most: int, seed: int, position: int) -> Tensor:
    """Draw at most so many of the tokens of a photo."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    return torch.randperm(count, generator=generator)[:most].sort().values


def _append(path: Path, rows: Tensor) -> None:
    with path.open("ab") as file:  # numpy's tofile would not say why it failed
        file.write(rows.clamp(-LARGEST, LARGEST).half().numpy().data)


@dataclass(frozen=True)
class _Progress:
    """How far a pass has come: photos that are in the files, their tokens, and how many of these are held out."""

    images: int = 0
    tokens: int = 0
    held_out: int = 0

    @classmethod
    def read(cls, folder: Path, rows: Mapping[Path, int]) -> _Progress:
        """Read how far the last call came; a call begins anew where some file is missing, damaged or too short.

        rows: bytes of a row, by file.
        """
        try:
            progress = cls(**json.loads((folder / "progress.json").read_text()))
            whole = all(path.stat().st_size >= progress.tokens * size for path, size in rows.items())
        except (OSError, ValueError, TypeError):
            return cls()
        return progress if whole else cls()

    def write(self, folder: Path) -> None:
        with atomic_write(folder / "progress.json") as unfinished:
            unfinished.write_text(json.dumps(vars(self)))

    def after(self, tokens: int, held_out: bool) -> _Progress:
        return _Progress(self.images + 1, self.tokens + tokens, self.held_out + (tokens if held_out else 0))

    def cut(self, rows: Mapping[Path, int]) -> None:
        """Remove what a killed call had begun to write behind the last whole photo. rows: bytes of a row, by file."""
        for path, size in rows.items():
            with path.open("ab") as file:
                file.truncate(self.tokens * size)


@contextmanager
def _disk_full(folder: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, and a folder that cannot be written, into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another --out.") from None
        free = shutil.disk_usage(existing_folder(folder)).free
        raise ConfigError(
            f"{folder} is full: features of these photos take up to {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are left; free some space and call again, or choose another --out."
        ) from None


def slices(rows: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most so many rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
