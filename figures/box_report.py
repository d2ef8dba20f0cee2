"""How good boxes are: mean IoU, coverage and shares, always beside boxes that need no method, and a contact sheet."""

from collections.abc import Collection, Mapping
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
    boxes_xywh: np.ndarray, found: np.ndarray, true_xywh: np.ndarray, image_sizes: np.ndarray, split: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare boxes, and boxes that need no method, with the true ones.

    Args:
        boxes_xywh: (N, 4), the whole image where no box was found.
        found: (N,) bool, whether a box was found.
        true_xywh: (N, 4); NaN where there is none: such an image is left out.
        image_sizes: (N, 2) width height.
        split: (N,) "train", "val" or "test"; val counts as train.

    Returns:
        method -> split -> mean_iou, coverage (mean asymmetric IoU), iou_at {"0.3", "0.5", "0.7"} (share of the boxes
        with at least this IoU), n, n_without_box. A split without images is left out.
    """
    known = ~np.isnan(true_xywh[:, 0])
    is_train = np.isin(split, SPLITS["train"]) & known
    everywhere = np.ones(len(split), dtype=bool)
    methods = {
        "boxes": (boxes_xywh, found),
        "whole_image": (whole_image_boxes(image_sizes), everywhere),
        "center": (center_boxes(image_sizes), everywhere),
        "median_train": (median_boxes(true_xywh, image_sizes, is_train), everywhere),
    }
    parts = split_rows(split, known)
    return {
        method: {name: score_boxes(boxes[rows], true_xywh[rows], has_box[rows]) for name, rows in parts.items()}
        for method, (boxes, has_box) in methods.items()
    }


def split_rows(split: np.ndarray, known: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of training (val with it) and test images that are ``known`` (N,) bool, where there are any."""
    rows = {name: np.flatnonzero(np.isin(split, members) & known) for name, members in SPLITS.items()}
    return {name: some for name, some in rows.items() if len(some)}


def score_boxes(boxes_xywh: np.ndarray, true_xywh: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Return the figures of one method on one split; arrays as in `evaluate_boxes`."""
    ious = iou(boxes_xywh, true_xywh)
    return {
        "mean_iou": float(ious.mean()),
        "coverage": float(coverage(boxes_xywh, true_xywh).mean()),
        "iou_at": {str(level): float((ious >= level).mean()) for level in IOU_LEVELS},
        "n": len(ious),
        "n_without_box": int((~found).sum()),
    }


def median_boxes(true_xywh: np.ndarray, image_sizes: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Return for each image (N, 4) the median of the training images' boxes: the same shares of every image.

    The edges left, top, right, bottom are taken as shares of the image's sides, and the median of each is taken by
    itself. Without training images the centred box stands in.
    """
    if not is_train.any():
        return center_boxes(image_sizes)
    sizes = np.asarray(image_sizes, dtype=np.float64)
    near, far = true_xywh[:, :2] / sizes, (true_xywh[:, :2] + true_xywh[:, 2:]) / sizes
    near, far = np.median(near[is_train], axis=0), np.median(far[is_train], axis=0)
    return np.concatenate([near * sizes, (far - near) * sizes], axis=1)


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
    found, boxes_xywh = ~np.isnan(boxes_xywh[:, 0]), fill_missing(boxes_xywh, data.image_sizes)
    scores = evaluate_boxes(boxes_xywh, found, data.boxes, data.image_sizes, data.split)
    seconds = dict(seconds)
    with timed(seconds, "contact_sheet"):
        draw_contact_sheet(contact_panels(data, boxes_xywh, errors, maps), out.with_suffix(".png"))
    save_json(out.with_suffix(".eval.json"), scores | {"seconds": seconds, "environment": environment()} | details)
    table = report_table(scores)
    save_text(out.with_suffix(".eval.md"), table + "\n")
    save_errors(out.with_name("errors.txt"), errors)
    print(table)
    unfound = sum(i not in errors for i in data.ids[~found].tolist())
    print(
        f"{out}: {int(found.sum())} boxes; no box found in {unfound} images, {len(errors)} failed; seconds: {seconds}"
    )


def save_errors(path: Path, errors: Mapping[int, str]) -> None:
    """Write errors.txt: how many images failed, then a line for each."""
    lines = [f"{len(errors)} images failed", *(f"{image_id}: {error}" for image_id, error in errors.items())]
    save_text(path, "\n".join(lines) + "\n")


def raise_if_any_failed(errors: Mapping[int, str], path: Path, command: str = "the same command again") -> None:
    """Raise UserError if images failed: after everything else was written the script ends with status 2."""
    if errors:
        raise UserError(
            f"{len(errors)} images failed and have no box, see {path}; the rest is done: mend them and run {command}"
        )


# --- contact sheet ------------------------------------------------------------------------------------------------


def contact_panels(
    data: DataSet, boxes_xywh: np.ndarray, failed: Collection[int], maps: Mapping[int, np.ndarray] | None
) -> dict[str, list[Panel]]:
    """Return the panels of the contact sheet, of test images where there are any; arguments as in `report_boxes`."""
    shown = data.split == "test" if (data.split == "test").any() else np.ones(len(data.ids), dtype=bool)
    shown &= [image_id not in failed for image_id in data.ids.tolist()]
    rows = np.flatnonzero(shown & data.has_box if data.has_box.any() else shown)
    ious = iou(boxes_xywh[rows], data.boxes[rows])

    def panel(place: int) -> Panel:
        row, image_id = rows[place], data.ids[rows[place]].item()
        attention_map = None if maps is None else maps.get(image_id)
        true = data.boxes[row] if data.has_box[row] else None
        title = short(image_id) if true is None else f"image {short(image_id)}, IoU {ious[place]:.2f}"
        return Panel(read_image(data.paths[row]), attention_map, boxes_xywh[row], true, title)

    if np.isnan(ious).all():  # no true boxes: images evenly spaced over the list
        places = np.linspace(0, len(rows) - 1, min(len(rows), 3 * SHEET_COLUMNS)).astype(int).tolist()
        chosen = {f"sample {number}": part for number, part in enumerate(batched(places, SHEET_COLUMNS), 1)}
    else:
        chosen = best_median_worst(ious, SHEET_COLUMNS)
    return {name: [panel(place) for place in places] for name, places in chosen.items()}


def best_median_worst(ious: np.ndarray, each: int) -> dict[str, list[int]]:
    """Return which of (N,) IoUs are the ``each`` best, those around the median, and the worst, best first."""
    order = np.argsort(-ious, kind="stable").tolist()
    middle = max(0, (len(order) - each) // 2)
    return {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}


def draw_contact_sheet(rows: dict[str, list[Panel]], path: Path | str) -> None:
    """Draw a row of panels per name, with attention (colour), box (orange) and true box (white dashes), as PNG."""
    lines = [[panel._replace(title=f"{name}: {panel.title}") for panel in panels] for name, panels in rows.items()]
    has_true = any(panel.true_xywh is not None for line in lines for panel in line)
    save_figure(panel_sheet(lines, "box: orange" + "; true box: white dashes" * has_true), path)
