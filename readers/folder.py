"""Photographs in class folders: root/train/CLASS/*, root/val/CLASS/*, root/test/CLASS/*, or root/CLASS/*."""

import os
import re
from collections import Counter
from pathlib import Path

from localized_crops.files import UserError
from readers.data_set import Listing, labels_of, list_names
from readers.images import SUFFIXES
from readers.splits import SPLIT_NAMES

MASKS = re.compile(r"masks_\d+")  # what generate_mask.py writes beside the class folders


def read_folder(root: Path) -> Listing:
    """Read a folder of class folders, or of images without labels; ids are the paths below ``root``.

    With a folder ``train`` in it, its split folders are read (``val`` may be called valid or validation, and it and
    ``test`` may be missing); else every folder in it is a class and all images are training images. Images that lie in
    no class folder have no label and are all test images. Inside a class folder, folders are read too.

    Raises:
        UserError: if there are no images, or the layout is neither.
    """
    folders = {folder.name: SPLIT_NAMES.get(folder.name.lower()) for folder in _folders(root)}
    parts = {name: split for name, split in folders.items() if split}
    if "train" not in parts.values():
        parts = {"": "train"}
    names, classes, splits, notes = [], [], [], []
    for part, split in sorted(parts.items()):
        for folder in _folders(root / part):
            images, others = _images_in(folder)
            place = folder.relative_to(root)
            if not images:
                notes.append(f"{place}: a class folder without images")
            if others:
                notes.append(f"{place}: {others} files that are no images are left out")
            names += [os.path.relpath(path, root) for path in images]
            classes += [folder.name] * len(images)
            splits += [split] * len(images)
    if not names:  # images without labels, if any
        names = [os.path.relpath(path, root) for path in _images_in(root)[0]]
        if not names:
            raise UserError(f"{root}: holds no images; put them into {root}/CLASS/ or {root}/train/CLASS/")
        return list_names(root, names, [-1] * len(names), [], ["test"] * len(names))
    class_names = sorted(set(classes))
    plain = {name: " ".join(name.lower().split()) for name in class_names}
    counts = Counter(plain.values())
    if alike := [repr(name) for name in class_names if counts[plain[name]] > 1]:
        notes.append(f"classes whose names differ in case or spaces alone: {', '.join(alike)}")
    return list_names(root, names, labels_of(classes, class_names), class_names, splits, notes=notes)


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        folders = [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return sorted(folder for folder in folders if not MASKS.fullmatch(folder.name))


def _images_in(folder: Path) -> tuple[list[str], int]:
    """Return the paths of all images below a folder, sorted, and how many other files lie there; no hidden ones."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names if not name.startswith(".")]
    images = sorted(file for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)
    return images, len(files) - len(images)
