"""From the images that a reader lists to a data set: sizes read, unreadable images left out, boxes clipped."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localized_crops.boxes import clip_boxes
from localized_crops.files import UserError
from readers.data_set import DataSet, ImagePaths, UprightPath, no_boxes
from readers.images import image_sizes


class Listing(NamedTuple):
    """The images that a reader found, and what it knows of them; the fields are those of `DataSet`."""

    paths: ImagePaths
    ids: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    split: np.ndarray
    boxes: np.ndarray | None = None  # (N, 4), not clipped; None: no image has one
    boxes_file: Path | None = None  # the file that holds them, for errors
    notes: Sequence[str] = ()


def list_names(
    root: Path, names: list[str], labels: list[int], class_names: list[str], splits: list[str], **more: Any
) -> Listing:
    """Return the listing of N images whose ids are their paths below ``root``; UserError if a name cannot be an id."""
    for image in names:
        # control characters, ends of lines, and what is no UTF-8; other invisible ones are in many files' names
        if image.isdigit() or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in image):
            raise UserError(f"{root}: {image!r}: a file name of digits alone, or with control characters; rename it")
    columns = np.array(labels, dtype=np.int64), class_names, np.array(splits, dtype="<U5")
    return Listing(ImagePaths(root, names, upright=True), np.array(names, dtype=np.str_), *columns, **more)


def build_data_set(name: str, root: Path, listing: Listing, keep_going: bool) -> DataSet:
    """Return the data set of the listed images.

    Raises:
        UserError: if an image cannot be read (with ``keep_going`` it is left out, into ``unreadable``), or a box lies
            outside its image.
    """
    paths, ids = listing.paths, listing.ids
    sizes, rotated, faults = image_sizes(paths, keep_going=keep_going)
    kept = np.ones(len(paths), dtype=bool)
    kept[list(faults)] = False
    raw_boxes = no_boxes(len(paths)) if listing.boxes is None else listing.boxes
    boxes = clip_boxes(raw_boxes, sizes)
    outside = kept & (boxes[:, 2:] <= 0).any(1)
    if outside.any():
        row = int(outside.argmax())
        box, size = tuple(raw_boxes[row].tolist()), tuple(sizes[row].tolist())
        raise UserError(f"{listing.boxes_file}: image {ids[row]}: box {box} lies outside the image, {size}")
    return DataSet(
        name=name,
        root=root,
        ids=ids[kept],
        paths=paths[kept],
        labels=listing.labels[kept],
        class_names=listing.class_names,
        boxes=boxes[kept],
        split=listing.split[kept],
        image_sizes=sizes[kept],
        pixel_grid="upright" if paths.kind is UprightPath else "stored",
        clipped=int((np.abs(boxes - raw_boxes) > 1e-6).any(1)[kept].sum()),
        rotated=int(rotated.sum()),
        notes=tuple(listing.notes),
        unreadable={ids[row].item(): fault for row, fault in faults.items()},
    )
