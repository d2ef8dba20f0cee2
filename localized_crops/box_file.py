"""The box file that the stages hand on: image id to box, with a header that says what it is.

A file of many images is JSON too, with the numbers of all images in one string: ``columns`` holds the list ``ids`` and,
each in base64 of little-endian float64 with NaN for what is not there, ``boxes`` (N, 4), ``image_sizes`` (N, 2) and
``scores`` (N,). Other programs read it so:

    columns = json.load(open("boxes.json"))["columns"]
    boxes = numpy.frombuffer(base64.b64decode(columns["boxes"]), "<f8").reshape(-1, 4)
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.boxes import clip_boxes
from localized_crops.files import UserError, is_finite_number, load_json, save_json, user_errors
from localized_crops.image_ids import ImageId, Rows, id_to_key, ids_to_keys, key_to_id

FILE_KIND, BOX_FORMAT = "localized-crops boxes", "xywh"
FILE_VERSION, COLUMNS_VERSION = 2, 3  # of files with an entry for each image, and with columns
MOST_ENTRIES = 50_000  # images; a file of more has columns: entries of a million take minutes and gigabytes
PIXEL_GRIDS = ("stored", "upright")  # the pixels as the file stores them, or turned as its EXIF orientation says
OVERSHOOT = 1e-3  # pixels that a box may reach past its image: rounding


@dataclass(frozen=True, eq=False)
class BoxFile:
    """What a box file holds: a row of numbers for each image, NaN where there are none, and the same by image id."""

    rows: Rows
    boxes_xywh: np.ndarray  # (N, 4), pixels
    sizes: np.ndarray  # (N, 2), width height
    all_scores: np.ndarray | None  # (N, 1); None: the file has no scores
    made_by: str  # the script
    settings: dict[str, Any]  # its resolved settings
    pixel_grid: str = "stored"  # of boxes and sizes: "stored", or "upright" (EXIF orientation applied)

    @cached_property
    def boxes(self) -> dict[ImageId, tuple[float, float, float, float] | None]:
        """The x y width height of each image; None: no box was found."""
        return self._by_id(self.boxes_xywh)

    @cached_property
    def image_sizes(self) -> dict[ImageId, tuple[int, int] | None]:
        """The width height of each image; None: it could not be read."""
        return self._by_id(self.sizes, int)

    @cached_property
    def scores(self) -> dict[ImageId, float | None]:
        """The score of each image; empty if the file has no scores."""
        scores = {} if self.all_scores is None else self._by_id(self.all_scores)
        return {image_id: None if score is None else score[0] for image_id, score in scores.items()}

    def _by_id(self, numbers: np.ndarray, kind: type = float) -> dict[ImageId, Any]:
        ids, is_known = (key_to_id(key.decode()) for key in self.rows.keys.tolist()), ~np.isnan(numbers[:, 0])
        return {
            i: tuple(map(kind, n)) if known else None
            for i, n, known in zip(ids, numbers.tolist(), is_known, strict=True)
        }


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
    if len(boxes) > MOST_ENTRIES:
        arrays = {"boxes": file.boxes_xywh, "image_sizes": file.sizes, "scores": file.all_scores}
        coded = {name: base64.b64encode(n.astype("<f8")).decode() for name, n in arrays.items() if n is not None}
        columns = {"ids": list(content["boxes"])} | coded
        header = {key: value for key, value in content.items() if key not in arrays}
        content = header | {"version": COLUMNS_VERSION, "columns": columns}
    save_json(path, content)


def load_boxes(path: Path | str) -> BoxFile:
    """Read and check a box file, of any version.

    Raises:
        UserError: if it is missing, torn, of another kind or version, or a box in it is impossible.
    """
    content = load_json(path)
    with user_errors(ValueError, f"{path}: not a box file that can be used, make it again with its script: "):
        return _parse(content)


def _parse(content: Any) -> BoxFile:
    """Check a box file's content; ValueError says what is wrong with it."""
    _check_header(content)
    ids, numbers = (_columns if content["version"] == COLUMNS_VERSION else _entries)(content)
    rows = Rows(ids_to_keys(ids))
    boxes, sizes, scores = np.split(numbers, (4, 6), axis=1)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        no_box, near, far = np.isnan(boxes).all(1), boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        holds = {
            "a box has four finite numbers": no_box | np.isfinite(boxes).all(1),
            "a size has two whole numbers from 1 on": (
                np.isnan(sizes).all(1) | ((sizes >= 1) & (sizes % 1 == 0)).all(1)
            ),
            "an image with a box has a size": no_box | ~np.isnan(sizes[:, 0]),
            "a box has an area": no_box | ((near >= 0) & (boxes[:, 2:] > 0)).all(1),
            "a box lies inside its image": no_box | ((far <= sizes + OVERSHOOT) & (near < sizes)).all(1),
            "a score is a finite number": ~np.isinf(scores[:, 0]),
        }
    for rule, is_held in holds.items():
        if not is_held.all():
            row = int(is_held.argmin())
            values = f"box {boxes[row].tolist()}, size {sizes[row].tolist()}, score {scores[row, 0]}"
            raise ValueError(f"image {ids[row][:100]}: {rule}, got {values}")
    scores = scores if "scores" in content.get("columns", content) else None
    pixel_grid = content.get("pixel_grid", "stored")
    return BoxFile(rows, boxes, sizes, scores, content["made_by"], content["settings"], pixel_grid)


def _check_header(content: Any) -> None:
    """Raise ValueError unless ``content`` is an object of our kind with all its parts."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != FILE_KIND:
        raise ValueError(f"kind is {str(kind)[:60]!r}, expected {FILE_KIND!r}")
    content = {"scores": {}, "pixel_grid": "stored"} | content  # a file of version 1 has no pixel_grid
    choices = {"version": range(1, COLUMNS_VERSION + 1), "box_format": (BOX_FORMAT,), "pixel_grid": PIXEL_GRIDS}
    for key, values in choices.items():
        if content.get(key) not in values:
            raise ValueError(f"{key} is {str(content.get(key))[:60]!r}, must be one of {', '.join(map(str, values))}")
    parts = ("columns",) if content["version"] == COLUMNS_VERSION else ("boxes", "image_sizes", "scores")
    for key, kind in ({"made_by": str, "settings": dict} | dict.fromkeys(parts, dict)).items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} is missing or no {kind.__name__}")


def _columns(content: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Return ids and numbers, (N, 7) box, size and score, of a file with columns; NaN where there is none."""
    columns = content["columns"]
    ids = columns.get("ids")
    if not isinstance(ids, list) or not all(isinstance(key, str) and key for key in ids):
        raise ValueError("columns has no list of ids")

    def decoded(name: str, length: int) -> np.ndarray:
        if not isinstance(columns.get(name), str):
            raise ValueError(f"columns has no {name}")
        return np.frombuffer(base64.b64decode(columns[name], validate=True), "<f8").reshape(len(ids), length)

    scores = decoded("scores", 1) if "scores" in columns else np.full((len(ids), 1), np.nan)
    return ids, np.concatenate([decoded("boxes", 4), decoded("image_sizes", 2), scores], axis=1)


def _entries(content: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Return the same of a file with an entry for each image."""
    boxes, sizes, scores = content["boxes"], content["image_sizes"], content.get("scores", {})
    if boxes.keys() != sizes.keys() or not scores.keys() <= boxes.keys():
        raise ValueError("boxes, image_sizes and scores name different images")
    table = []
    for key, box in boxes.items():
        score = scores.get(key)
        for numbers, length in ((box, 4), (sizes[key], 2), (None if score is None else [score], 1)):
            if numbers is None:
                numbers = [math.nan] * length
            elif not (isinstance(numbers, list) and len(numbers) == length and all(map(is_finite_number, numbers))):
                raise ValueError(f"image {key[:100]}: {str(numbers)[:80]} is no list of {length} finite numbers")
            table.extend(numbers)
    return list(boxes), np.array(table, dtype=np.float64).reshape(-1, 7)


def boxes_for_images(path: Path | str, ids: Sequence[ImageId], image_sizes: np.ndarray, pixel_grid: str) -> np.ndarray:
    """Read the boxes of the images of a data set.

    Args:
        ids: (N,) image ids.
        image_sizes: (N, 2) width height.
        pixel_grid: of the images, "stored" or "upright".

    Returns:
        Boxes (N, 4) x y width height, cut at the images; NaN where the file says that no box was found.

    Raises:
        UserError: if the file was made for other images.
    """
    file = load_boxes(path)
    if file.pixel_grid != pixel_grid:
        raise UserError(f"{path}: its boxes are in the {file.pixel_grid} pixel grid, the images here are {pixel_grid}")
    names, sizes, rows = np.asarray(ids).tolist(), np.asarray(image_sizes), file.rows.of(ids)
    if (rows < 0).any():
        name = names[int((rows < 0).argmax())]
        raise UserError(f"{path}: made for another data set, it has no entry for image {name}; make it again")
    file_sizes = file.sizes[rows]
    differs = (file_sizes != sizes).any(1) & ~np.isnan(file_sizes[:, 0])
    if differs.any():
        row = int(differs.argmax())
        here, there = tuple(sizes[row].tolist()), tuple(file_sizes[row].astype(int).tolist())
        raise UserError(
            f"{path}: made for another data set: image {names[row]} is {here} here and {there} there; make it again"
        )
    return clip_boxes(file.boxes_xywh[rows], sizes)
