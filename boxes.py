"""Box arithmetic (IoU, coverage, maIoU of crops) and the box file that the stages hand on.

Boxes are (x, y, width, height) in pixels of the original image, in its stored pixel grid (no EXIF rotation).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crops import sample_crops
from utils import UserError, load_json, save_json

FILE_KIND, FILE_VERSION, BOX_FORMAT = "localized-crops boxes", 1, "xywh"
MAIOU_CROPS = 20_000  # for a mean asymmetric IoU that is good to .001 or so
CENTER_SHARE = 0.65  # of each side: the constant centred box, the control that every method must beat


# --- arithmetic ---------------------------------------------------------------------------------------------------


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
        seed: of the random numbers.
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
        target: mean asymmetric IoU.
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


def published_thr(maiou: float) -> float:
    """Return the published proxy's threshold, thr = (2 (maIoU - .5))^2.5; for comparison, it is not exact."""
    return (2 * (maiou - 0.5)) ** 2.5


def published_maiou(thr: float) -> float:
    """Return the published proxy's mean asymmetric IoU, .5 + .5 thr^.4."""
    return 0.5 + 0.5 * thr**0.4


# --- the box file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxFile:
    """What a box file holds."""

    boxes: dict[int, tuple[float, float, float, float] | None]  # image id -> xywh; None: no box was found
    image_sizes: dict[int, tuple[int, int] | None]  # image id -> width height; None: it could not be read
    made_by: str  # the script
    settings: dict[str, Any]  # its resolved settings
    scores: dict[int, float | None] = field(default_factory=dict)


def save_boxes(
    path: Path | str,
    boxes: dict[int, Sequence[float] | None],
    image_sizes: dict[int, Sequence[int] | None],
    *,
    made_by: str,
    settings: dict[str, Any],
    scores: dict[int, float | None] | None = None,
) -> None:
    """Write a box file, whole or not at all.

    Args:
        path: the JSON to write.
        boxes: image id -> x y width height in pixels; None where no box was found.
        image_sizes: image id -> width height, for the same ids; None, with no box, where the image cannot be read.
        made_by: the script that made the boxes.
        settings: its resolved settings.
        scores: image id -> the method's own belief in the box, any scale.

    Raises:
        ValueError: if a box or size is not one, or the ids differ.
    """
    content = {
        "kind": FILE_KIND,
        "version": FILE_VERSION,
        "box_format": BOX_FORMAT,
        "unit": "pixels of the original image as stored",
        "made_by": made_by,
        "settings": settings,
        "image_sizes": {str(i): size and [int(n) for n in size] for i, size in image_sizes.items()},
        "boxes": {str(i): None if box is None else [float(n) for n in box] for i, box in boxes.items()},
    }
    if scores is not None:
        content["scores"] = {str(i): None if score is None else float(score) for i, score in scores.items()}
    fault = _first_fault(content)
    if fault:
        raise ValueError(f"not a box file: {fault}")
    save_json(path, content)


def load_boxes(path: Path | str) -> BoxFile:
    """Read and check a box file.

    Raises:
        UserError: if it is missing, torn, of another kind or version, or a box in it is impossible.
    """
    content = load_json(path)
    fault = _first_fault(content)
    if fault:
        raise UserError(f"{path}: not a box file of version {FILE_VERSION}: {fault}; make it again with its script")
    return BoxFile(
        boxes={int(i): None if box is None else tuple(map(float, box)) for i, box in content["boxes"].items()},
        image_sizes={int(i): size and tuple(size) for i, size in content["image_sizes"].items()},
        made_by=content["made_by"],
        settings=content["settings"],
        scores={int(i): score for i, score in content.get("scores", {}).items()},
    )


def _first_fault(content: Any) -> str | None:
    """Return what is wrong with a box file's content, None if nothing is."""
    if not isinstance(content, dict) or content.get("kind") != FILE_KIND:
        return f"kind is {content.get('kind') if isinstance(content, dict) else None!r}, expected {FILE_KIND!r}"
    if content.get("version") != FILE_VERSION or content.get("box_format") != BOX_FORMAT:
        return f"version {content.get('version')!r}, box format {content.get('box_format')!r}"
    for key, kind in (("made_by", str), ("settings", dict), ("boxes", dict), ("image_sizes", dict)):
        if not isinstance(content.get(key), kind):
            return f"{key} is missing or no {kind.__name__}"
    if content["boxes"].keys() != content["image_sizes"].keys():
        return "boxes and image_sizes name different images"
    return next(filter(None, (_entry_fault(i, content) for i in content["boxes"])), None) or _score_fault(content)


def _entry_fault(image_id: str, content: dict) -> str | None:
    size, box = content["image_sizes"][image_id], content["boxes"][image_id]
    if not (image_id.isascii() and image_id.isdigit() and len(image_id) <= 18 and str(int(image_id)) == image_id):
        return f"image id {image_id[:40]!r} is not a number"
    if size is None and box is None:
        return None
    if not _are_numbers(size, 2) or not all(isinstance(n, int) and n >= 1 for n in size):
        return f"image {image_id}: size {str(size)[:60]} is not [width, height]"
    if box is None:
        return None
    if not _are_numbers(box, 4) or min(box[2:]) <= 0 or min(box[:2]) < 0:
        return f"image {image_id}: box {str(box)[:80]} is not [x, y, width, height] with an area"
    if box[0] + box[2] > size[0] + 1e-3 or box[1] + box[3] > size[1] + 1e-3:
        return f"image {image_id}: box {str(box)[:80]} reaches past the image, {size}"
    return None


def _score_fault(content: dict) -> str | None:
    scores = content.get("scores", {})
    if not isinstance(scores, dict) or not scores.keys() <= content["boxes"].keys():
        return "scores name images without an entry in boxes"
    bad = [i for i, score in scores.items() if score is not None and not _are_numbers([score], 1)]
    return f"image {bad[0]}: score {str(scores[bad[0]])[:60]!r} is not a number" if bad else None


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(n) in (int, float) and abs(n) <= sys.float_info.max for n in values)  # not NaN, no longer int
    )


def boxes_for_images(path: Path | str, ids: Sequence[int], image_sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Read a box file for the images of a data set.

    Args:
        path: the box file.
        ids: (N,) image ids.
        image_sizes: (N, 2) width height.

    Returns:
        Boxes (N, 4) x y width height, the whole image where the file says that no box was found; and how many
        these are.

    Raises:
        UserError: if the file was made for other images.
    """
    file = load_boxes(path)
    boxes = whole_image_boxes(image_sizes)
    missing = 0
    for row, (image_id, size) in enumerate(zip(map(int, ids), image_sizes, strict=True)):
        if image_id not in file.boxes:
            raise UserError(f"{path}: made for another data set, it has no entry for image {image_id}; make it again")
        if file.image_sizes[image_id] not in (None, tuple(size)):
            raise UserError(
                f"{path}: made for another data set: image {image_id} is {tuple(map(int, size))} here and "
                f"{file.image_sizes[image_id]} there; make it again"
            )
        if file.boxes[image_id] is None:
            missing += 1
        else:
            boxes[row] = clip_boxes(np.array(file.boxes[image_id]), size)
    return boxes, missing
