"""Box arithmetic: IoU, coverage, mean coverage (maIoU) of crops.

Boxes are (x, y, width, height) in pixels of the original image, in its stored pixel grid (no EXIF rotation).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from localized_crops.crops import sample_crops
from localized_crops.files import UserError

MAIOU_CROPS = 20_000  # for a mean asymmetric IoU with an error of about 0.001
CENTER_SHARE = 0.65  # of each side: the constant centred box, the control that every method must beat


def intersection(a_xywh: np.ndarray, b_xywh: np.ndarray) -> np.ndarray:
    """Return the area, (N,), that boxes (N, 4) share pair by pair; exactly b's area where a holds b."""
    a, b = np.asarray(a_xywh, dtype=np.float64), np.asarray(b_xywh, dtype=np.float64)
    near = np.maximum(a[..., :2] - b[..., :2], 0)  # measured from b's corner: no rounding where a holds b
    far = np.minimum(a[..., :2] + a[..., 2:] - b[..., :2], b[..., 2:])
    return np.maximum(far - near, 0).prod(-1)


def iou(a_xywh: np.ndarray, b_xywh: np.ndarray) -> np.ndarray:
    """Return the intersection over union, (N,), of boxes (N, 4) pair by pair."""
    shared = intersection(a_xywh, b_xywh)
    areas = np.asarray(a_xywh, float)[..., 2:].prod(-1) + np.asarray(b_xywh, float)[..., 2:].prod(-1)
    return shared / (areas - shared)


def coverage(crops_or_boxes_xywh: np.ndarray, true_xywh: np.ndarray) -> np.ndarray:
    """Return the asymmetric IoU, (N,): the share of each true box (N, 4) that the crop or box keeps."""
    return intersection(crops_or_boxes_xywh, true_xywh) / np.asarray(true_xywh, float)[..., 2:].prod(-1)


def crops_to_xywh(crops: np.ndarray) -> np.ndarray:
    """Turn crops (N, 4) top left height width into boxes (N, 4) x y width height."""
    return np.asarray(crops)[..., [1, 0, 3, 2]]


def clip_boxes(boxes_xywh: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Cut boxes (N, 4) at their images, sizes (N, 2) width height; a box outside gets no area."""
    boxes, sizes = np.asarray(boxes_xywh, dtype=np.float64), np.asarray(image_sizes, dtype=np.float64)
    near = np.clip(boxes[..., :2], 0, sizes)
    far = np.clip(boxes[..., :2] + boxes[..., 2:], 0, sizes)
    return np.concatenate([near, np.maximum(far - near, 0)], axis=-1)


def expand_boxes(boxes_xywh: np.ndarray, image_sizes: np.ndarray, margin: float) -> np.ndarray:
    """Add ``margin`` times a box's side on each of its sides, cut at the image."""
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    grown = np.concatenate([boxes[..., :2] - margin * boxes[..., 2:], (1 + 2 * margin) * boxes[..., 2:]], axis=-1)
    return clip_boxes(grown, image_sizes)


def whole_image_boxes(image_sizes: np.ndarray) -> np.ndarray:
    """Return boxes (N, 4) that hold the whole of images of sizes (N, 2) width height."""
    sizes = np.asarray(image_sizes, dtype=np.float64)
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def fill_missing(boxes_xywh: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Return boxes (N, 4) with the whole image in place of those that are NaN."""
    missing = np.isnan(boxes_xywh[:, :1])
    return np.where(missing, whole_image_boxes(image_sizes), boxes_xywh) if missing.any() else boxes_xywh


def center_boxes(image_sizes: np.ndarray, share: float = CENTER_SHARE) -> np.ndarray:
    """Return boxes (N, 4) in the middle of the images, with ``share`` of each side."""
    sizes = np.asarray(image_sizes, dtype=np.float64)
    return np.concatenate([sizes * (1 - share) / 2, sizes * share], axis=1)


# --- how much of the object crops keep ----------------------------------------------------------------------------


def maiou_curve(
    boxes_xywh: np.ndarray,
    image_sizes: np.ndarray,
    thresholds: Sequence[float],
    mode: str = "exact",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    draws: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return the mean asymmetric IoU of crops, ``draws`` per box, (len(thresholds),).

    Every threshold sees the same random numbers, so that the curve is smooth in the threshold.

    Args:
        boxes_xywh: (N, 4), inside their images.
        image_sizes: (N, 2), width height.
        thresholds: values of THR; negative: RandomResizedCrop.
        mode, scale, ratio: of the crop, see ``crops.sample_crops``.
        draws: crops per box; None: as many as make MAIOU_CROPS, at least 5.
    """
    draws = draws or max(5, math.ceil(MAIOU_CROPS / len(boxes_xywh)))
    boxes, sizes = np.tile(boxes_xywh, (draws, 1)), np.tile(image_sizes, (draws, 1))
    means = []
    for thr in thresholds:
        crops = sample_crops(boxes, sizes, thr, mode, scale, ratio, np.random.default_rng(seed))
        means.append(coverage(crops_to_xywh(crops), boxes).mean())
    return np.array(means)


def maiou_to_thr(target: float, boxes_xywh: np.ndarray, image_sizes: np.ndarray, **crop: Any) -> float:
    """Return the threshold whose measured maIoU on these boxes is ``target``, found by bisection.

    Args:
        boxes_xywh, image_sizes: the data set's boxes (N, 4) and sizes (N, 2).
        **crop: mode, scale, ratio, draws, seed of ``maiou_curve``.

    Raises:
        UserError: if no threshold reaches it.
    """
    low, high = 0.0, 1.0
    least, most = maiou_curve(boxes_xywh, image_sizes, (low, high), **crop)
    if not least - 5e-4 <= target <= most + 5e-4:  # half a unit of the third digit: what is printed can be asked for
        raise UserError(f"maiou={target}: these boxes and crops reach from {least:.3f} to {most:.3f}; choose between")
    while high - low > 1e-4:
        middle = (low + high) / 2
        below = maiou_curve(boxes_xywh, image_sizes, (middle,), **crop)[0] < target
        low, high = (middle, high) if below else (low, middle)
    return 1.0 if target >= most else (low + high) / 2
