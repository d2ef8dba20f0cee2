"""Image files without labels: finding them, and their views."""

import glob
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from localized_crops.files import UserError
from readers.data_set import UprightPath
from readers.images import SUFFIXES, read_image


def find_images(images: str) -> list[UprightPath]:
    """Return the image files that ``images`` names, in a stable order, to be read with their EXIF orientation applied.

    Args:
        images: a file; a folder (all files in it and below with an image's suffix); a pattern such as
            ``photos/*.jpg`` (``**`` stands for any folders); or ``-``, the paths on stdin, one a line.

    Raises:
        UserError: if there is no such file.
    """
    if images == "-":
        paths = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    elif Path(images).is_dir():
        below = Path(images).rglob("*")
        paths = sorted(path for path in below if path.suffix.lower() in SUFFIXES and path.is_file())
    elif Path(images).exists():
        paths = [images]
    else:
        paths = sorted(Path(path) for path in glob.glob(images, recursive=True) if Path(path).is_file())
    if not paths:
        raise UserError(f"images={images}: no image there; give a file, a folder, a pattern in quotes, or - for stdin")
    return [UprightPath(path) for path in paths]


def reason(error: Exception | str, path: Path) -> str:
    """Return an error as one line that names the file."""
    line = " ".join(str(error).split())[:300] or type(error).__name__
    return line if str(path) in line else f"{path}: {line}"


@dataclass(frozen=True)
class Photos(Dataset):
    """Image files, each in several views; a file that cannot be read gives zeros and the reason."""

    paths: Sequence[Path]
    views: Sequence[Callable]  # (image, box) -> (3, size, size) uint8
    boxes: np.ndarray | None  # (N, 4) x y width height, for the views that look at one; None: the whole image
    unreadable: Mapping[int, str]  # row -> why it is not to be tried again

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[tuple[torch.Tensor, ...], str]:
        """Return the views, each (3, size, size) uint8, zeros where the file cannot be read, and why, "" if it can."""
        error = self.unreadable.get(row, "")
        if not error:
            try:
                image = pil_to_tensor(read_image(self.paths[row]))
                box = np.array([0, 0, *image.shape[:0:-1]]) if self.boxes is None else self.boxes[row]
                return tuple(view(image, box) for view in self.views), ""
            except Exception as fault:  # one file must not stop the others; decoders raise many kinds
                error = reason(fault, self.paths[row])
        return tuple(torch.zeros(3, view.size, view.size, dtype=torch.uint8) for view in self.views), error
