"""ToyBirds, the built-in data set: small birds in clutter, drawn by code.

The eight classes are all combinations of three small parts with two forms each (crown colour, wing bars,
beak), so every part has to be seen. All else is drawn without regard to the class: pose, size, place, body
colour, light, background, the fragments of birds strewn behind, the leaves and twigs in front, image size and
JPEG quality.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

VERSION = 3  # raise it with every change that alters a drawn pixel, a box or a file's format

CROWNS = ("Ruby_crowned", "Azure_crowned")
WINGS = ("Plain", "Barred")
BEAKS = ("Conebill", "Daggerbill")
PARTS = [(crown, wing, beak) for crown in (0, 1) for wing in (0, 1) for beak in (0, 1)]
CLASS_NAMES: list[str] = [f"{CROWNS[crown]}_{WINGS[wing]}_{BEAKS[beak]}" for crown, wing, beak in PARTS]

SIDES = (128, 176)  # pixels, inclusive; width and height are drawn alike and never equal
BOX_SHARE = (0.14, 0.43)  # of the image's area, before leaves hide the feet: 0.10 at the least is left
BEHIND, IN_FRONT = 14, 3  # distractors an image
FRAGMENTS = ("head", "beak", "wing", "bars", "trunk", "leaf", "twig")  # what lies behind: pieces of birds, and plants
SUPERSAMPLE = 2  # Pillow's polygons have hard edges: scenes are drawn twice as large and averaged down

Color = tuple[int, int, int]


class Palette(NamedTuple):
    """Colours (RGB, 0 to 255) that images are drawn with; another palette gives birds of another kind."""

    # Half muted: brighter parts are learnt from any crop, duller ones are hardly learnt from whole images.
    crowns: tuple[Color, Color] = ((184, 56, 54), (66, 95, 178))
    beaks: tuple[Color, Color] = ((218, 149, 64), (80, 74, 72))
    bars: Color = (226, 219, 198)
    # Duller still, so that no body is as red, blue or white as a part is.
    bodies: tuple[Color, ...] = (
        (156, 118, 82), (124, 132, 92), (134, 134, 138), (186, 154, 98), (112, 104, 122), (150, 98, 84),
        (98, 124, 118),
    )  # fmt: skip
    grounds: tuple[Color, ...] = (
        (112, 142, 84), (146, 160, 150), (158, 138, 104), (88, 116, 104), (170, 176, 160), (134, 112, 92),
    )  # fmt: skip
    leaves: tuple[Color, ...] = ((74, 122, 58), (120, 146, 66), (56, 96, 66), (152, 138, 70), (112, 84, 58))


PALETTE = Palette()


class ToyBird(NamedTuple):
    """One drawing, with the truth about where the bird is."""

    image: Image.Image  # RGB
    mask: np.ndarray  # (H, W) bool, True is a visible pixel of the bird: without the leaves in front of it
    box_xywh: tuple[float, float, float, float]  # pixels, tight around the mask


class _Shape(NamedTuple):
    """A filled polygon: ``points`` (N, 2) as x, y (y points down), ``color`` RGB."""

    points: np.ndarray
    color: Color


class _Placement(NamedTuple):
    """A similarity from a bird's own frame to pixels: ``matrix`` (2, 2), then ``offset`` (2,)."""

    matrix: np.ndarray
    offset: np.ndarray

    def points(self, points: np.ndarray) -> np.ndarray:
        return points @ self.matrix.T + self.offset

    def shapes(self, shapes: list[_Shape]) -> list[_Shape]:
        return [_Shape(self.points(shape.points), shape.color) for shape in shapes]


# --- geometry in the bird's own frame: it looks right, its trunk is 1.1 long and centred at the origin ---


def _arc(radius_x: float, radius_y: float, start: float = 0, stop: float = 360, n: int = 22) -> np.ndarray:
    """Return (n, 2) points of an elliptic arc around the origin; angles in degrees, 270 is up."""
    angles = np.radians(np.linspace(start, stop, n))
    return np.stack([radius_x * np.cos(angles), radius_y * np.sin(angles)], axis=1)


def _rotation(degrees: float) -> np.ndarray:
    """Return the (2, 2) matrix that turns points (x right, y down) clockwise by ``degrees``."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])


TRUNK = _arc(0.56, 0.36) @ _rotation(-16).T
BELLY = _arc(0.40, 0.20) @ _rotation(-16).T + (0.06, 0.13)
WING = np.array([
    (0.26, -0.16), (0.10, -0.25), (-0.16, -0.20), (-0.46, 0.02), (-0.74, 0.22), (-0.40, 0.20), (-0.06, 0.15),
    (0.16, 0.06),
])  # fmt: skip
WING_BARS = [
    np.array([(0.07, -0.18), (0.13, -0.18), (0.05, 0.10), (-0.01, 0.10)]) + shift
    for shift in ((0.0, 0.0), (-0.17, 0.04))
]
TAIL = np.array([(-0.36, -0.08), (-1.02, 0.02), (-1.06, 0.16), (-0.40, 0.18)])
LEG = np.array([(0, 0.28), (0.045, 0.28), (0.045, 0.56), (0.14, 0.60), (-0.06, 0.60), (0, 0.56)])
# The head's parts, around its centre.
HEAD = _arc(0.25, 0.25)
CROWN = np.concatenate([_arc(0.27, 0.27, 208, 325, n=12), [(0.16, -0.13), (0.0, -0.13), (-0.16, -0.10)]])
EYE_RING = _arc(0.052, 0.052, n=12) + np.array([0.09, -0.03])
PUPIL = _arc(0.034, 0.034, n=10) + np.array([0.095, -0.03])
CONE = np.array([(0.17, -0.13), (0.36, -0.09), (0.55, 0.05), (0.34, 0.13), (0.17, 0.17)])
# The dagger lies inside the cone and ends in the same tip, so that a beak's form leaves the box as it is.
DAGGER = np.array([(0.20, -0.04), (0.39, -0.015), (0.55, 0.05), (0.39, 0.045), (0.20, 0.06)])
PARTS_REACH = np.concatenate([CROWN, DAGGER])  # how far the parts stick out of the head, in all classes
# Circles x, y, radius around the parts: crown and beak in the head's frame, bars in the trunk's.
HEAD_ZONES = ((0.0, -0.14, 0.32), (0.37, 0.02, 0.30))
BARS_ZONE = (-0.03, -0.03, 0.31)
TAIL_RADIUS = 0.12  # of the circle around the tail's tip: hidden, it would take a quarter off the box


# --- colours ---


def _near(rng: np.random.Generator, color: Color, spread: float = 14) -> Color:
    """Return a colour near ``color``, each channel moved by up to ``spread``."""
    return _scaled(color, 1.0, rng.uniform(-spread, spread, 3))


def _scaled(color: Color, factor: float, shift: np.ndarray | float = 0.0) -> Color:
    return tuple(np.clip(np.asarray(color) * factor + shift, 0, 255).astype(int).tolist())


def _pick(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return _near(rng, colors[rng.integers(len(colors))])


# --- the bird ---


class _Bird(NamedTuple):
    """A bird in its own frame: ``plain`` shapes that all classes share, and the class's ``parts``."""

    plain: list[_Shape]
    parts: list[_Shape]
    zones: np.ndarray  # (4, 3) x, y, radius of the circles around crown, beak, wing bars and the tail's tip
    reach: np.ndarray  # (N, 2) points of the parts that stick out of the plain shapes


def _bird(rng: np.random.Generator, label: int, palette: Palette) -> _Bird:
    """Return a bird in a random pose; every random number is drawn whatever the label is."""
    crown, wing, beak = PARTS[label]
    body = _pick(rng, palette.bodies)
    turn = _rotation(rng.uniform(-18, 18)) * rng.uniform(0.92, 1.08)
    head = _Placement(turn, rng.uniform((0.42, -0.44), (0.54, -0.30)))
    trunk = _trunk(rng, body, head)
    crown_color, bar_color = _near(rng, palette.crowns[crown]), _near(rng, palette.bars, 8)
    beak_color = _near(rng, palette.beaks[beak])
    parts = [_Shape(bar, bar_color) for bar in WING_BARS] if wing else []
    parts += head.shapes([_Shape(CROWN, crown_color), _Shape((CONE, DAGGER)[beak], beak_color)])
    zones = [(*head.points(np.array([(x, y)]))[0], radius) for x, y, radius in HEAD_ZONES]
    zones += [BARS_ZONE, (*trunk[0].points[1:3].mean(axis=0), TAIL_RADIUS)]
    return _Bird(trunk, parts, np.array(zones), head.points(PARTS_REACH))


def _trunk(rng: np.random.Generator, body: Color, head: _Placement) -> list[_Shape]:
    """Return what all classes share, from back to front: tail, legs, neck, trunk, belly, head, wing, eye."""
    plump, darker, lighter = rng.uniform(0.9, 1.12), rng.uniform(0.52, 0.7), rng.uniform(20, 60)
    tail = (TAIL * (rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.3))) @ _rotation(rng.uniform(-16, 16)).T
    leg_color, head_color = _scaled(body, 0.4), _scaled(body, rng.uniform(0.8, 1.15))
    legs = [_Shape(LEG * (1, rng.uniform(0.9, 1.1)) + (x, 0), leg_color) for x in (-0.08, 0.1)]
    nape, throat = head.offset + np.array([(-0.06, -0.22), (0.16, 0.18)])
    neck = np.array([(0.0, -0.30), nape, throat, (0.42, 0.14)])
    return [
        _Shape(tail, _scaled(body, darker * 0.9)), *legs, _Shape(neck, _scaled(body, 0.96)),
        _Shape(TRUNK * (1, plump), body), _Shape(BELLY * (1, plump), _scaled(body, 1.0, lighter)),
        *head.shapes([_Shape(HEAD, head_color)]), _Shape(WING, _scaled(body, darker)),
        *head.shapes([_Shape(EYE_RING, (236, 232, 220)), _Shape(PUPIL, (16, 14, 18))]),
    ]  # fmt: skip


def _place_bird(rng: np.random.Generator, bird: _Bird, size: np.ndarray) -> _Placement:
    """Return where the bird goes: turned, maybe mirrored, of random size, anywhere in the image.

    The class has no say: only what all classes share is measured.

    Args:
        size: (2,) width and height of the image in pixels.
    """
    matrix = _rotation(rng.uniform(-24, 24)) * (rng.choice((-1, 1)), 1)
    outline = np.concatenate([shape.points for shape in bird.plain] + [bird.reach]) @ matrix.T
    low, extent = outline.min(axis=0), np.ptp(outline, axis=0)
    least, most = BOX_SHARE
    share = least * (most / least) ** (rng.uniform() ** 2)  # most birds are small: the median share is 0.185
    scale = math.sqrt(share * size.prod() / extent.prod())
    scale = min(scale, *(0.97 * size / extent))  # a wide bird in a tall image
    corner = rng.uniform(0, size - scale * extent)
    return _Placement(matrix * scale, corner - scale * low)


# --- the clutter ---


def _fragments(rng: np.random.Generator, size: np.ndarray, palette: Palette) -> list[_Shape]:
    """Return what lies behind the bird: pieces of birds, in the parts' forms and colours, leaves, twigs."""
    shapes = []
    for number in rng.choice(len(FRAGMENTS), BEHIND):
        scale = size.min() * rng.uniform(0.18, 0.42)  # as a bird's own
        place = _Placement(_rotation(rng.uniform(0, 360)) * scale, rng.uniform(0, size))
        shapes += place.shapes(_fragment(rng, FRAGMENTS[number], palette))
    return shapes


def _fragment(rng: np.random.Generator, kind: str, palette: Palette) -> list[_Shape]:
    """Return one piece, of a kind in FRAGMENTS."""
    if kind == "head":
        return [_Shape(HEAD, _pick(rng, palette.bodies)), _Shape(CROWN, _pick(rng, palette.crowns))]
    if kind == "beak":
        return [_Shape((CONE, DAGGER)[rng.integers(2)], _pick(rng, palette.beaks))]
    if kind == "wing":
        color = _near(rng, palette.bars, 8)
        bars = [_Shape(bar, color) for bar in WING_BARS] * int(rng.integers(2))
        return [_Shape(WING, _scaled(_pick(rng, palette.bodies), rng.uniform(0.52, 0.7))), *bars]
    if kind == "bars":
        colors = (palette.bars, *palette.crowns, *palette.beaks)
        return [_Shape(bar, _pick(rng, colors)) for bar in WING_BARS]
    if kind == "trunk":
        body = _pick(rng, palette.bodies)
        return [_Shape(TRUNK, body), _Shape(BELLY, _scaled(body, 1.0, rng.uniform(20, 60)))]
    return _leaf(rng, palette) if kind == "leaf" else _twig(rng, palette)


def _leaf(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    """Return a leaf along the x axis, two shades on its two halves."""
    color, width = _pick(rng, palette.leaves), rng.uniform(0.09, 0.17)
    upper, lower = _arc(0.45, width, 180, 360, 9), _arc(0.45, width, 0, 180, 9)
    return [_Shape(upper, color), _Shape(lower, _scaled(color, 0.82))]


def _twig(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    """Return a thin bough along the x axis."""
    width = rng.uniform(0.03, 0.06)
    corners = np.array([(-1.1, -width), (1.1, -width * 0.4), (1.1, width * 0.4), (-1.1, width)])
    return [_Shape(corners, _scaled(_pick(rng, palette.leaves), 0.6))]


def _foliage(
    rng: np.random.Generator, size: np.ndarray, bird: np.ndarray, zones: np.ndarray, palette: Palette
) -> list[_Shape]:
    """Return leaves and twigs in front of the bird, none of which touches the zones that must be seen.

    Args:
        size: (2,) width and height of the image in pixels.
        bird: (2, 2) lower and upper corner of the bird's box in pixels, which the pieces are centred in.
        zones: (4, 3) x, y, radius in pixels of the circles to keep free.
    """
    shapes = []
    for _ in range(IN_FRONT):
        for _attempt in range(12):  # a bird with little but its parts in reach gets fewer
            middle = rng.uniform(*bird)
            place = _Placement(_rotation(rng.uniform(0, 360)) * size.min() * rng.uniform(0.25, 0.5), middle)
            piece = place.shapes((_leaf, _leaf, _twig)[rng.integers(3)](rng, palette))
            if not _touches(piece, zones):
                shapes += piece
                break
    return shapes


def _touches(piece: list[_Shape], zones: np.ndarray) -> bool:
    """Return whether any polygon's edge enters any circle (x, y, radius); none is wide enough to hold one."""
    start = np.concatenate([shape.points for shape in piece])[:, None]  # (N, 1, 2)
    edge = np.concatenate([np.roll(shape.points, -1, axis=0) for shape in piece])[:, None] - start
    to_center = zones[None, :, :2] - start  # (N, 4, 2)
    along = np.clip((to_center * edge).sum(-1) / np.maximum((edge**2).sum(-1), 1e-9), 0, 1)
    return bool((np.hypot(*np.moveaxis(to_center - along[..., None] * edge, -1, 0)) < zones[:, 2]).any())


# --- ground, light and pixels ---


def _noise(rng: np.random.Generator, size: np.ndarray, cells: int, spread: float) -> np.ndarray:
    """Return (H, W, 1) smooth noise within +-``spread``, about ``cells`` bumps across."""
    coarse = Image.fromarray(rng.uniform(-spread, spread, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(tuple(size.tolist()), Image.Resampling.BILINEAR))[..., None]


def _ground(rng: np.random.Generator, size: np.ndarray, palette: Palette) -> Image.Image:
    """Return a mottled ground: two colours blended by smooth noise, with rougher noise on top."""
    first, second = (np.array(_pick(rng, palette.grounds), np.float32) for _ in range(2))
    blend = 0.5 + _noise(rng, size, int(rng.integers(3, 7)), 0.6)
    pixels = first * blend + second * (1 - blend)
    for coarsest in (10, 28):
        pixels += _noise(rng, size, int(rng.integers(coarsest, 1.6 * coarsest)), 22)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _lit(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Return the image in another light: brightness, tint, dappled shade, grain."""
    size = np.array(image.size)
    light = rng.uniform(0.78, 1.12) * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    shade = 1 + _noise(rng, size, 2, 0.16) + _noise(rng, size, int(rng.integers(4, 9)), 0.10)
    grain = rng.standard_normal((image.height, image.width, 1), dtype=np.float32) * rng.uniform(3, 9)
    pixels = np.asarray(image) * (light * shade).astype(np.float32) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _paint(image: Image.Image, shapes: list[_Shape]) -> None:
    draw = ImageDraw.Draw(image)
    for points, color in shapes:
        draw.polygon((points * SUPERSAMPLE).ravel().tolist(), fill=color)


def draw_toybird(rng: np.random.Generator, label: int, *, palette: Palette = PALETTE) -> ToyBird:
    """Return one drawing of a bird of class ``label``.

    The random numbers used do not depend on the label: the same state of ``rng`` with another label gives the
    same scene with other parts.

    Args:
        rng: all that is not the class comes from it.
        label: 0 to 7, index into ``CLASS_NAMES``.
        palette: the colours.
    """
    size = rng.choice(np.arange(SIDES[0], SIDES[1] + 1), 2, replace=False)
    image = _ground(rng, size, palette).resize(tuple((size * SUPERSAMPLE).tolist()), Image.Resampling.NEAREST)
    _paint(image, _fragments(rng, size, palette))
    bird = _bird(rng, label, palette)
    place = _place_bird(rng, bird, size)
    shapes = place.shapes(bird.plain + bird.parts)
    plain = np.concatenate([shape.points for shape in place.shapes(bird.plain)])
    scale = math.sqrt(abs(np.linalg.det(place.matrix)))
    zones = np.column_stack([place.points(bird.zones[:, :2]), bird.zones[:, 2] * scale])
    front = _foliage(rng, size, np.stack([plain.min(axis=0), plain.max(axis=0)]), zones, palette)
    _paint(image, shapes + front)
    stencil = Image.new("L", image.size)
    _paint(stencil, [_Shape(points, 255) for points, _ in shapes] + [_Shape(points, 0) for points, _ in front])
    mask = np.asarray(stencil.reduce(SUPERSAMPLE)) >= 128  # at least half of the pixel's area shows the bird
    left, top, right, bottom = map(float, Image.fromarray(mask).getbbox())
    return ToyBird(_lit(rng, image.reduce(SUPERSAMPLE)), mask, (left, top, right - left, bottom - top))
