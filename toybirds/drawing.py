"""ToyBirds, the built-in data set: small birds in clutter, drawn by code, in CUB-200-2011's file format.

The eight classes are all combinations of three small parts with two forms each (crown colour, wing bars,
beak), so every part has to be seen. All else is drawn without regard to the class: pose, size, place, body
colour, light, background, the fragments of birds strewn behind, the leaves and twigs in front, image size and
JPEG quality.

    python -c "import pathlib, toybirds; toybirds.write_toybirds(pathlib.Path('data/toybirds'))"
"""

import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

VERSION = 3  # raise it with every change that alters a drawn pixel, a box or a file's format

CROWNS = ("Ruby_crowned", "Azure_crowned")
WINGS = ("Plain", "Barred")
BEAKS = ("Conebill", "Daggerbill")
PARTS = [(crown, wing, beak) for crown in (0, 1) for wing in (0, 1) for beak in (0, 1)]
CLASS_NAMES: list[str] = [f"{CROWNS[crown]}_{WINGS[wing]}_{BEAKS[beak]}" for crown, wing, beak in PARTS]

SIDES = (128, 176)  # pixels, inclusive; width and height are drawn alike and never equal
BOX_SHARE = (0.14, 0.43)  # of the image's area, before leaves hide the feet: 0.10 at the least is left
BEHIND, IN_FRONT = 14, 3  # distractors an image
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
    mask: np.ndarray  # (H, W) bool, True is a visible pixel of the bird
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
    red, green, blue = np.clip(np.asarray(color) * factor + shift, 0, 255).astype(int).tolist()
    return red, green, blue


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
    """Return where the bird goes: turned, maybe mirrored, as large as drawn by lot, anywhere in the image.

    The class has no say: only what all classes share is measured.

    Args:
        size: (2,) width and height of the image in pixels.
    """
    matrix = _rotation(rng.uniform(-24, 24)) * (rng.choice((-1, 1)), 1)
    outline = np.concatenate([shape.points for shape in bird.plain] + [bird.reach]) @ matrix.T
    low, extent = outline.min(axis=0), np.ptp(outline, axis=0)
    least, most = BOX_SHARE
    share = least * (most / least) ** (rng.uniform() ** 2)  # small birds are the rule: the median is .185
    scale = math.sqrt(share * size.prod() / extent.prod())
    scale = min(scale, *(0.97 * size / extent))  # a wide bird in a tall image
    corner = rng.uniform(0, size - scale * extent)
    return _Placement(matrix * scale, corner - scale * low)


# --- the clutter ---


def _fragments(rng: np.random.Generator, size: np.ndarray, palette: Palette) -> list[_Shape]:
    """Return what lies behind the bird: pieces of birds, in the parts' forms and colours, leaves, twigs."""
    makers = (_loose_head, _loose_beak, _loose_wing, _loose_bars, _loose_trunk, _leaf, _twig)
    shapes = []
    for maker in rng.choice(len(makers), BEHIND):
        scale = size.min() * rng.uniform(0.18, 0.42)  # as a bird's own
        place = _Placement(_rotation(rng.uniform(0, 360)) * scale, rng.uniform(0, size))
        shapes += place.shapes(makers[maker](rng, palette))
    return shapes


def _loose_head(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    return [_Shape(HEAD, _pick(rng, palette.bodies)), _Shape(CROWN, _pick(rng, palette.crowns))]


def _loose_beak(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    return [_Shape((CONE, DAGGER)[rng.integers(2)], _pick(rng, palette.beaks))]


def _loose_wing(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    color = _near(rng, palette.bars, 8)
    bars = [_Shape(bar, color) for bar in WING_BARS] * int(rng.integers(2))
    return [_Shape(WING, _scaled(_pick(rng, palette.bodies), rng.uniform(0.52, 0.7))), *bars]


def _loose_bars(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    colors = (palette.bars, *palette.crowns, *palette.beaks)
    return [_Shape(bar, _pick(rng, colors)) for bar in WING_BARS]


def _loose_trunk(rng: np.random.Generator, palette: Palette) -> list[_Shape]:
    body = _pick(rng, palette.bodies)
    return [_Shape(TRUNK, body), _Shape(BELLY, _scaled(body, 1.0, rng.uniform(20, 60)))]


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


def _stencil(size: np.ndarray, bird: list[_Shape], front: list[_Shape]) -> np.ndarray:
    """Return the (H, W) bool mask of pixels that show the bird in at least half of their area."""
    stencil = Image.new("L", tuple((size * SUPERSAMPLE).tolist()))
    _paint(stencil, [_Shape(points, 255) for points, _ in bird] + [_Shape(points, 0) for points, _ in front])
    return np.asarray(stencil.reduce(SUPERSAMPLE)) >= 128


def _tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the tight box x, y, width, height around the True pixels of ``mask`` (H, W)."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    return float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)


def draw_toybird(rng: np.random.Generator, label: int, *, palette: Palette = PALETTE) -> ToyBird:
    """Return one drawing of a bird of class ``label``.

    The random numbers used do not depend on the label: the same state of ``rng`` with another label gives the
    same scene with other parts.

    Args:
        rng: all that is not the class comes from it.
        label: 0 to 7, index into ``CLASS_NAMES``.
        palette: the colours to draw with.

    Returns:
        Image, mask and box. The mask holds the *visible* pixels of the bird (leaves in front are left out, as
        a person who outlines a photographed bird would), the box is tight around it.
    """
    size = rng.choice(np.arange(SIDES[0], SIDES[1] + 1), 2, replace=False)
    image = _ground(rng, size, palette).resize(tuple((size * SUPERSAMPLE).tolist()), Image.Resampling.NEAREST)
    _paint(image, _fragments(rng, size, palette))
    bird = _bird(rng, label, palette)
    place = _place_bird(rng, bird, size)
    shapes = place.shapes(bird.plain + bird.parts)
    front = _foliage(rng, size, _corners(place.shapes(bird.plain)), _zones_in_pixels(bird, place), palette)
    _paint(image, shapes + front)
    mask = _stencil(size, shapes, front)
    return ToyBird(_lit(rng, image.reduce(SUPERSAMPLE)), mask, _tight_box(mask))


def _corners(shapes: list[_Shape]) -> np.ndarray:
    """Return the (2, 2) lower and upper corner (x, y) of a list of polygons."""
    points = np.concatenate([shape.points for shape in shapes])
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _zones_in_pixels(bird: _Bird, place: _Placement) -> np.ndarray:
    """Return the (4, 3) x, y, radius in pixels of the circles that nothing may cover."""
    scale = math.sqrt(abs(np.linalg.det(place.matrix)))
    return np.column_stack([place.points(bird.zones[:, :2]), bird.zones[:, 2] * scale])


# --- the data set on disk ---


class _Row(NamedTuple):
    """One image to write; ``image_id`` and ``class_id`` start at 1 as CUB's do."""

    image_id: int
    class_id: int
    name: str
    is_train: bool


def write_toybirds(
    root: pathlib.Path,
    *,
    train_per_class: int = 75,
    test_per_class: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write the data set as JPEGs in CUB-200-2011's layout, whole or not at all.

    It is drawn into a scratch folder beside ``root``, which takes the final name when it is complete. Where
    another process wrote the same set first, its copy stays. The same arguments give the same bytes (with the
    same Pillow).

    Args:
        root: folder to make.
        train_per_class: images a class with a 1 in train_test_split.txt.
        test_per_class: images a class with a 0 there.
        seed: of the drawings, 0 or more.
        progress: whether to show a bar.

    Raises:
        FileExistsError: if ``root`` holds something else already.
    """
    header = _header(train_per_class, test_per_class, seed)
    if _is_written(root, header):
        return
    # Not by tempfile, whose folders (mode 0700) lock colleagues out.
    scratch = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _write_into(scratch, list(_rows(train_per_class, test_per_class)), seed, progress)
        (scratch / "README.txt").write_text(header, encoding="utf-8")
        _publish(scratch, root, header)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # of a set that was broken off, or came second


def _header(train_per_class: int, test_per_class: int, seed: int) -> str:
    """Return README.txt: what the folder is and what it was made with. Equal text means equal data."""
    counts = f"{train_per_class} training and {test_per_class} test images a class"
    return (
        f"ToyBirds version {VERSION}, seed {seed}, {counts}\n"
        "\n"
        "Birds drawn by toybirds.py, in the file format of CUB-200-2011. The classes are all combinations\n"
        "of crown colour, wing bars and beak; nothing else in an image depends on the class. A box (x y\n"
        "width height, pixels) is tight around the visible pixels of the bird. To make the folder again,\n"
        "delete it and run the program that asked for it.\n"
    )


def has_toybirds(root: pathlib.Path) -> bool:
    """Return whether ``root`` says that it was drawn by this program, by whatever version."""
    readme = root / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith("ToyBirds version ")


def _is_written(root: pathlib.Path, header: str) -> bool:
    """Return whether ``root`` holds this very data set; False where it is absent or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    readme = root / "README.txt"
    if not readme.is_file() or (found := readme.read_text(encoding="utf-8", errors="replace")) != header:
        found = found.partition("\n")[0] if has_toybirds(root) else "something else"
        raise FileExistsError(f"{root} holds {found!r}, not {header.partition(chr(10))[0]!r}: choose another folder")
    return True


def _rows(train_per_class: int, test_per_class: int) -> Iterator[_Row]:
    """Yield the images in file order: by class, training and test images evenly mixed within each."""
    total = train_per_class + test_per_class
    for class_id, class_name in enumerate(CLASS_NAMES, start=1):
        for index in range(total):
            is_train = (index + 1) * train_per_class // total > index * train_per_class // total
            name = f"{class_id:03d}.{class_name}/{class_name}_{index + 1:04d}.jpg"
            yield _Row((class_id - 1) * total + index + 1, class_id, name, is_train)


def _write_into(folder: pathlib.Path, rows: list[_Row], seed: int, progress: bool) -> None:
    """Draw all images and write them and CUB's five lists into ``folder``."""
    for class_id, class_name in enumerate(CLASS_NAMES, start=1):
        (folder / "images" / f"{class_id:03d}.{class_name}").mkdir(parents=True)
    boxes = [
        _write_image(folder, row, seed)
        for row in tqdm(rows, desc="drawing ToyBirds", disable=None if progress else True)
    ]
    lists = {
        "images.txt": [f"{row.image_id} {row.name}" for row in rows],
        "image_class_labels.txt": [f"{row.image_id} {row.class_id}" for row in rows],
        "train_test_split.txt": [f"{row.image_id} {int(row.is_train)}" for row in rows],
        "bounding_boxes.txt": [
            " ".join([str(row.image_id), *(f"{side:.1f}" for side in box)])
            for row, box in zip(rows, boxes, strict=True)
        ],
        "classes.txt": [f"{class_id} {class_id:03d}.{name}" for class_id, name in enumerate(CLASS_NAMES, start=1)],
    }
    for name, lines in lists.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_image(folder: pathlib.Path, row: _Row, seed: int) -> tuple[float, float, float, float]:
    """Draw one image, save it as JPEG, return its box x, y, width, height in pixels."""
    rng = np.random.default_rng([seed, row.image_id])  # its own stream: no image depends on those before it
    drawing = draw_toybird(rng, row.class_id - 1)
    drawing.image.save(folder / "images" / row.name, quality=int(rng.integers(80, 96)))
    return drawing.box_xywh


def _publish(scratch: pathlib.Path, root: pathlib.Path, header: str) -> None:
    """Give the finished folder its final name, unless the same set has that name by now."""
    try:
        os.replace(scratch, root)
    except OSError:
        if not _is_written(root, header):
            raise
