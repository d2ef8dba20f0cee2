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
from readers.data_set import ImagePaths, Listing, labels_of
from utils import file_sha256

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_ARCHIVE = "CUB_200_2011.tgz"
CUB_SHA256 = "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
LARGEST_PIXEL = 1e9  # coordinate; farther than any image reaches


def read_cub_tables(root: Path) -> Listing:
    """Read a folder in CUB's file format; raise UserError on any fault of the files, naming file, line or image."""
    classes, names = _read_names(root / "classes.txt"), _read_names(root / "images.txt")
    ids = np.array(list(names), dtype=np.int64)
    class_of = _read_numbers(root / "image_class_labels.txt", ids, np.int64, 1, "a whole number", lambda n: n >= 0)
    boxes = _read_numbers(root / "bounding_boxes.txt", ids, np.float64, 4, "a box with an area", _are_boxes)
    is_train = _read_numbers(
        root / "train_test_split.txt", ids, np.int64, 1, "1 (train) or 0 (test)", lambda n: np.isin(n, (0, 1))
    )
    labels = labels_of(class_of[:, 0].tolist(), classes)
    if labels.min() < 0:
        row = int(labels.argmin())
        raise UserError(
            f"{root / 'image_class_labels.txt'}: image id {ids[row]} has class {class_of[row, 0]}, which classes.txt "
            "does not name"
        )
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

    A line holds an id and then ``count`` numbers of dtype ``kind``. They must be ``expected``, as errors say, which
    ``are_good`` returns for each row or number.
    """
    lines, row_type = _lines(path), np.dtype([("id", np.int64), ("numbers", kind, (count,))])

    def parse(lines: list[str]) -> np.ndarray | None:
        """Return the rows of lines; None if one is not as expected."""
        try:
            with warnings.catch_warnings(action="error"):  # NumPy warns of no data, and where it reads 1.5 as 1
                rows = np.loadtxt(lines, row_type, comments=None, ndmin=1)
        except (ValueError, UserWarning):
            return None
        return rows if (rows["id"] >= 0).all() and are_good(rows["numbers"]).all() else None

    rows = parse(lines)
    if rows is None:
        number, line = next((n, line) for n, line in enumerate(lines, 1) if line.strip() and parse([line]) is None)
        raise UserError(f"{path}:{number}: {line[:80]!r}: a whole number, the id, and {expected} were expected")
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


def _are_boxes(boxes: np.ndarray) -> np.ndarray:
    """Return which boxes (N, 4) are finite, not beyond any image, and have an area; NaN fails each comparison."""
    return (np.abs(boxes) <= LARGEST_PIXEL).all(1) & (boxes[:, 2:] > 0).all(1)


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
    """Fetch, check and unpack CUB-200-2011 to ``root``, whole or not at all; an archive that lies beside it is used.

    Raises:
        UserError: if it cannot be fetched or unpacked, or is not the official archive.
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
    try:
        with scratch_folder(root) as scratch, tarfile.open(archive) as tar:
            members = tqdm(tar, desc="unpacking", unit=" files", mininterval=1.0)
            tar.extractall(scratch, members=members, filter="data")  # refuses members that leave the folder
            os.replace(scratch / "CUB_200_2011", root)
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and fetch it again") from None
