"""The box file that the stages hand on: image id to box, with a header that says what it is.

A file of many images is JSON too, with the numbers of all images in one string: ``columns`` holds the list ``ids`` and,
each in base64 of little-endian float64 with NaN for what is not there, ``boxes`` (N, 4), ``image_sizes`` (N, 2) and
``scores`` (N,). Other programs read it so:

    columns = json.load(open("boxes.json"))["columns"]
    boxes = numpy.frombuffer(base64.b64decode(columns["boxes"]), "<f8").reshape(-1, 4)
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.columns import Column, Rows, ids_to_keys
from localized_crops.files import UserError, load_json, save_json, user_errors
from localized_crops.image_ids import ImageId, id_to_key

FILE_KIND, BOX_FORMAT = "localized-crops boxes", "xywh"
FILE_VERSION, COLUMNS_VERSION = 2, 3  # of files with an entry for each image, and with columns
MOST_ENTRIES = 50_000  # images; a file of more has columns: entries of a million take minutes and gigabytes
PIXEL_GRIDS = ("stored", "upright")  # the pixels as the file stores them, or turned as its EXIF orientation says
OVERSHOOT = 1e-3  # pixels that a box may reach past its image: rounding
ENTRIES = {"boxes": dict, "image_sizes": dict, "scores": dict}
PARTS = {"made_by": str, "settings": dict, "pixel_grid": str}
NUMBERS = {"boxes": (4,), "image_sizes": (2,), "scores": ()}  # of an image


@dataclass(frozen=True)
class BoxFile:
    """What a box file holds."""

    boxes: Mapping[ImageId, tuple[float, float, float, float] | None]  # image id -> xywh; None: no box was found
    image_sizes: Mapping[ImageId, tuple[int, int] | None]  # image id -> width height; None: it could not be read
    made_by: str  # the script
    settings: dict[str, Any]  # its resolved settings
    scores: Mapping[ImageId, float | None] = field(default_factory=dict)
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
    file = _parse(content)
    save_json(path, content if len(boxes) <= MOST_ENTRIES else _with_columns(content, file))


def _with_columns(content: dict[str, Any], file: BoxFile) -> dict[str, Any]:
    """Return the content of a file with columns in place of entries."""
    kept = {key: value for key, value in content.items() if key not in ENTRIES}
    columns = {"boxes": file.boxes.numbers, "image_sizes": file.image_sizes.numbers}
    if "scores" in content:
        rows, columns["scores"] = file.scores.rows.of(file.boxes.rows.keys), np.full(len(file.boxes), np.nan)
        columns["scores"][rows >= 0] = file.scores.numbers[rows[rows >= 0]]
    coded = {name: base64.b64encode(one.astype("<f8").tobytes()).decode() for name, one in columns.items()}
    return kept | {"version": COLUMNS_VERSION, "columns": {"ids": list(content["boxes"])} | coded}


def load_boxes(path: Path | str) -> BoxFile:
    """Read and check a box file, of any version.

    Raises:
        UserError: if it is missing, torn, of another kind or version, or a box in it is impossible.
    """
    content = load_json(path)
    with user_errors(ValueError, f"{path}: not a box file that can be used, make it again with its script: "):
        return _parse(content)


def _parse(content: Any) -> BoxFile:
    """Check a box file's content, in NumPy for all images at once; ValueError says what is wrong with it."""
    _check_header(content)
    read = _columns if content["version"] == COLUMNS_VERSION else _entries
    boxes, sizes, scores = read(content)
    has_box = ~np.isnan(boxes.numbers[:, 0])
    _refuse(sizes, (sizes.numbers < 1).any(1), "a size [width, height] from 1 x 1 pixels on")
    _refuse(sizes, has_box & np.isnan(sizes.numbers[:, 0]), "known, as it must be for an image with a box")
    _refuse(boxes, has_box & ~((boxes.numbers[:, :2] >= 0) & (boxes.numbers[:, 2:] > 0)).all(1), "a box with an area")
    far = boxes.numbers[:, :2] + boxes.numbers[:, 2:]
    outside = (far > sizes.numbers + OVERSHOOT) | (boxes.numbers[:, :2] >= sizes.numbers)
    _refuse(boxes, outside.any(1), "a box inside its image")
    about = {"made_by": content["made_by"], "settings": content["settings"]}
    return BoxFile(boxes, sizes, **about, scores=scores, pixel_grid=content.get("pixel_grid", "stored"))


def _check_header(content: Any) -> None:
    """Raise ValueError unless ``content`` is an object of our kind with all its parts."""
    if not isinstance(content, dict) or content.get("kind") != FILE_KIND:
        found = content.get("kind") if isinstance(content, dict) else None
        raise ValueError(f"kind is {str(found)[:60]!r}, expected {FILE_KIND!r}")
    if content.get("version") not in range(1, COLUMNS_VERSION + 1) or content.get("box_format") != BOX_FORMAT:
        raise ValueError(f"version {content.get('version')!r}, box format {content.get('box_format')!r}")
    content = {"scores": {}, "pixel_grid": "stored"} | content  # a file of version 1 has no pixel_grid
    for key, kind in (PARTS | ({"columns": dict} if content["version"] == COLUMNS_VERSION else ENTRIES)).items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")
    if content["pixel_grid"] not in PIXEL_GRIDS:
        raise ValueError(f"pixel_grid is {content['pixel_grid'][:60]!r}, must be one of {', '.join(PIXEL_GRIDS)}")


def _columns(content: dict[str, Any]) -> tuple[Column, Column, Column]:
    """Return boxes, image sizes and scores of a file with columns."""
    columns = content["columns"]
    ids = columns.get("ids")
    if not isinstance(ids, list) or not all(isinstance(one, str) and one for one in ids):
        raise ValueError("columns has no list of ids")
    rows, found = Rows(ids_to_keys(ids)), {}
    for name, shape in NUMBERS.items():
        text = columns.get(name, "" if name == "scores" else None)
        if not isinstance(text, str):
            raise ValueError(f"columns has no {name}")
        numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(np.float64)
        own = rows if text else Rows(rows.keys[:0])
        found[name] = Column(own, numbers.reshape(len(own), *shape), int if name == "image_sizes" else float)
        of_image = found[name].numbers.reshape(len(own), math.prod(shape))
        whole = np.isfinite(of_image).all(1) | np.isnan(of_image).all(1)
        if name == "image_sizes":
            whole &= (np.nan_to_num(of_image) % 1 == 0).all(1)
        _refuse_rows(own, ~whole, f"its {name} are no numbers")
    return found["boxes"], found["image_sizes"], found["scores"]


def _refuse_rows(rows: Rows, bad: np.ndarray, what: str) -> None:
    if bad.any():
        raise ValueError(f"image {rows.keys[int(bad.argmax())].decode()[:100]}: {what}")


def _entries(content: dict[str, Any]) -> tuple[Column, Column, Column]:
    """Return boxes, image sizes and scores of a file with an entry for each image."""
    boxes, sizes, scores = content["boxes"], content["image_sizes"], content.get("scores", {})
    if boxes.keys() != sizes.keys() or not scores.keys() <= boxes.keys():
        raise ValueError("boxes, image_sizes and scores name different images")
    rows, sizes = Rows(ids_to_keys(list(boxes))), {key: sizes[key] for key in boxes}
    score_of = _numbers(scores, "a number")
    size_of = _numbers(sizes, "a size [width, height] of whole numbers", 2, kinds="i")
    box_of = _numbers(boxes, "a box [x, y, width, height]", 4)
    scored = rows if scores.keys() == boxes.keys() and list(scores) == list(boxes) else Rows(ids_to_keys(list(scores)))
    return Column(rows, box_of), Column(rows, size_of, int), Column(scored, score_of)


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
        raise ValueError(f"image {str(key)[:100]}: {str(entries[key])[:80]} is not {what}")


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
    names, sizes = np.asarray(ids).tolist(), np.asarray(image_sizes)
    rows = file.boxes.rows.of(ids)
    if (unknown := np.flatnonzero(rows < 0)).size:
        raise UserError(
            f"{path}: made for another data set, it has no entry for image {names[unknown[0]]}; make it again"
        )
    there = file.image_sizes.numbers[rows]
    if (other := np.flatnonzero((there != sizes).any(1) & ~np.isnan(there[:, 0]))).size:
        row = other[0]
        raise UserError(
            f"{path}: made for another data set: image {names[row]} is {tuple(sizes[row].tolist())} here and "
            f"{tuple(there[row].astype(int).tolist())} there; make it again"
        )
    found = file.boxes.numbers[rows]
    missing = np.isnan(found[:, 0])
    return clip_boxes(np.where(missing[:, None], whole_image_boxes(sizes), found), sizes), int(missing.sum())
