"""Trained classifiers on a labelled split of a data set: their figures, their comparison, the report."""

import csv
import io
from collections.abc import Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.paired_tests import compare
from figures.plots import save_figure
from figures.probabilities import calibration_figure, confusion_figure
from inference.classifier import Classifier
from inference.metrics import (
    accuracy,
    by_size,
    calibration,
    confusion_counts,
    most_confused,
    per_class,
    top_k_accuracy,
)
from jobs.loader import build_loader
from localized_crops.boxes import coverage, whole_image_boxes
from localized_crops.files import UserError, save_json, save_text
from readers.data_set import DataSet
from training.batches import ViewImages
from training.train_data import view_boxes

WORTH_A_WORKER = 500  # images: fewer are read sooner than spawn workers start, some seconds
MOST_IN_TABLE = 30  # classes, the worst first


class Evaluated(NamedTuple):
    """One classifier on the images of a split."""

    classifier: Classifier
    labels: np.ndarray  # (N,)
    log_probs: dict[str, np.ndarray]  # view -> (N, K)

    def right(self, view: str) -> np.ndarray:
        """Return (N,) bool: which images are classified rightly in a view."""
        return self.log_probs[view].argmax(1) == self.labels


def evaluate(
    classifier: Classifier, data: DataSet, rows: np.ndarray, *, batch_size: int, num_workers: int
) -> Evaluated:
    """Classify the images of some rows of a data set in every view.

    Args:
        classifier: its config's ``eval_box`` names the boxes for the views that look at one.
        data: with labels.
        rows: which of its images.
        batch_size: images that go through the network together.
        num_workers: processes that decode.
    """
    if classifier.class_names != data.class_names:
        pairs = zip_longest(classifier.class_names, data.class_names)
        difference = next(f"{known} there, {given} here" for known, given in pairs if known != given)
        raise UserError(
            f"{classifier.path}: trained on other classes than those of {data.root} (the first: {difference})"
        )
    loader = build_loader(
        ViewImages(data, rows, view_boxes(classifier.config, data), list(classifier.views.values())),
        batch_size=batch_size,
        num_workers=num_workers if len(rows) >= WORTH_A_WORKER else 0,
        pin_memory=classifier.device.type == "cuda",
    )
    bar = tqdm(loader, desc=Path(classifier.path).parent.name, unit=" batches", disable=None)
    log_probs, labels = classifier.labelled_log_probs(bar)
    return Evaluated(classifier, labels.numpy(), {view: values.numpy() for view, values in log_probs.items()})


# --- figures ------------------------------------------------------------------------------------------------------


def figures_of(one: Evaluated, shares: np.ndarray) -> dict[str, Any]:
    """Return all figures of one classifier as JSON takes them.

    Args:
        one: what it said.
        shares: (N,) of each image's area that the object's true box covers; NaN: not known.
    """
    views, known = {}, ~np.isnan(shares)
    for view, log_probs in one.log_probs.items():
        views[view] = accuracy(one.right(view)) | {
            "top5": top_k_accuracy(log_probs, one.labels, 5),
            "loss": float(-log_probs[np.arange(len(one.labels)), one.labels].mean()),
            "calibration": calibration(log_probs, one.labels),
            "by_size": by_size(one.right(view)[known], shares[known]) if known.any() else None,
        }
    names, log_probs = one.classifier.class_names, one.log_probs[one.classifier.answer]
    counts = confusion_counts(one.labels, log_probs.argmax(1), len(names))
    return {
        "weights": one.classifier.weights,
        "answer": one.classifier.answer,
        "views": views,
        "per_class": per_class(counts, names),
        "most_confused": most_confused(counts, names),
    }


def comparisons(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return McNemar's paired test of every two classifiers, on the answers of both."""
    pairs = []
    for a, b in combinations(evaluated, 2):
        result = compare(a.right(a.classifier.answer)[None], b.right(b.classifier.answer)[None])
        about = {
            key: getattr(result, key) for key in ("difference", "only_a", "only_b", "p_images", "detectable_images")
        }
        pairs.append({"a": a.classifier.path, "b": b.classifier.path} | about)
    return pairs


def object_shares(data: DataSet, rows: np.ndarray) -> np.ndarray:
    """Return the share of the image's area that each true box covers, (N,); NaN where an image has none."""
    return coverage(data.boxes[rows], whole_image_boxes(data.image_sizes[rows]))


# --- what is written ----------------------------------------------------------------------------------------------


def write_report(
    folder: Path, evaluated: Sequence[Evaluated], data: DataSet, rows: np.ndarray, about: dict[str, Any]
) -> str:
    """Write evaluation.json, evaluation.md, predictions.csv and the pictures; return the Markdown's first table.

    Args:
        folder: exists.
        evaluated: the classifiers, all on the same ``rows`` of ``data``.
        data: with labels.
        rows: which of its images.
        about: what else evaluation.json tells.
    """
    shares = object_shares(data, rows)
    found = {one.classifier.path: figures_of(one, shares) for one in evaluated}
    pairs = comparisons(evaluated)
    header = {"kind": "localized-crops evaluation", "version": 1, "images": len(rows), "root": str(data.root)}
    save_json(folder / "evaluation.json", header | about | {"checkpoints": found, "comparisons": pairs})
    parts = [overview_table(found, evaluated), pairs_table(pairs), size_table(found), class_tables(found)]
    title = f"# {data.root}, split {about['split']}: {len(rows)} images, {len(data.class_names)} classes\n"
    save_text(folder / "evaluation.md", "\n".join([title, *(part for part in parts if part)]))
    save_text(folder / "predictions.csv", predictions_csv(evaluated, data, rows))
    for number, one in enumerate(evaluated):
        draw(one, found[one.classifier.path], folder, f"_{number}" if len(evaluated) > 1 else "")
    return "\n".join(parts[:2])


def draw(one: Evaluated, figures: dict[str, Any], folder: Path, suffix: str) -> None:
    """Draw the confusion matrix and the calibration of a classifier's answers."""
    names, answer = one.classifier.class_names, one.classifier.answer
    counts = confusion_counts(one.labels, one.log_probs[answer].argmax(1), len(names))
    title = f"{one.classifier.path}, view {answer}"
    save_figure(confusion_figure(counts, names, title), folder / f"confusion{suffix}.png")
    save_figure(calibration_figure(figures["views"][answer]["calibration"], title), folder / f"calibration{suffix}.png")


def predictions_csv(evaluated: Sequence[Evaluated], data: DataSet, rows: np.ndarray) -> str:
    """Return a table with a row for each checkpoint, view and image."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["checkpoint", "view", "path", "label", "predicted", "probability", "probability_of_label"])
    for one in evaluated:
        names = one.classifier.class_names
        for view, log_probs in one.log_probs.items():
            for row, label, values in zip(rows, one.labels, np.exp(log_probs), strict=True):
                best = values.argmax()
                shown = [data.paths[row], names[label], names[best], f"{values[best]:.4f}", f"{values[label]:.4f}"]
                table.writerow([one.classifier.path, view, *shown])
    return text.getvalue()


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def percent(value: float | None) -> str:
    """Return a fraction per cent with one digit; n/a for None."""
    return "n/a" if value is None else f"{100 * value:.1f}"


def overview_table(found: dict[str, Any], evaluated: Sequence[Evaluated]) -> str:
    """Return the figures of every checkpoint in every view."""
    oracle = {one.classifier.path for one in evaluated if one.classifier.config["eval_box"] == "gt"}
    lines = []
    for path, one in found.items():
        for view, value in one["views"].items():
            note = " (oracle: true boxes)" if path in oracle and view.startswith(("box", "average")) else ""
            low, high = value["interval"]
            error = value["calibration"]["expected_calibration_error"]
            top1 = f"{percent(value['top1'])} [{percent(low)}, {percent(high)}]"
            shown = [top1, percent(value["top5"]), f"{value['loss']:.3f}", percent(error)]
            lines.append([f"{path} ({one['weights']})", view + note, *shown])
    heads = [
        "checkpoint (weights)",
        "view",
        "top-1 [95%] in %",
        "top-5 in %",
        "cross-entropy",
        "calibration error in %",
    ]
    return table(heads, lines)


def pairs_table(pairs: list[dict[str, Any]]) -> str:
    """Return the paired tests; nothing where there is one checkpoint."""
    if not pairs:
        return ""
    lines = [
        [
            *(one["a"], one["b"], f"{100 * one['difference']:+.1f}", str(one["only_a"]), str(one["only_b"])),
            *(f"{one['p_images']:.3g}", f"{100 * one['detectable_images']:.1f}"),
        ]
        for one in pairs
    ]
    detectable = "detectable from, in points, at 80% power"
    return table(["a", "b", "a - b in points", "only a right", "only b right", "p (McNemar)", detectable], lines)


def size_table(found: dict[str, Any]) -> str:
    """Return the accuracy by the size of the object; nothing where boxes are not known."""
    lines, heads = [], []
    for path, one in found.items():
        for view, value in one["views"].items():
            if value["by_size"] is not None:
                thirds = value["by_size"]
                heads = [f"{name} (to {third['largest_share']:.2f}), n {third['n']}" for name, third in thirds.items()]
                lines.append([path, view, *(percent(third["top1"]) for third in thirds.values())])
    if not lines:
        return ""
    about = "Top-1 in % by the share of the image that the object's true box covers:\n\n"
    return about + table(["checkpoint", "view", *heads], lines)


def class_tables(found: dict[str, Any]) -> str:
    """Return for each checkpoint the classes with the lowest accuracy, and which are taken for which."""
    parts = []
    for path, one in found.items():
        known = sorted((c for c in one["per_class"] if c["n"]), key=lambda c: c["recall"])[:MOST_IN_TABLE]
        lines = [[c["class"], str(c["n"]), percent(c["recall"]), percent(c["precision"])] for c in known]
        parts += [f"## {path}, view {one['answer']}, the hardest {len(known)} classes\n"]
        parts += [table(["class", "images", "right in % (recall)", "precision in %"], lines)]
        wrong = [[c["class"], c["taken_for"], f"{c['images']} of {c['of']}"] for c in one["most_confused"]]
        parts += [table(["class", "taken for", "images"], wrong)] if wrong else []
    return "\n".join(parts)
