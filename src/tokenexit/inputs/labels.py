"""Class names and colours of a mask are read from data and saved with a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tokenexit.errors import ConfigError
from tokenexit.runtime.schema import check_keys, fits, shown

Colour: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Labels:
    """The classes of a mask: name and colour of each, and the value of void pixels. Class k is the mask value k.

    Attributes:
        names: name of each class, none empty or given twice.
        palette: RGB colour (0..255) of each class.
        ignore_index: mask value of void pixels, outside the classes.

    Raises:
        ConfigError: where lengths differ, a name is empty or given twice, a colour is no RGB triple, or `ignore_index`
            is also a class.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        # Lists (from JSON or YAML) become tuples, so that equal labels compare and hash equal.
        object.__setattr__(self, "names", as_tuple("names", self.names))
        object.__setattr__(self, "palette", tuple(as_tuple("palette", c) for c in as_tuple("palette", self.palette)))
        if not self.names:
            raise ConfigError("labels.names is empty: name at least one class.")
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ConfigError(f"labels.names holds {shown(name)}: every class name must be a non-empty string.")
        repeated = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if repeated:
            raise ConfigError(f"labels.names holds {repeated[0]!r} more than once: give each class its own name.")
        if len(self.palette) != len(self.names):
            raise ConfigError(
                f"labels.palette has {len(self.palette)} colours for {len(self.names)} class names: give one "
                "colour per class."
            )
        for name, colour in zip(self.names, self.palette):
            if len(colour) != 3 or not all(is_int(c) and 0 <= c <= 255 for c in colour):
                raise ConfigError(
                    f"labels.palette gives {shown(colour)} for class {name!r}: a colour is three whole numbers "
                    "from 0 to 255."
                )
        if not is_int(self.ignore_index):
            raise ConfigError(f"labels.ignore_index is {shown(self.ignore_index)}: it must be a whole number.")
        if 0 <= self.ignore_index < len(self.names):
            raise ConfigError(
                f"labels.ignore_index={self.ignore_index} is also class {self.names[self.ignore_index]!r}: "
                f"choose a value outside 0..{len(self.names) - 1}."
            )

    @property
    def num_classes(self) -> int:
        """Number K of classes, without the ignored value."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers only, as JSON and YAML hold them."""
        return {
            "names": list(self.names),
            "palette": [list(colour) for colour in self.palette],
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Labels:
        """The inverse of `to_dict`. Raises `ConfigError` for unknown or missing keys."""
        check_keys("labels", values, known=("names", "palette", "ignore_index"), needed=("names", "palette"))
        return cls(**values)


def default_labels(num_classes: int) -> Labels:
    """Return labels for a model without names: class_0, class_1, ..., each with a colour that is always the same."""
    if not is_int(num_classes) or num_classes < 1:
        raise ConfigError(f"num_classes={num_classes!r} cannot be labelled: give a whole number of at least 1.")
    ignore_index = 255 if num_classes <= 255 else 65535
    return Labels(
        names=tuple(f"class_{k}" for k in range(num_classes)),
        palette=default_palette(num_classes),
        ignore_index=ignore_index,
    )


def default_palette(num_classes: int) -> tuple[Colour, ...]:
    """Return K different colours, always the same: the bits of k + 1 are dealt to red, green, blue in turn.

    The lowest bits weigh most. Neighbouring classes therefore lie far apart, no class is black, and the first
    colours do not change with K.
    """
    return tuple(_spread_colour(k + 1) for k in range(num_classes))


def _spread_colour(code: int) -> Colour:
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= ((code >> bit) & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def is_int(value: object) -> bool:
    return fits(value, int)


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ConfigError(f"labels.{name} is {shown(value)}: give a list.")


IgnoredPixels = Literal["left_out", "counted"]
