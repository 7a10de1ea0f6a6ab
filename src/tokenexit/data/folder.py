"""Images and masks of your own: `images/SPLIT/NAME.jpg` beside `annotations/SPLIT/NAME.png`, or any other names.

NAME may contain sub-folders. Where images have no folders for splits, `train.txt`, `val.txt` and others list the names
or paths of each; without such lists images are split by file name. A mask holds one class index per pixel (a palette
PNG is read as its indices), or, with `masks: colour`, the colour of its class. What they mean is given as `Labels` and
options, or stands in `dataset.yaml` beside the two folders:

    classes: [background, leaf, fruit]
    palette: [[0, 0, 0], [0, 160, 60], [200, 30, 30]]   # optional with index masks
    ignore_index: 255                                   # optional: void in index masks, and in what is read
    reduce_zero_label: false                            # optional: 0 in files is void, 1 the first class
    ignore_values: []                                   # optional: further values in files that are void

for masks painted in colours:

    masks: colour                                       # RGB, RGBA, or a palette PNG read as its colours
    ignore_colours: [[255, 255, 255]]                   # optional: colours that are void
    unknown_colours: refuse                             # optional: or ignore, then every other colour is void

and where files have other names:

    images: img                                         # folder of the images; or {split}/img
    annotations: gt                                     # folder of the masks, which may be that of the images
    image_suffix: _image                                # what follows the name that both share, before .jpg
    mask_suffix: _annotation                            # or with its extension, as in _annotation.png
    lists: splits                                       # folder of train.txt, val.txt, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenexit.data.files import FileDataset, OnUnpaired
from tokenexit.data.folder_layout import FolderLayout
from tokenexit.data.masks import ColourMasks, IndexMasks, MaskFormat, UnknownColours
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.labels import Colour, Labels, default_palette
from tokenexit.runtime.schema import parse_yaml, read_bytes

DATASET_FILE = "dataset.yaml"

MaskKind: TypeAlias = Literal["index", "colour"]

_INDEX_KEYS = ("reduce_zero_label", "ignore_values")
_COLOUR_KEYS = ("ignore_colours", "unknown_colours")
_LAYOUT_KEYS = tuple(key.name for key in fields(FolderLayout))
_KEYS = ("classes", "palette", "ignore_index", "masks", *_INDEX_KEYS, *_COLOUR_KEYS, *_LAYOUT_KEYS)


class FolderDataset(FileDataset):
    """A split of a folder; images and masks are decoded when a sample is read.

    root: holds the images and masks. split: a folder within both, a list, or train, val and test drawn by file name.
    labels and the options up to `unknown_colours`: what the mask values mean, as in `IndexMasks` and `ColourMasks`;
    with `labels=None` all of it is read from `dataset.yaml` in root. unpaired: "refuse" files without partner, or
    "skip" them. images to lists: as in `FolderLayout`; what is not given stands in `dataset.yaml`.

    Raises `DataError` where folders or partners are missing, and, when a sample is read, where files are
    damaged or do not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        labels: Labels | None = None,
        reduce_zero_label: bool = False,
        ignore_values: Iterable[int] = (),
        masks: MaskKind = "index",
        ignore_colours: Iterable[Colour] = (),
        unknown_colours: UnknownColours = "refuse",
        unpaired: OnUnpaired = "refuse",
        images: str | None = None,
        annotations: str | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        lists: str | None = None,
    ) -> None:
        root = Path(root)
        self.split = split
        layout = read_layout(root, images, annotations, image_suffix, mask_suffix, lists)
        pairing, note = layout.open(root, split)
        if labels is None:
            mask_format = read_dataset_file(root / DATASET_FILE)
        else:
            given = {"reduce_zero_label": reduce_zero_label, "ignore_values": tuple(ignore_values)}
            given |= {"ignore_colours": tuple(ignore_colours), "unknown_colours": unknown_colours}
            mask_format = build_mask_format(labels, masks, given)
        super().__init__(mask_format, pairing, unpaired, note)

    @staticmethod
    def splits(
        root: str | Path,
        images: str | None = None,
        annotations: str | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        lists: str | None = None,
    ) -> tuple[str, ...]:
        """Return the splits that have images. Raises `DataError` where root has no folder for any."""
        root = Path(root)
        return read_layout(root, images, annotations, image_suffix, mask_suffix, lists).splits(root)


def read_layout(root: Path, *given: str | None) -> FolderLayout:
    """Return the layout as given, in the order of the fields of `FolderLayout`, else that of `dataset.yaml`, if any.

    Raises `DataError` where the file cannot be read, `ConfigError` for impossible names."""
    path = root / DATASET_FILE
    written: dict[str, Any] = {}
    if path.is_file():
        values = _values(path)
        written = {key: values[key] for key in _LAYOUT_KEYS if key in values}
    try:
        layout = FolderLayout(**written)
    except ConfigError as error:
        raise DataError(f"file {str(path)!r}: {error}") from None
    return replace(layout, **{key: value for key, value in zip(_LAYOUT_KEYS, given) if value is not None})


def build_mask_format(labels: Labels, masks: str, options: Mapping[str, Any]) -> MaskFormat:
    """`IndexMasks` or `ColourMasks`. Raises `ConfigError` for an option that the other kind has."""
    own, other = (_INDEX_KEYS, _COLOUR_KEYS) if masks == "index" else (_COLOUR_KEYS, _INDEX_KEYS)
    if masks not in ("index", "colour"):
        raise ConfigError(f"masks must be 'index' or 'colour', got {masks!r}: choose one.")
    for key in other:
        if options.get(key) not in (None, False, (), "refuse"):
            raise ConfigError(f"{key}={options[key]!r} does not apply to masks={masks!r}: leave it out.")
    known = {key: options[key] for key in own if key in options}
    return IndexMasks(labels, **known) if masks == "index" else ColourMasks(labels, **known)


def read_dataset_file(path: Path) -> MaskFormat:
    """Read labels and mask format from `dataset.yaml`. Raises `DataError` naming the file and what is wrong."""
    if not path.is_file():
        raise DataError(
            f"file {str(path)!r} does not exist: write the class names there, as in 'classes: [road, tree]'."
        )
    values = _values(path)
    try:
        return _format_from(values)
    except ConfigError as error:
        raise DataError(f"file {str(path)!r}: {error}") from None


def _values(path: Path) -> Mapping[str, Any]:
    """Read the values of the file; none if it is no mapping."""
    try:
        values = parse_yaml(read_bytes(path))
    except OSError as error:
        raise DataError(f"file {str(path)!r} cannot be read ({error.strerror}): check its permissions.") from None
    except ValueError as error:
        raise DataError(f"file {str(path)!r} is no valid YAML ({error}): correct it.") from None
    return values if isinstance(values, Mapping) else {}


def _format_from(values: Mapping[str, Any]) -> MaskFormat:
    if "classes" not in values:
        raise ConfigError("it lists no classes: add a line such as 'classes: [road, tree]'.")
    unknown = [str(key) for key in values if key not in _KEYS]
    if unknown:
        raise ConfigError(f"the key {unknown[0]!r} is unknown: the keys are {', '.join(_KEYS)}.")
    options = {key: values[key] for key in (*_INDEX_KEYS, *_COLOUR_KEYS) if values.get(key) is not None}
    for key in ("classes", "ignore_values", "ignore_colours"):
        if not isinstance(values.get(key) or [], list):
            raise ConfigError(f"{key} must be a list: write it as in 'classes: [road, tree]'.")
        if key in options:
            options[key] = tuple(options[key])
    if not isinstance(options.get("reduce_zero_label", False), bool):
        raise ConfigError(f"reduce_zero_label must be true or false, got {options['reduce_zero_label']!r}: correct it.")
    classes, masks = values["classes"] or [], values.get("masks", "index")
    if masks == "colour" and not values.get("palette"):
        raise ConfigError("masks are colours, but there is no palette: list the colour of each class.")
    palette = values.get("palette") or default_palette(len(classes))
    labels = Labels(tuple(classes), palette, values.get("ignore_index", 255))
    return build_mask_format(labels, masks, options)
