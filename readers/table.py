"""A data set named by a CSV table: columns path and label, and where there are any split, x, y, width, height."""

import csv
import io
import math
from pathlib import Path

import numpy as np

from localized_crops.files import UserError, read_text
from readers.data_set import Listing, labels_of, list_names, no_boxes
from readers.splits import SPLIT_NAMES

BOX_COLUMNS = ("x", "y", "width", "height")


def read_table(root: Path, table: str | Path | None) -> Listing:
    """Read a data set that a table names; ids are its paths, relative to ``root``.

    Without a column split all images are training images. A box is in pixels of the upright image; where its four
    fields are empty, the image has none.

    Args:
        table: the CSV file; None: the only one in ``root``.

    Raises:
        UserError: on any fault, naming file and line.
    """
    tables = [Path(table)] if table else list(root.glob("*.csv"))
    if len(tables) != 1:
        raise UserError(f"{root}: holds {len(tables)} CSV files; name the table: dataset.table=FILE.csv")
    path = tables[0]
    columns, lines = read_columns(path, "path", "label")
    for name in ("path", "label"):
        _refuse_lines(path, lines, columns[name], [not field for field in columns[name]], f"has no {name}")
    first_row = {}
    twice = [first_row.setdefault(image, row) < row for row, image in enumerate(columns["path"])]
    _refuse_lines(path, lines, columns["path"], twice, "stands in an earlier line already; remove one")
    boxes = boxes_of(path, columns, lines)
    split_names = columns.get("split", ["train"] * len(lines))
    splits = [SPLIT_NAMES.get(field.lower()) for field in split_names]
    _refuse_lines(path, lines, split_names, [split is None for split in splits], "is no split: train, val, test")
    class_names = sorted(set(columns["label"]), key=lambda label: label.zfill(18) if label.isdigit() else label)
    labels = labels_of(columns["label"], class_names)
    return list_names(root, columns["path"], labels, class_names, splits, boxes=boxes, boxes_file=path)


def read_columns(path: Path, *needed: str) -> tuple[dict[str, list[str]], list[int]]:
    """Return the columns of a CSV file with a header by lower-case name, and the line number of each row.

    Raises:
        UserError: if a needed column is not there, it has no rows, or a line has another number of fields than the
            header.
    """
    text = read_text(path).lstrip("\ufeff")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        header = [field.strip().lower() for field in next(reader, [])]
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise UserError(f"{path}:1: has no column {lacking[0]!r}; it needs {', '.join(needed)}")
    bad = next((line for line, row in rows if len(row) != len(header)), None)
    if bad is not None:
        raise UserError(f"{path}:{bad}: has another number of fields than the header, {len(header)}")
    if not rows:
        raise UserError(f"{path}: has no rows")
    columns = zip(*(row for _, row in rows), strict=True)
    return dict(zip(header, map(list, columns), strict=True)), [line for line, _ in rows]


def boxes_of(path: Path, columns: dict[str, list[str]], lines: list[int]) -> np.ndarray:
    """Return the boxes (N, 4) of a table's columns x, y, width, height; NaN where the four fields are empty.

    Raises:
        UserError: if a field is no number, only some of the columns or of a line's fields are there, or all boxes seem
            to be shares of the image.
    """
    given = [name for name in BOX_COLUMNS if name in columns]
    if not given:
        return no_boxes(len(lines))
    if len(given) < len(BOX_COLUMNS):
        raise UserError(f"{path}:1: has {', '.join(given)}, but a box needs all of {', '.join(BOX_COLUMNS)}")
    fields = list(zip(*(columns[name] for name in BOX_COLUMNS), strict=True))
    boxes = np.array([[_number(field) for field in row] for row in fields])
    empty = np.array([not any(row) for row in fields])
    bad = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)) & ~empty
    _refuse_lines(path, lines, fields, bad.tolist(), "is no box with an area")
    if not empty.all() and np.nanmax(boxes) <= 1:
        raise UserError(f"{path}: no box reaches past 1: shares of the image, it seems; pixels are expected")
    return boxes


def _number(field: str) -> float:
    """Return a field as a number, NaN if it is empty or not a number."""
    try:
        return float(field)
    except ValueError:
        return math.nan


def _refuse_lines(path: Path, lines: list[int], values: list, bad: list[bool], what: str) -> None:
    if any(bad):
        row = bad.index(True)
        raise UserError(f"{path}:{lines[row]}: {str(values[row])[:80]!r} {what} ({sum(bad)} such lines)")
