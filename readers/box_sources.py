"""Boxes in other tools' formats: COCO JSON, a folder of YOLO text files or of Pascal VOC XML, a CSV table.

Each format is a few lines of JSON, XML or text and is read here: supervision would decode every image for its size and
brings OpenCV, pycocotools reads COCO alone and matches no file names (the tests open what is written with it).
"""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert

from localized_crops.box_file import FILE_KIND
from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.files import UserError, load_json, read_text, refuse_special, save_json, save_text
from readers.data_set import DataSet
from readers.table import boxes_of, read_columns


@dataclass(frozen=True)
class BoxSet:
    """Any number of boxes for each image of a data set."""

    boxes: np.ndarray  # (M, 4) float64, x y width height in pixels, cut at their images, sorted by row
    rows: np.ndarray  # (M,) int64, of which image each is
    image_sizes: np.ndarray  # (N, 2) width height

    def one_each(self, how: str, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
        """Return one box an image, (N, 4), the whole image where there is none; and for how many there is none.

        Args:
            how: "largest", "union" (the box around all), or "random" (drawn by ``rng``).
            rng: of the draw.
        """
        chosen, counts = whole_image_boxes(self.image_sizes), np.bincount(self.rows, minlength=len(self.image_sizes))
        has_box, starts = counts > 0, np.cumsum(counts) - counts
        if how == "union":
            far = self.boxes[:, :2] + self.boxes[:, 2:]
            near = np.minimum.reduceat(self.boxes[:, :2], starts[has_box]) if len(self.boxes) else far
            far = np.maximum.reduceat(far, starts[has_box]) if len(self.boxes) else far
            chosen[has_box] = np.concatenate([near, far - near], axis=1)
        elif how == "random":
            drawn = starts + (rng.random(len(counts)) * counts).astype(np.int64)
            chosen[has_box] = self.boxes[drawn[has_box]]
        else:
            order = np.lexsort((self.boxes[:, 2:].prod(1), self.rows))  # of each image the largest comes last
            chosen[has_box] = self.boxes[order[(starts + counts - 1)[has_box]]]
        return chosen, int((~has_box).sum())

    def of(self, rows: np.ndarray) -> "BoxSet":
        """Return the boxes of some images, (K,) rows in ascending order."""
        place = np.full(len(self.image_sizes), -1)
        place[rows] = np.arange(len(rows))
        kept = place[self.rows] >= 0
        return BoxSet(self.boxes[kept], place[self.rows[kept]], self.image_sizes[rows])

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Return one box an image, drawn, (N, 4)."""
        return self.one_each("random", rng)[0]


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
        data: the data set.
        allow_missing: share of the images that may be left without a box.

    Raises:
        UserError: if the format is none of these, coordinates are impossible, images have another size there, or more
            images than allowed have no box.
    """
    path = Path(path)
    names, boxes, sizes, is_relative = _read_any(path)
    rows, unknown = match_names(names, [name.decode(errors="replace") for name in data.paths.names.tolist()])
    known = rows >= 0
    _compare_sizes(path, names, rows, sizes, data)
    all_boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    has_box = known & ~np.isnan(all_boxes[:, 0])
    rows, found = rows[has_box], all_boxes[has_box]
    _check_coordinates(path, np.array(names, dtype=object)[has_box], found, is_relative)
    if is_relative:
        found = box_convert(torch.from_numpy(found), "cxcywh", "xywh").numpy() * np.tile(data.image_sizes[rows], 2)
    found = clip_boxes(found, data.image_sizes[rows])
    inside = (found[:, 2:] > 0).all(1)
    rows, found = rows[inside], found[inside]
    outside = f"; {(~inside).sum()} boxes lie outside their image" if not inside.all() else ""
    _count_missing(path, data, rows, unknown, outside, allow_missing)
    order = np.argsort(rows, kind="stable")
    return BoxSet(found[order], rows[order], data.image_sizes)


Read = tuple[list[str], Any, list[tuple[int, int] | None], bool]  # names, boxes, sizes, whether boxes are shares


def _read_any(path: Path) -> Read:
    if path.is_dir():
        found = {suffix: sorted(path.rglob(f"*.{suffix}")) for suffix in ("xml", "txt")}
        if bool(found["xml"]) == bool(found["txt"]):
            raise UserError(
                f"{path}: holds {'both' if found['xml'] else 'none of'} Pascal VOC's .xml and YOLO's .txt files"
            )
        return _read_voc(found["xml"]) if found["xml"] else _read_yolo(path, found["txt"])
    if read_text(path).lstrip("\ufeff \t\r\n").startswith(("{", "[")):
        return _read_coco(path)
    return _read_csv(path)


def _read_coco(path: Path) -> Read:
    content = load_json(path)
    try:
        images = {image["id"]: image for image in content["images"]}
        annotations = content["annotations"]
        names = {image_id: str(image["file_name"]) for image_id, image in images.items()}
        without = sum("bbox" not in one or not one["bbox"] for one in annotations)
        if annotations and without == len(annotations):
            raise UserError(f"{path}: COCO annotations without bbox (segmentations only?); add the boxes")
        pairs = [(one["image_id"], one["bbox"]) for one in annotations if one.get("bbox")]
        sizes = {image_id: (image.get("width"), image.get("height")) for image_id, image in images.items()}
        boxes = np.array([box for _, box in pairs], dtype=np.float64).reshape(-1, 4)
        listed = [names[image_id] for image_id, _ in pairs], [sizes[image_id] for image_id, _ in pairs]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        lacking = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: neither a box JSON of this program nor a COCO JSON ({lacking}); give one") from None
    return listed[0], boxes, [None if None in size else size for size in listed[1]], False


def _read_csv(path: Path) -> Read:
    columns, lines = read_columns(path, ("path", "x", "y", "width", "height"), ())
    return columns["path"], boxes_of(path, columns, lines), [None] * len(lines), False


def _read_yolo(folder: Path, files: list[Path]) -> Read:
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
    return names, boxes, [None] * len(names), True


def _read_voc(files: list[Path]) -> Read:
    names, corners, sizes = [], [], []
    for file in files:
        try:
            root = ElementTree.fromstring(read_text(file).encode())  # expat refuses entity bombs since 2.4.1
            size = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
            name = root.findtext("filename") or file.stem
            for one in root.iter("bndbox"):
                corners.append([float(one.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")])
                names.append(name)
                sizes.append(size if all(size) else None)
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise UserError(f"{file}: no Pascal VOC annotation ({error})") from None
    xyxy = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)
    return names, box_convert(xyxy, "xyxy", "xywh").numpy(), sizes, False


# --- matching and checking ----------------------------------------------------------------------------------------


def match_names(names: Sequence[str], own: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return for each of ``names`` the row (M,) in ``own`` that it means, -1 for none, and the names that mean none.

    A name means the path that equals it, or that equals it without suffixes; else the only path whose last parts are
    the same, down to the file's name alone.
    """
    row_of = {}
    for spell in (_spellings_of_all, _stems_of_all):
        for row, name in enumerate(own):
            for one in spell(name):
                row_of.setdefault(one, []).append(row)
    rows = {name: _row_of(name, row_of) for name in dict.fromkeys(names)}
    counts = Counter(rows.values())
    for name, row in rows.items():
        if counts[row] > 1 and name not in (own[row], PurePosixPath(own[row]).with_suffix("").as_posix()):
            rows[name] = -1  # another name means this image too
    return np.array([rows[name] for name in names], dtype=np.int64), [name for name, row in rows.items() if row < 0]


def _spellings_of_all(name: str) -> list[str]:
    parts = PurePosixPath(name).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _stems_of_all(name: str) -> list[str]:
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return _spellings_of_all(stem) if stem != name else []


def _row_of(name: str, row_of: dict[str, list[int]]) -> int:
    name = name.replace("\\", "/")
    for one in (*_spellings_of_all(name), *_stems_of_all(name)):
        rows = row_of.get(one, [])
        if len(set(rows)) == 1:
            return rows[0]
    return -1


def _compare_sizes(path: Path, names: list[str], rows: np.ndarray, sizes: list, data: DataSet) -> None:
    own = [tuple(size) for size in data.image_sizes.tolist()]
    other = {name: (size, own[row]) for name, row, size in zip(names, rows.tolist(), sizes, strict=True)
             if row >= 0 and size is not None and tuple(size) != own[row]}  # fmt: skip
    if other:
        name, (there, here) = next(iter(other.items()))
        turned = f"; here pixels are {data.pixel_grid}, by EXIF" if tuple(there) == here[::-1] else ""
        line = f"{len(other)} images have another size there, the first: {name} {tuple(there)}, here {here}"
        raise UserError(f"{path}: {line}{turned}")


def _check_coordinates(path: Path, names: np.ndarray, boxes: np.ndarray, is_relative: bool) -> None:
    bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] <= 0).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: {names[row]}: {boxes[row].tolist()} is no box with an area ({bad.sum()} such boxes)")
    if is_relative and len(boxes) and boxes.max() > 1.01:
        row = int(boxes.max(1).argmax())
        raise UserError(f"{path}: {names[row]}: {boxes[row].tolist()}: pixels, it seems; YOLO has shares of the image")
    if not is_relative and len(boxes) and boxes.max() <= 1:
        raise UserError(f"{path}: no box reaches past 1: shares of the image, it seems; pixels are expected")


def _count_missing(
    path: Path, data: DataSet, rows: np.ndarray, unknown: list[str], outside: str, allow_missing: float
) -> None:
    """Print what does not match; raise where too many images have no box."""
    missing = np.setdiff1d(np.arange(len(data.ids)), rows)
    if not (len(missing) or unknown or outside):
        return
    first = ", ".join(str(one) for one in data.ids[missing[:3]].tolist())
    line = f"{path}: no box for {len(missing)} of {len(data.ids)} images" + (f" ({first}, ...)" if first else "")
    line += f"; {len(unknown)} names there are no image here ({unknown[0]}, ...)" if unknown else ""
    if len(missing) > allow_missing * len(data.ids):
        share = np.ceil(1e4 * len(missing) / len(data.ids)) / 1e4
        raise UserError(f"{line}{outside}; boxes.allow_missing={share:g} lets them go without one")
    print(line + outside)


# --- writing ------------------------------------------------------------------------------------------------------


def write_foreign(path: Path, names: list[str], image_sizes: np.ndarray, boxes: np.ndarray, made_by: str) -> None:
    """Write boxes as COCO (NAME.json), CSV (NAME.csv) or YOLO (a folder of text files).

    Args:
        path: its suffix chooses the format.
        names: (N,) image files.
        image_sizes: (N, 2) width height.
        boxes: (N, 4) xywh in pixels; NaN where there is none.
        made_by: what COCO's info says.

    Raises:
        UserError: if it cannot be written, or a YOLO folder is not empty.
    """
    if path.suffix == ".json":
        save_json(path, _coco(names, image_sizes, boxes, made_by))
    elif path.suffix == ".csv":
        rows = [",".join([_csv_field(name), *("" if np.isnan(n) else repr(n) for n in box)])
                for name, box in zip(names, boxes.tolist(), strict=True)]  # fmt: skip
        save_text(path, "\n".join(["path,x,y,width,height", *rows]) + "\n")
    elif path.suffix:
        raise UserError(f"{path}: name FILE.json (COCO), FILE.csv, or a folder (YOLO)")
    else:
        _write_yolo(path, names, image_sizes, boxes)


def _csv_field(name: str) -> str:
    return json.dumps(name, ensure_ascii=False).replace('\\"', '""') if set(name) & set(',";\t') else name


def _coco(names: list[str], image_sizes: np.ndarray, boxes: np.ndarray, made_by: str) -> dict[str, Any]:
    about = zip(names, image_sizes.tolist(), strict=True)
    images = [{"id": n, "file_name": name, "width": w, "height": h} for n, (name, (w, h)) in enumerate(about, 1)]
    annotations = [
        {"id": number, "image_id": int(row) + 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (row, box) in enumerate(
            ((row, boxes[row].tolist()) for row in np.flatnonzero(~np.isnan(boxes[:, 0]))), 1
        )
    ]
    categories = [{"id": 1, "name": "object"}]
    return {"info": {"description": made_by}, "images": images, "annotations": annotations, "categories": categories}


def _write_yolo(folder: Path, names: list[str], image_sizes: np.ndarray, boxes: np.ndarray) -> None:
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    twice, count = Counter(stems).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{folder}: {count} images are called {twice} but for their suffix; YOLO cannot tell them apart"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder")
    shares = box_convert(torch.from_numpy(boxes), "xywh", "cxcywh").numpy() / np.tile(image_sizes, 2)
    for stem, box in zip(stems, shares.tolist(), strict=True):
        save_text(folder / f"{stem}.txt", "" if np.isnan(box[0]) else "0 " + " ".join(map(repr, box)) + "\n")
