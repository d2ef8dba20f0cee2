"""What a data set is to the program: one row an image."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class DataSet:
    """What the files of a data set say, one row per image, in the order of images.txt."""

    name: str
    root: Path
    ids: np.ndarray  # (N,) int64 as in images.txt, or text
    paths: list[Path]
    labels: np.ndarray  # (N,) int64, 0 to C - 1
    class_names: list[str]
    boxes: np.ndarray  # (N, 4) float64, x y width height in stored pixels, clipped to the image
    split: np.ndarray  # (N,) "train" | "val" | "test"
    image_sizes: np.ndarray  # (N, 2) int64, width height as stored
    clipped: int = 0  # boxes that reached past their image
    unreadable: dict[int | str, str] = field(default_factory=dict)  # image id -> why; these images have no row

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers of one split."""
        return np.flatnonzero(self.split == split)

    def fingerprint(self) -> str:
        """Return a hash of which images these are: ids, file names, sizes, in any order."""
        images = (self.root / "images").resolve()
        names = [path.relative_to(images).as_posix() for path in self.paths]
        rows = sorted(zip(self.ids.tolist(), names, self.image_sizes.tolist(), strict=True))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
