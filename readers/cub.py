"""Data sets in CUB-200-2011's file format, and fetching CUB itself."""

import hashlib
import math
import os
import re
import tarfile
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from localized_crops.boxes import clip_boxes
from localized_crops.files import UserError, read_text, refuse_special, remove_scratch, scratch_folder, whole_file
from readers.data_set import DataSet, ImagePaths
from readers.images import image_sizes

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_ARCHIVE = "CUB_200_2011.tgz"
CUB_SHA256 = "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
LARGEST_PIXEL = 1e9  # coordinate; farther than any image reaches
NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
PLAIN = {  # table -> what stands behind the id where it is plainly written, and its numbers
    "image_class_labels": (r"[0-9]{1,15}", np.int64),
    "bounding_boxes": (rf"{NUMBER} {NUMBER} {NUMBER} {NUMBER}", np.float64),
    "train_test_split": (r"[01]", np.int64),
}


def read_cub_tables(name: str, root: Path, keep_going: bool) -> DataSet:
    """Read a folder in CUB's file format.

    Args:
        name: of the data set.
        root: the folder.
        keep_going: leave out images that cannot be read, into ``unreadable``, instead of raising.

    Raises:
        UserError: on any fault of the files, naming file, line or image.
    """
    classes = dict(_read_rows(root / "classes.txt", _text))
    folder = Path(os.path.realpath(root / "images"))  # resolve() raises an error of its own on a loop of links
    ids, names, class_of, raw_boxes, is_train = _plain_tables(root) or _any_tables(root, folder)
    labels = _labels(root, classes, ids, class_of)
    paths = ImagePaths(folder, names)
    sizes, rotated, faults = image_sizes(paths, keep_going=keep_going)
    kept = np.ones(len(paths), dtype=bool)
    kept[list(faults)] = False
    boxes = _clip_checked(root / "bounding_boxes.txt", ids[kept], raw_boxes[kept], sizes[kept])
    return DataSet(
        name=name,
        root=root,
        ids=ids[kept],
        paths=paths[kept],
        labels=labels[kept],
        class_names=list(classes.values()),
        boxes=boxes,
        split=np.where(is_train[kept], "train", "test").astype("<U5"),
        image_sizes=sizes[kept],
        clipped=int((np.abs(boxes - raw_boxes[kept]) > 1e-6).any(1).sum()),
        rotated=int(rotated.sum()),
        unreadable={ids[row].item(): fault for row, fault in faults.items()},
    )


Tables = tuple[np.ndarray, list[str], np.ndarray, np.ndarray, np.ndarray]  # ids, names, classes, boxes, is training


def _any_tables(root: Path, folder: Path) -> Tables:
    """Return what the tables say, line by line, or which line is at fault."""
    images = dict(_read_rows(root / "images.txt", _text))
    class_of = _read_for(root / "image_class_labels.txt", images, _whole_number)
    raw_boxes = _read_for(root / "bounding_boxes.txt", images, _box)
    is_train = _read_for(root / "train_test_split.txt", images, _flag)
    return (
        np.array(list(images), dtype=np.int64),
        [_image_name(root, folder, *item) for item in images.items()],
        np.array(list(class_of.values()), dtype=np.int64),
        np.array(list(raw_boxes.values()), dtype=np.float64).reshape(-1, 4),
        np.array(list(is_train.values()), dtype=bool),
    )


def _plain_tables(root: Path) -> Tables | None:
    """Return what the tables say where they are plainly written and without a fault, ten times as fast; else None."""
    names = _plain_text(root / "images.txt", r"\S+")
    if names is None or any(odd in names for odd in (" .", "/.", " /", "//", "/\n", "\0")):
        return None
    words = names.split()
    found = [_plain_numbers(root / f"{name}.txt", *about) for name, about in PLAIN.items()]
    ids = np.array(words[::2], dtype=np.int64)
    if any(one is None or not np.array_equal(one[:, 0], ids) for one in found) or len(np.unique(ids)) < len(ids):
        return None
    class_of, boxes, is_train = (one[:, 1:] for one in found)
    if not (boxes[:, 2:] > 0).all() or boxes.max() > LARGEST_PIXEL:
        return None
    return ids, words[1::2], class_of[:, 0], boxes, is_train[:, 0] == 1


def _plain_text(path: Path, pattern: str) -> str | None:
    """Return a table's text if each line is an id, a space and what ``pattern`` matches; else None."""
    text = read_text(path) if path.exists() else ""
    return text if re.fullmatch(rf"(?>[0-9]{{1,15}} {pattern}\n)++", text) else None


def _plain_numbers(path: Path, pattern: str, kind: type) -> np.ndarray | None:
    """Return a table's numbers (N, K), ids first, as `_plain_text`."""
    text = _plain_text(path, pattern)
    return None if text is None else np.fromstring(text, kind, sep=" ").reshape(text.count("\n"), -1)


def _read_rows(path: Path, parse: Callable[[str], object]) -> Iterator[tuple[int, object]]:
    """Yield (id, parsed rest) of each line; an id stands once."""
    if not path.exists():
        raise UserError(f"{path}: missing; dataset.root must be a folder in CUB-200-2011's file format")
    seen = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        fields = line.strip().split(maxsplit=1)  # a name may hold spaces, even two in a row
        if not fields:
            continue
        try:
            key, value = _whole_number(fields[0]), parse("".join(fields[1:]))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {line[:80]!r}: {error}") from None
        if key in seen:
            raise UserError(f"{path}:{number}: id {key} stands in line {seen[key]} already; remove one")
        seen[key] = number
        yield key, value
    if not seen:
        raise UserError(f"{path}: is empty")


def _read_for(path: Path, images: dict[int, str], parse: Callable) -> dict[int, object]:
    """Read a file that has one row for each image, into the order of images.txt."""
    rows = dict(_read_rows(path, parse))
    for one, other, problem in ((images, rows, "has no row here"), (rows, images, "is not in images.txt")):
        lacking = next((key for key in one if key not in other), None)
        if lacking is not None:
            raise UserError(f"{path}: image id {lacking} {problem}; the files must name the same images")
    return {key: rows[key] for key in images}


def _text(rest: str) -> str:
    if not rest:
        raise ValueError("a name is missing after the id")
    return rest


def _whole_number(rest: str) -> int:
    if not (rest.isascii() and rest.isdigit()) or len(rest) > 18:
        raise ValueError("a whole number was expected")
    return int(rest)


def _flag(rest: str) -> bool:
    if rest not in ("0", "1"):
        raise ValueError("1 (train) or 0 (test) was expected")
    return rest == "1"


def _box(rest: str) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(field) for field in rest.split())
    except ValueError:
        raise ValueError("four numbers x y width height were expected") from None
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError("the box has a number that is not finite")
    if max(map(abs, (x, y, width, height))) > LARGEST_PIXEL:
        raise ValueError("the box has a number that lies outside any image")
    if width <= 0 or height <= 0:
        raise ValueError("the box has no area")
    return x, y, width, height


def _labels(root: Path, classes: dict[int, str], ids: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    class_ids = np.array(list(classes), dtype=np.int64)
    order = class_ids.argsort()
    labels = order[np.minimum(class_ids.searchsorted(class_of, sorter=order), len(order) - 1)]
    if (unknown := np.flatnonzero(class_ids[labels] != class_of)).size:
        raise UserError(
            f"{root / 'image_class_labels.txt'}: image id {ids[unknown[0]]} has class {class_of[unknown[0]]}, "
            "which classes.txt does not name"
        )
    return labels


def _image_name(root: Path, folder: Path, image_id: int, relative: str) -> str:
    """Return a file's normal name below ``folder``."""
    if "\0" in relative:
        raise UserError(f"{root / 'images.txt'}: image id {image_id}: {relative!r} is no file name")
    path = os.path.normpath(os.path.join(folder, relative))
    if not path.startswith(f"{folder}{os.sep}"):
        raise UserError(f"{root / 'images.txt'}: image id {image_id}: {relative!r} leaves the images folder")
    return path[len(str(folder)) + 1 :]


def _clip_checked(path: Path, ids: np.ndarray, raw_boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    boxes = clip_boxes(raw_boxes, sizes)
    outside = np.flatnonzero((boxes[:, 2:] <= 0).any(1))
    if len(outside):
        row, size = outside[0], tuple(sizes[outside[0]].tolist())
        box = tuple(raw_boxes[row].tolist())
        raise UserError(f"{path}: image id {ids[row]}: box {box} lies outside the image, {size}")
    return boxes


def download_cub(root: Path) -> None:
    """Fetch, check and unpack CUB-200-2011 to ``root``; an archive that lies beside it is used.

    Raises:
        UserError: if it cannot be fetched or is not the official archive.
    """
    archive = root.parent / CUB_ARCHIVE
    remove_scratch(root.parent)  # what a killed process had fetched
    refuse_special(archive)
    if not archive.exists():
        _fetch(CUB_URL, archive)
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != CUB_SHA256:
        raise UserError(f"{archive}: not the official archive, its sha256 is {found}; remove it and try again")
    unpack(archive, root)


def _fetch(url: str, path: Path) -> None:
    """Fetch a file, whole or not at all."""
    with whole_file(path) as scratch:
        try:
            scratch.unlink(missing_ok=True)  # torchvision leaves a file that is there as it is
            download_url(url, str(scratch.parent), scratch.name)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise UserError(f"{url}: cannot be fetched ({error}); fetch it by hand to {path}") from None


def unpack(archive: Path, root: Path) -> None:
    """Unpack the folder CUB_200_2011 of the archive as ``root``, whole or not at all.

    Raises:
        UserError: if a member would leave the folder, or the archive is damaged or has no such folder.
    """
    try:
        with scratch_folder(root) as scratch, tarfile.open(archive) as tar:
            members = tqdm(tar, desc="unpacking", unit=" files", mininterval=1.0)
            tar.extractall(scratch, members=members, filter="data")  # refuses members that leave the folder
            os.replace(scratch / "CUB_200_2011", root)
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and fetch it again") from None
