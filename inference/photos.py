"""Image files without labels: finding them, the object's box in each, and their views."""

import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from localized_crops.files import UserError
from localized_crops.map_boxes import MapBox
from localizer.attention_maps import attend_batches, clean_batch, map_to_box, plan_batches
from localizer.networks import Localizer
from localizer.object_head import ObjectHead, find_objects
from readers.data_set import UprightPath
from readers.images import SUFFIXES, image_sizes, read_image


def find_images(images: str, lines: Iterable[str] | None = None) -> list[UprightPath]:
    """Return the image files that ``images`` names, in a stable order, to be read with their EXIF orientation applied.

    Args:
        images: a file; a folder (all files in it and below with an image's suffix); a pattern such as
            ``photos/*.jpg`` (``**`` stands for any folders); or ``-``, the paths in ``lines``.
        lines: one path a line, empty lines are left out; None: those of stdin.

    Raises:
        UserError: if there is no such file.
    """
    if images == "-":
        paths = [line.rstrip("\r\n") for line in lines or sys.stdin if line.strip()]
    elif Path(images).is_dir():
        files = (path for path in Path(images).rglob("*") if path.is_file())
        paths = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
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


# --- boxes --------------------------------------------------------------------------------------------------------


def find_boxes(
    paths: Sequence[Path],
    localizer: Localizer,
    settings: Mapping[str, Any],
    device: torch.device,
    *,
    precision: str = "float32",
    num_workers: int = 0,
    progress: bool = True,
    head: ObjectHead | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the box of the object in each image, (N, 4) x y width height in upright pixels, and errors by row.

    An image with a blank map gets the whole image; one that cannot be read gets zeros and an error.

    Args:
        paths: of the images.
        localizer: the Vision Transformer that makes the maps, or the network whose cells ``head`` classifies.
        settings: the section ``dino`` of the config.
        device: where the localizer works.
        precision: float32 | bf16 | fp16 (on CUDA).
        num_workers: processes that decode ahead.
        progress: show a bar.
        head: of dino.method=object_head.
    """
    sizes, _, errors = image_sizes(paths, keep_going=True)
    rows = np.array([row for row in range(len(paths)) if row not in errors], dtype=np.int64)
    boxes, files = np.zeros((len(paths), 4)), [paths[row] for row in rows]
    localizer.model.to(device)
    if head is None:
        results = _boxes_of_maps(localizer, files, sizes[rows], settings, device, precision, num_workers)
    else:
        results = find_objects(localizer, head, files, sizes[rows], settings, device, num_workers)
    bar = tqdm(results, total=len(rows), desc="boxes", unit=" images", disable=None if progress else True)
    for number, box, error in bar:
        row = int(rows[number])
        boxes[row] = box.xywh
        if error is not None:
            errors[row] = reason(error, paths[row])
    return boxes, errors


def _boxes_of_maps(
    localizer: Localizer,
    files: Sequence[Path],
    sizes: np.ndarray,
    settings: Mapping[str, Any],
    device: torch.device,
    precision: str,
    num_workers: int,
) -> Iterator[tuple[int, MapBox, str | None]]:
    """Yield row, box and error of each image, as `find_objects` does, from a Vision Transformer's attention."""
    side = settings["image_size"] or localizer.image_size
    batches = plan_batches(sizes, side, localizer.patch, settings["batch_size"])
    options = {"autocontrast": settings["autocontrast"], "precision": precision, "num_workers": num_workers}
    for part in attend_batches(localizer, batches, files, device, **options):
        for row, attention_map, error in zip(part.batch.rows, clean_batch(part, settings), part.errors, strict=True):
            yield row, map_to_box(attention_map, tuple(sizes[row].tolist()), settings), error


# --- views --------------------------------------------------------------------------------------------------------


class Photos(Dataset):
    """Image files, each in several views; a file that cannot be read gives zeros and the reason."""

    def __init__(
        self, paths: Sequence[Path], views: Sequence[Callable], boxes: np.ndarray | None, unreadable: Mapping[int, str]
    ) -> None:
        """Keep what is to be shown.

        Args:
            paths: of the images.
            views: (image, box) -> (3, size, size) uint8.
            boxes: (N, 4) x y width height, for the views that look at one; None: the whole image.
            unreadable: row -> why it is not to be tried again.
        """
        self.paths, self.views, self.boxes, self.unreadable = paths, views, boxes, unreadable

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
            except Exception as fault:  # whatever one file does, the others go on; decoders raise many kinds
                error = reason(fault, self.paths[row])
        return tuple(torch.zeros(3, view.size, view.size, dtype=torch.uint8) for view in self.views), error
