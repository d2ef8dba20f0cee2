"""Predictions of image files on disk: CSV or JSON lines, what failed, a contact sheet."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from figures.plots import Panel, check_picture, panel_sheet, save_figure
from inference.classifier import Prediction
from localized_crops.files import UserError, check_output, save_text
from readers.images import read_image
from utils import batched

SUFFIXES = (".csv", ".jsonl")
COLUMNS = 6  # of the contact sheet
LONGEST_NAME = 28  # characters
SHEET_SIDE = 240  # pixels, the longer side of an image on it


def check_out(path: Path, sheet: str | None = None) -> None:
    """Check that predictions may be written to ``path``, of one of two kinds, and a contact sheet to ``sheet``.

    Raises:
        UserError: if something else lies there; predictions that lie there already will be replaced.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"out={path}: predictions are written as .csv or .jsonl; give such a name")
    check_output(path, rb'\A(path,class_1,|\{"path": )')
    check_output(path.with_suffix(".errors.txt"), rb"\A\d+ files cannot be read\n")
    if sheet:
        check_picture(sheet)


def save_predictions(path: Path, predictions: Sequence[Prediction], top_k: int) -> None:
    """Write a row for each image that could be read, whole or not at all.

    CSV: path,class_1,probability_1,class_2,... JSON lines: {"path", "top": [{"class", "probability"}], "box"}; box is
    x y width height in pixels of the upright image, null without a localizer.
    """
    lines, table = [], io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", *(f"{name}_{k}" for k in range(1, top_k + 1) for name in ("class", "probability"))])
    for prediction in predictions:
        if prediction.error is None:
            top = list(zip(prediction.classes, prediction.probabilities, strict=True))
            writer.writerow([prediction.path, *(cell for name, value in top for cell in (name, f"{value:.6f}"))])
            entries = [{"class": name, "probability": round(value, 6)} for name, value in top]
            line = {"path": str(prediction.path), "top": entries, "box": prediction.box_xywh}
            lines.append(json.dumps(line, allow_nan=False) + "\n")
    save_text(path, table.getvalue() if path.suffix == ".csv" else "".join(lines))


def save_sheet(path: Path | str, predictions: Sequence[Prediction], most: int) -> None:
    """Draw a contact sheet: up to ``most`` images from all over the list with their box and the most probable class.

    Images with an error are left out.
    """
    known = [prediction for prediction in predictions if prediction.error is None]
    chosen = [known[n] for n in np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int))]
    lines = list(batched(map(_panel, chosen), COLUMNS))
    save_figure(panel_sheet(lines, f"{len(chosen)} of {len(known)} images: the most probable class"), path)
    print(f"contact sheet: {path}")


def _panel(prediction: Prediction) -> Panel:
    image = read_image(prediction.path)
    width, _ = image.size
    image.thumbnail((SHEET_SIDE, SHEET_SIDE))
    name, box = prediction.classes[0], prediction.box_xywh
    name = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…"
    box = None if box is None else np.array(box) * image.width / width
    return Panel(image, box_xywh=box, title=f"{name}\n{prediction.probabilities[0]:.0%}")
