"""Data sets in CUB-200-2011's file format, and fetching CUB itself."""

import os
import tarfile
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from localized_crops.files import UserError, read_text, refuse_special, remove_scratch, scratch_folder, whole_file
from localized_crops.image_ids import MOST_DIGITS
from readers.build import Listing
from readers.data_set import ImagePaths
from utils import file_sha256

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_ARCHIVE = "CUB_200_2011.tgz"
CUB_SHA256 = "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
LARGEST_PIXEL = 1e9  # coordinate; farther than any image reaches


def read_cub_tables(root: Path) -> Listing:
    """Read a folder in CUB's file format.

    Raises:
        UserError: on any fault of the files, naming file, line or image.
    """
    classes, names = _read_names(root / "classes.txt"), _read_names(root / "images.txt")
    ids = np.array(list(names), dtype=np.int64)
    class_of = _read_numbers(root / "image_class_labels.txt", ids, np.int64, 1, "a whole number", lambda n: n >= 0)
    boxes = _read_numbers(root / "bounding_boxes.txt", ids, np.float64, 4, "a box with an area", _are_boxes)
    is_train = _read_numbers(
        root / "train_test_split.txt", ids, np.int64, 1, "1 (train) or 0 (test)", lambda n: np.isin(n, (0, 1))
    )
    labels = _labels(root, np.array(list(classes), dtype=np.int64), ids, class_of[:, 0])
    folder = Path(os.path.realpath(root / "images"))  # resolve() raises an error of its own on a loop of links
    paths = ImagePaths(folder, _image_names(root, str(folder), names))
    split = np.where(is_train[:, 0] == 1, "train", "test").astype("<U5")
    return Listing(paths, ids, labels, list(classes.values()), split, boxes, root / "bounding_boxes.txt")


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path}: missing; dataset.root must be a folder in CUB-200-2011's file format")
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: is empty")
    return text.split("\n")


def _read_names(path: Path) -> dict[int, str]:
    """Return id -> name of the lines of a table."""
    names = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.strip().split(maxsplit=1)  # a name may hold spaces, even two in a row
        if not fields:
            continue
        key = fields[0]
        if len(fields) < 2 or not (key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS):
            raise UserError(f"{path}:{number}: {line[:80]!r}: a whole number, the id, and a name were expected")
        if int(key) in names:
            raise UserError(f"{path}:{number}: id {key} stands in an earlier line already; remove one")
        names[int(key)] = fields[1]
    return names


def _read_numbers(
    path: Path, ids: np.ndarray, kind: type, count: int, expected: str, are_good: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the numbers of a table with one line for each image, (N, count), in the order of ``ids`` (N,).

    Args:
        path: the table.
        ids: of the images.
        kind: dtype of the numbers.
        count: numbers of a line, after the id.
        expected: what they must be, for the error.
        are_good: returns a bool for each row or number.
    """
    lines, row_type = _lines(path), np.dtype([("id", np.int64), ("numbers", kind, (count,))])

    def parse(lines: list[str]) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy reads 1.5 as 1, with a warning
            rows = np.loadtxt(lines, row_type, comments=None, ndmin=1)
        if (rows["id"] < 0).any() or not are_good(rows["numbers"]).all():
            raise ValueError
        return rows

    try:
        rows = parse(lines)
    except (ValueError, UserWarning):  # a warning where NumPy sees no data in a line
        number = _first_fault(lines, parse)
        line = lines[number - 1][:80]
        raise UserError(f"{path}:{number}: {line!r}: a whole number, the id, and {expected} were expected") from None
    rows = rows[rows["id"].argsort()]
    in_order = np.sort(ids)
    if not np.array_equal(rows["id"], in_order):
        known, counts = np.unique(rows["id"], return_counts=True)
        problems = {
            "has several rows here": known[counts > 1],
            "has no row here": np.setdiff1d(ids, known),
            "is not in images.txt": np.setdiff1d(known, ids),
        }
        problem, which = next((problem, odd[0]) for problem, odd in problems.items() if len(odd))
        raise UserError(f"{path}: image id {which} {problem}; the files must name the same images")
    return rows["numbers"][in_order.searchsorted(ids)]


def _first_fault(lines: list[str], parse: Callable[[list[str]], np.ndarray]) -> int:
    """Return the number of the first line that ``parse`` refuses, from 1."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                parse([line])
        except (ValueError, UserWarning):
            return number
    raise AssertionError("all lines are parsed one by one")


def _are_boxes(boxes: np.ndarray) -> np.ndarray:
    """Return which boxes (N, 4) are finite, not beyond any image, and have an area; NaN fails each comparison."""
    return (np.abs(boxes) <= LARGEST_PIXEL).all(1) & (boxes[:, 2:] > 0).all(1)


def _labels(root: Path, class_ids: np.ndarray, ids: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    """Return the place of each image's class in classes.txt, (N,)."""
    order = class_ids.argsort()
    labels = order[np.minimum(class_ids.searchsorted(class_of, sorter=order), len(order) - 1)]
    unknown = class_ids[labels] != class_of
    if unknown.any():
        row = int(unknown.argmax())
        raise UserError(
            f"{root / 'image_class_labels.txt'}: image id {ids[row]} has class {class_of[row]}, which classes.txt does "
            "not name"
        )
    return labels


def _image_names(root: Path, folder: str, names: dict[int, str]) -> list[str]:
    """Return the normal names of files (image id -> name as it stands in images.txt) below ``folder``."""
    normal, up = list(map(os.path.normpath, names.values())), ".." + os.sep
    for row, (image_id, relative) in enumerate(names.items()):
        if normal[row].startswith((os.sep, up)):  # it may lead back into the folder
            normal[row] = os.path.relpath(os.path.join(folder, relative), folder)
        if normal[row].startswith(up) or normal[row] in (".", "..") or "\0" in relative:
            raise UserError(
                f"{root / 'images.txt'}: image id {image_id}: {relative!r} leaves the images folder or is no file name"
            )
    return normal


def download_cub(root: Path) -> None:
    """Fetch, check and unpack CUB-200-2011 to ``root``; an archive that lies beside it is used.

    Raises:
        UserError: if it cannot be fetched or is not the official archive.
    """
    archive = root.parent / CUB_ARCHIVE
    remove_scratch(root.parent)  # what a killed process had fetched
    refuse_special(archive)
    if not archive.exists():
        with whole_file(archive) as scratch:
            try:
                scratch.unlink(missing_ok=True)  # torchvision leaves a file that is there as it is
                download_url(CUB_URL, str(scratch.parent), scratch.name)
            except (urllib.error.URLError, OSError, RuntimeError) as error:
                raise UserError(f"{CUB_URL}: cannot be fetched ({error}); fetch it by hand to {archive}") from None
    sha256 = file_sha256(archive)
    if sha256 != CUB_SHA256:
        raise UserError(f"{archive}: not the official archive, its sha256 is {sha256}; remove it and try again")
    unpack(archive, root)


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
