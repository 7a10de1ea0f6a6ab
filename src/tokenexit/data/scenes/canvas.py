"""Tools that draw scenes: colours, random numbers, light, camera, street and painter.

`s` metres right of the camera, `y` above the road, `z` ahead. Materials stand for a class and a colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tokenexit.inputs.labels import Labels

Colour: TypeAlias = tuple[float, float, float]
Point: TypeAlias = tuple[float, float]
Plane: TypeAlias = Callable[[float, float], Point]  # flat object coordinates in metres -> canvas
Pixels: TypeAlias = npt.NDArray[np.uint8]
FloatMap: TypeAlias = npt.NDArray[np.float32]
Thing: TypeAlias = tuple[float, Callable[[], None]]  # metres, how to draw it
T = TypeVar("T")

SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, POLE, SIGN, VOID = range(10)
# fmt: off
SCENE_LABELS = Labels(
    names=("sky", "building", "road", "pavement", "tree", "car", "person", "pole", "sign"),
    palette=(
        (70, 130, 180), (70, 70, 70), (128, 64, 128), (244, 35, 232), (107, 142, 35),
        (0, 0, 142), (220, 20, 60), (153, 153, 153), (220, 220, 0),
    ),
    ignore_index=255,
)
SPLIT_SEEDS = {"train": 0, "val": 1, "test": 2}
SPLIT_LENGTHS = {"train": 4000, "val": 200, "test": 500}
MIN_SIDE, MAX_SIDE, NUM_SEEDS = 16, 2048, 2**32

SCALE = 2  # canvas pixels per image pixel
NEAR, FAR = 1.2, 110.0  # metres: the part of the street that is drawn
CIRCLE = (
    (1.0, 0.0), (0.87, 0.5), (0.5, 0.87), (0.0, 1.0), (-0.5, 0.87), (-0.87, 0.5),
    (-1.0, 0.0), (-0.87, -0.5), (-0.5, -0.87), (0.0, -1.0), (0.5, -0.87), (0.87, -0.5),
)
# Texture by class, as shares of the brightness: grain of one pixel, leaf-sized and wall-sized noise.
TEXTURE = np.array([
    (0, 0, 0), (0.07, 0.04, 0.14), (0.1, 0.05, 0.12), (0.08, 0.05, 0.1), (0.32, 0.3, 0.12), (0.05, 0.03, 0.12),
    (0.12, 0.08, 0.05), (0.08, 0.04, 0.1), (0.06, 0.03, 0.08), (0.06, 0.03, 0.08),
], np.float32)
PAINTS: tuple[Colour, ...] = (
    (225, 226, 228), (150, 154, 160), (95, 99, 105), (42, 43, 48), (160, 28, 30), (30, 60, 130), (35, 75, 60),
    (200, 165, 40), (120, 100, 80), (70, 110, 160), (190, 70, 30),
    (200, 202, 205), (120, 124, 130), (64, 67, 74), (28, 29, 33), (235, 233, 226),  # most cars are grey
)
WALLS: tuple[Colour, ...] = (
    (150, 148, 145), (120, 118, 118), (176, 164, 142), (160, 96, 74), (128, 74, 60), (206, 196, 172), (188, 150, 110),
    (100, 110, 122), (196, 178, 172), (170, 184, 178),
)
PANES: tuple[Colour, ...] = ((52, 60, 70), (84, 96, 110), (44, 46, 50), (120, 130, 138))
ROOFS: tuple[Colour, ...] = ((120, 62, 46), (84, 80, 82), (100, 84, 72), (70, 66, 72))
LEAVES: tuple[Colour, ...] = ((66, 96, 44), (88, 112, 48), (52, 82, 46), (112, 118, 52), (150, 104, 44), (76, 92, 66))
CLOTHES: tuple[Colour, ...] = (
    (40, 42, 52), (70, 74, 84), (120, 30, 36), (34, 58, 110), (210, 206, 200), (140, 120, 90), (60, 90, 60),
    (200, 120, 40), (96, 60, 110), (28, 28, 30), (170, 60, 90),
)
SKINS: tuple[Colour, ...] = ((232, 190, 164), (198, 150, 118), (140, 98, 70), (92, 62, 46))
HAIRS: tuple[Colour, ...] = ((30, 24, 20), (90, 64, 40), (150, 140, 130), (60, 40, 26))


class CarModel(NamedTuple):
    """A car: outline, from the rear over the roof, and side windows in shares of length and height, those in metres."""

    body: tuple[Point, ...]
    panes: tuple[tuple[Point, ...], ...]
    length: float
    width: float
    height: float


_HATCHBACK = CarModel(
    (
        (0, 0.2), (0, 0.62), (0.02, 0.66), (0.1, 0.97), (0.16, 1), (0.52, 1), (0.7, 0.66), (0.97, 0.56),
        (1, 0.4), (1, 0.2),
    ),
    (
        ((0.1, 0.68), (0.15, 0.93), (0.34, 0.94), (0.34, 0.67)),
        ((0.37, 0.67), (0.37, 0.94), (0.51, 0.94), (0.66, 0.67)),
    ),
    4.1, 1.75, 1.5,
)
_SALOON = CarModel(
    (
        (0, 0.2), (0, 0.6), (0.16, 0.66), (0.3, 0.98), (0.36, 1), (0.56, 1), (0.72, 0.66), (0.97, 0.56),
        (1, 0.4), (1, 0.2),
    ),
    (
        ((0.21, 0.68), (0.32, 0.93), (0.43, 0.94), (0.43, 0.67)),
        ((0.46, 0.67), (0.46, 0.94), (0.55, 0.94), (0.69, 0.67)),
    ),
    4.6, 1.8, 1.44,
)
_VAN = CarModel(
    ((0, 0.14), (0, 0.55), (0.01, 0.9), (0.03, 1), (0.7, 1), (0.88, 0.58), (0.99, 0.48), (1, 0.3), (1, 0.14)),
    (((0.64, 0.6), (0.64, 0.9), (0.72, 0.9), (0.85, 0.6)),),
    5.3, 2.0, 2.3,
)
CARS = (_HATCHBACK, _SALOON, _VAN, _HATCHBACK._replace(length=4.5, width=1.85, height=1.7))
# fmt: on


class Dice:
    """Random decisions from one stream; numbers are fetched in blocks, many times faster than one by one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._left: list[float] = []

    def roll(self) -> float:
        """Draw a number in [0, 1)."""
        if not self._left:
            self._left = self.rng.random(2048).tolist()
        return self._left.pop()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.roll()

    def chance(self, probability: float) -> bool:
        return self.roll() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.roll() * len(items))]

    def grey(self, low: float, high: float, spread: float = 10) -> Colour:
        """Draw a nearly grey colour, warm or cold."""
        value, warm = self.between(low, high), self.between(-spread, spread)
        return value + warm, value, value - warm

    def near(self, colour: Colour, factor: float = 0.15) -> Colour:
        """Return the colour, a little brighter or darker."""
        bright = self.between(1 - factor, 1 + factor)
        return colour[0] * bright, colour[1] * bright, colour[2] * bright

    def along(self, start: float, step: float, chance: float, end: float) -> Iterator[float]:
        """Draw distances from `start` to `end`, about `step` apart, each taken with probability `chance`."""
        z = start + step * self.roll()
        while z < end:
            if self.chance(chance):
                yield z
            z += step * self.between(0.75, 1.4)


@dataclass(frozen=True)
class Light:
    """Weather and time of day. Colours are RGB in 0..255.

    top, low: sky overhead and at the horizon, which is the colour of haze, too. tint: factor on every surface.
    fog: haze per metre, as a share. shadow: darkness of sun shadows in 0..1. sun: the side it shines from, -1 or 1.
    cover: share of clouds. lamps: share of windows with light.
    """

    top: Colour
    low: Colour
    cloud: Colour
    tint: Colour
    fog: float
    shadow: float
    sun: int
    cover: float
    lamps: float


@dataclass(frozen=True)
class Camera:
    """A pinhole `height` metres above a road that may bend, rise and lean.

    focal, u0, v0: focal length and vanishing point in canvas pixels. bend, rise: curvature of the road to the right and
    upwards in 1 / metre. roll: slope of the horizon. near: metres to the first road seen at the lower border.
    """

    focal: float
    u0: float
    v0: float
    height: float
    bend: float
    rise: float
    roll: float
    near: float

    def point(self, s: float, y: float, z: float) -> Point:
        k = self.focal / z
        du = k * s + 0.5 * self.focal * self.bend * z
        return self.u0 + du, self.v0 + k * (self.height - y) - 0.5 * self.focal * self.rise * z + self.roll * du


@dataclass(frozen=True)
class Street:
    """A street with kerbs at s = `left` and `right`, `lanes` between them, pavements `pave` metres wide.

    cars ... poles: how full the street is of each, 0..1.
    """

    left: float
    right: float
    lanes: int
    pave: float
    cars: float
    people: float
    trees: float
    houses: float
    poles: float

    def beside(self, side: int, metres: float) -> float:
        """Return s at `metres` outside the kerb of a side (-1 left, 1 right)."""
        return self.right + metres if side > 0 else self.left - metres


class Painter:
    """The canvas: shapes made of materials. size: (H, W) of the image."""

    def __init__(self, dice: Dice, size: tuple[int, int], camera: Camera, light: Light) -> None:
        self.dice, self.size, self.camera, self.light = dice, size, camera, light
        self.height, self.width = size[0] * SCALE, size[1] * SCALE
        self.ids = Image.new("I", (self.width, self.height), 0)
        self.shadows = Image.new("L", (size[1], size[0]), 0)  # falls on ground only, so it needs no depth
        self._ids, self._shadows = ImageDraw.Draw(self.ids), ImageDraw.Draw(self.shadows)
        self.materials: list[tuple[int, ...]] = [(0, 0, 0, 255, SKY, 0, 0)]  # columns: see `material`

    def material(self, label: int, colour: Colour, z: float, bright: float = 1.0, ground: bool = False) -> int:
        """Return the number of a new material at z metres; ground takes its haze row by row in `develop` instead.

        Columns: red, green, blue, share of sky, class, is ground, how clear its texture is through the haze (0..255).
        """
        haze = 0.0 if ground else self.light.fog * z / (1 + self.light.fog * z)
        keep = bright * (1 - haze)
        red, green, blue = (
            min(255, max(0, int(c * t * keep + h * haze))) for c, t, h in zip(colour, self.light.tint, self.light.low)
        )
        self.materials.append((red, green, blue, 0, label, int(ground), int(255 * (1 - haze))))
        return len(self.materials) - 1

    def polygon(self, material: int, points: Sequence[Point]) -> None:
        self._ids.polygon(points, fill=material)

    def shape(self, material: int, plane: Plane, corners: Iterable[Point]) -> None:
        """Draw a polygon in the coordinates of a plane."""
        self._ids.polygon([plane(a, b) for a, b in corners], fill=material)

    def box(self, material: int, plane: Plane, a0: float, a1: float, b0: float, b1: float) -> None:
        self._ids.polygon([plane(a0, b0), plane(a1, b0), plane(a1, b1), plane(a0, b1)], fill=material)

    def disc(self, material: int, centre: Point, rx: float, ry: float) -> None:
        """Draw an ellipse; radii in canvas pixels, at least one."""
        (u, v), rx, ry = centre, max(rx, 1.0), max(ry, 1.0)
        self._ids.ellipse((u - rx, v - ry, u + rx, v + ry), fill=material)

    def strip(self, material: int, s0: float, s1: float, z0: float, z1: float) -> None:
        """Draw ground between s0 and s1, with as many corners as a bend needs."""
        point, shares = (
            self.camera.point,
            (0, 0.01, 0.03, 0.07, 0.15, 0.25, 0.4, 0.6, 0.8, 1) if z1 > 1.5 * z0 else (0, 1),
        )
        zs = [z0 + (z1 - z0) * share for share in shares]
        self.polygon(material, [point(s0, 0, z) for z in zs] + [point(s1, 0, z) for z in reversed(zs)])

    def wall(self, material: int, s: float, y0: float, y1: float, z0: float, z1: float) -> None:
        """Draw an upright surface along the street."""
        point, zs = self.camera.point, [z0 + (z1 - z0) * share for share in (0, 0.1, 0.3, 0.6, 1)]
        self.polygon(material, [point(s, y0, z) for z in zs] + [point(s, y1, z) for z in reversed(zs)])

    def shadow(self, strength: float, corners: Sequence[Point]) -> None:
        """Darken the ground between the (s, z) corners."""
        points = [self.camera.point(s, 0, max(z, self.camera.near)) for s, z in corners]
        self._shadows.polygon([(u / SCALE, v / SCALE) for u, v in points], fill=int(255 * strength))

    def upright(self, s: float, z: float) -> Plane:
        """Return the plane at (s, z) that faces the camera: metres to the right, metres above the road."""
        (u, v), k = self.camera.point(s, 0, z), self.camera.focal / z
        return lambda a, b: (u + k * a, v - k * b)

    def pixels(self, metres: float, z: float) -> float:
        """Return the canvas pixels of a length that faces the camera."""
        return metres * self.camera.focal / z
