"""Photographs in class folders: root/train/CLASS/*, root/val/CLASS/*, root/test/CLASS/*, or root/CLASS/*."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from localized_crops.files import UserError
from readers.data_set import DataSet, ImagePaths, no_boxes
from readers.images import SUFFIXES, image_sizes
from readers.splits import SPLIT_NAMES

MASKS = re.compile(r"masks_\d+")  # what generate_mask.py writes beside the class folders


def read_folder(name: str, root: Path, keep_going: bool) -> DataSet:
    """Read a folder of class folders, or of images without labels; ids are the paths below ``root``.

    With a folder ``train`` in it, its split folders are read (``val`` may be called valid or validation, and it and
    ``test`` may be missing); else every folder in it is a class and all images are training images. Images that lie in
    no class folder have no label and are all test images. Inside a class folder, folders are read too.

    Args:
        name: of the data set.
        root: the folder.
        keep_going: leave out images that cannot be read, into ``unreadable``, instead of raising.

    Raises:
        UserError: if there are no images, or the layout is neither, or an image cannot be read.
    """
    parts = {entry.name: SPLIT_NAMES[entry.name.lower()] for entry in _folders(root) if _is_split(entry.name)}
    if "train" not in parts.values():
        parts = {"": "train"}
    names, classes, splits, notes = [], [], [], []
    for part, split in sorted(parts.items()):
        for folder in _folders(root / part):
            found, others = _images_in(folder)
            notes += _folder_notes(folder.relative_to(root), found, others)
            names += [os.path.relpath(path, root) for path in found]
            classes += [folder.name] * len(found)
            splits += [split] * len(found)
    if not names:
        return unlabelled(name, root, keep_going)
    class_names = sorted(set(classes))
    notes += _alike(class_names)
    number_of = {one: number for number, one in enumerate(class_names)}
    labels = np.array([number_of[one] for one in classes], dtype=np.int64)
    return from_columns(name, root, names, labels, class_names, np.array(splits, dtype="<U5"), keep_going, notes)


def unlabelled(name: str, root: Path, keep_going: bool) -> DataSet:
    """Return all images in a folder, without labels, as test images.

    Raises:
        UserError: if there is none.
    """
    found, _ = _images_in(root)
    if not found:
        raise UserError(f"{root}: holds no images; put them into {root}/CLASS/ or {root}/train/CLASS/")
    names, count = [os.path.relpath(path, root) for path in found], len(found)
    return from_columns(name, root, names, np.full(count, -1), [], np.full(count, "test", dtype="<U5"), keep_going, [])


def from_columns(
    name: str,
    root: Path,
    names: list[str],
    labels: np.ndarray,
    class_names: list[str],
    split: np.ndarray,
    keep_going: bool,
    notes: list[str],
) -> DataSet:
    """Return the data set of N image files named by their paths below ``root``, sizes read; it has no boxes.

    Raises:
        UserError: if an image cannot be read, unless ``keep_going``; or a name cannot be an id.
    """
    _check_names(root, names)
    paths = ImagePaths(root, names, upright=True)
    sizes, rotated, faults = image_sizes(paths, keep_going=keep_going)
    kept = np.ones(len(names), dtype=bool)
    kept[list(faults)] = False
    return DataSet(
        name=name,
        root=root,
        ids=np.array(names, dtype=np.str_)[kept],
        paths=paths[kept],
        labels=labels[kept],
        class_names=class_names,
        boxes=no_boxes(int(kept.sum())),
        split=split[kept],
        image_sizes=sizes[kept],
        pixel_grid="upright",
        rotated=int(rotated.sum()),
        notes=tuple(notes),
        unreadable={names[row]: fault for row, fault in faults.items()},
    )


def _check_names(root: Path, names: list[str]) -> None:
    for name in names:
        # control characters, ends of lines, and what is no UTF-8; others that cannot be seen are in many files' names
        if name.isdigit() or any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in name):
            raise UserError(f"{root}: {name!r}: a file name of digits alone, or with control characters; rename it")


def _is_split(name: str) -> bool:
    return name.lower() in SPLIT_NAMES


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        folders = [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return sorted(one for one in folders if not MASKS.fullmatch(one.name))


def _images_in(folder: Path) -> tuple[list[str], int]:
    """Return the paths of all images below a folder, sorted, and how many other files lie there."""
    found, others = [], 0
    for path in _files_below(folder):
        if os.path.splitext(path)[1].lower() in SUFFIXES:
            found.append(path)
        else:
            others += 1
    return sorted(found), others


def _files_below(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        yield from (os.path.join(place, one) for one in files if not one.startswith("."))


def _folder_notes(folder: Path, found: list[str], others: int) -> list[str]:
    notes = [] if found else [f"{folder}: a class folder without images"]
    return notes + [f"{folder}: {others} files that are no images are left out"] * bool(others)


def _alike(class_names: list[str]) -> list[str]:
    """Return a line on class names that differ in case or spaces alone."""
    counts = Counter(" ".join(one.lower().split()) for one in class_names)
    alike = [one for one in class_names if counts[" ".join(one.lower().split())] > 1]
    return [f"classes whose names differ in case or spaces alone: {', '.join(map(repr, alike))}"] if alike else []
