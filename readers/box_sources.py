"""Boxes in other tools' formats: COCO JSON, a folder of YOLO text files or of Pascal VOC XML, a CSV table.

Each format is a few lines of JSON, XML or text and is read here: supervision would decode every image for its size and
brings OpenCV, pycocotools reads COCO alone and matches no file names (the tests open what is written with it).
"""

import csv
import io
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import box_convert

from localized_crops.box_file import FILE_KIND
from localized_crops.boxes import clip_boxes, fill_missing
from localized_crops.files import UserError, load_json, read_text, refuse_special, save_json, save_text
from readers.data_set import DataSet
from readers.table import BOX_COLUMNS, boxes_of, read_columns


@dataclass(frozen=True)
class BoxSet:
    """Any number of boxes for each image of a data set."""

    boxes: np.ndarray  # (M, 4) float64, x y width height in pixels, cut at their images, sorted by row
    rows: np.ndarray  # (M,) int64, of which image each is
    image_sizes: np.ndarray  # (N, 2) width height

    def one_each(self, choose: str, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return one box an image, (N, 4), NaN where there is none.

        ``choose`` is "largest", "union" (the box around all), or "random" (drawn by ``rng``).
        """
        count = len(self.image_sizes)
        chosen, counts = np.full((count, 4), np.nan), np.bincount(self.rows, minlength=count)
        has_box, starts = counts > 0, np.cumsum(counts) - counts
        if choose == "union":
            near = np.minimum.reduceat(self.boxes[:, :2], starts[has_box])
            far = np.maximum.reduceat(self.boxes[:, :2] + self.boxes[:, 2:], starts[has_box])
            chosen[has_box] = np.concatenate([near, far - near], axis=1)
        elif choose == "random":
            drawn = starts + (rng.random(count) * counts).astype(np.int64)
            chosen[has_box] = self.boxes[drawn[has_box]]
        else:
            order = np.lexsort((self.boxes[:, 2:].prod(1), self.rows))  # of each image the largest comes last
            chosen[has_box] = self.boxes[order[(starts + counts - 1)[has_box]]]
        return chosen

    def of(self, rows: np.ndarray) -> "BoxSet":
        """Return the boxes of some images, (K,) rows in ascending order."""
        place = np.full(len(self.image_sizes), -1)
        place[rows] = np.arange(len(rows))
        kept = place[self.rows] >= 0
        return BoxSet(self.boxes[kept], place[self.rows[kept]], self.image_sizes[rows])

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Return one box an image, drawn, (N, 4); the whole image where there is none."""
        return fill_missing(self.one_each("random", rng), self.image_sizes)


# --- reading ------------------------------------------------------------------------------------------------------


def is_foreign(path: Path | str) -> bool:
    """Tell whether a source is in another tool's format; a file that cannot be read is taken for ours."""
    path = Path(path)
    if path.is_dir():
        return True
    refuse_special(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(400)
    return not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or FILE_KIND.encode() not in start


def read_foreign(path: Path | str, data: DataSet, allow_missing: float = 0.0) -> BoxSet:
    """Read boxes that another tool made for the images of a data set, matched by file name.

    Args:
        path: a COCO JSON, a CSV table, or a folder of YOLO or Pascal VOC files.
        allow_missing: share of the images that may be left without a box.

    Raises:
        UserError: if the format is none of these, coordinates are impossible, images have another size there, or more
            images than allowed have no box.
    """
    path = Path(path)
    file = _read_any(path)
    rows, unknown = match_names(file.names, data.paths.texts())
    _check_sizes(path, file, rows, data)
    has_box = (rows >= 0) & ~np.isnan(file.boxes[:, 0])
    rows, boxes = rows[has_box], file.boxes[has_box]
    _check_coordinates(path, [file.names[row] for row in np.flatnonzero(has_box)], boxes, file.is_relative)
    if file.is_relative:
        boxes = box_convert(torch.from_numpy(boxes), "cxcywh", "xywh").numpy() * np.tile(data.image_sizes[rows], 2)
    boxes = clip_boxes(boxes, data.image_sizes[rows])
    inside = (boxes[:, 2:] > 0).all(1)
    rows, boxes = rows[inside], boxes[inside]
    _report_missing(path, data, rows, unknown, int((~inside).sum()), allow_missing)
    order = np.argsort(rows, kind="stable")
    return BoxSet(boxes[order], rows[order], data.image_sizes)


class _ForeignFile(NamedTuple):
    """The boxes of another tool's file."""

    names: list[str]  # (M,) of the image of each box
    boxes: np.ndarray  # (M, 4) float64, x y width height in pixels; NaN where the image has none
    sizes: np.ndarray  # (M, 2) float64, width height of the image; NaN where the file does not say
    is_relative: bool = False  # boxes are centre x y width height, shares of the image


def _read_any(path: Path) -> _ForeignFile:
    if path.is_dir():
        xml, txt = sorted(path.rglob("*.xml")), sorted(path.rglob("*.txt"))
        if bool(xml) == bool(txt):
            raise UserError(f"{path}: holds {'both' if xml else 'none of'} Pascal VOC's .xml and YOLO's .txt files")
        return _read_voc(xml) if xml else _read_yolo(path, txt)
    if read_text(path).lstrip("\ufeff \t\r\n").startswith(("{", "[")):
        return _read_coco(path)
    columns, lines = read_columns(path, "path", *BOX_COLUMNS)
    return _ForeignFile(columns["path"], boxes_of(path, columns, lines), np.full((len(lines), 2), np.nan))


def _read_coco(path: Path) -> _ForeignFile:
    content = load_json(path)
    try:
        images = {image["id"]: image for image in content["images"]}
        annotations = [annotation for annotation in content["annotations"] if annotation.get("bbox")]
        if content["annotations"] and not annotations:
            raise UserError(f"{path}: COCO annotations without bbox (segmentations only?); add the boxes")
        boxed = [images[annotation["image_id"]] for annotation in annotations]
        names = [str(image["file_name"]) for image in boxed]
        boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
        sizes = np.array([(image.get("width"), image.get("height")) for image in boxed], dtype=np.float64)
        return _ForeignFile(names, boxes.reshape(len(names), 4), sizes.reshape(-1, 2))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: neither a box JSON of this program nor a COCO JSON ({reason}); give one") from None


def _read_yolo(folder: Path, files: list[Path]) -> _ForeignFile:
    names, boxes = [], []
    for file in files:
        if file.name == "classes.txt":
            continue
        for number, line in enumerate(read_text(file).splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            try:
                if len(fields) not in (5, 6):  # class, box, and a prediction's confidence
                    raise ValueError
                boxes.append([float(field) for field in fields[1:5]])
            except ValueError:
                raise UserError(f"{file}:{number}: {line[:80]!r} is no line `class x y width height`") from None
            names.append(file.relative_to(folder).with_suffix("").as_posix())
    return _ForeignFile(names, np.array(boxes).reshape(-1, 4), np.full((len(names), 2), np.nan), is_relative=True)


def _read_voc(files: list[Path]) -> _ForeignFile:
    names, boxes, sizes = [], [], []
    for file in files:
        try:
            root = ElementTree.fromstring(read_text(file).encode())  # expat refuses entity bombs since 2.4.1
            size = [float(root.findtext(f"size/{side}", "0")) or np.nan for side in ("width", "height")]
            for box in root.iter("bndbox"):
                left, top, right, bottom = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                boxes.append([left, top, right - left, bottom - top])
                names.append(root.findtext("filename") or file.stem)
                sizes.append(size)
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise UserError(f"{file}: no Pascal VOC annotation ({error})") from None
    return _ForeignFile(names, np.array(boxes).reshape(-1, 4), np.array(sizes).reshape(-1, 2))


# --- matching and checking ----------------------------------------------------------------------------------------


def match_names(names: Sequence[str], image_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Match other tools' file names to the images of a data set.

    A name means the path that equals it, or that equals it without suffixes; else the only path whose last parts are
    the same, down to the file's name alone. Of two names that mean one image only the path itself is matched.

    Returns:
        The row (M,) of each name in ``image_names``, -1 for none, and the names that mean none.
    """
    row_of = {}  # spelling -> row; -1: several images are spelled so
    for row, image_name in enumerate(image_names):
        for spelling in _spellings(image_name):
            if row_of.setdefault(spelling, row) != row:
                row_of[spelling] = -1
    rows = {}
    for name in names:
        if name not in rows:
            matches = (row_of.get(spelling, -1) for spelling in _spellings(name))
            rows[name] = next((row for row in matches if row >= 0), -1)
    counts = Counter(rows.values())
    for name, row in rows.items():
        if counts[row] > 1 and name not in (image_names[row], os.path.splitext(image_names[row])[0]):
            rows[name] = -1
    return np.array([rows[name] for name in names], dtype=np.int64), [name for name, row in rows.items() if row < 0]


def _spellings(name: str) -> list[str]:
    """Return a path and its shorter ends, then the same without the file's suffix."""
    path = os.path.normpath(name.replace("\\", "/"))
    return [
        "/".join(whole.split("/")[start:])
        for whole in dict.fromkeys((path, os.path.splitext(path)[0]))
        for start in range(whole.count("/") + 1)
    ]


def _check_sizes(path: Path, file: _ForeignFile, rows: np.ndarray, data: DataSet) -> None:
    here = data.image_sizes[rows]
    differs = (rows >= 0) & ~np.isnan(file.sizes).any(1) & (file.sizes != here).any(1)
    if differs.any():
        row = int(differs.argmax())
        there, size = tuple(file.sizes[row].astype(int).tolist()), tuple(here[row].tolist())
        turned = f"; here pixels are {data.pixel_grid}, by EXIF" if there == size[::-1] else ""
        raise UserError(f"{path}: image {file.names[row]} has another size, {there} there and {size} here{turned}")


def _check_coordinates(path: Path, names: list[str], boxes: np.ndarray, is_relative: bool) -> None:
    """Raise UserError if a box has no area, or all are in pixels instead of shares of the image or the reverse."""
    bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] <= 0).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: {names[row]}: {boxes[row].tolist()} is no box with an area ({bad.sum()} such boxes)")
    if is_relative and boxes.max(initial=0) > 1.01:
        row = int(boxes.max(1).argmax())
        raise UserError(f"{path}: {names[row]}: {boxes[row].tolist()}: pixels, it seems; YOLO has shares of the image")
    if not is_relative and len(boxes) and boxes.max() <= 1:
        raise UserError(f"{path}: no box reaches past 1: shares of the image, it seems; pixels are expected")


def _report_missing(
    path: Path, data: DataSet, rows: np.ndarray, unknown: list[str], outside: int, allow_missing: float
) -> None:
    """Print what does not match; raise UserError where too many images have no box."""
    missing, total, notes = np.setdiff1d(np.arange(len(data.ids)), rows), len(data.ids), []
    if len(missing):
        first = ", ".join(map(str, data.ids[missing[:3]].tolist()))
        notes.append(f"no box for {len(missing)} of {total} images ({first}, ...)")
    if unknown:
        notes.append(f"{len(unknown)} names there are no image here ({unknown[0]}, ...)")
    if outside:
        notes.append(f"{outside} boxes lie outside their image")
    if len(missing) > allow_missing * total:
        share = np.ceil(1e4 * len(missing) / total) / 1e4
        raise UserError(f"{path}: {'; '.join(notes)}; boxes.allow_missing={share:g} lets them go without one")
    if notes:
        print(f"{path}: {'; '.join(notes)}")


# --- writing ------------------------------------------------------------------------------------------------------


def write_foreign(path: Path, data: DataSet, boxes: np.ndarray, made_by: str) -> None:
    """Write the boxes (N, 4) of a data set, NaN for none, as COCO (NAME.json), CSV (NAME.csv) or YOLO (a folder).

    Raises:
        UserError: if it cannot be written, or a YOLO folder is not empty.
    """
    names = data.paths.texts()
    if path.suffix == ".json":
        save_json(path, _coco(names, data.image_sizes, boxes, made_by))
    elif path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", *BOX_COLUMNS))
        for name, box in zip(names, boxes.tolist(), strict=True):
            writer.writerow((name, *("" if np.isnan(n) else n for n in box)))
        save_text(path, text.getvalue())
    elif path.suffix:
        raise UserError(f"{path}: name FILE.json (COCO), FILE.csv, or a folder (YOLO)")
    else:
        _write_yolo(path, names, data.image_sizes, boxes)


def _coco(names: list[str], image_sizes: np.ndarray, boxes: np.ndarray, made_by: str) -> dict[str, Any]:
    images, annotations = [], []
    for number, (name, size, box) in enumerate(zip(names, image_sizes.tolist(), boxes.tolist(), strict=True), 1):
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        if not np.isnan(box[0]):
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": box, "area": box[2] * box[3]})
    categories = [{"id": 1, "name": "object"}]
    return {"info": {"description": made_by}, "images": images, "annotations": annotations, "categories": categories}


def _write_yolo(folder: Path, names: list[str], image_sizes: np.ndarray, boxes: np.ndarray) -> None:
    stems = [os.path.splitext(name)[0] for name in names]
    twice, count = Counter(stems).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder}: {count} images are called {twice} but for their suffix; YOLO mixes them up")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder")
    shares = box_convert(torch.from_numpy(boxes), "xywh", "cxcywh").numpy() / np.tile(image_sizes, 2)
    for stem, box in zip(stems, shares.tolist(), strict=True):
        save_text(folder / f"{stem}.txt", "" if np.isnan(box[0]) else "0 " + " ".join(map(repr, box)) + "\n")
