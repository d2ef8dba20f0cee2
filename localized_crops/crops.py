"""Where crops are drawn: the two formulas of LocalizedRandomResizedCrop, in NumPy, for many boxes at once.

``transforms.py`` applies these crops to images, ``boxes.py`` measures how much of the object they keep. One image or a
million go through the same lines, so the crops of an epoch are drawn at once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Range = tuple[float, float]  # least and largest value
MODES = ("exact", "reference")
SHAPE_TRIES = 10  # of RandomResizedCrop, as torchvision: then the largest centred crop with a ratio in range is taken
ROWS_AT_ONCE = 16_384  # are drawn together: the memory of drawing does not grow with the data set
RATIO_CELLS = 32  # cells of the inverse CDF over log-ratio: each is 1.8% of the ratio wide for (3/4, 4/3)


def sample_crops(
    boxes_xywh: np.ndarray,
    image_sizes: np.ndarray,
    thr: float,
    mode: str = "exact",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draw one crop for each box.

    Args:
        boxes_xywh: (N, 4) float, x y width height in pixels; boxes lie inside their image.
        image_sizes: (N, 2), width height in pixels.
        thr: the share of the box that a crop keeps, in [0, 1]; negative: the box is ignored and the crop follows
            the law of RandomResizedCrop.
        mode: "exact" (every crop keeps at least ``thr`` of the box) or "reference" (the published crop).
        scale: least and largest area of the crop, as shares of the image's area.
        ratio: least and largest width / height; its logarithm is uniform.

    Returns:
        (N, 4) int64, top left height width in pixels, inside the image, each side at least 1.

    Raises:
        ValueError: on a wrong shape, mode or range, or a box that does not lie inside its image.
    """
    check_settings(thr, mode, scale, ratio)
    boxes, sizes = np.asarray(boxes_xywh, dtype=np.float64), np.asarray(image_sizes, dtype=np.float64)
    _check_boxes(boxes, sizes, are_ignored=thr < 0)
    rng = rng if rng is not None else np.random.default_rng()

    def draw(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        if thr < 0:
            shapes, fitted = random_shapes(sizes, scale, ratio, rng)
            left, top = plain_corners(shapes, fitted, sizes, rng.random(shapes.shape)).T
            return np.stack([top, left, shapes[:, 1], shapes[:, 0]], axis=1)
        if mode == "reference":
            edges = _reference_edges(boxes, sizes, thr, scale, ratio, rng)
            return _to_crops(np.rint(edges), sizes)
        edges = _exact_edges(boxes, sizes, thr, scale, ratio, rng)
        # outward, so that what the real-valued crop keeps of the box the whole-pixel crop keeps too
        outward = np.concatenate([np.floor(edges[:, :2]), np.ceil(edges[:, 2:])], axis=1)
        return _to_crops(outward, sizes)

    return _part_by_part(draw, boxes, sizes)


def _part_by_part(draw: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Return ``draw`` of the arrays (N, ...), of `ROWS_AT_ONCE` rows at a time."""
    starts = range(0, max(1, len(arrays[0])), ROWS_AT_ONCE)
    return np.concatenate([draw(*(array[start : start + ROWS_AT_ONCE] for array in arrays)) for start in starts])


def ratio_gives_way(
    boxes_xywh: np.ndarray, image_sizes: np.ndarray, thr: float, scale: Range, ratio: Range
) -> np.ndarray:
    """Return a mask of the boxes that no crop within ``ratio`` can cover by ``thr`` without leaving the image.

    In mode "exact" the crops of these boxes, (N,) bool, leave the range of ratios, by as little as possible.
    The arguments are those of `sample_crops`.
    """
    boxes, sizes = np.asarray(boxes_xywh, dtype=np.float64), np.asarray(image_sizes, dtype=np.float64)
    low, high = _ratios_that_reach(boxes, sizes, max(thr, 0.0), scale[1])
    return (low > ratio[1]) | (high < ratio[0])


def check_settings(thr: float, mode: str, scale: Range, ratio: Range) -> None:
    """Raise ValueError on settings that `sample_crops` cannot draw by."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    if not thr <= 1:
        raise ValueError(f"thr={thr} must be a share of the box, at most 1 (negative: no box)")
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"need 0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1], got {scale}, {ratio}")


def _check_boxes(boxes: np.ndarray, sizes: np.ndarray, *, are_ignored: bool) -> None:
    """Raise ValueError on wrong shapes, sizes or, unless they ``are_ignored``, boxes."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or sizes.shape != (len(boxes), 2):
        raise ValueError(f"need boxes (N, 4) and image sizes (N, 2), got {boxes.shape} and {sizes.shape}")
    if not (sizes >= 1).all():
        raise ValueError("an image size is under one pixel")
    bad = ~((boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] > 0).all(1) & (_far_edges(boxes) <= sizes + 1e-6).all(1))
    if bad.any() and not are_ignored:
        n = int(bad.argmax())
        raise ValueError(f"box {n}, xywh {boxes[n].tolist()}, does not lie inside its image {sizes[n].tolist()}")


def _far_edges(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, :2] + boxes[:, 2:]


def _to_crops(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Turn (N, 4) whole-numbered left top right bottom into top left height width inside the image."""
    near = np.clip(edges[:, :2], 0, sizes - 1)
    far = np.clip(edges[:, 2:], near + 1, sizes)
    side = far - near
    return np.stack([near[:, 1], near[:, 0], side[:, 1], side[:, 0]], axis=1).astype(np.int64)


# --- RandomResizedCrop --------------------------------------------------------------------------------------------


def random_shapes(
    image_sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the shapes of torchvision's RandomResizedCrop, by its law; the arguments are those of `sample_crops`.

    Returns:
        (N, 2) int64 width height in pixels, each side between 1 and the image's; and (N,) bool, whether any of the
        tries fitted into the image (if not, the crop lies in the middle).
    """

    def draw(sizes: np.ndarray) -> np.ndarray:
        tries = (len(sizes), SHAPE_TRIES)
        areas = rng.uniform(*scale, tries) * sizes.prod(1)[:, None]
        ratios = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), tries))
        shapes = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], axis=-1)))
        fits = ((shapes > 0) & (shapes <= sizes[:, None])).all(axis=-1)  # (N, tries)
        first = shapes[np.arange(len(sizes)), fits.argmax(axis=1)]
        any_fits = fits.any(axis=1, keepdims=True)
        # else the largest shape inside the image whose ratio is in range
        largest = np.minimum(sizes, np.rint(np.stack([sizes[:, 1] * ratio[1], sizes[:, 0] / ratio[0]], axis=1)))
        shapes = np.where(any_fits, first, np.maximum(largest, 1))
        return np.concatenate([shapes, any_fits], axis=1).astype(np.int64)

    drawn = _part_by_part(draw, np.asarray(image_sizes, dtype=np.float64))
    return drawn[:, :2], drawn[:, 2] > 0


def plain_corners(shapes: np.ndarray, fitted: np.ndarray, image_sizes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return where RandomResizedCrop lays crops of `random_shapes`: (N, 2) int64 left top; ``uniform`` is (N, 2)."""
    room = np.asarray(image_sizes, dtype=np.int64) - shapes
    anywhere = np.minimum((uniform * (room + 1)).astype(np.int64), room)
    return np.where(fitted[:, None], anywhere, room // 2)


# --- the published crop -------------------------------------------------------------------------------------------


def _reference_edges(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale: Range, ratio: Range, rng: np.random.Generator
) -> np.ndarray:
    """Return (N, 4) left top right bottom of the published crop, real-valued.

    Four details that the published formulas leave open decide its curve: the object's area is that of the square
    around the box; the shape grows along its long side; a crop that starts before the image is moved in; a crop that
    ends behind the image is cut off.
    """
    uniform = rng.random((len(boxes), 4))
    area = sizes.prod(1)
    lower = np.maximum(scale[0], thr * boxes[:, 2:].max(1) ** 2 / area)
    s = np.sqrt((lower + (scale[1] - lower) * uniform[:, 0]) * area)
    r = np.exp(_between(np.log(ratio[0]), np.log(ratio[1]), uniform[:, 1]))
    shape = np.stack([np.where(r > 1, r * s, s), np.where(r > 1, s, s / r)], axis=1)
    shape = np.minimum(shape, sizes)
    reach = (1 - np.sqrt(thr)) * (shape + boxes[:, 2:]) / 2
    centre = boxes[:, :2] + boxes[:, 2:] / 2 + (2 * uniform[:, 2:] - 1) * reach
    near = np.maximum(centre - shape / 2, 0)
    return np.concatenate([near, np.minimum(near + shape, sizes)], axis=1)


def _between(low: Any, high: Any, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


# --- the exact crop -----------------------------------------------------------------------------------------------
# A crop of sides a = s sqrt(r), b = s / sqrt(r) (area s^2, ratio r), laid as well as can be on a box w x h, keeps
# min(a, w) min(b, h) of it. That is at least thr w h exactly when
#     s^2 >= thr w h,   s >= thr h sqrt(r),   s >= thr w / sqrt(r)
# (all four products must reach it, the fourth always does). The crop lies in the image W x H when s^2 <= W^2 / r and
# s^2 <= H^2 r. Both bounds are monotonous in r, so the ratios that reach thr are one interval, known in closed form.


def _exact_edges(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale: Range, ratio: Range, rng: np.random.Generator
) -> np.ndarray:
    """Return (N, 4) left top right bottom of crops that keep at least ``thr`` of their box, real-valued."""
    thr = min(thr * (1 + 1e-9), 1.0)  # so that rounding errors fall on the promise's side
    shape = _exact_shapes(boxes, sizes, thr, scale, ratio, rng)
    near = _exact_positions(boxes, sizes, shape, thr, rng)
    far = near + shape
    if thr == 1:  # here there is no side to fall on: the box's own edges are the limit
        near, far = np.minimum(near, boxes[:, :2]), np.maximum(far, _far_edges(boxes))
    return np.concatenate([near, np.minimum(far, sizes)], axis=1)


def _exact_shapes(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale: Range, ratio: Range, rng: np.random.Generator
) -> np.ndarray:
    """Draw (N, 2) width height, uniform in (scale, log ratio) over the shapes that reach ``thr`` inside the image."""
    uniform = rng.random((len(boxes), 2))
    low, high = _ratio_interval(boxes, sizes, thr, scale, ratio)
    step = (np.log(high) - np.log(low)) / RATIO_CELLS
    cells = np.exp(np.log(low)[:, None] + step[:, None] * (np.arange(RATIO_CELLS) + 0.5))
    least, most = _area_bounds(boxes[:, None], sizes[:, None], thr, scale, cells)
    # log ratio has a density proportional to the span of areas that it allows: inverse CDF, one cell at a time
    cdf = np.cumsum(np.maximum(most - least, 0) + 1e-9 * most, axis=1)
    target = uniform[:, 0] * cdf[:, -1]
    cell = np.minimum((cdf <= target[:, None]).sum(1), RATIO_CELLS - 1)
    rows = np.arange(len(boxes))
    below = np.where(cell > 0, cdf[rows, cell - 1], 0.0)
    inside = (target - below) / (cdf[rows, cell] - below)
    r = np.clip(np.exp(np.log(low) + step * (cell + inside)), low, high)
    least, most = _area_bounds(boxes, sizes, thr, scale, r)
    area = _between(least, np.maximum(most, least), uniform[:, 1])
    return np.minimum(np.stack([np.sqrt(area * r), np.sqrt(area / r)], axis=1), sizes)


def _area_bounds(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale: Range, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and largest crop area in pixels for ratio ``r``; ``thr`` takes precedence over ``scale``."""
    w, h, width, height = boxes[..., 2], boxes[..., 3], sizes[..., 0], sizes[..., 1]
    reach = np.maximum(thr * w * h, np.maximum((thr * h) ** 2 * r, (thr * w) ** 2 / r))
    fits = np.minimum(width**2 / r, height**2 * r)
    most = np.maximum(np.minimum(scale[1] * width * height, fits), reach)
    return np.minimum(np.maximum(scale[0] * width * height, reach), most), most


def _ratios_that_reach(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale_max: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and largest ratio, (N,) each, of crops in the image that keep ``thr`` of the box."""
    (w, h), (width, height) = boxes[:, 2:].T, sizes.T
    largest = scale_max * width * height
    low = np.maximum.reduce([thr * w / height, (thr * w) ** 2 / largest, thr * w * h / height**2])
    with np.errstate(divide="ignore", over="ignore"):  # thr = 0, or hardly more: any ratio reaches it
        high = np.minimum.reduce([width / (thr * h), largest / (thr * h) ** 2, width**2 / (thr * w * h)])
    return low, high


def _ratio_interval(
    boxes: np.ndarray, sizes: np.ndarray, thr: float, scale: Range, ratio: Range
) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of ratios to draw from; ``thr`` takes precedence over ``scale``, that over ``ratio``."""
    least, most = _ratios_that_reach(boxes, sizes, thr, scale[1])
    low, high = np.maximum(ratio[0], least), np.minimum(ratio[1], most)
    # where no ratio in range reaches thr, the one nearest to the range that does
    empty, nearest = low > high, np.where(least > ratio[1], least, most)
    low, high = np.where(empty, nearest, low), np.where(empty, nearest, high)
    # then cut to the ratios with which scale[0] fits into the image, as far as the intervals overlap
    width, height = sizes.T
    least, most = scale[0] * width / height, width / (scale[0] * height)
    return np.minimum(np.maximum(low, least), high), np.maximum(np.minimum(high, most), low)


def _exact_positions(
    boxes: np.ndarray, sizes: np.ndarray, shape: np.ndarray, thr: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw (N, 2) left top, uniform among the positions in the image where the crop keeps ``thr`` of the box.

    Drawn by rejection from the rectangle of positions that reach thr when the other axis is at its best; about half
    of that rectangle or more qualifies, so the rounds are few.
    """
    low, high = _position_bounds(boxes, sizes, shape, thr)
    need = thr * boxes[:, 2:].prod(1)
    near = _between(low, high, rng.random(low.shape))
    todo = np.arange(len(boxes)) if 0 < thr < 1 else np.arange(0)  # at 0 and 1 every position in it qualifies
    for _ in range(50):
        far = np.minimum(near[todo] + shape[todo], _far_edges(boxes[todo]))
        overlap = np.maximum(far - np.maximum(near[todo], boxes[todo, :2]), 0)
        todo = todo[overlap.prod(1) < need[todo]]
        if not len(todo):
            return near
        near[todo] = _between(low[todo], high[todo], rng.random((len(todo), 2)))
    # a shape that only just reaches thr has one position, which no draw finds: concentric, moved into the image
    centred = boxes[todo, :2] + (boxes[todo, 2:] - shape[todo]) / 2
    near[todo] = np.clip(centred, 0, sizes[todo] - shape[todo])
    return near


def _position_bounds(
    boxes: np.ndarray, sizes: np.ndarray, shape: np.ndarray, thr: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and largest left top, (N, 2) each, that can reach ``thr``, inside the image."""
    best = np.minimum(shape, boxes[:, 2:])  # overlap in pixels per axis, at best
    need = np.minimum(thr * boxes[:, 2:].prod(1)[:, None] / best[:, ::-1], best)
    low = boxes[:, :2] + need - shape
    high = _far_edges(boxes) - need
    if thr == 0:  # nothing is asked for: anywhere in the image
        low, high = np.zeros_like(low), sizes - shape
    low, high = np.clip(low, 0, sizes - shape), np.clip(high, 0, sizes - shape)
    return np.minimum(low, high), high
