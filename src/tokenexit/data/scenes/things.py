"""The objects of a street scene and how they are drawn: ground, buildings, trees, cars, people, poles and signs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from tokenexit.data.scenes.canvas import (
    BUILDING,
    CAR,
    CARS,
    CIRCLE,
    CLOTHES,
    FAR,
    HAIRS,
    LEAVES,
    PAINTS,
    PANES,
    PAVEMENT,
    PERSON,
    POLE,
    ROAD,
    ROOFS,
    SCALE,
    SIGN,
    SKINS,
    TREE,
    VOID,
    WALLS,
    CarModel,
    Painter,
    Plane,
    Point,
    Street,
)

# --------------------------------------------------------------------------------------- ground and background


def draw_ground(p: Painter, street: Street) -> None:
    """Draw pavements to the horizon, the road on them, kerbs, gutters and slabs."""
    dice, near = p.dice, p.camera.near
    stone, asphalt = dice.grey(120, 180, 16), dice.grey(70, 120, 8)
    pavement, joint = (p.material(PAVEMENT, stone, 0, bright, ground=True) for bright in (1, 0.8))
    road, gutter = (p.material(ROAD, asphalt, 0, bright, ground=True) for bright in (1, 0.8))
    kerb = p.material(PAVEMENT, dice.grey(150, 200), 0, ground=True)
    wide = FAR * p.width / p.camera.focal + 50  # beyond both borders even at the horizon
    left, right = (p.camera.point(s, 0, FAR) for s in (-wide, wide))
    p.polygon(pavement, [left, right, (right[0], 2 * p.height), (left[0], 2 * p.height)])
    p.strip(road, street.left, street.right, near, FAR)
    slab = dice.between(0.8, 1.6)
    for side in (-1, 1):
        edge, outer = street.beside(side, 0), street.beside(side, street.pave)
        for k in range(1, 14):
            p.strip(joint, edge, outer, near + k * slab, near + k * slab + 0.05)
        p.strip(joint, (edge + outer) / 2, (edge + outer) / 2 + 0.05, near, 30)
        p.strip(joint, outer - 0.06, outer + 0.06, near, 60)
        p.strip(kerb, edge, street.beside(side, 0.18), near, FAR)
        p.strip(gutter, edge, street.beside(side, -0.25), near, FAR)


def draw_markings(p: Painter, street: Street) -> None:
    """Draw repairs, manholes, lane lines, a crossing: all of class road."""
    dice, near, left, width = p.dice, p.camera.near, street.left, street.right - street.left
    for _ in range(int(dice.between(0, 5))):
        patch, s, z = (
            p.material(ROAD, dice.grey(60, 125, 6), 0, ground=True),
            left + width * dice.roll(),
            dice.between(near, 25),
        )
        p.strip(patch, s, min(street.right, s + dice.between(0.4, 2)), z, z + dice.between(1, 7))
    for _ in range(int(dice.between(0, 3))):
        lid, s, z = (
            p.material(ROAD, dice.grey(60, 90), 0, ground=True),
            left + width * dice.between(0.1, 0.9),
            dice.between(4, 16),
        )
        p.polygon(lid, [p.camera.point(s + 0.35 * a, 0, z + 0.35 * b) for a, b in CIRCLE])
    paint = p.material(ROAD, dice.pick(((215, 215, 210), (235, 235, 230), (205, 180, 90))), 0, ground=True)
    for lane in range(1, street.lanes):
        s = left + width * lane / street.lanes
        if 2 * lane == street.lanes and dice.chance(0.3):
            p.strip(paint, s - 0.07, s + 0.07, near, 90)
            continue
        for z in range(10):
            start = near * 1.5 + 7 * z
            p.strip(paint, s - 0.07, s + 0.07, start, start + 3)
    if dice.chance(0.6):
        for side in (-1, 1):
            s = street.beside(side, -0.5)
            p.strip(paint, s - 0.06, s + 0.06, near, 90)
    if dice.chance(0.35):
        z, stripes = dice.between(6, 22), int(width / 1.1)
        for k in range(stripes):
            s = left + width * (k + 0.25) / stripes
            p.strip(paint, s, s + 0.55, z, z + 3)
        p.strip(paint, left + width / 2, street.right, z - 1.6, z - 1.2)


def draw_backdrop(p: Painter, street: Street) -> None:
    """Draw what ends the view: tree line, skyline, and the haze in which they meet the ground (void)."""
    dice, metre, (u0, v0) = p.dice, p.pixels(1, FAR), p.camera.point(0, 0, FAR)

    def place(u: float, y: float) -> Point:
        return u, v0 + p.camera.roll * (u - u0) + metre * (1 - y)

    top, u = dice.between(1, 5 + 8 * street.trees), 0.0
    line = [place(0, 0)]
    while u < p.width + 9 * metre:
        line.append(place(u, top * dice.between(0.7, 1.2)))
        u += metre * dice.between(1.5, 5)
    p.polygon(p.material(TREE, dice.near(dice.pick(LEAVES)), 1.3 * FAR), [*line, place(u, 0)])
    u = 0.0
    while u < p.width:
        end = u + metre * dice.between(9, 26)
        if dice.chance(1.3 * street.houses - 0.1):
            colour, floors = dice.near(dice.pick(WALLS)), int(dice.between(3, 9))
            wall, band = (p.material(BUILDING, colour, 1.2 * FAR, bright) for bright in (0.95, 0.75))
            p.box(wall, place, u, end, 0, 3.4 * floors + 2)
            for k in range(1, floors):
                p.box(band, place, u + metre, end - metre, 3.4 * k, 3.4 * k + 1)
        u += (end - u) * dice.between(0.6, 1.3)
    thick = 0.006 * p.height / metre
    p.box(p.material(VOID, p.light.low, 0, 0.8), place, 0, p.width, -thick, thick)


# --------------------------------------------------------------------------------------------- things in the street


def draw_building(p: Painter, side: int, s: float, z0: float, z1: float, gap: bool) -> None:
    """Draw a house along the street from z0 to z1 metres, its front in the plane s; gap: its end wall can be seen."""
    dice, point, z0 = p.dice, p.camera.point, max(z0, p.camera.near)
    z, end_wall, deep = (z0 + z1) / 2, p.upright(s, z0), side * dice.between(8, 14)
    small, floor = dice.chance(0.35), dice.between(2.8, 3.6)
    floors = int(dice.between(2, 3.5) if small else dice.between(3, 8))
    high, colour = floor * floors + dice.between(0.3, 1), dice.near(dice.pick(WALLS))
    sunny = 1 + p.light.shadow * (0.25 if p.light.sun != side else -0.75)
    wall, trim, end = (p.material(BUILDING, colour, z, sunny * bright) for bright in (1, 1.25, 0.8))
    glass = [p.material(BUILDING, dice.near(pane, 0.3), z) for pane in PANES]
    glass += [p.material(BUILDING, (250, 205, 120), z, 1.5)] * int(6 * p.light.lamps)

    if small and dice.chance(0.8):  # a pitched roof: the slope to the street, the gable to the camera
        ridge, tiles = high + dice.between(2, 3.5), p.material(BUILDING, dice.near(dice.pick(ROOFS)), z, sunny)
        eaves, top = (s - 0.3 * side, high - 0.2), (s + deep / 2, ridge)
        p.polygon(tiles, [point(*top, z0), point(*top, z1), point(*eaves, z1), point(*eaves, z), point(*eaves, z0)])
        p.shape(end, end_wall, ((0, high), (deep / 2, ridge), (deep, high)))
    p.wall(wall, s, 0, high, z0, z1)
    p.wall(trim, s, high - 0.35, high, z0, z1)
    p.box(end, end_wall, 0, deep, 0, high)
    if gap and p.pixels(1, z0) > 4:
        for k in range(floors):
            for a in (0.2, 0.6):
                p.box(dice.pick(glass), end_wall, a * deep, (a + 0.15) * deep, k * floor + 1, k * floor + 2.3)
    shop = not small and dice.chance(0.6)
    if shop:
        p.wall(p.material(BUILDING, dice.near(dice.pick(PAINTS)), z, 0.8), s, 0, floor, z0, z1)

    bays, ribbon = max(1, int((z1 - z0) / dice.between(2.4, 4.2))), dice.chance(0.2)
    step, low, tall = (z1 - z0) / bays, dice.between(0.7, 1.1), dice.between(1.2, 1.9)
    for bay in range(bays):
        a, b = z0 + step * (bay + 0.2), z0 + step * (bay + (1.15 if ribbon else 0.75))
        (ua, va), (ub, _) = point(s, 0, a), point(s, 0, b)
        if abs(ua - ub) < 2.5 or max(ua, ub) < 0 or min(ua, ub) > p.width:
            continue  # too narrow to see, or beside the image
        for k in range(floors):
            y = k * floor + low
            if va - p.pixels(y, a) < 0:
                break  # above the image
            material, y0, y1 = dice.pick(glass), y, y + tall
            if k == 0 and shop:
                y0, y1 = 0.3, floor - 0.7
            elif k == 0 and bay == bays // 2:
                material, y0, y1 = end, 0, 2.2  # the door
            p.polygon(material, [point(s, y0, a), point(s, y0, b), point(s, y1, b), point(s, y1, a)])


def draw_hedge(p: Painter, s: float, z0: float, z1: float) -> None:
    """Draw a hedge along the pavement."""
    dice, point, z0 = p.dice, p.camera.point, max(z0, p.camera.near)
    colour, high = dice.near(dice.pick(LEAVES)), dice.between(0.8, 2.2)
    zs = [z0 + (z1 - z0) * share for share in (0, 0.05, 0.12, 0.25, 0.5, 0.75, 1)]
    tops = [point(s, high * dice.between(0.85, 1.15), z) for z in reversed(zs)]
    p.polygon(p.material(TREE, colour, z0, 0.8), [point(s, 0, z) for z in zs] + tops)
    p.box(p.material(TREE, colour, z0, 0.95), p.upright(s, z0), 0, 3 if s > 0 else -3, 0, high)


def draw_tree(p: Painter, s: float, z: float) -> None:
    """Draw a trunk and a crown of overlapping blobs, large and dark first, small and bright last; or a conifer."""
    dice, plane, metre = p.dice, p.upright(s, z), p.pixels(1, z)
    high, colour = dice.between(5, 10), dice.near(dice.pick(LEAVES), 0.2)
    shades = [p.material(TREE, colour, z, bright) for bright in (0.6, 0.75, 0.9, 1.05, 1.2)]
    bark = p.material(TREE, dice.near((84, 70, 56), 0.3), z)
    wide, lean, trunk = high * dice.between(0.2, 0.3), dice.between(-0.3, 0.3), 0.02 * high + 0.04
    draw_cast_shadow(p, s, z, 0.8 * wide, high)
    if dice.chance(0.2):
        p.box(bark, plane, -trunk, trunk, 0, 1.5)
        for k in range(7):
            y, half = 1 + 0.12 * high * k, wide * (1 - 0.13 * k) * dice.between(0.85, 1.1)
            p.shape(shades[k % 3], plane, ((-half, y), (half, y + dice.between(-0.2, 0.2)), (0, y + 0.26 * high)))
        return
    y = 0.6 * high
    p.shape(bark, plane, ((-1.3 * trunk, 0), (1.3 * trunk, 0), (lean + 0.7 * trunk, y), (lean - 0.7 * trunk, y)))
    blobs = 10 if metre < 16 else 24 if metre < 50 else 44  # metre: in canvas pixels
    for k in range(blobs):
        t, (a, b), r = k / blobs, dice.pick(CIRCLE), dice.roll()
        a, b = wide * (0.8 * r * a + 0.1 * t * p.light.sun), wide * (0.75 * r * b + 0.35 * t - 0.17)
        radius = metre * wide * dice.between(0.7, 1.3) * (0.5 - 0.33 * t)
        p.disc(
            shades[min(4, int(5 * t * dice.between(0.7, 1.3)))], plane(lean + a, 0.68 * high + b), radius, 0.85 * radius
        )


def draw_cast_shadow(p: Painter, s: float, z: float, half: float, high: float) -> None:
    """Draw the shadow of an upright thing on the ground: a long one from the sun, a small one beneath."""
    away, third = -0.6 * p.light.sun * high, half / 3
    far = ((s + away + half, z + 0.5), (s + away - half, z + 0.5))
    p.shadow(0.8 * p.light.shadow, ((s - third, z), (s + third, z), *far))
    p.shadow(0.35, [(s + half * a, z + 0.3 * half * b) for a, b in CIRCLE])


def draw_car_side(p: Painter, plane: Plane, car: CarModel, paint: int, glass: int, dark: int, z: float) -> None:
    """Draw body, windows and wheels in a plane of (share of length, share of height)."""
    p.shape(paint, plane, car.body)
    for pane in car.panes:
        p.shape(glass, plane, pane)
    rim = p.material(CAR, (130, 132, 136), z)
    for t in (0.19, 0.8):
        for material, radius in ((dark, 0.34), (rim, 0.2)):
            a, b = radius / car.length, radius / car.height
            p.shape(material, plane, [(t + a * x, 0.32 / car.height + b * y) for x, y in CIRCLE])


def draw_car(p: Painter, s: float, z: float, oncoming: bool) -> None:
    """Draw a car along the street, z metres away: the near end and the visible side."""
    dice, car = p.dice, p.dice.pick(CARS)
    half, far, front, away = car.width / 2, z + car.length, float(oncoming), -1.1 * p.light.sun
    colour, flank = dice.near(dice.pick(PAINTS)), dice.pick((0.7, 0.85, 1.1))
    dull, paint, shine = (p.material(CAR, colour, z, bright) for bright in (flank, 1, 1.25))
    glass, dark, plate = (p.material(CAR, c, z) for c in ((46, 54, 62), (26, 26, 28), (220, 220, 200)))
    lamp = p.material(CAR, (240, 240, 225) if oncoming else (190, 20, 24), z, 1 + p.light.lamps)
    p.shadow(0.7 * p.light.shadow, ((s - half, z), (s + half, z), (s + half + away, far), (s - half + away, far)))
    p.shadow(0.65, ((s - half, z - 0.15), (s + half, z - 0.15), (s + half, far), (s - half, far)))

    def place(offset: float, t: float, y: float) -> Point:  # offset: -1 left flank, 1 right flank
        inset = 1 - 0.42 * max(0.0, y - 0.62)
        return p.camera.point(s + offset * half * inset, y * car.height, z + car.length * (1 - t if oncoming else t))

    def across(material: int, wide: float, start: Point, end: Point, offset: float = 0) -> None:
        left, right = offset - wide, offset + wide
        p.polygon(material, [place(left, *start), place(right, *start), place(right, *end), place(left, *end)])

    for side in (-1, 1):
        if side * (place(side, 1 - front, 0.5)[0] - place(side, front, 0.5)[0]) > 0:
            draw_car_side(p, partial(place, side), car, dull, glass, dark, z)
    for offset in (-0.75, 0.75):
        across(dark, 0.15, (front, 0), (front, 0.3), offset)  # tyres
    outline = car.body[::-1] if oncoming else car.body
    for (t0, y0), (t1, y1) in pairwise(outline):
        across(shine if y1 - y0 < 0.12 else paint, 1, (t0, y0), (t1, y1))
        if y0 > 0.5 and y1 - y0 > 0.25:
            t, y = t1 - t0, y1 - y0
            across(glass, 0.88, (t0 + 0.12 * t, y0 + 0.12 * y), (t0 + 0.9 * t, y0 + 0.9 * y))
        if y1 == 1:
            break
    for offset in (-0.8, 0.8):
        across(lamp, 0.16, (front, 0.42), (front, 0.54), offset)
    across(plate, 0.25, (front, 0.3), (front, 0.37))
    across(dark, 0.95, (front, 0.18), (front, 0.25))


def draw_crossing_car(p: Painter, s: float, z: float) -> None:
    """Draw a car across the street, seen from the side."""
    dice, car, upright = p.dice, p.dice.pick(CARS), p.upright(s, z)
    way, half, far = dice.pick((-1, 1)), car.length / 2, z + car.width
    paint, glass, dark = (p.material(CAR, c, z) for c in (dice.near(dice.pick(PAINTS)), (46, 54, 62), (26, 26, 28)))
    p.shadow(0.65, ((s - half, z), (s + half, z), (s + half, far), (s - half, far)))
    draw_car_side(p, lambda t, y: upright(way * car.length * (t - 0.5), y * car.height), car, paint, glass, dark, z)


def draw_person(p: Painter, s: float, z: float) -> None:
    """Draw a person: legs in mid-stride, swinging arms, coat, head with hair."""
    dice, plane, shirt = p.dice, p.upright(s, z), p.dice.near(p.dice.pick(CLOTHES))
    h, stride, w = dice.between(1.5, 1.9), dice.between(-0.2, 0.2), dice.between(0.19, 0.27)
    coat, sleeve = (p.material(PERSON, shirt, z, bright) for bright in (1, 0.75))
    trousers = p.material(PERSON, dice.near(dice.pick(CLOTHES), 0.3), z, 0.8)
    skin, hair = (p.material(PERSON, dice.pick(colours), z) for colours in (SKINS, HAIRS))
    draw_cast_shadow(p, s, z, 0.3, h)
    for foot in (stride, -stride):
        p.shape(trousers, plane, ((foot - 0.07, 0), (foot + 0.1, 0), (0.6 * w, 0.5 * h), (-0.6 * w, 0.5 * h)))
    for side in (-1, 1):
        hand = side * (w - side * stride)
        p.shape(sleeve, plane, ((side * w, 0.8 * h), (hand + 0.07, 0.45 * h), (hand - 0.07, 0.45 * h), (0, 0.8 * h)))
    hem, neck = dice.between(0.36, 0.5) * h, 0.86 * h
    right = ((0.75 * w, hem), (w, 0.8 * h), (0.3 * w, neck))
    p.shape(coat, plane, [*right, *((-a, b) for a, b in reversed(right))])
    head = p.pixels(0.065 * h, z)
    p.disc(hair, plane(0, 0.935 * h), 1.05 * head, 1.15 * head)
    p.disc(skin, plane(dice.between(-0.02, 0.02), 0.92 * h), 0.85 * head, head)


def draw_post(p: Painter, s: float, z: float, high: float, thick: float) -> None:
    """Draw an upright post, at least one image pixel wide: thinner ones would leave holes in the mask."""
    plane, half, colour = p.upright(s, z), max(thick / 2, SCALE * z / p.camera.focal / 2), p.dice.grey(50, 160)
    draw_cast_shadow(p, s, z, thick, high)
    p.box(p.material(POLE, colour, z), plane, -half, half, 0, high)
    p.box(p.material(POLE, colour, z, 0.7), plane, 0, half, 0, high)


def draw_lamp(p: Painter, s: float, z: float, side: int) -> None:
    """Draw a lamp post whose arm reaches over the road."""
    plane, high, reach = p.upright(s, z), p.dice.between(5, 8), -side * p.dice.between(0.8, 2.2)
    draw_post(p, s, z, high, 0.16)
    thick, arm = max(0.1, SCALE * z / p.camera.focal), p.material(POLE, p.dice.grey(70, 130), z)
    p.shape(arm, plane, ((0, high - thick), (0, high), (reach, high + 0.4), (reach, high + 0.4 - thick)))
    light = (250, 235, 190) if p.light.lamps else (190, 190, 190)
    p.box(p.material(POLE, light, z, 1 + p.light.lamps), plane, reach - 0.35, reach + 0.35, high + 0.25, high + 0.42)


def draw_sign(p: Painter, s: float, z: float) -> None:
    """Draw a traffic sign or a traffic light on its post."""
    dice, plane, high, r = p.dice, p.upright(s, z), p.dice.between(2.2, 3.2), p.dice.between(0.35, 0.5)
    draw_post(p, s, z, high, 0.09)
    red, white, blue, black, green, yellow = (
        p.material(SIGN, c, z)
        for c in ((190, 24, 30), (232, 232, 228), (30, 74, 160), (28, 30, 32), (24, 110, 60), (225, 180, 30))
    )

    def face(a: float, b: float) -> Point:  # the sign's own coordinates, -1..1
        return plane(r * a, high + r * b)

    kind = int(dice.between(0, 6))
    if kind == 0:  # a limit or ban
        p.shape(red, face, CIRCLE)
        p.shape(white, face, [(0.72 * a, 0.72 * b) for a, b in CIRCLE])
        p.box(black, face, -0.3, 0.3, -0.3, 0.3)
    elif kind == 1:  # no entry
        p.shape(red, face, CIRCLE)
        p.box(white, face, -0.65, 0.65, -0.2, 0.2)
    elif kind == 2:  # a warning
        p.shape(red, face, ((-1.1, -0.8), (1.1, -0.8), (0, 1.1)))
        p.shape(white, face, ((-0.65, -0.55), (0.65, -0.55), (0, 0.6)))
    elif kind == 3:  # a direction
        p.box(dice.pick((blue, white, green, yellow)), face, -1.8, 1.8, -0.5, 0.6)
        p.box(white, face, -1.4, 1.2, -0.05, 0.15)
    elif kind == 4:  # an order, or parking
        p.shape(blue, face, CIRCLE if dice.chance(0.5) else ((-1, -1), (1, -1), (1, 1), (-1, 1)))
        p.box(white, face, -0.15, 0.2, -0.6, 0.6)
    else:
        p.box(black, plane, -0.22, 0.22, high - 0.4, high + 0.6)
        on, lens = int(dice.between(0, 3)), p.pixels(0.12, z)
        for k, colour in enumerate(((230, 40, 30), (240, 180, 40), (50, 210, 110))):
            p.disc(p.material(SIGN, colour, z, 1.1 if k == on else 0.25), plane(0, high + 0.4 - 0.3 * k), lens, lens)


def draw_foreground(p: Painter, clutter: float) -> None:
    """Draw what belongs to the camera and to no class (void): wires overhead, the bonnet below."""
    dice, w, h = p.dice, p.width, p.height
    if dice.chance(0.6 * clutter):
        wire = p.material(VOID, (40, 40, 44), 10)
        for _ in range(int(dice.between(1, 4))):
            v0, v1, sag = (dice.between(0, 0.3) * h for _ in range(3))
            line = [(w * t, v0 + (v1 - v0) * t + 0.6 * sag * t * (1 - t)) for t in (0, 0.15, 0.3, 0.5, 0.7, 0.85, 1)]
            p.polygon(wire, line + [(u, v + 2) for u, v in reversed(line)])
    if dice.chance(0.4):
        colour, rise = dice.near(dice.pick(PAINTS), 0.3), dice.between(0.03, 0.08) * h
        for bright, drop in ((1.1, 0.0), (0.7, 0.012 * h)):  # the edge shines
            arc = [(w * (0.5 + 0.56 * a), h + 2 + drop - rise * b) for a, b in CIRCLE[:7]]
            p.polygon(p.material(VOID, colour, 0, bright), arc)
