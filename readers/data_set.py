"""The data set as the program sees it: one row per image."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localized_crops.files import UserError


class UprightPath(type(Path())):
    """An image file that is read as its EXIF orientation shows it; a plain Path is read as it is stored."""


class ImagePaths(Sequence):
    """The image files of a data set: names below one folder in one array, which a loader process takes over at once."""

    def __init__(self, folder: Path, names: Sequence[str] | np.ndarray, *, upright: bool = False) -> None:
        """Keep the files ``names`` (N,), relative to ``folder``; ``upright``: they are read as EXIF says."""
        is_array = isinstance(names, np.ndarray) and names.dtype.kind == "S"
        self.names = names if is_array else np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.folder, self.kind = str(folder), UprightPath if upright else Path

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Any) -> "Path | ImagePaths":
        """Return one file's path, or the files of an array of rows."""
        if isinstance(rows, (int, np.integer)):
            return self.kind(self.folder, os.fsdecode(self.names[rows]))
        return ImagePaths(Path(self.folder), self.names[rows], upright=self.kind is UprightPath)

    def files(self) -> Iterator[bytes]:
        """Yield the files' names as the system takes them, in a twentieth of the time that paths take."""
        folder = os.fsencode(self.folder + os.sep)
        return (folder + name for name in self.names.tolist())

    def texts(self) -> list[str]:
        """Return the names as text."""
        return [name.decode(errors="replace") for name in self.names.tolist()]

    def __iter__(self) -> Iterator[Path]:
        return (self.kind(self.folder, os.fsdecode(name)) for name in self.names.tolist())


@dataclass(frozen=True)
class DataSet:
    """What the files of a data set say, one row per image, in the order of images.txt or of the paths."""

    name: str
    root: Path
    ids: np.ndarray  # (N,) int64 as in images.txt, or text: the path below root
    paths: ImagePaths
    labels: np.ndarray  # (N,) int64, 0 to C - 1; -1 in a folder of images without labels
    class_names: list[str]
    boxes: np.ndarray  # (N, 4) float64, x y width height in pixels, clipped to the image; NaN: the image has none
    split: np.ndarray  # (N,) "train" | "val" | "test"
    image_sizes: np.ndarray  # (N, 2) int64, width height
    pixel_grid: str = "stored"  # of boxes and sizes: "stored", or "upright" (EXIF orientation applied)
    clipped: int = 0  # boxes that reached past their image
    rotated: int = 0  # images whose EXIF orientation is not upright
    notes: tuple[str, ...] = ()  # oddities of the files that users should know, a line each
    unreadable: dict[int | str, str] = field(default_factory=dict)  # image id -> why; these images have no row

    def rows(self, *splits: str) -> np.ndarray:
        """Return the row numbers of a split; of several the first one that has images."""
        found = [np.flatnonzero(self.split == split) for split in splits]
        return next(filter(len, found), found[-1])

    @property
    def has_box(self) -> np.ndarray:
        """Which images (N,) bool have a true box."""
        return ~np.isnan(self.boxes[:, 0])

    def fingerprint(self) -> str:
        """Return a hash of which images these are: ids, file names, sizes, in any order."""
        order = np.argsort(self.ids)
        ids = "\n".join(map(str, self.ids[order].tolist())).encode()
        names, sizes = b"\n".join(self.paths.names[order].tolist()), self.image_sizes[order].astype("<i8").tobytes()
        return hashlib.sha256(b"\0".join((ids, names, sizes))).hexdigest()


def no_boxes(count: int) -> np.ndarray:
    """Return the boxes (N, 4) of images that have none."""
    return np.full((count, 4), np.nan)


# --- what readers find --------------------------------------------------------------------------------------------


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


def labels_of(classes: list[Any], class_names: Iterable[Any]) -> np.ndarray:
    """Return the place of each image's class (N,) among all classes; -1 where it is none of them."""
    places = {name: place for place, name in enumerate(class_names)}
    return np.array([places.get(name, -1) for name in classes], dtype=np.int64)


def list_names(
    root: Path, names: list[str], labels: Sequence[int], class_names: list[str], splits: list[str], **more: Any
) -> Listing:
    """Return the listing of N images whose ids are their paths below ``root``; UserError if a name cannot be an id."""
    for image in names:
        # control characters, ends of lines, and what is no UTF-8; other invisible ones are in many files' names
        if image.isdigit() or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in image):
            raise UserError(f"{root}: {image!r}: a file name of digits alone, or with control characters; rename it")
    columns = np.array(labels, dtype=np.int64), class_names, np.array(splits, dtype="<U5")
    return Listing(ImagePaths(root, names, upright=True), np.array(names, dtype=np.str_), *columns, **more)
