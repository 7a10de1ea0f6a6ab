"""The layout of a folder of your own: where images and masks lie, and which of them belong to a split.

Splits are the folders within both (`images/train`), or lists (`train.txt`), or, where there is neither, drawn by file
name: a name's digest decides, so that a split stays as it is when images are added.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

from tokenexit.data.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Pair,
    Pairing,
    Unpaired,
    files_below,
    files_by_name,
    first,
    folders_in,
)
from tokenexit.errors import ConfigError, DataError

SPLIT = "{split}"
"""Placeholder of the split's name in the name of a folder."""
DRAWN = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Splits that are drawn by file name, and their shares."""
EXPECTED = (
    "expected are images/NAME.jpg and annotations/NAME.png, with splits as folders within both (images/train, ...), as "
    "lists (train.txt, ...), or drawn by name"
)

_SPLIT_WORDS = {"train", "training", "trainval", "trainaug", "val", "valid", "validation", "dev", "test", "testing"}
_MASK_WORDS = ("mask", "anno", "label", "gt", "truth", "seg")
_SCANNED = 20_000  # files that are looked at for a hint
_SHOWN = 4  # folders that it names

Scheme: TypeAlias = Literal["folders", "lists", "drawn"]
Files: TypeAlias = Mapping[str, str]
"""Paths by name: relative to their folder, with forward slashes, without suffix."""


@dataclass(frozen=True)
class FolderLayout:
    """Names of folders and files, all relative to the dataset's folder.

    images, annotations: folders of images and masks, with folders within them as you like. `{split}` in both stands for
        the split's name, as in `{split}/img`.
    image_suffix, mask_suffix: what follows the name that an image shares with its mask, such as `_image`, `_mask.png`.
    lists: folder of the lists, one name or path a line, or image and mask; if not given, the dataset's folder, where
        they count if images have no folders for splits.

    Raises `ConfigError` for names that are no text, and where one folder alone depends on the split.
    """

    images: str = "images"
    annotations: str = "annotations"
    image_suffix: str = ""
    mask_suffix: str = ""
    lists: str | None = None

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not isinstance(value, str) and not (key == "lists" and value is None):
                raise ConfigError(f"{key} must be a text, got {value!r}: write the name in quotes.")
        if (SPLIT in self.images) != (SPLIT in self.annotations):
            raise ConfigError(f"{SPLIT} stands in one of images and annotations: write it in both, or in neither.")

    @property
    def by_split(self) -> bool:
        """Whether folder names contain the name of the split."""
        return SPLIT in self.images

    def splits(self, root: Path) -> tuple[str, ...]:
        """Return the splits that have images. Raises `DataError` where there is no folder for any."""
        self._check_images(root)
        scheme = self._scheme(root)
        if scheme == "drawn":
            if not files_by_name(root / self.images, _endings(self.image_suffix, IMAGE_SUFFIXES)):
                return ()
            pairing = pair_files(*self._files(root))
            return tuple(split for split in DRAWN if any(drawn_split(pair.name) == split for pair in pairing.pairs))
        return self._folders(root) if scheme == "folders" else tuple(sorted(self._lists(root)))

    def open(self, root: Path, split: str) -> tuple[Pairing, str]:
        """Return the files of a split, and a sentence on how it was drawn, if it was.

        Raises `DataError`, in one sentence, where folders, files or the split are missing."""
        self._check_images(root)
        scheme = self._scheme(root)
        if scheme == "drawn" and not self.by_split and (root / self.images / split).is_dir():
            scheme = "folders"  # a folder of any name is a split if it is asked for
        if scheme == "folders":
            return self._open_folder(root, split), ""
        if scheme == "lists":
            return self._open_list(root, split), ""
        return self._draw(root, split)

    def _check_images(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"dataset folder {str(root)!r} does not exist: give the one that holds {self.images!r}.")
        there = self._folders(root) if self.by_split else (root / self.images).is_dir()
        if not there:
            held = ", ".join(folders_in(root)) or "nothing"
            raise DataError(
                f"dataset folder {str(root)!r} holds {held} but no folder {self.images!r}: {self._hint(root)}."
            )

    def _scheme(self, root: Path) -> Scheme:
        if self.by_split:
            return "folders"
        if self.lists is None and any(map(_names_a_split, folders_in(root / self.images))):
            return "folders"
        return "lists" if self.lists is not None or self._lists(root) else "drawn"

    # ---------------------------------------------------------------------------------------------------- folders

    def _folders(self, root: Path) -> tuple[str, ...]:
        if not self.by_split:
            return tuple(folders_in(root / self.images))
        before, _, after = self.images.partition(SPLIT)
        above = (root / before) if before.endswith("/") or not before else (root / before).parent
        start = "" if before.endswith("/") or not before else PurePath(before).name
        end, _, inside = after.partition("/")
        names = [name for name in folders_in(above) if name.startswith(start) and name.endswith(end)]
        names = [name for name in names if (above / name / inside).is_dir()]
        return tuple(name[len(start) : len(name) - len(end)] for name in names)

    def _open_folder(self, root: Path, split: str) -> Pairing:
        splits = self._folders(root)
        if split not in splits:
            raise DataError(f"split {split!r} is unknown in {str(root)!r}: there is {', '.join(splits) or 'nothing'}.")
        images, masks = self._files(root, split)
        return self._checked(root, pair_files(images, masks))

    def _files(self, root: Path, split: str | None = None) -> tuple[Files, Files]:
        """Return images and masks by name, of all splits or of the folder of one."""
        of_images, of_masks = self.images, self.annotations
        if split is not None:
            of_images, of_masks = (
                folder.replace(SPLIT, split) if self.by_split else f"{folder}/{split}"
                for folder in (of_images, of_masks)
            )
        if not (root / of_masks).is_dir():
            raise DataError(
                f"dataset folder {str(root)!r} lacks {of_masks!r}: put the masks there; {self._hint(root)}."
            )
        images = files_by_name(root / of_images, _endings(self.image_suffix, IMAGE_SUFFIXES))
        masks = files_by_name(root / of_masks, _endings(self.mask_suffix, MASK_SUFFIXES))
        both = set(images.values()) & set(masks.values())
        if both:
            depth_of_images, depth_of_masks = (len((root / folder).parts) for folder in (of_images, of_masks))
            masks_win = (depth_of_masks, len(self.mask_suffix)) > (depth_of_images, len(self.image_suffix))
            images_win = (depth_of_masks, len(self.mask_suffix)) < (depth_of_images, len(self.image_suffix))
            images = {name: path for name, path in images.items() if path not in both or not masks_win}
            masks = {name: path for name, path in masks.items() if path not in both or not images_win}
            if not masks_win and not images_win:
                raise DataError(
                    f"images and masks are both all of {str(root / of_images)!r}: tell them apart with image_suffix "
                    "and mask_suffix, such as .jpg and .png."
                )
        for folder, files, things in ((of_images, images, "images"), (of_masks, masks, "masks")):
            if not files:
                raise DataError(f"folder {str(root / folder)!r} holds no {things}: {self._hint(root)}.")
        return images, masks

    # ------------------------------------------------------------------------------------------------------ lists

    def _lists(self, root: Path) -> dict[str, Path]:
        """Return the lists by split: text files of that name whose first line names an image."""
        files = sorted((root / (self.lists or ".")).glob("*.txt"))
        if not files:
            return {}
        known = _Known(root, self)
        return {file.stem: file for file in files if file.stem.lower() in _SPLIT_WORDS or known.begins(file)}

    def _open_list(self, root: Path, split: str) -> Pairing:
        lists = self._lists(root)
        if split not in lists:
            raise DataError(
                f"split {split!r} is unknown in {str(root)!r}: there is {', '.join(lists) or 'no list'}; "
                f"{split}.txt would list its images."
            )
        known = _Known(root, self)
        pairs: dict[str, Pair] = {}
        lonely: list[Unpaired] = []
        lines = _lines(lists[split])
        foreign = [line for line in lines if known.pair(line) is None]
        if foreign:
            raise DataError(
                f"{str(lists[split])!r} lists {len(foreign)} of {len(lines)} names that are no image of "
                f"{str(root / self.images)!r} ({first(foreign)}): correct them; {self._hint(root)}."
            )
        for line in lines:
            pair = known.pair(line)
            assert pair is not None
            if pair.name in pairs:
                raise DataError(f"{pair.name!r} is listed twice in {str(lists[split])!r}: remove one.")
            pairs[pair.name] = pair
            if not pair.mask:
                lonely.append(Unpaired("mask", pair.image))
        whole = tuple(pairs[name] for name in sorted(pairs) if pairs[name].mask)
        return self._checked(root, Pairing(whole, tuple(lonely), len(pairs), len(whole)))

    # ------------------------------------------------------------------------------------------------------ drawn

    def _draw(self, root: Path, split: str) -> tuple[Pairing, str]:
        if split not in DRAWN:
            raise DataError(
                f"split {split!r} is unknown in {str(root)!r}: there is {', '.join(DRAWN)}, drawn by file name; "
                f"{split}.txt would list its images."
            )
        images, masks = self._files(root)
        everything = self._checked(root, pair_files(images, masks))
        counts = Counter(drawn_split(pair.name) for pair in everything.pairs)
        if everything.pairs and not counts[split]:
            raise DataError(
                f"no split is given in {str(root)!r}, and drawing by file name leaves none of "
                f"{len(everything.pairs)} pairs for {split!r}: list its images in {split}.txt, or add some."
            )
        mine = pair_files(
            *({n: path for n, path in files.items() if drawn_split(n) == split} for files in (images, masks))
        )
        shares = "/".join(f"{share:.0%}".rstrip("%") for share in DRAWN.values())
        numbers = ", ".join(f"{counts[name]} {name}" for name in DRAWN)
        return mine, f"no split is given, so images are split by file name, {shares}: {numbers}"

    # ------------------------------------------------------------------------------------------------------- hints

    def _checked(self, root: Path, pairing: Pairing) -> Pairing:
        """Reject files of which none has a partner: then the names do not fit."""
        if not pairing.pairs:
            raise DataError(
                f"none of {pairing.num_images} images in {str(root / self.images)!r} has a mask of its name in "
                f"{str(root / self.annotations)!r}: {self._hint(root)}."
            )
        return pairing

    def _hint(self, root: Path) -> str:
        """Describe the expected files, the files that are there, and a layout that would fit."""
        found = scan(root)
        fitting = suggestion(found)
        said = f"{EXPECTED}; found {seen(found) or 'no image at all'}"
        if fitting is None or fitting == self:
            return said
        return f"{said}; write to dataset.yaml, one a line: {fitting.changes()}"

    def changes(self) -> str:
        """Write the lines of `dataset.yaml` that give this layout, for a message."""
        default = FolderLayout()
        return ", ".join(f"{key}: {value!r}" for key, value in vars(self).items() if value != getattr(default, key))


def drawn_split(name: str) -> str:
    """Return the split of an image, drawn by its name alone, the same on every machine."""
    at = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    for split, share in DRAWN.items():
        if at < share:
            return split
        at -= share
    return next(reversed(DRAWN))


def pair_files(images: Files, masks: Files) -> Pairing:
    """Pair files of one name, sorted by name, and list those without partner."""
    lonely = [Unpaired("mask", images[name]) for name in sorted(images.keys() - masks.keys())]
    lonely += [Unpaired("image", masks[name]) for name in sorted(masks.keys() - images.keys())]
    pairs = tuple(Pair(name, images[name], masks[name]) for name in sorted(images.keys() & masks.keys()))
    return Pairing(pairs, tuple(lonely), len(images), len(masks))


class _Known:
    """The images and masks that a line of a list may name."""

    def __init__(self, root: Path, layout: FolderLayout) -> None:
        self.root = root
        self.images, self.masks = layout._files(root)
        self.folders = tuple(f"{folder.strip('/')}/" for folder in (layout.images, layout.annotations))
        self.endings = (*_endings(layout.image_suffix, IMAGE_SUFFIXES), *_endings(layout.mask_suffix, MASK_SUFFIXES))
        names: dict[str, list[str]] = {}
        for name in self.images:
            names.setdefault(name.rpartition("/")[2], []).append(name)
        self.by_last = {last: found[0] for last, found in names.items() if len(found) == 1}

    def pair(self, line: str) -> Pair | None:
        """Return the pair that a line names, with an empty mask where it has none; None if it names no image."""
        name = self._name(line)
        if name is not None:
            return Pair(name, self.images[name], self.masks.get(name, ""))
        parts = [part.strip() for part in re.split(r"[\t,]|\s+", line) if part.strip()]
        if len(parts) != 2:
            return None
        image, mask = (self.root / part.lstrip("/") for part in parts)
        name = self._name(parts[0])
        if mask.is_file() and (name is not None or image.is_file()):
            path = str(image) if name is None else self.images[name]
            return Pair(parts[0] if name is None else name, path, str(mask))
        return None

    def begins(self, file: Path) -> bool:
        """Return whether the first line of a text file names an image."""
        try:
            return self.pair(_lines(file)[0]) is not None
        except DataError:
            return False

    def _name(self, text: str) -> str | None:
        path = text.replace("\\", "/").removeprefix(f"{self.root.as_posix()}/").removeprefix("./").lstrip("/")
        starts = (*(path.removeprefix(folder) for folder in self.folders), path)
        for start, end in product(starts, ("", *self.endings)):
            if end and not start.lower().endswith(end.lower()):
                continue
            name = start[: len(start) - len(end)]
            if name in self.images:
                return name
            if name in self.by_last:
                return self.by_last[name]
        return None


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file {str(file)!r} cannot be read ({error}): check that it lists names.") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"file {str(file)!r} lists no names: write one a line.")
    return lines


def _names_a_split(name: str) -> bool:
    return not _SPLIT_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _endings(suffix: str, extensions: Sequence[str]) -> tuple[str, ...]:
    """Return the endings that a suffix allows: `_mask` with any of the extensions, `_mask.png` as it is."""
    whole = PurePath(suffix).suffix.lower() in extensions or suffix.lower() in extensions
    return (suffix,) if whole else tuple(suffix + extension for extension in extensions)


# ------------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class View:
    """Images of a folder and its sub-folders with one ending. names: without that ending; example: one of the files."""

    folder: str
    suffix: str
    names: frozenset[str]
    example: str
    lossless: bool

    def words(self) -> str:
        return f"{len(self.names)} images in {self.folder!r} such as {self.example!r}"

    @property
    def level(self) -> int:
        return 0 if self.folder == "." else self.folder.count("/") + 1

    @property
    def looks_like_masks(self) -> bool:
        return any(word in f"{self.folder}{self.suffix}".lower() for word in _MASK_WORDS)


def scan(root: Path) -> list[View]:
    """List the images of folders up to two levels down, each with all that lies deeper."""
    found: dict[str, list[PurePath]] = {}
    for relative in islice(sorted(files_below(root)), _SCANNED):
        path = PurePath(relative)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            for level in range(min(len(path.parts), 3)):
                found.setdefault("/".join(path.parts[:level]) or ".", []).append(PurePath(*path.parts[level:]))
    return [view for folder, paths in sorted(found.items()) for view in _views(folder, paths)]


def seen(found: Sequence[View]) -> str:
    """Describe a few of the folders for a message."""
    shown = [view.words() for view in found if not view.suffix and view.level == 1]
    here = next((view for view in found if not view.suffix and view.level == 0), None)
    if here is not None and not shown:
        shown = [here.words()]
    return "; ".join(shown[:_SHOWN]) + (f"; and {len(shown) - _SHOWN} folders more" if len(shown) > _SHOWN else "")


def _views(folder: str, paths: Sequence[PurePath]) -> Iterable[View]:
    """Yield all images of a folder, those that share an ending such as `_mask`, and those of each file type."""
    names = {path: path.with_suffix("").as_posix() for path in paths}
    endings = Counter(match[0] for name in names.values() if (match := re.search(r"[_\-][A-Za-z]+$", name)))
    kinds = Counter(path.suffix for path in paths)
    often = 0.3 * len(paths)
    for suffix in ("", *(ending for ending, count in endings.items() if count >= often)):
        mine = [path for path in paths if names[path].endswith(suffix)]
        yield _view(folder, suffix, mine, [names[path].removesuffix(suffix) for path in mine])
    for kind in sorted(kinds) if len(kinds) > 1 else ():
        mine = [path for path in paths if path.suffix == kind]
        yield _view(folder, kind, mine, [names[path] for path in mine])


def _view(folder: str, suffix: str, paths: Sequence[PurePath], names: Sequence[str]) -> View:
    lossless = all(path.suffix.lower() in MASK_SUFFIXES for path in paths)
    return View(folder, suffix, frozenset(names), paths[0].as_posix(), lossless)


def suggestion(found: Sequence[View]) -> FolderLayout | None:
    """Return the layout under which most images have a mask, if any has."""

    def rank(pair: tuple[View, View]) -> tuple[int, ...]:
        images, masks = pair
        looks = masks.looks_like_masks + (not images.looks_like_masks) + (not images.lossless)
        level = (
            masks.level if images.folder == masks.folder else -masks.level
        )  # the folder itself; the one of all splits
        return len(images.names & masks.names), looks, level, -len(images.suffix) - len(masks.suffix)

    pairs = [(a, b) for a, b in product(found, found) if b.lossless and _apart(a, b)]
    images, masks = max(pairs, key=rank, default=(None, None))
    if images is None or masks is None or not images.names & masks.names:
        return None
    return FolderLayout(
        images=_without_split(images.folder),
        annotations=_without_split(masks.folder),
        image_suffix=images.suffix,
        mask_suffix=masks.suffix,
    )


def _apart(images: View, masks: View) -> bool:
    """Return whether suffixes tell images and masks apart where both lie in one folder."""
    if images.folder != masks.folder:
        return True
    return images.suffix != masks.suffix and images.suffix.startswith(".") == masks.suffix.startswith(".")


def _without_split(folder: str) -> str:
    """Write `train/img` as `{split}/img`, and `img/train` as `img`."""
    parts = folder.split("/")
    if len(parts) > 1 and _names_a_split(parts[-1]):
        return "/".join(parts[:-1])
    return "/".join(SPLIT if _names_a_split(part) else part for part in parts)
