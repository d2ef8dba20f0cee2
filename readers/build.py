"""From the columns of a reader to a data set: sizes read, unreadable images left out, boxes clipped."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localized_crops.boxes import clip_boxes
from localized_crops.files import UserError
from readers.data_set import DataSet, ImagePaths, UprightPath, no_boxes
from readers.images import image_sizes


def build_data_set(
    name: str,
    root: Path,
    paths: ImagePaths,
    *,
    ids: np.ndarray,
    labels: np.ndarray,
    class_names: list[str],
    split: np.ndarray,
    keep_going: bool,
    boxes_xywh: np.ndarray | None = None,
    boxes_file: Path | None = None,
    notes: Sequence[str] = (),
) -> DataSet:
    """Return the data set of N images; the other arguments are the fields of `DataSet`.

    Args:
        keep_going: leave out images that cannot be read, into ``unreadable``, instead of raising.
        boxes_xywh: (N, 4) in pixels, NaN for an image without a box; None: no image has one.
        boxes_file: the file that holds them, for errors.

    Raises:
        UserError: if an image cannot be read or a box lies outside its image.
    """
    sizes, rotated, faults = image_sizes(paths, keep_going=keep_going)
    kept = np.ones(len(paths), dtype=bool)
    kept[list(faults)] = False
    raw_boxes = no_boxes(len(paths)) if boxes_xywh is None else boxes_xywh
    boxes = clip_boxes(raw_boxes, sizes)
    outside = kept & (boxes[:, 2:] <= 0).any(1)
    if outside.any():
        row = int(outside.argmax())
        box, size = tuple(raw_boxes[row].tolist()), tuple(sizes[row].tolist())
        raise UserError(f"{boxes_file}: image {ids[row]}: box {box} lies outside the image, {size}")
    return DataSet(
        name=name,
        root=root,
        ids=ids[kept],
        paths=paths[kept],
        labels=labels[kept],
        class_names=class_names,
        boxes=boxes[kept],
        split=split[kept],
        image_sizes=sizes[kept],
        pixel_grid="upright" if paths.kind is UprightPath else "stored",
        clipped=int((np.abs(boxes - raw_boxes) > 1e-6).any(1)[kept].sum()),
        rotated=int(rotated.sum()),
        notes=tuple(notes),
        unreadable={ids[row].item(): fault for row, fault in faults.items()},
    )
