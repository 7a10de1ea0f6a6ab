"""Render a whole scene: choose light, camera and street, place things back to front, develop image and mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tokenexit.data.base import Sample
from tokenexit.data.scenes.canvas import (
    FAR,
    MAX_SIDE,
    MIN_SIDE,
    NEAR,
    NUM_SEEDS,
    SCALE,
    SCENE_LABELS,
    SPLIT_LENGTHS,
    SPLIT_SEEDS,
    TEXTURE,
    VOID,
    Camera,
    Dice,
    FloatMap,
    Light,
    Painter,
    Pixels,
    Street,
    Thing,
)
from tokenexit.data.scenes.things import (
    draw_backdrop,
    draw_building,
    draw_car,
    draw_crossing_car,
    draw_foreground,
    draw_ground,
    draw_hedge,
    draw_lamp,
    draw_markings,
    draw_person,
    draw_post,
    draw_sign,
    draw_tree,
)
from tokenexit.errors import ConfigError, DataError

# ------------------------------------------------------------------------------------------------ the whole image


def choose_light(dice: Dice, difficulty: float) -> Light:
    """Choose a light: sunny, overcast, dusk or hazy; haze grows with difficulty."""
    kind, low, grey = dice.roll(), dice.between(0, 30), dice.between(150, 200)
    light = Light(
        top=(dice.between(50, 110), dice.between(110, 160), dice.between(180, 225)),
        low=(185 + low, 205 + low, 222 + low),
        cloud=(245, 245, 246),
        tint=(1.1, 1.06, 0.98),
        fog=0.002 + 0.006 * difficulty * dice.roll(),
        shadow=0.55,
        sun=dice.pick((-1, 1)),
        cover=dice.between(0, 0.6),
        lamps=0,
    )
    if kind < 0.4:
        return light
    white, dull = (185 + low, 186 + low, 188 + low), (grey - 25, grey - 25, grey - 22)
    if kind < 0.7:
        light = replace(light, top=(grey, grey + 4, grey + 10), low=white, cloud=dull, tint=(0.82, 0.84, 0.87))
        return replace(light, fog=1.5 * light.fog, shadow=0.08, cover=light.cover + 0.5)
    if kind < 0.85:
        top = (dice.between(45, 90), dice.between(55, 90), dice.between(95, 140))
        light = replace(light, top=top, low=(215 + low, 150 + low, 120), cloud=(130, 96, 110), tint=(0.62, 0.52, 0.52))
        return replace(light, shadow=0.15, lamps=0.6)
    light = replace(light, top=(180, 186, 192), low=white, cloud=(205, 208, 210), tint=(0.9, 0.9, 0.88))
    return replace(light, fog=4 * light.fog + 0.006, shadow=0.1)


def choose_camera(dice: Dice, size: tuple[int, int]) -> Camera:
    """Choose a camera: field of view, horizon, and the bend, rise and lean of the road."""
    height, width = size[0] * SCALE, size[1] * SCALE
    focal, v0, above = dice.between(0.75, 1.05), dice.between(0.36, 0.54) * height, dice.between(1.25, 1.9)
    focal *= math.sqrt(height * width)
    return Camera(
        focal=focal,
        u0=dice.between(0.35, 0.65) * width,
        v0=v0,
        height=above,
        bend=dice.between(-0.009, 0.009) if dice.chance(0.6) else 0.0,
        rise=dice.between(-0.00015, 0.0006),  # a road that falls off more would hide its own end
        roll=dice.between(-0.03, 0.03),
        near=min(NEAR, 0.8 * focal * above / (height - v0)),
    )


def choose_street(dice: Dice, difficulty: float) -> Street:
    """Choose widths, the camera's lane, and how much of everything: around `difficulty`, different in every scene."""
    lanes, lane = dice.pick((1, 2, 2, 2, 3, 4)), dice.between(2.9, 3.6)
    room = dice.pick((0.8, 4.4))  # without or with parking on both sides
    own = (int(lanes * dice.roll()) + 0.5) * lane + room / 2
    cars, people, trees, houses, poles = (min(1.0, difficulty * dice.between(0.5, 1.6)) for _ in range(5))
    right, pave = lanes * lane + room - own, dice.between(2, 6)
    return Street(-own, right, lanes, pave, cars=cars, people=people, trees=trees, houses=houses, poles=poles)


def place_things(p: Painter, street: Street) -> list[Thing]:
    """Place everything that stands in the street: its distance, which decides what hides what, and how to draw it."""
    dice, things, lane = p.dice, list[Thing](), (street.right - street.left) / street.lanes
    for side in (-1, 1):
        kerb = partial(street.beside, side)
        things += place_houses(p, street, side)
        things += [(z, partial(draw_tree, p, kerb(0.7), z)) for z in dice.along(5, 9, 0.7 * street.trees, 90)]
        things += [(z, partial(draw_lamp, p, kerb(0.4), z, side)) for z in dice.along(4, 16, street.poles, 90)]
        things += [(z, partial(draw_sign, p, kerb(0.5), z)) for z in dice.along(3, 9, 0.7 * street.poles, 60)]
        if dice.chance(street.poles - 0.3):
            things += [(z, partial(draw_post, p, kerb(0.3), z, 1, 0.14)) for z in dice.along(3, 2, 1, 40)]
        for z in dice.along(2.5, 2.5, 0.7 * street.people, 50):
            things.append((z, partial(draw_person, p, kerb(dice.between(0.3, street.pave - 0.3)), z)))
        if street.right - street.left > 3.8 * street.lanes:  # room to park
            for z in dice.along(3, 7, 0.8 * street.cars, 80):
                things.append((z, partial(draw_car, p, kerb(-1.05), z, dice.chance(0.3))))
    for k in range(street.lanes):
        s = street.left + (k + 0.5) * lane
        things += [(z, partial(draw_car, p, s, z, s < -1)) for z in dice.along(7, 16, 0.5 * street.cars, 90)]
    for z in dice.along(8, 12, 0.4 * street.people, 45):
        things.append((z, partial(draw_person, p, dice.between(street.left, street.right), z)))
    if dice.chance(0.4 * street.cars):
        z = dice.between(14, 40)
        things.append((z, partial(draw_crossing_car, p, dice.between(-6, 6), z)))
    return things


def place_houses(p: Painter, street: Street, side: int) -> Iterator[Thing]:
    """Place lot after lot along one side: a house and its shadow, or a hedge with trees behind, or nothing.

    A house counts as far as its far end: whatever stands before it, up to that distance, is drawn later.
    """
    dice, near, front = p.dice, p.camera.near, street.beside(side, street.pave)
    z, gap = near - dice.between(0, 12), True
    while z < FAR:
        end, built = z + dice.between(8, 20), dice.chance(1.25 * street.houses)
        if end > 1.5 * near and built:
            yield end, partial(draw_building, p, side, front, z, end, gap)
            if p.light.sun == side:
                shade = front - 5 * side
                p.shadow(0.8 * p.light.shadow, ((front, z), (front, end), (shade, end), (shade, z)))
        elif end > 1.5 * near and dice.chance(street.trees):
            yield end, partial(draw_hedge, p, front, z, end)
            for t in dice.along(max(z, 4), 5, 0.7, end):
                yield t, partial(draw_tree, p, front + 4 * side, t)
        alley = dice.between(1, 6) if dice.chance(0.3) else 0.0
        z, gap = end + alley, not built or alley > 0


def develop(p: Painter) -> tuple[Pixels, Pixels]:
    """Develop the finished canvas to image (H, W, 3) with light, sky, texture, haze and noise, and mask (H, W)."""
    (height, width), light, camera, rng = p.size, p.light, p.camera, p.dice.rng
    ids, table = np.asarray(p.ids), np.array(p.materials, np.uint8)
    crisp = ids[::SCALE, ::SCALE]
    label, ground, clear = table[:, 4][crisp], table[:, 5][crisp], (table[:, 6] / np.float32(255))[crisp]

    rows = (np.arange(height, dtype=np.float32)[:, None] + 0.5) * SCALE  # (H, 1)
    depth = camera.focal * camera.height / np.maximum(rows - camera.v0, 1.0)
    fog = ground * (light.fog * depth / (1 + light.fog * depth))
    unit = math.sqrt(height * width) / 220  # texture keeps its look at any size
    grain = [_noise(rng, p.size, cell * unit) * TEXTURE[:, k][label] for k, cell in enumerate((1, 3, 28))]
    gain = (1 + clear * (grain[0] + grain[1] + grain[2])) * (1 - fog)
    gain *= 1 - ground * (np.asarray(p.shadows) * np.float32(0.8 / 255))

    rise = np.clip(rows / (camera.v0 + 1), 0, 1) ** 2  # 0 overhead, 1 at the horizon
    octaves = [_noise(rng, p.size, cell * unit, 2) * (cell / 110) for cell in (70, 28, 12)]
    clouds = np.clip((octaves[0] + octaves[1] + octaves[2] + (light.cover - 0.5)) * 1.5, 0, 0.9)
    noise = (rng.random((3, height, width), np.float32) - 0.5) * p.dice.between(4, 16)

    colours = np.ascontiguousarray(table[:, :4]).view(np.uint32)[:, 0][ids]  # four bytes in one look-up
    canvas = Image.frombuffer("RGBX", (p.width, p.height), colours, "raw", "RGBX", 0, 1).reduce(SCALE)
    share = np.asarray(canvas.getchannel(3)) * np.float32(1 / 255)  # of sky in each pixel; sky itself is black so far
    image = np.empty((height, width, 3), np.uint8)
    for k in range(3):  # channel by channel: numpy is slow at a last axis of three
        sky = light.top[k] + (light.low[k] - light.top[k]) * rise
        plane = np.asarray(canvas.getchannel(k)) * gain + share * (sky + clouds * (light.cloud[k] - sky))
        image[..., k] = np.clip(plane + fog * light.low[k] + noise[k], 0, 255)
    return image, np.where(label == VOID, SCENE_LABELS.ignore_index, label).astype(np.uint8)


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: float, stretch: float = 1.0) -> FloatMap:
    """Draw smooth noise (H, W) in -1..1 with spots of `cell` pixels, `stretch` times as wide as high."""
    (height, width), cell = size, max(cell, 1.0)
    rows, columns = max(2, int(height / cell) + 1), max(2, int(width / cell / stretch) + 1)
    seeds = rng.integers(0, 256, (rows, columns), np.uint8)
    if rows < height or columns < width:  # 8 bits: Pillow resizes them in integers, alike on every platform
        seeds = np.asarray(Image.fromarray(seeds).resize((width, height), Image.Resampling.BICUBIC))
    noise: FloatMap = seeds[:height, :width] * np.float32(1 / 127.5) - np.float32(1)
    return noise


def render_scene(seed: int, size: tuple[int, int] = (192, 256), difficulty: float = 0.5) -> tuple[Pixels, Pixels]:
    """Render one scene: image (H, W, 3) in RGB and mask (H, W) of `SCENE_LABELS`, the same for the same arguments.

    size: (H, W), 16 to 2048 pixels each. difficulty: 0 is an empty road under open sky, 1 a crowded street.

    Raises `ConfigError` for values outside.
    """
    size, difficulty = _checked_size(size), _checked_difficulty(difficulty)
    dice = Dice(np.random.default_rng(np.random.SeedSequence(_checked_int("seed", seed, 0, None))))
    street = choose_street(dice, difficulty)
    p = Painter(dice, size, choose_camera(dice, size), choose_light(dice, difficulty))
    draw_ground(p, street)
    draw_markings(p, street)
    draw_backdrop(p, street)
    for _, draw in sorted(place_things(p, street), key=lambda thing: -thing[0]):
        draw()
    draw_foreground(p, difficulty)
    return develop(p)


class Scenes:
    """A dataset of `length` scenes by index, each drawn when it is read.

    size: (H, W) in pixels. seed: scenes of different seeds have nothing in common. difficulty: of all scenes in 0..1,
    or None for the whole range, another one for each index.

    Raises `ConfigError` for impossible values.
    """

    labels = SCENE_LABELS

    def __init__(
        self, length: int, size: tuple[int, int] = (192, 256), seed: int = 0, difficulty: float | None = None
    ) -> None:
        self.length = _checked_int("length", length, 1, NUM_SEEDS)
        self.size = _checked_size(size)
        self.seed = _checked_int("seed", seed, 0, NUM_SEEDS - 1)
        self.difficulty = None if difficulty is None else _checked_difficulty(difficulty)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        index = range(self.length)[index]  # IndexError outside, negative counts from the end
        # As SeedSequence reads it, this number is the pair [seed, index]: each is one 32-bit word.
        image, mask = render_scene(self.seed + index * NUM_SEEDS, self.size, self.difficulty_of(index))
        return Sample(Image.fromarray(image), mask, f"scene-{self.seed}-{index:06d}")

    def difficulty_of(self, index: int) -> float:
        """Return the difficulty of a scene, 0..1."""
        if self.difficulty is not None:
            return self.difficulty
        # A third word: this number must not be the first of those that the scene itself is made of.
        return float(np.random.default_rng(np.random.SeedSequence([self.seed, index, 1])).random())


def scene_split(
    split: str, length: int | None = None, size: tuple[int, int] = (192, 256), difficulty: float | None = None
) -> Scenes:
    """Open "train", "val" or "test": a fixed seed each, 4000, 200 and 500 scenes if `length` is not given."""
    if split not in SPLIT_SEEDS:
        raise DataError(f"split {split!r} of the scenes is unknown: choose one of {', '.join(SPLIT_SEEDS)}.")
    return Scenes(SPLIT_LENGTHS[split] if length is None else length, size, SPLIT_SEEDS[split], difficulty)


def _checked_int(name: str, value: Any, low: int, high: int | None) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r} is impossible: give a whole number {wanted}.")
    return int(value)


def _checked_size(size: Any) -> tuple[int, int]:
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(type(side) is int and MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ConfigError(
            f"size={size!r} is no size of a scene: give (height, width) of {MIN_SIDE} to {MAX_SIDE} pixels each."
        )
    return size[0], size[1]


def _checked_difficulty(difficulty: Any) -> float:
    number = isinstance(difficulty, (int, float)) and not isinstance(difficulty, bool)
    if not number or not 0 <= difficulty <= 1:
        raise ConfigError(f"difficulty={difficulty!r} is out of range: give a number from 0 (empty) to 1 (crowded).")
    return float(difficulty)
