"""Data sets by name: reading and checking them, their splits, and the boxes of a source.

Pixels and boxes: those of a data set in CUB's file format are in the stored pixel grid, as CUB's are, so an EXIF
orientation is not applied; of the others they are in the upright image. Ids are the numbers of images.txt (neither they
nor classes need be contiguous; labels count the classes that classes.txt names, in its order), of the others the paths
below root.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from localized_crops.box_file import boxes_for_images, save_boxes
from localized_crops.boxes import center_boxes, clip_boxes, fill_missing, whole_image_boxes
from localized_crops.files import UserError, user_errors
from localized_crops.image_ids import ImageId
from readers.box_sources import BoxSet, is_foreign, read_foreign, write_foreign
from readers.cub import download_cub, read_cub_tables
from readers.data_set import DataSet, Listing, UprightPath, no_boxes
from readers.folder import read_folder
from readers.images import image_sizes, unreadable_images
from readers.splits import fill_train, hold_out
from readers.table import read_table
from readers.torchvision_sets import SETS, read_torchvision
from toybirds import writing

DEFAULT_ROOTS = {"toybirds": "data/toybirds", "cub": "data/CUB_200_2011"} | dict.fromkeys(SETS, "data")

NAMED_SOURCES = ("gt", "center", "image", "dino")


def read_dataset(
    name: str,
    root: Path | str | None = None,
    *,
    table: Path | str | None = None,
    split: str = "official",
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    download: bool = False,
    check: bool = False,
    keep_going: bool = False,
) -> DataSet:
    """Read and check a data set; ToyBirds is drawn when its default folder is missing.

    Args:
        name: "toybirds", "cub" (any folder in CUB's file format), "folder" (class folders), "csv" (a table), or a name
            in `SETS`.
        root: the folder of the data set; None: the usual one under data/.
        table: of "csv": the CSV file; None: the only one in root.
        split: "official", or "70/30": train filled up with the first test images in file order.
        val_fraction: share of each class's training images that becomes the split "val", unless there is one: in CUB's
            format the last ones in file order, else drawn by ``split_seed``.
        test_fraction: of "folder" and "csv": likewise for the split "test", before "val".
        split_seed: of these draws.
        download: fetch the CUB archive, or torchvision's data set, when it is missing.
        check: decode every image.
        keep_going: leave out images that are no images, into ``unreadable``, instead of raising.

    Raises:
        UserError: on any fault of the files, naming file, line or image.
    """
    if root is None and name not in DEFAULT_ROOTS:
        raise UserError(f"dataset.name={name} needs dataset.root=FOLDER")
    folder = Path(root or DEFAULT_ROOTS[name])
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; dataset.root must be a folder")
    data = _build_data_set(name, folder, _list_images(name, folder, table, download), keep_going)
    faults = unreadable_images(data.paths) if check else []
    if faults:
        raise UserError(f"{len(faults)} images cannot be read, the first: {faults[0]} (check_dataset.py lists all)")
    data = fill_train(data) if split == "70/30" else data
    in_file_order = name in ("toybirds", "cub")
    if name in ("folder", "csv") and not len(data.rows("test")):
        data = hold_out(data, test_fraction, "test", split_seed)
    if len(data.rows("val")):
        return data
    return hold_out(data, val_fraction, "val", None if in_file_order else split_seed)


def _list_images(name: str, folder: Path, table: Path | str | None, download: bool) -> Listing:
    """Read what a folder holds; of ToyBirds only the default folder is drawn into."""
    if name in SETS:
        return read_torchvision(name, folder, download)
    if name == "toybirds" and (folder == Path(DEFAULT_ROOTS[name]) or writing.has_toybirds(folder)):
        with user_errors(FileExistsError):  # something else, or another version of the drawings, lies there
            writing.write_toybirds(folder)
        return read_cub_tables(folder)
    if name == "cub" and download and not folder.exists():
        download_cub(folder)
    if not folder.exists():
        fetched = "; dataset.download=true fetches CUB-200-2011 (1.1 GB, non-commercial research use)"
        remedies = {"toybirds": " (for the drawn birds leave dataset.root out)", "cub": f"; give dataset.root{fetched}"}
        raise UserError(f"{folder}: there is no such folder{remedies.get(name, '; give dataset.root')}")
    if name == "toybirds":
        raise UserError(
            f"{folder}: holds no ToyBirds; for photographs in class folders give dataset.name=folder, for a table "
            "dataset.name=csv, for CUB's file format dataset.name=cub"
        )
    if name == "cub":
        return read_cub_tables(folder)
    return read_folder(folder) if name == "folder" else read_table(folder, table)


def _build_data_set(name: str, root: Path, listing: Listing, keep_going: bool) -> DataSet:
    """Return the listed images with their sizes, unreadable ones left out and boxes clipped.

    Raises:
        UserError: if an image cannot be read (with ``keep_going`` it is left out, into ``unreadable``), or a box lies
            outside its image.
    """
    paths, ids = listing.paths, listing.ids
    sizes, rotated, faults = image_sizes(paths, keep_going=keep_going)
    kept = np.ones(len(paths), dtype=bool)
    kept[list(faults)] = False
    raw_boxes = no_boxes(len(paths)) if listing.boxes is None else listing.boxes
    boxes = clip_boxes(raw_boxes, sizes)
    outside = kept & (boxes[:, 2:] <= 0).any(1)
    if outside.any():
        row = int(outside.argmax())
        box, size = tuple(raw_boxes[row].tolist()), tuple(sizes[row].tolist())
        raise UserError(f"{listing.boxes_file}: image {ids[row]}: box {box} lies outside the image, {size}")
    return DataSet(
        name=name,
        root=root,
        ids=ids[kept],
        paths=paths[kept],
        labels=listing.labels[kept],
        class_names=listing.class_names,
        boxes=boxes[kept],
        split=listing.split[kept],
        image_sizes=sizes[kept],
        pixel_grid="upright" if paths.kind is UprightPath else "stored",
        clipped=int((np.abs(boxes - raw_boxes) > 1e-6).any(1)[kept].sum()),
        rotated=int(rotated.sum()),
        notes=tuple(listing.notes),
        unreadable={ids[row].item(): fault for row, fault in faults.items()},
    )


def stem_of(name: str, root: Path | str | None) -> str:
    """Return what runs and box files are called after: the folder of a "folder" or "csv", else the data set's name."""
    return os.path.basename(os.path.realpath(root)) if name in ("folder", "csv") and root is not None else name


def dino_boxes_path(name: str, root: Path | str | None) -> Path:
    """Return where generate_dino_boxes.py writes the boxes of a data set by default."""
    return Path("runs") / f"dino_boxes_{stem_of(name, root)}" / "boxes.json"


# --- boxes of a source --------------------------------------------------------------------------------------------


def source_boxes(source: str, data: DataSet, **options: Any) -> tuple[np.ndarray, int]:
    """Return `known_boxes` with the whole image in place of missing boxes, and the number of missing boxes."""
    boxes = known_boxes(source, data, **options)
    return fill_missing(boxes, data.image_sizes), int(np.isnan(boxes[:, 0]).sum())


def known_boxes(source: str, data: DataSet, *, several: str = "largest", allow_missing: float = 0.0) -> np.ndarray:
    """Return the boxes that ``source`` names, (N, 4) x y width height in the order of ``data``, NaN for no box.

    Args:
        source: "gt" (of the data set), "center", "image", "dino" (`dino_boxes_path`), or the path of a box JSON, or of
            boxes in another tool's format (`readers.box_sources`).
        several: what serves an image that another tool's file gives several boxes: "largest" or "union"; "random" gives
            the largest here (`source_set` keeps them all).
        allow_missing: share of the images that another tool's file may leave without a box.

    Raises:
        UserError: if the file is unusable or was made for other images, or there is no true box at all.
    """
    if source == "gt" and not data.has_box.any():
        raise UserError(
            f"{data.root}: has no true boxes: make some with generate_dino_boxes.py and give source=FILE, or "
            "source=center"
        )
    if source == "gt":
        return data.boxes
    if source == "center":
        return center_boxes(data.image_sizes)
    if source == "image":
        return whole_image_boxes(data.image_sizes)
    box_file = box_file_of(source, data)
    if box_file is None:
        return read_foreign(source, data, allow_missing).one_each("union" if several == "union" else "largest")
    return boxes_for_images(box_file, data.ids, data.image_sizes, data.pixel_grid)


def save_source(
    path: Path | str, data: DataSet, boxes_xywh: np.ndarray, *, scores: np.ndarray | None = None, **header: Any
) -> None:
    """Write the box JSON of a data set, which ``source=path`` reads; images that cannot be read have an empty entry.

    Args:
        boxes_xywh: (N, 4), in the order of ``data``; NaN for an image that has none.
        scores: (N,) confidence in the boxes.
        **header: made_by and settings of `localized_crops.box_file.save_boxes`.
    """
    has_box, ids, no_image = ~np.isnan(boxes_xywh[:, 0]), data.ids.tolist(), dict.fromkeys(data.unreadable)

    def by_id(values: np.ndarray) -> dict[ImageId, Any]:
        rows = zip(ids, values.tolist(), has_box, strict=True)
        return {i: value if is_known else None for i, value, is_known in rows} | no_image

    save_boxes(
        path,
        by_id(boxes_xywh),
        dict(zip(ids, data.image_sizes.tolist(), strict=True)) | no_image,
        pixel_grid=data.pixel_grid,
        scores=None if scores is None else by_id(scores),
        **header,
    )


def convert_source(path: Path, data: DataSet, boxes_xywh: np.ndarray, *, made_by: str, settings: dict) -> None:
    """Write boxes (N, 4) in the format that the name chooses: NAME.coco.json, NAME.csv, a YOLO folder, else ours."""
    if path.suffix == ".json" and not path.name.endswith(".coco.json"):
        save_source(path, data, boxes_xywh, made_by=made_by, settings=settings)
    else:
        write_foreign(path, data, boxes_xywh, made_by)


def box_file_of(source: str, data: DataSet) -> Path | None:
    """Return the box file of this program that a source names; None for gt, center, image and other tools' files.

    Raises:
        UserError: if the source is "dino" and generate_dino_boxes.py has made no boxes yet.
    """
    if source != "dino":
        return None if source in NAMED_SOURCES or is_foreign(source) else Path(source)
    path = dino_boxes_path(data.name, data.root)
    if not path.exists():
        raise UserError(f"{path}: there is no such file: make it with generate_dino_boxes.py on the same data set")
    return path


def source_set(source: str, data: DataSet, allow_missing: float) -> BoxSet | None:
    """Return all boxes of a source that may hold several per image, else None."""
    if source in NAMED_SOURCES or not is_foreign(source):
        return None
    return read_foreign(source, data, allow_missing)
