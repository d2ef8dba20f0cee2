"""The box file that the stages hand on: image id to box, with a header that says what it is."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.files import UserError, load_json, save_json

FILE_KIND, FILE_VERSION, BOX_FORMAT = "localized-crops boxes", 1, "xywh"


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
