"""The box file that the stages hand on: image id to box, with a header that says what it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.files import UserError, load_json, save_json, user_errors
from localized_crops.image_ids import ImageId, id_to_key, key_to_id

FILE_KIND, FILE_VERSION, BOX_FORMAT = "localized-crops boxes", 2, "xywh"
PIXEL_GRIDS = ("stored", "upright")  # the pixels as the file stores them, or turned as its EXIF orientation says
OVERSHOOT = 1e-3  # pixels that a box may reach past its image: rounding
PARTS = {"made_by": str, "settings": dict, "boxes": dict, "image_sizes": dict, "scores": dict, "pixel_grid": str}


@dataclass(frozen=True)
class BoxFile:
    """What a box file holds."""

    boxes: dict[ImageId, tuple[float, float, float, float] | None]  # image id -> xywh; None: no box was found
    image_sizes: dict[ImageId, tuple[int, int] | None]  # image id -> width height; None: it could not be read
    made_by: str  # the script
    settings: dict[str, Any]  # its resolved settings
    scores: dict[ImageId, float | None] = field(default_factory=dict)
    pixel_grid: str = "stored"  # of boxes and sizes: "stored", or "upright" (EXIF orientation applied)


def save_boxes(
    path: Path | str,
    boxes: dict[ImageId, Sequence[float] | None],
    image_sizes: dict[ImageId, Sequence[int] | None],
    *,
    made_by: str,
    settings: dict[str, Any],
    scores: dict[ImageId, float | None] | None = None,
    pixel_grid: str = "stored",
) -> None:
    """Write a box file, whole or not at all.

    Args:
        path: the JSON to write.
        boxes: image id (a number or text) -> x y width height in pixels; None where no box was found.
        image_sizes: image id -> width height, for the same ids; None, with no box, where the image cannot be read.
        made_by: the script that made the boxes.
        settings: its resolved settings.
        scores: image id -> the method's confidence in the box, on any scale.
        pixel_grid: "stored" if boxes and sizes refer to the pixels as the image file stores them, "upright" if to the
            image after its EXIF orientation was applied.

    Raises:
        ValueError: if a box, size or id is impossible, or the ids differ.
    """
    content = {
        "kind": FILE_KIND,
        "version": FILE_VERSION,
        "box_format": BOX_FORMAT,
        "unit": "pixels of the original image",
        "pixel_grid": pixel_grid,
        "made_by": made_by,
        "settings": settings,
        "image_sizes": {id_to_key(i): size and [int(n) for n in size] for i, size in image_sizes.items()},
        "boxes": {id_to_key(i): None if box is None else [float(n) for n in box] for i, box in boxes.items()},
    }
    if scores is not None:
        content["scores"] = {id_to_key(i): None if score is None else float(score) for i, score in scores.items()}
    _parse(content)
    save_json(path, content)


def load_boxes(path: Path | str) -> BoxFile:
    """Read and check a box file, of this version or of version 1.

    Raises:
        UserError: if it is missing, torn, of another kind or version, or a box in it is impossible.
    """
    content = load_json(path)
    with user_errors(ValueError, f"{path}: not a box file that can be used, make it again with its script: "):
        return _parse(content)


def _parse(content: Any) -> BoxFile:
    """Check a box file's content, in NumPy for all images at once; ValueError says what is wrong with it."""
    _check_header(content)
    boxes, sizes, scores = content["boxes"], content["image_sizes"], content.get("scores", {})
    if boxes.keys() != sizes.keys() or not scores.keys() <= boxes.keys():
        raise ValueError("boxes, image_sizes and scores name different images")
    _numbers(scores, "a number")
    size_of = _numbers(sizes, "a size [width, height] of whole numbers", 2, kinds="i")
    box_of = _numbers(boxes, "a box [x, y, width, height]", 4)
    has_box = ~np.isnan(box_of[:, 0])
    _refuse(sizes, (size_of < 1).any(1), "a size [width, height] from 1 x 1 pixels on")
    _refuse(sizes, has_box & np.isnan(size_of[:, 0]), "known, as it must be for an image with a box")
    _refuse(boxes, has_box & ~((box_of[:, :2] >= 0) & (box_of[:, 2:] > 0)).all(1), "a box with an area")
    far = box_of[:, :2] + box_of[:, 2:]
    _refuse(boxes, (far > size_of + OVERSHOOT).any(1), "a box inside its image")
    return BoxFile(
        boxes={key_to_id(key): box and tuple(map(float, box)) for key, box in boxes.items()},
        image_sizes={key_to_id(key): size and tuple(size) for key, size in sizes.items()},
        made_by=content["made_by"],
        settings=content["settings"],
        scores={key_to_id(key): score for key, score in scores.items()},
        pixel_grid=content.get("pixel_grid", "stored"),
    )


def _check_header(content: Any) -> None:
    """Raise ValueError unless ``content`` is an object of our kind with all its parts."""
    if not isinstance(content, dict) or content.get("kind") != FILE_KIND:
        found = content.get("kind") if isinstance(content, dict) else None
        raise ValueError(f"kind is {str(found)[:60]!r}, expected {FILE_KIND!r}")
    if content.get("version") not in range(1, FILE_VERSION + 1) or content.get("box_format") != BOX_FORMAT:
        raise ValueError(f"version {content.get('version')!r}, box format {content.get('box_format')!r}")
    content = {"scores": {}, "pixel_grid": "stored"} | content  # a file of version 1 has no pixel_grid
    for key, kind in PARTS.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")
    if content["pixel_grid"] not in PIXEL_GRIDS:
        raise ValueError(f"pixel_grid is {content['pixel_grid'][:60]!r}, must be one of {', '.join(PIXEL_GRIDS)}")


def _numbers(entries: Mapping[str, Any], what: str, *shape: int, kinds: str = "iuf") -> np.ndarray:
    """Return the values of all images as one float array (N, *shape); NaN for None.

    Raises:
        ValueError: if a value is not ``what``: not of this shape, not finite, or not of one of NumPy's ``kinds``.
    """
    values = [value for value in entries.values() if value is not None]
    holds_bool = [isinstance(value, list) and bool in map(type, value) for value in entries.values()]
    _refuse(entries, np.array(holds_bool), what)  # NumPy would take true for 1
    rows = _array(values)
    if values and (rows.shape != (len(values), *shape) or rows.dtype.kind not in kinds or not np.isfinite(rows).all()):
        singles = [None if value is None else _array(value) for value in entries.values()]
        bad = [
            one is not None and (one.shape != shape or one.dtype.kind not in kinds or not np.isfinite(one).all())
            for one in singles
        ]
        _refuse(entries, np.array(bad), what)
    filled = np.full((len(entries), *shape), np.nan)
    filled[[value is not None for value in entries.values()]] = rows.reshape(len(values), *shape)
    return filled


def _array(values: Any) -> np.ndarray:
    try:
        return np.array(values)
    except ValueError:  # lists of different lengths
        return np.array(None)


def _refuse(entries: Mapping[str, Any], bad: np.ndarray, what: str) -> None:
    """Raise ValueError that names the first image that is ``bad`` (N,)."""
    if bad.any():
        key = list(entries)[int(bad.argmax())]
        raise ValueError(f"image {key[:100]}: {str(entries[key])[:80]} is not {what}")


def boxes_for_images(
    path: Path | str, ids: Sequence[ImageId], image_sizes: np.ndarray, pixel_grid: str | None = None
) -> tuple[np.ndarray, int]:
    """Read a box file for the images of a data set.

    Args:
        path: the box file.
        ids: (N,) image ids.
        image_sizes: (N, 2) width height.
        pixel_grid: of the images, "stored" or "upright"; None: not compared.

    Returns:
        Boxes (N, 4) x y width height, the whole image where the file says that no box was found; and how many
        these are.

    Raises:
        UserError: if the file was made for other images.
    """
    file = load_boxes(path)
    if pixel_grid not in (None, file.pixel_grid):
        raise UserError(f"{path}: its boxes are in the {file.pixel_grid} pixel grid, the images here are {pixel_grid}")
    boxes = whole_image_boxes(image_sizes)
    missing = 0
    for row, (image_id, size) in enumerate(zip(np.asarray(ids).tolist(), image_sizes.tolist(), strict=True)):
        if image_id not in file.boxes:
            raise UserError(f"{path}: made for another data set, it has no entry for image {image_id}; make it again")
        if file.image_sizes[image_id] not in (None, tuple(size)):
            raise UserError(
                f"{path}: made for another data set: image {image_id} is {tuple(size)} here and "
                f"{file.image_sizes[image_id]} there; make it again"
            )
        if file.boxes[image_id] is None:
            missing += 1
        else:
            boxes[row] = file.boxes[image_id]
    return clip_boxes(boxes, image_sizes), missing
