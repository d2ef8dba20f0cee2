"""How good boxes are: mean IoU, coverage and shares, always beside boxes that need no method, and a contact sheet."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures.plots import Panel, panel_sheet, save_figure, short
from localized_crops.boxes import CENTER_SHARE, center_boxes, coverage, fill_missing, iou, whole_image_boxes
from localized_crops.files import UserError, save_json, save_text
from readers.data_set import DataSet
from readers.images import read_image
from utils import batched, environment, markdown_table, timed

SHEET_COLUMNS = 5  # images a row of the contact sheet
IOU_LEVELS = (0.3, 0.5, 0.7)
METHOD_NAMES = {
    "boxes": "these boxes",
    "whole_image": "whole image",
    "center": f"centred box, {CENTER_SHARE} of each side",
    "median_train": "median training box",
}
SPLITS = {"train": ("train", "val"), "test": ("test",)}  # validation images are held out of the training images


# --- figures ------------------------------------------------------------------------------------------------------


def evaluate_boxes(
    boxes_xywh: np.ndarray, true_xywh: np.ndarray, image_sizes: np.ndarray, split: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare boxes, and boxes that need no method, with the true ones.

    Args:
        boxes_xywh: (N, 4); NaN where no box was found: the whole image serves there.
        true_xywh: (N, 4); NaN where there is none: such an image is left out.
        image_sizes: (N, 2) width height.
        split: (N,) "train", "val" or "test"; val counts as train.

    Returns:
        method -> split -> what `score_boxes` returns. A split without images is left out.
    """
    parts = split_rows(split, ~np.isnan(true_xywh[:, 0]))
    methods = {
        "boxes": boxes_xywh,
        "whole_image": whole_image_boxes(image_sizes),
        "center": center_boxes(image_sizes),
        "median_train": median_boxes(true_xywh, image_sizes, parts.get("train", [])),
    }
    return {
        method: {name: score_boxes(boxes[rows], true_xywh[rows], image_sizes[rows]) for name, rows in parts.items()}
        for method, boxes in methods.items()
    }


def split_rows(split: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of training (val with it) and test images that are ``known`` (N,) bool, where there are any."""
    rows = {name: np.flatnonzero(np.isin(split, members) & known) for name, members in SPLITS.items()}
    return {name: some for name, some in rows.items() if len(some)}


def score_boxes(boxes_xywh: np.ndarray, true_xywh: np.ndarray, image_sizes: np.ndarray) -> dict[str, Any]:
    """Return the figures of one method on some images; arrays as in `evaluate_boxes`."""
    boxes = fill_missing(boxes_xywh, image_sizes)
    ious = iou(boxes, true_xywh)
    return {
        "mean_iou": float(ious.mean()),
        "coverage": float(coverage(boxes, true_xywh).mean()),
        "iou_at": {str(level): float((ious >= level).mean()) for level in IOU_LEVELS},  # share with at least this IoU
        "n": len(ious),
        "n_without_box": int(np.isnan(boxes_xywh[:, 0]).sum()),
    }


def median_boxes(true_xywh: np.ndarray, image_sizes: np.ndarray, train: Sequence[int]) -> np.ndarray:
    """Return for each image (N, 4) the median of the boxes in the rows ``train``: the same shares of every image.

    The edges left, top, right, bottom are taken as shares of the image's sides, and the median of each is taken by
    itself. Without training images the centred box stands in.
    """
    if not len(train):
        return center_boxes(image_sizes)
    near = np.median(true_xywh[train, :2] / image_sizes[train], axis=0)
    far = np.median((true_xywh[train, :2] + true_xywh[train, 2:]) / image_sizes[train], axis=0)
    return np.concatenate([near * image_sizes, (far - near) * image_sizes], axis=1)


# --- the files ----------------------------------------------------------------------------------------------------


def report_table(scores: dict[str, Any]) -> str:
    """Return the figures of `evaluate_boxes` as a Markdown table, shares in per cent."""
    if not scores["boxes"]:
        return "The data set has no true boxes to compare these boxes with."
    heads = ["box", "split", "n", "none found", "mean IoU", "coverage", *(f"IoU ≥ {level}" for level in IOU_LEVELS)]
    rows = []
    for split in SPLITS:
        for method, name in METHOD_NAMES.items():
            if score := scores[method].get(split):
                shares = [f"{100 * share:.1f}%" for share in score["iou_at"].values()]
                means = f"{score['mean_iou']:.3f}", f"{score['coverage']:.3f}"
                rows.append([name, split, score["n"], score["n_without_box"], *means, *shares])
    return markdown_table(heads, rows)


def report_boxes(
    out: Path,
    data: DataSet,
    boxes_xywh: np.ndarray,
    *,
    seconds: dict[str, float],
    errors: Mapping[int, str],
    maps: Mapping[int, np.ndarray] | None = None,
    **details: Any,
) -> None:
    """Print the evaluation of boxes; write STEM.eval.json, the table STEM.eval.md, a contact sheet, errors.txt.

    Args:
        out: the box JSON, beside which all lies.
        boxes_xywh: (N, 4), NaN where no box was found: the whole image serves there.
        errors: image id -> why the image failed; such images have no box.
        maps: image id -> attention map, drawn over the images of the contact sheet.
        **details: what else the evaluation file keeps.
    """
    scores, seconds = evaluate_boxes(boxes_xywh, data.boxes, data.image_sizes, data.split), dict(seconds)
    with timed(seconds, "contact_sheet"):
        filled = fill_missing(boxes_xywh, data.image_sizes)
        draw_contact_sheet(out.with_suffix(".png"), data, filled, errors, maps)
    save_json(out.with_suffix(".eval.json"), scores | {"seconds": seconds, "environment": environment()} | details)
    table = report_table(scores)
    save_text(out.with_suffix(".eval.md"), table + "\n")
    save_errors(out.with_name("errors.txt"), errors)
    print(table)
    without = data.ids[np.isnan(boxes_xywh[:, 0])].tolist()
    unfound = sum(image_id not in errors for image_id in without)
    counts = f"{len(data.ids) - len(without)} boxes; no box found in {unfound} images, {len(errors)} failed"
    print(f"{out}: {counts}; seconds: {seconds}")


def save_errors(path: Path, errors: Mapping[int, str]) -> None:
    """Write errors.txt: how many images failed, then a line for each."""
    lines = [f"{len(errors)} images failed", *(f"{image_id}: {error}" for image_id, error in errors.items())]
    save_text(path, "\n".join(lines) + "\n")


def raise_if_any_failed(errors: Mapping[int, str], path: Path, command: str = "the same command again") -> None:
    """Raise UserError if images failed: after everything else was written the script ends with status 2."""
    if errors:
        remedy = f"the rest is done: mend them and run {command}"
        raise UserError(f"{len(errors)} images failed and have no box, see {path}; {remedy}")


# --- contact sheet ------------------------------------------------------------------------------------------------


def draw_contact_sheet(
    path: Path, data: DataSet, boxes_xywh: np.ndarray, failed: Collection[int], maps: Mapping[int, np.ndarray] | None
) -> None:
    """Draw images with attention (colour), box (orange) and true box (white dashes) as PNG; nothing if all failed.

    They are test images where there are any: the best, the median and the worst boxes or, where no true box is known,
    images evenly spaced over the list. Arguments as in `report_boxes`.
    """
    is_test, is_whole = data.split == "test", np.array([image_id not in failed for image_id in data.ids.tolist()])
    choices = (is_whole & is_test & data.has_box, is_whole & is_test, is_whole & data.has_box, is_whole)
    rows = next((rows for rows in map(np.flatnonzero, choices) if len(rows)), None)
    if rows is None:
        return
    ious, has_true = iou(boxes_xywh[rows], data.boxes[rows]), bool(data.has_box[rows].any())

    def panel(name: str, place: int) -> Panel:
        row, image_id = rows[place], data.ids[rows[place]].item()
        attention_map = None if maps is None else maps.get(image_id)
        title = f"image {short(image_id)}, IoU {ious[place]:.2f}" if has_true else short(image_id)
        return Panel(read_image(data.paths[row]), attention_map, boxes_xywh[row], data.boxes[row], f"{name}: {title}")

    if has_true:
        chosen = best_median_worst(ious, SHEET_COLUMNS)
    else:
        places = np.linspace(0, len(rows) - 1, min(len(rows), 3 * SHEET_COLUMNS)).astype(int).tolist()
        chosen = {f"sample {number}": part for number, part in enumerate(batched(places, SHEET_COLUMNS), 1)}
    lines = [[panel(name, place) for place in places] for name, places in chosen.items()]
    save_figure(panel_sheet(lines, "box: orange" + "; true box: white dashes" * has_true), path)


def best_median_worst(ious: np.ndarray, each: int) -> dict[str, list[int]]:
    """Return which of (N,) IoUs are the ``each`` best, those around the median, and the worst, best first."""
    order = np.argsort(-ious, kind="stable").tolist()
    middle = max(0, (len(order) - each) // 2)
    return {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}
