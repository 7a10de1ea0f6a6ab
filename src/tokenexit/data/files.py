"""Pairs of image and mask files, and the dataset made of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, TypeAlias, get_args

from tokenexit.data.base import Sample
from tokenexit.data.masks import MaskFormat, decode
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import load_image
from tokenexit.inputs.labels import Labels

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

OnUnpaired: TypeAlias = Literal["refuse", "skip"]

_SHOWN = 3


class Pair(NamedTuple):
    """An image and its mask; paths are text, since a dataset may hold hundreds of thousands."""

    name: str
    image: str
    mask: str


class Unpaired(NamedTuple):
    """A file without partner. lacks: what is missing; path: the file that misses it."""

    lacks: Literal["image", "mask"]
    path: str


@dataclass(frozen=True)
class Pairing:
    """The files of a split: pairs sorted by name, files without partner, and the numbers of files."""

    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    num_images: int
    num_masks: int

    def require_partners(self) -> None:
        """Raise `DataError` if files have no partner, with their number and the first of them."""
        for lacks, has, total in (("mask", "image", self.num_images), ("image", "mask", self.num_masks)):
            paths = [path for missing, path in self.unpaired if missing == lacks]
            if paths:
                raise DataError(
                    f"{len(paths)} of {total} {has}s have no {lacks} of the same name ({first(paths)}): "
                    f"add the {lacks}s, remove the {has}s, or set unpaired to 'skip'."
                )


class FileDataset:
    """A dataset of file pairs; images and masks are decoded when a sample is read.

    unpaired: "refuse" files without partner, or "skip" them; `pairing.unpaired` lists them. note: a sentence on what
    was decided without being asked, such as how images were split.

    Raises `DataError` for files without partner, and, when a sample is read, where files are damaged or do not fit
    together.
    """

    def __init__(
        self, mask_format: MaskFormat, pairing: Pairing, unpaired: OnUnpaired = "refuse", note: str = ""
    ) -> None:
        if unpaired not in get_args(OnUnpaired):
            raise ConfigError(f"unpaired must be 'refuse' or 'skip', got {unpaired!r}: choose one.")
        if unpaired == "refuse":
            pairing.require_partners()
        self.mask_format = mask_format
        self.pairing = pairing
        self.note = note

    @property
    def labels(self) -> Labels:
        return self.mask_format.labels

    @property
    def names(self) -> tuple[str, ...]:
        """The sorted names of all samples."""
        return tuple(pair.name for pair in self.pairing.pairs)

    def __len__(self) -> int:
        return len(self.pairing.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairing.pairs[index]
        image = load_image(pair.image)
        mask = decode(self.mask_format, self.mask_format.read(pair.mask), f"mask {pair.mask!r}")
        check_sizes(pair, (image.height, image.width), (mask.shape[0], mask.shape[1]))
        return Sample(image, mask, pair.name)


def check_sizes(pair: Pair, image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Raise `DataError` where (height, width) differ."""
    if image != mask:
        raise DataError(
            f"mask {pair.mask!r} has {mask[0]}x{mask[1]} pixels and its image {image[0]}x{image[1]}: "
            "both must have the same height and width."
        )


def pair_folders(
    images: Path,
    masks: Path,
    image_suffixes: Sequence[str] = IMAGE_SUFFIXES,
    mask_suffixes: Sequence[str] = MASK_SUFFIXES,
    hint: str | None = None,
) -> Pairing:
    """Pair files of one name in two folders and their sub-folders; one of the suffixes follows the name.

    hint: what to do where there is no file at all; if not given, to put some there.

    Raises `DataError` where a folder holds no such file, or a name has two.
    """
    image_files, mask_files = files_by_name(images, image_suffixes), files_by_name(masks, mask_suffixes)
    for folder, files, things, suffixes in (
        (images, image_files, "images", image_suffixes),
        (masks, mask_files, "masks", mask_suffixes),
    ):
        if not files:
            cure = hint or f"put {', '.join(suffixes)} files there"
            raise DataError(f"folder {str(folder)!r} holds no {things}: {cure}.")
    names = sorted(image_files.keys() & mask_files.keys())
    lonely = [Unpaired("mask", image_files[name]) for name in sorted(image_files.keys() - mask_files.keys())]
    lonely += [Unpaired("image", mask_files[name]) for name in sorted(mask_files.keys() - image_files.keys())]
    pairs = tuple(Pair(name, image_files[name], mask_files[name]) for name in names)
    return Pairing(pairs, tuple(lonely), len(image_files), len(mask_files))


def pair_listed(
    lists: Sequence[Path],
    images: Path,
    masks: Sequence[Path],
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    hint: str = "unpack both there",
) -> Pairing:
    """Pair files by the names in text files, one a line; a mask is taken from the first of its folders that has it.

    Raises `DataError` where the lists hold no name, or one twice.
    """
    image_files = files_below(images)
    mask_folders = [(folder, files_below(folder)) for folder in masks]
    pairs: list[Pair] = []
    lonely: list[Unpaired] = []
    names = _read_names(lists)
    num_images = num_masks = 0
    for name in names:
        found = (folder for folder, files in mask_folders if name + mask_suffix in files)
        mask_folder = next(found, None)
        image, mask = str(images / (name + image_suffix)), str((mask_folder or masks[0]) / (name + mask_suffix))
        has_image, has_mask = name + image_suffix in image_files, mask_folder is not None
        num_images, num_masks = num_images + has_image, num_masks + has_mask
        if has_image and has_mask:
            pairs.append(Pair(name, image, mask))
        if not has_mask:
            lonely.append(Unpaired("mask", image))
        if not has_image:
            lonely.append(Unpaired("image", mask))
    if not pairs:
        raise DataError(
            f"none of the {len(names)} listed names has both {str(images / ('NAME' + image_suffix))!r} and "
            f"{str(masks[0] / ('NAME' + mask_suffix))!r}: {hint}."
        )
    return Pairing(tuple(pairs), tuple(lonely), num_images, num_masks)


def files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Return {name without suffix, relative to folder: file}, without hidden files.

    Raises `DataError` where two files share a name.
    """
    files: dict[str, str] = {}
    for relative in sorted(files_below(folder)):
        suffix = next((s for s in suffixes if relative.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        name, path = relative[: -len(suffix)], str(folder / relative)
        if name in files:
            raise DataError(f"{files[name]!r} and {path!r} share the name {name!r}: remove or rename one.")
        files[name] = path
    return files


def folders_in(path: Path) -> list[str]:
    """Return the sorted names of the sub-folders, without hidden ones; none if `path` is no folder."""
    if not path.is_dir():
        return []
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def first(paths: Sequence[str]) -> str:
    """Write the first few of many paths for a message."""
    return ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")


def files_below(folder: Path) -> set[str]:
    """Return paths relative to folder, with forward slashes; `os.walk` asks the disk once per folder, not per file."""
    found: set[str] = set()
    for path, _, names in os.walk(folder):
        below = PurePath(path).relative_to(folder).as_posix()
        prefix = "" if below == "." else below + "/"
        found.update(prefix + name for name in names if not name.startswith("."))
    return found


def _read_names(lists: Sequence[Path]) -> list[str]:
    seen: dict[str, Path] = {}
    for path in lists:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"file {str(path)!r} cannot be read ({error}): check that it lists names.") from None
        for name in filter(None, (line.strip() for line in lines)):
            if name in seen:
                raise DataError(f"{name!r} is listed twice, in {str(seen[name])!r} and {str(path)!r}: remove one.")
            seen[name] = path
    if not seen:
        raise DataError(f"{', '.join(repr(str(path)) for path in lists)} lists no names: write one a line.")
    return sorted(seen)
