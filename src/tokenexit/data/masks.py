"""Formats of mask files: class indices from numbers, or from colours of a palette.

Both kinds read a file to *codes*, one whole number per pixel, and translate codes to classes. Values that stand for
nothing are counted, not raised, so that a check of a whole dataset can go on; `decode` raises them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tokenexit.data.base import Mask
from tokenexit.errors import ConfigError, DataError
from tokenexit.inputs.images import decoder_reason, open_image
from tokenexit.inputs.labels import Colour, Labels

Codes: TypeAlias = npt.NDArray[np.integer[Any]]
Unknown: TypeAlias = dict[str, int]
"""Pixels by value, as a message writes it, for values that are neither class nor void; the most frequent first."""
UnknownColours: TypeAlias = Literal["refuse", "ignore"]

_INDEX_MODES = ("1", "L", "P", "I;16", "I;16L", "I;16B", "I;16N", "I")
_COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
_NUM_VALUES = 65536  # a mask file holds 16 bits at most
_TRANSPARENT = -1


class MaskFormat(Protocol):
    """A format of mask files: how to read them and what their values mean."""

    @property
    def labels(self) -> Labels: ...

    def read(self, path: str | Path) -> Codes:
        """Read the (H, W) codes of a file. Raises `DataError` where it is damaged or of another kind."""
        ...

    def translate(self, codes: Codes) -> tuple[Mask, Unknown]:
        """Translate (H, W) codes to (H, W) class indices; void and unknown values become `labels.ignore_index`."""
        ...

    def complaint(self, unknown: Unknown) -> str | None:
        """Describe unknown values and the cure for a message, or return None where they are to be ignored."""
        ...


@dataclass(frozen=True)
class IndexMasks:
    """Mask files with one number per pixel; a palette PNG is read as its indices.

    labels: the classes; `labels.ignore_index` is void in the files, too.
    reduce_zero_label: 0 in the files is void and k + 1 is class k.
    ignore_values: further numbers in the files that are void, be they classes or not.

    Raises `ConfigError` for numbers that no mask file can hold.
    """

    labels: Labels
    reduce_zero_label: bool = False
    ignore_values: tuple[int, ...] = ()
    # Two tables by file value, (65536,): the mask value, and whether it may stand in a file at all.
    _target: Mask = field(init=False, repr=False, compare=False)
    _known: npt.NDArray[np.bool_] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for value in self.ignore_values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _NUM_VALUES:
                raise ConfigError(
                    f"ignore_values must be whole numbers from 0 to {_NUM_VALUES - 1}, got {value!r}: correct it."
                )
        first, ignore = int(self.reduce_zero_label), self.labels.ignore_index
        if first + self.labels.num_classes > _NUM_VALUES:
            raise ConfigError(f"{self.labels.num_classes} classes do not fit into 16-bit masks: use fewer.")
        target = np.full(_NUM_VALUES, ignore, _narrowest_type(self.labels))
        known = np.zeros(_NUM_VALUES, np.bool_)
        target[first : first + self.labels.num_classes] = np.arange(self.labels.num_classes)
        known[: first + self.labels.num_classes] = True
        void = [v for v in (*self.ignore_values, ignore) if 0 <= v < _NUM_VALUES]
        target[void] = ignore
        known[void] = True
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_known", known)

    def read(self, path: str | Path) -> Codes:
        return read_index_image(path)

    def translate(self, codes: Codes) -> tuple[Mask, Unknown]:
        if codes.min() >= 0 and codes.max() < _NUM_VALUES:
            known, mask = self._known[codes], self._target[codes]
            if known.all():
                return mask, {}
        else:
            inside = (codes >= 0) & (codes < _NUM_VALUES)
            within = np.where(inside, codes, 0)
            known, mask = inside & self._known[within], self._target[within]
        mask[~known] = self.labels.ignore_index
        return mask, _count(codes[~known], str)

    def complaint(self, unknown: Unknown) -> str:
        first = int(self.reduce_zero_label)
        void = sorted({*self.ignore_values, self.labels.ignore_index, *range(first)})
        value, pixels = next(iter(unknown.items()))
        return (
            f"holds the value {value} in {number(pixels, 'pixel')}{_further(unknown, 'value')}, but classes are "
            f"{first}..{first + self.labels.num_classes - 1} and void is {', '.join(map(str, void))}: "
            "correct the mask, the class list or ignore_values."
        )


@dataclass(frozen=True)
class ColourMasks:
    """Mask files with every class in its colour of the palette: RGB, RGBA, palette or grey images.

    labels: the classes; each needs a colour of its own.
    ignore_colours: colours that are void.
    unknown_colours: "refuse" a file with any other colour, or "ignore" them: they are void.

    Of a wholly transparent pixel nothing can be seen: it counts as black where black is a class, and as void elsewhere.
    Raises `ConfigError` where a colour has two meanings.
    """

    labels: Labels
    ignore_colours: tuple[Colour, ...] = ()
    unknown_colours: UnknownColours = "refuse"
    # Known codes in rising order, and what each stands for.
    _codes: npt.NDArray[np.int32] = field(init=False, repr=False, compare=False)
    _target: Mask = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unknown_colours not in get_args(UnknownColours):
            raise ConfigError(
                f"unknown_colours must be 'refuse' or 'ignore', got {self.unknown_colours!r}: choose one."
            )
        object.__setattr__(self, "ignore_colours", tuple(_checked_colour(colour) for colour in self.ignore_colours))
        ignore = self.labels.ignore_index
        meaning: dict[int, int] = {}
        for k, colour in enumerate(self.labels.palette):
            other = meaning.setdefault(_code(colour), k)
            if other != k:
                names = self.labels.names
                raise ConfigError(
                    f"the colour {colour} stands for {names[other]!r} and for {names[k]!r}: masks read by colour need "
                    "a palette without repetition."
                )
        for colour in self.ignore_colours:
            if meaning.setdefault(_code(colour), ignore) != ignore:
                name = self.labels.names[meaning[_code(colour)]]
                raise ConfigError(f"ignore_colours holds {colour}, the colour of {name!r}: a class cannot be void.")
        meaning[_TRANSPARENT] = meaning.get(_code((0, 0, 0)), ignore)
        codes = sorted(meaning)
        object.__setattr__(self, "_codes", np.array(codes, np.int32))
        object.__setattr__(self, "_target", np.array([meaning[c] for c in codes], _narrowest_type(self.labels)))

    def read(self, path: str | Path) -> Codes:
        what = f"mask {str(path)!r}"
        try:
            with open_image(path) as image:
                mode = image.mode
                pixels: npt.NDArray[Any] | None = None
                if mode in _COLOUR_MODES:
                    pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        except Exception as error:  # decoders of damaged files raise nearly everything
            raise _undecodable(what, error) from None
        if pixels is None:
            raise DataError(f"{what} has mode {mode!r}, not 8-bit colour: save it as an RGB or RGBA PNG.")
        wide = pixels.astype(np.int32)  # (H, W, 3 or 4)
        codes = (wide[:, :, 0] << 16) | (wide[:, :, 1] << 8) | wide[:, :, 2]
        if pixels.shape[2] == 4:
            codes[pixels[:, :, 3] == 0] = _TRANSPARENT
        return codes

    def translate(self, codes: Codes) -> tuple[Mask, Unknown]:
        nearest = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        mask, known = self._target[nearest], self._codes[nearest] == codes
        if known.all():
            return mask, {}
        mask[~known] = self.labels.ignore_index
        return mask, _count(codes[~known], lambda c: str((c >> 16, c >> 8 & 255, c & 255)))

    def complaint(self, unknown: Unknown) -> str | None:
        if self.unknown_colours == "ignore":
            return None
        colour, pixels = next(iter(unknown.items()))
        return (
            f"holds the colour {colour} in {number(pixels, 'pixel')}{_further(unknown, 'colour')}, but no class has "
            "it: correct the mask or the palette, list it in ignore_colours, or set unknown_colours to 'ignore'."
        )


def decode(mask_format: MaskFormat, codes: Codes, what: str) -> Mask:
    """Translate (H, W) codes to (H, W) class indices. Raises `DataError`, naming `what`, for unknown values."""
    mask, unknown = mask_format.translate(codes)
    complaint = mask_format.complaint(unknown) if unknown else None
    if complaint is not None:
        raise DataError(f"{what} {complaint}")
    return mask


def read_index_image(path: str | Path) -> Codes:
    """Read a one-channel image as (H, W) integers, palette indices untouched.

    Raises `DataError` for anything else.
    """
    what = f"mask {str(path)!r}"
    try:
        with open_image(path) as image:
            mode = image.mode
            values = np.asarray(image) if mode in _INDEX_MODES else None
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise _undecodable(what, error) from None
    if values is None:
        raise DataError(
            f"{what} has mode {mode!r}, not one channel: save class indices as a grey or palette PNG, or read it with "
            "'masks: colour' from a generic folder."
        )
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _undecodable(what: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what} does not exist: check the path.")
    return DataError(f"{what} cannot be decoded ({decoder_reason(error)}): check that it is an undamaged PNG.")


def _count(codes: Codes, name: Any) -> Unknown:
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {name(int(values[i])): int(counts[i]) for i in order}


def number(count: int, thing: str) -> str:
    """Write a number with its noun: `1 pixel`, `2 pixels`."""
    return f"{count} {thing}{'s' if count != 1 else ''}"


def _further(unknown: Unknown, thing: str) -> str:
    return f" (and {number(len(unknown) - 1, f'further {thing}')})" if len(unknown) > 1 else ""


def _code(colour: Colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _checked_colour(colour: Any) -> Colour:
    if (
        not isinstance(colour, (list, tuple))
        or len(colour) != 3
        or not all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= 255 for c in colour)
    ):
        raise ConfigError(
            f"ignore_colours must hold three whole numbers from 0 to 255 each, got {colour!r}: correct it."
        )
    return colour[0], colour[1], colour[2]


def _narrowest_type(labels: Labels) -> type[np.integer[Any]]:
    """Return the narrowest integer type of all values: masks are copied, cropped and cached many times."""
    highest = max(labels.num_classes - 1, labels.ignore_index)
    return np.uint8 if labels.ignore_index >= 0 and highest <= 255 else np.int32
