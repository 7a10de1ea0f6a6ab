"""Published datasets as values: classes, colours, and where the files lie.

A `Layout` is called as `LAYOUT(root, split)`, like every opener in the registry. Its parts are the splits; a part is
a pair of folders (`Folders`) or lists of names (`Listed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenexit.data.files import FileDataset, OnUnpaired, Pairing, pair_folders, pair_listed
from tokenexit.data.masks import IndexMasks
from tokenexit.errors import DataError
from tokenexit.inputs.labels import Labels


@dataclass(frozen=True)
class Folders:
    """A split as files of one name below two folders; names end where the suffix begins."""

    images: str
    masks: str
    image_suffixes: tuple[str, ...] = (".jpg",)
    mask_suffixes: tuple[str, ...] = (".png",)

    def missing(self, home: Path) -> list[Path]:
        """Return the folders that are not there."""
        return [home / folder for folder in (self.images, self.masks) if not (home / folder).is_dir()]

    def begun(self, home: Path) -> bool:
        """Return whether there are images, whatever else is missing."""
        return (home / self.images).is_dir()

    def pair(self, home: Path, hint: str) -> Pairing:
        return pair_folders(home / self.images, home / self.masks, self.image_suffixes, self.mask_suffixes, hint)


@dataclass(frozen=True)
class Listed:
    """A split as names in text files. lists: alternatives, each a row of files that together hold the names.

    masks: folders; each mask is taken from the first that has it.
    """

    lists: tuple[tuple[str, ...], ...]
    images: str
    masks: tuple[str, ...]

    def missing(self, home: Path) -> list[Path]:
        """Return the folders that are not there, and the missing files of the most complete list."""
        rows = [[home / file for file in row if not (home / file).is_file()] for row in self.lists]
        folders = [home / folder for folder in (self.images, *self.masks) if not (home / folder).is_dir()]
        return min(rows, key=len) + folders

    def begun(self, home: Path) -> bool:
        """Return whether there are names, whatever else is missing."""
        return any(all((home / file).is_file() for file in row) for row in self.lists)

    def pair(self, home: Path, hint: str) -> Pairing:
        row = next(row for row in self.lists if all((home / file).is_file() for file in row))
        masks = [home / folder for folder in self.masks]
        return pair_listed([home / file for file in row], home / self.images, masks, hint=hint)


@dataclass(frozen=True, eq=False)
class Layout:
    """A published dataset in the folder layout that mmsegmentation uses.

    title: the name people know. labels: classes, colours, void. parts: splits by name.
    homes: where in the given root the parts may lie; the first one that has any of them is taken.
    aliases: further names of splits. withheld: splits whose masks are not public.
    hint: what to do where masks are missing.
    reduce_zero_label, ignore_values: as in `IndexMasks`.
    """

    title: str
    labels: Labels
    parts: Mapping[str, Folders | Listed]
    homes: tuple[str, ...] = (".",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    withheld: tuple[str, ...] = ()
    hint: str = "unpack the dataset there"
    reduce_zero_label: bool = False
    ignore_values: tuple[int, ...] = ()

    def __call__(self, root: str | Path, split: str, unpaired: OnUnpaired = "refuse") -> FileDataset:
        """Open a split of the dataset in the folder `root`.

        unpaired: "refuse" files without partner, or "skip" them.

        Raises `DataError` for an unknown split, and where folders, lists or partners are missing.
        """
        part = self.parts[self.known_split(split)]
        home = self._home(Path(root))
        missing = part.missing(home)
        if missing:
            raise DataError(
                f"{self.title} lacks {' and '.join(repr(str(p)) for p in missing)} for split {split!r}: {self.hint}."
            )
        mask_format = IndexMasks(self.labels, self.reduce_zero_label, self.ignore_values)
        try:
            return FileDataset(mask_format, part.pair(home, self.hint), unpaired)
        except DataError as error:
            raise DataError(f"{self.title}, split {split!r}: {error}") from None

    def splits(self, root: str | Path) -> tuple[str, ...]:
        """Return the splits that are there, complete or not. Raises `DataError` where nothing of the dataset is."""
        home = self._home(Path(root))
        return tuple(split for split, part in self.parts.items() if part.begun(home))

    def known_split(self, split: str) -> str:
        """Return the full name of a split. Raises `DataError` for an unknown one, and for one with withheld masks."""
        if split in self.withheld:
            raise DataError(f"split {split!r} of {self.title} has no public masks: use 'val', which papers report.")
        split = self.aliases.get(split, split)
        if split not in self.parts:
            raise DataError(f"split {split!r} of {self.title} is unknown: choose one of {', '.join(self.parts)}.")
        return split

    def _home(self, root: Path) -> Path:
        if not root.is_dir():
            raise DataError(f"dataset folder {str(root)!r} does not exist: give the one that holds {self.title}.")
        markers = list(dict.fromkeys(part.images for part in self.parts.values()))
        for home in self.homes:
            if any((root / home / marker).is_dir() for marker in markers):
                return root / home
        looked = " or ".join(repr(str(root / home / markers[0])) for home in self.homes)
        raise DataError(
            f"{self.title} is not in {str(root)!r}, as there is no folder {looked}: give the one that holds it."
        )


def read_names(text: str) -> tuple[str, ...]:
    """Read names of one word each, separated by white space."""
    return tuple(text.split())


def read_labels(table: str, ignore_index: int = 255) -> Labels:
    """Read labels from lines of `red green blue name`, in the order of the classes."""
    rows = [line.split(maxsplit=3) for line in table.strip().splitlines()]
    return Labels(
        names=tuple(name for _, _, _, name in rows),
        palette=tuple((int(red), int(green), int(blue)) for red, green, blue, _ in rows),
        ignore_index=ignore_index,
    )
