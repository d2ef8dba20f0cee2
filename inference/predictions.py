"""Predictions of image files on disk: CSV or JSON lines, what failed, a contact sheet."""

import csv
import io
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from figures.plots import Panel, draw_panel
from inference.classifier import Prediction
from localized_crops.files import UserError, check_output, save_text
from readers.images import read_image

SUFFIXES = (".csv", ".jsonl")
COLUMNS = 6  # of the contact sheet
LONGEST_NAME = 28  # characters
SHEET_SIDE = 240  # pixels, the longer side of an image on it


def check_out(path: Path) -> None:
    """Check that predictions may be written to ``path``: one of two kinds, and nothing else lies there.

    Raises:
        UserError: if not; predictions that lie there already will be replaced.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"out={path}: predictions are written as .csv or .jsonl; give such a name")
    check_output(path, rb'\A(path,class_1,|\{"path": )')
    check_output(path.with_suffix(".errors.txt"), rb"\A\d+ files cannot be read\n")


def save_predictions(path: Path, predictions: Sequence[Prediction], top_k: int) -> None:
    """Write a row for each image that could be read, whole or not at all.

    CSV: path,class_1,probability_1,class_2,... JSON lines: {"path", "top": [{"class", "probability"}], "box"}; box is
    x y width height in pixels of the upright image, null without a localizer.
    """
    known = [one for one in predictions if one.error is None]
    save_text(path, _csv(known, top_k) if path.suffix == ".csv" else _json_lines(known))


def _csv(predictions: Sequence[Prediction], top_k: int) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", *(f"{name}_{k}" for k in range(1, top_k + 1) for name in ("class", "probability"))])
    for one in predictions:
        pairs = zip(one.classes, one.probabilities, strict=True)
        table.writerow([one.path, *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])
    return text.getvalue()


def _json_lines(predictions: Sequence[Prediction]) -> str:
    lines = []
    for one in predictions:
        pairs = zip(one.classes, one.probabilities, strict=True)
        top = [{"class": name, "probability": round(value, 6)} for name, value in pairs]
        lines.append(json.dumps({"path": str(one.path), "top": top, "box": one.box_xywh}, allow_nan=False) + "\n")
    return "".join(lines)


def sheet_figure(predictions: Sequence[Prediction], most: int) -> Figure:
    """Return a contact sheet: images from all over the list with their box and the most probable class.

    Args:
        predictions: those with an error are left out.
        most: images at most.
    """
    known = [one for one in predictions if one.error is None]
    chosen = [known[n] for n in np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int))]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows + 0.4), layout="constrained")
    for axes, one in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, chosen):
        axes.set_axis_off()
        if one is not None:
            draw_panel(axes, _panel(one))
            name = one.classes[0] if len(one.classes[0]) <= LONGEST_NAME else one.classes[0][:LONGEST_NAME] + "…"
            axes.set_title(f"{name}\n{one.probabilities[0]:.0%}", fontsize=7)
    figure.suptitle(f"{len(chosen)} of {len(known)} images: the most probable class", fontsize=9)
    return figure


def _panel(one: Prediction) -> Panel:
    image = read_image(one.path)
    width, _ = image.size
    image.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return Panel(image, box_xywh=None if one.box_xywh is None else np.array(one.box_xywh) * image.width / width)
