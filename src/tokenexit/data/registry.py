"""The registry of datasets. A new one is a file with a `Layout` or a function that opens it, and a line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenexit.errors import ConfigError, DataError

if TYPE_CHECKING:  # so that names are known before torch is loaded
    from tokenexit.data.base import SegmentationDataset
    from tokenexit.inputs.labels import Labels

# name: "module:opener". The module is imported when the dataset is opened; the opener is called with root, split and
# options. One without the parameter `root` makes its images itself. One with an attribute `splits(root)` says
# which splits there are; others have train, val and test. One with `known_split(split)` refuses unknown ones by it.
DATASETS = {
    "ade20k": "tokenexit.data.ade20k:ADE20K",
    "camvid": "tokenexit.data.camvid:CAMVID",
    "cityscapes": "tokenexit.data.cityscapes:CITYSCAPES",
    "coco_stuff10k": "tokenexit.data.coco_stuff:COCO_STUFF_10K",
    "coco_stuff164k": "tokenexit.data.coco_stuff:COCO_STUFF_164K",
    "folder": "tokenexit.data.folder:FolderDataset",
    "pascal_context59": "tokenexit.data.pascal_context:PASCAL_CONTEXT_59",
    "pascal_context60": "tokenexit.data.pascal_context:PASCAL_CONTEXT_60",
    "photos": "tokenexit.data.photos:Photos",
    "scenes": "tokenexit.data.scenes:scene_split",
    "voc2012": "tokenexit.data.voc:VOC_2012",
}
UNLABELLED = frozenset({"photos"})
"""Datasets without masks, whose classes are those of a model."""


def open_dataset(name: str, root: str | Path | None, split: str, **options: Any) -> SegmentationDataset:
    """Open a split of a dataset by name; "folder" has its own classes, and "scenes" needs no root.

    root: the dataset's folder; None for datasets that are drawn, not read.
    options: what the dataset's own opener takes beyond root and split.

    Raises `DataError` for an unknown name, a root that is missing or too much, and an unknown split;
    `ConfigError` for an unknown option.
    """
    opener = _opener(name)
    _check_options(name, options)
    home = _checked_root(name, opener, root)
    return opener(split=split, **options) if home is None else opener(root=home, split=split, **options)


def check_dataset_options(name: str, root: str | Path | None, split: str, **options: Any) -> None:
    """Raise the errors of `open_dataset` that do not depend on files; the folder need not be there."""
    opener = _opener(name)
    _check_options(name, options)
    if _checked_root(name, opener, root) is None:
        opener(split=split, **options)
    elif hasattr(opener, "known_split"):
        opener.known_split(split)


def dataset_options(name: str) -> tuple[str, ...]:
    """Return the options of a dataset. Raises `DataError` for an unknown name."""
    return tuple(key for key in inspect.signature(_opener(name)).parameters if key not in ("root", "split"))


def dataset_labels(name: str) -> Labels | None:
    """Return the labels of a published dataset; None for one that brings its own, and for one without masks.

    Raises `DataError` for an unknown name.
    """
    opener = _opener(name)
    if "root" not in inspect.signature(opener).parameters:  # drawn, so it is always there
        return opener(split="train").labels
    from tokenexit.inputs.labels import Labels

    labels = getattr(opener, "labels", None)
    return labels if isinstance(labels, Labels) else None  # a class has them as a property of what it opens


def dataset_splits(name: str, root: str | Path | None, **options: Any) -> tuple[str, ...]:
    """Return the splits of a dataset that can be opened. options: as for `open_dataset`.

    Raises `DataError` for an unknown name, and for a root that is missing or too much.
    """
    opener = _opener(name)
    home = _checked_root(name, opener, root)
    splits: tuple[str, ...] = ("train", "val", "test")
    if hasattr(opener, "splits"):
        known = inspect.signature(opener.splits).parameters
        splits = opener.splits(home, **{key: value for key, value in options.items() if key in known})
    if not splits:
        raise DataError(f"dataset {name!r} has no split in {str(home)!r}: check that images and masks are there.")
    return splits


def check_name(name: str) -> None:
    """Raise `DataError` for an unknown name; loads nothing."""
    if name not in DATASETS:
        raise DataError(f"dataset {name!r} is unknown: choose one of {', '.join(sorted(DATASETS))}.")


def _opener(name: str) -> Callable[..., SegmentationDataset]:
    check_name(name)
    module, _, attribute = DATASETS[name].partition(":")
    return cast("Callable[..., SegmentationDataset]", getattr(import_module(module), attribute))


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = dataset_options(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(
            f"dataset {name!r} has no option {unknown[0]!r}: its options are {', '.join(known) or 'none'}."
        )


def _checked_root(name: str, opener: Callable[..., SegmentationDataset], root: str | Path | None) -> Path | None:
    """Return the root of a dataset that is read from files, None for one that is drawn."""
    if "root" not in inspect.signature(opener).parameters:
        if root is not None:
            raise DataError(f"dataset {name!r} needs no folder, but root={str(root)!r} is given: leave it out.")
        return None
    if root is None:
        raise DataError(f"dataset {name!r} is read from a folder: give its root.")
    return Path(root)
