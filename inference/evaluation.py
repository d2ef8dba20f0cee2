"""Trained classifiers on a labelled split of a data set: their figures, their comparison, the report."""

import csv
import io
from collections.abc import Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.grid import group_by_settings, settings_key
from experiments.paired_tests import compare
from experiments.table_report import Column, difference_table, top1_of
from figures.plots import save_figure
from figures.probabilities import calibration_figure, confusion_figure
from inference import metrics
from inference.classifier import Classifier
from jobs.loader import build_loader, workers_for
from localized_crops.boxes import coverage, iou, whole_image_boxes
from localized_crops.files import UserError, save_json, save_text
from readers.data_set import DataSet
from training.batches import ViewImages
from training.evaluation import AVERAGE, average
from training.train_data import view_boxes
from utils import markdown_table

MOST_IN_TABLE = 30  # classes, the worst first


class Evaluated(NamedTuple):
    """One classifier on the images of a split."""

    classifier: Classifier
    labels: np.ndarray  # (N,)
    log_probs: dict[str, np.ndarray]  # view -> (N, K)
    correct: dict[str, np.ndarray]  # view -> (N,) bool
    box_iou: np.ndarray  # (N,) of the box that views look at with the true box; NaN where one of the two is not known

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.classifier.trained["seed"]

    @property
    def confusion(self) -> np.ndarray:
        """How many images of the class of the row were taken for the class of the column, (K, K)."""
        predicted = self.log_probs[self.classifier.answer].argmax(1)
        return metrics.confusion_counts(self.labels, predicted, len(self.classifier.class_names))


def evaluate(classifier: Classifier, data: DataSet, rows: np.ndarray) -> Evaluated:
    """Classify the images of some rows of a data set in every view, as the config of the classifier says."""
    if classifier.class_names != data.class_names:
        pairs = zip_longest(classifier.class_names, data.class_names)
        difference = next(f"{known} there, {given} here" for known, given in pairs if known != given)
        raise UserError(
            f"{classifier.path}: trained on other classes than those of {data.root} (the first: {difference})"
        )
    config, boxes = classifier.config, view_boxes(classifier.config, data)
    averages = {name: name.split("+") for name in config["evaluate"]["averages"]}
    for name, views in averages.items():
        if unknown := set(views) - set(classifier.views):
            known = ", ".join(classifier.views)
            raise UserError(f"evaluate.averages={name}: {min(unknown)} is no view of {classifier.path}, it has {known}")
    images, workers = ViewImages(data, rows, boxes, list(classifier.views.values())), workers_for(len(rows), config)
    pin, batch_size = classifier.device.type == "cuda", config["eval"]["batch_size"]
    loader = build_loader(images, batch_size=batch_size, num_workers=workers, pin_memory=pin)
    bar = tqdm(loader, desc=Path(classifier.path).parent.name, unit=" batches", disable=None)
    log_probs, labels = classifier.labelled_log_probs(bar)
    for name, views in averages.items():
        log_probs[name] = average(log_probs[view] for view in views)
    log_probs, labels = {view: values.numpy() for view, values in log_probs.items()}, labels.numpy()
    correct = {view: values.argmax(1) == labels for view, values in log_probs.items()}
    finds_boxes = config["eval_box"] not in (None, "gt")
    box_iou = iou(boxes[rows], data.boxes[rows]) if finds_boxes else np.full(len(rows), np.nan)
    return Evaluated(classifier, labels, log_probs, correct, box_iou)


# --- figures ------------------------------------------------------------------------------------------------------


def figures_of(evaluated: Evaluated, shares: np.ndarray) -> dict[str, Any]:
    """Return all figures of one classifier as JSON takes them.

    ``shares``: (N,) of each image's area that the object's true box covers; NaN: not known.
    """
    views, labels = {}, evaluated.labels
    for view, log_probs in evaluated.log_probs.items():
        correct = evaluated.correct[view]
        views[view] = metrics.accuracy(correct) | {
            "top5": metrics.top_k_accuracy(log_probs, labels, 5),
            "loss": float(-log_probs[np.arange(len(labels)), labels].mean()),
            "calibration": metrics.calibration(log_probs, labels),
            "by_size": metrics.by_thirds(correct, shares),
            "by_box_iou": metrics.by_thirds(correct, evaluated.box_iou),
        }
    names = evaluated.classifier.class_names
    return {
        "weights": evaluated.classifier.weights,
        "answer": evaluated.classifier.answer,
        "views": views,
        "per_class": metrics.per_class(evaluated.confusion, names),
        "most_confused": metrics.most_confused(evaluated.confusion, names),
    }


def comparisons(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return McNemar's paired test of every two classifiers, on the answers of both."""
    pairs = []
    for a, b in combinations(evaluated, 2):
        result = compare(*(one.correct[one.classifier.answer][None] for one in (a, b)))._asdict()
        tested = {key: result[key] for key in ("difference", "only_a", "only_b", "p_images", "detectable_images")}
        pairs.append({"a": a.classifier.path, "b": b.classifier.path} | tested)
    return pairs


# --- what is written ----------------------------------------------------------------------------------------------


def write_report(
    folder: Path, evaluated: Sequence[Evaluated], data: DataSet, rows: np.ndarray, header: dict[str, Any]
) -> str:
    """Write evaluation.json, evaluation.md, predictions.csv and the pictures; return the Markdown's first table.

    Args:
        folder: exists.
        evaluated: the classifiers, all on the same ``rows`` of ``data``.
        header: split, and whatever else evaluation.json holds of the evaluation.
    """
    shares = coverage(data.boxes[rows], whole_image_boxes(data.image_sizes[rows]))
    figures = {one.classifier.path: figures_of(one, shares) for one in evaluated}
    pairs = comparisons(evaluated)
    header = {"kind": "localized-crops evaluation", "version": 1, "images": len(rows), "root": str(data.root)} | header
    save_json(folder / "evaluation.json", header | {"checkpoints": figures, "comparisons": pairs})
    parts = [
        overview_table(figures, evaluated),
        seeds_tables(evaluated) or pairs_table(pairs),
        thirds_table(figures, "by_size", "share of the image that the object's true box covers"),
        thirds_table(figures, "by_box_iou", "IoU of the box that views look at with the true box"),
        class_tables(figures),
    ]
    title = f"# {data.root}, split {header['split']}: {len(rows)} images, {len(data.class_names)} classes"
    save_text(folder / "evaluation.md", "\n\n".join([title, *filter(None, parts)]) + "\n")
    save_text(folder / "predictions.csv", predictions_csv(evaluated, data, rows))
    for number, one in enumerate(evaluated):
        name, answer = one.classifier.path, one.classifier.answer
        title, suffix = f"{name}, view {answer}", f"_{number}.png" if len(evaluated) > 1 else ".png"
        confusion = confusion_figure(one.confusion, data.class_names, title)
        save_figure(confusion, folder / f"confusion{suffix}")
        reliability = calibration_figure(figures[name]["views"][answer]["calibration"], title)
        save_figure(reliability, folder / f"calibration{suffix}")
    return "\n\n".join(filter(None, parts[:2]))


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


def percent(value: float | None) -> str:
    """Return a fraction per cent with one digit; n/a for None."""
    return "n/a" if value is None else f"{100 * value:.1f}"


def view_title(one: Evaluated, view: str) -> str:
    """Return the name of a view, marked if it, or a view that it is the average of, looks at true boxes."""
    sees_box = any(part.startswith(("box", AVERAGE)) for part in view.split("+"))
    return view + " (oracle: true boxes)" * (sees_box and one.classifier.config["eval_box"] == "gt")


def overview_table(figures: dict[str, Any], evaluated: Sequence[Evaluated]) -> str:
    """Return the figures of every checkpoint in every view."""
    lines = []
    for one in evaluated:
        path = one.classifier.path
        for view, value in figures[path]["views"].items():
            top1, low, high = map(percent, (value["top1"], *value["interval"]))
            line = [f"{path} ({figures[path]['weights']})", view_title(one, view), f"{top1} [{low}, {high}]"]
            error = percent(value["calibration"]["expected_calibration_error"])
            lines.append([*line, percent(value["top5"]), f"{value['loss']:.3f}", error])
    heads = ["checkpoint (weights)", "view", "top-1 [95%] in %", "top-5 in %", "cross-entropy"]
    return markdown_table([*heads, "calibration error in %"], lines)


def pairs_table(pairs: list[dict[str, Any]]) -> str:
    """Return the paired tests; nothing where there is one checkpoint."""
    if not pairs:
        return ""
    lines = []
    for pair in pairs:
        counts = pair["a"], pair["b"], f"{100 * pair['difference']:+.1f}", pair["only_a"], pair["only_b"]
        lines.append([*counts, f"{pair['p_images']:.3g}", f"{100 * pair['detectable_images']:.1f}"])
    detectable = "detectable from, in points, at 80% power"
    heads = ["a", "b", "a - b in points", "only a right", "only b right", "p (McNemar)", detectable]
    return markdown_table(heads, lines)


def seeds_tables(evaluated: Sequence[Evaluated]) -> str:
    """Return the accuracy over trainings that differ in their seed alone, a row for each, with paired tests.

    The first such row is the control: in the same view, and in the best of its views that look at no box. A view that
    some training lacks is left out. Nothing where every training has other settings, or two checkpoints are of one
    training.
    """
    by_path = {Path(one.classifier.path).parent: one for one in evaluated}
    groups = group_by_settings({path: settings_key(one.classifier.trained) for path, one in by_path.items()})
    if len(groups) == len(evaluated) or len(by_path) < len(evaluated):
        return ""
    rows = {label: [by_path[path] for path in paths] for label, paths in groups.items()}
    name, control = next(iter(rows.items()))
    views = [view for view in control[0].correct if all(view in runs[0].correct for runs in rows.values())]
    if not views:
        return ""
    heads = {view: max((view_title(one, view) for one in evaluated), key=len) for view in views}  # marked if one's is
    plain = [view for view in views if "box" not in view and "+" not in view and view != AVERAGE]
    best = max(plain or views, key=lambda view: np.mean(top1_of(control, view)))
    parts = []
    for title, against in (("the same view", None), (f"view {best}, its best one without a box on these images", best)):
        columns = {head: Column(view, against or view) for view, head in heads.items()}
        parts += [f"Top-1 in %, mean ± standard deviation over seeds; difference to {name} in {title}:"]
        parts += [difference_table("trainings", rows, name, columns)]
    return "\n\n".join(parts)


def thirds_table(figures: dict[str, Any], key: str, of: str) -> str:
    """Return the accuracy by thirds of the images, which are the figures' ``key`` and told as ``of``; or nothing."""
    tables = {}  # heads -> lines: checkpoints that look at other boxes have other thirds
    for path, checkpoint in figures.items():
        for view, value in checkpoint["views"].items():
            if (thirds := value[key]) is not None:
                heads = (f"{name} (to {third['largest_share']:.2f}), n {third['n']}" for name, third in thirds.items())
                line = [path, view, *(percent(third["top1"]) for third in thirds.values())]
                tables.setdefault(tuple(heads), []).append(line)
    if not tables:
        return ""
    parts = [markdown_table(["checkpoint", "view", *heads], lines) for heads, lines in tables.items()]
    return "\n\n".join([f"Top-1 in % by the {of}, thirds of the images:", *parts])


def class_tables(figures: dict[str, Any]) -> str:
    """Return for each checkpoint the classes with the lowest accuracy, and which are taken for which."""
    parts = []
    for path, checkpoint in figures.items():
        hardest = sorted((c for c in checkpoint["per_class"] if c["n"]), key=lambda c: c["recall"])[:MOST_IN_TABLE]
        lines = [[c["class"], c["n"], percent(c["recall"]), percent(c["precision"])] for c in hardest]
        parts += [f"## {path}, view {checkpoint['answer']}, the hardest {len(hardest)} classes"]
        parts += [markdown_table(["class", "images", "right in % (recall)", "precision in %"], lines)]
        wrong = [[c["class"], c["taken_for"], f"{c['images']} of {c['of']}"] for c in checkpoint["most_confused"]]
        parts += [markdown_table(["class", "taken for", "images"], wrong)] if wrong else []
    return "\n\n".join(parts)
