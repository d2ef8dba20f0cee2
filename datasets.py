"""Data sets by name: reading and checking them, their splits, and the boxes of a source.

Pixels and boxes: boxes are in the stored pixel grid, as CUB's are, so an EXIF orientation is not applied. Ids and
classes are taken as they are in the files (neither need be contiguous); labels count the classes that classes.txt
names, in its order.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from localized_crops.box_file import boxes_for_images
from localized_crops.boxes import center_boxes, whole_image_boxes
from localized_crops.files import UserError, user_errors
from readers.cub import download_cub, read_cub_tables
from readers.data_set import DataSet
from readers.images import unreadable_images
from toybirds import drawing

DEFAULT_ROOTS = {"toybirds": "data/toybirds", "cub": "data/CUB_200_2011"}
TRAIN_SHARE = 0.7  # of the 70/30 split


def read_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    split: str = "official",
    val_fraction: float = 0.0,
    download: bool = False,
    check: bool = False,
    keep_going: bool = False,
) -> DataSet:
    """Read and check a data set; ToyBirds is drawn when its folder is missing.

    Args:
        name: "toybirds" or "cub" (any folder in CUB's file format).
        root: the folder with images.txt; None: the usual one under data/.
        split: "official", or "70/30": train filled up with the first test images in file order.
        val_fraction: share of each class's training images that becomes the split "val": the last ones in file order.
        download: fetch the CUB archive when the folder is missing.
        check: decode every image.
        keep_going: leave out images that are no images, into ``unreadable``, instead of raising.

    Raises:
        UserError: on any fault of the files, naming file, line or image.
    """
    root = Path(root or DEFAULT_ROOTS[name])
    if name == "toybirds":
        with user_errors(FileExistsError):  # another version of the drawings lies there
            drawing.write_toybirds(root)
    elif not root.exists():
        _make_cub(root, download)
    data = read_cub_tables(name, root, keep_going)
    faults = unreadable_images(data) if check else []
    if faults:
        raise UserError(f"{len(faults)} images cannot be read, the first: {faults[0]} (check_dataset.py lists all)")
    return hold_out(fill_train(data) if split == "70/30" else data, val_fraction)


def _make_cub(root: Path, download: bool) -> None:
    if not download:
        raise UserError(
            f"{root}: there is no such folder; give dataset.root, or dataset.download=true to fetch CUB-200-2011 "
            "(1.1 GB, non-commercial research use)"
        )
    download_cub(root)


# --- splits -------------------------------------------------------------------------------------------------------


def fill_train(data: DataSet) -> DataSet:
    """Return the data set with the first test images, in file order, moved to train until it holds 70%."""
    wanted = math.ceil(TRAIN_SHARE * len(data.ids))
    moved = data.rows("test")[: max(0, wanted - len(data.rows("train")))]
    return _with_split(data, moved, "train")


def hold_out(data: DataSet, val_fraction: float) -> DataSet:
    """Return the data set with the last ``val_fraction`` of each class's training images as split "val"."""
    train, moved = data.rows("train"), []
    for label in range(len(data.class_names)):
        rows = train[data.labels[train] == label]
        moved.extend(rows[len(rows) - round(val_fraction * len(rows)) :])
    return _with_split(data, moved, "val")


def _with_split(data: DataSet, rows: Iterable[int], name: str) -> DataSet:
    split = data.split.copy()
    split[np.asarray(rows, dtype=np.int64)] = name
    return replace(data, split=split)


# --- boxes of a source --------------------------------------------------------------------------------------------


def source_boxes(source: str, data: DataSet) -> tuple[np.ndarray, int]:
    """Return the boxes that ``source`` names, (N, 4) x y width height, and for how many images it has none.

    Args:
        source: "gt" (of the data set), "center", "image", or the path of a box JSON. An image without a box in the
            JSON gets the whole image.
        data: the data set, in whose order the boxes come.

    Raises:
        UserError: if the file is unusable or was made for other images.
    """
    if source == "gt":
        return data.boxes, 0
    if source == "center":
        return center_boxes(data.image_sizes), 0
    if source == "image":
        return whole_image_boxes(data.image_sizes), 0
    return boxes_for_images(source, data.ids, data.image_sizes)
