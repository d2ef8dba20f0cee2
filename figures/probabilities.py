"""Pictures of a classifier's answers: the confusion matrix and the calibration."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

MOST_NAMES, MOST_COUNTS = 60, 20  # classes whose names and counts can still be read


def confusion_figure(counts: np.ndarray, class_names: list[str], title: str) -> Figure:
    """Return a figure of a confusion matrix (K, K), rows true classes, coloured by the share of the row's class."""
    side = float(np.clip(0.28 * len(counts) + 3, 5, 20))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes, total = figure.subplots(), counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="share of the true class's images (%)", shrink=0.8)
    axes.set(title=title, xlabel="answer", ylabel="true class")
    if len(counts) <= MOST_NAMES:
        axes.set_xticks(range(len(counts)), class_names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(counts)), class_names, fontsize=7)
    if len(counts) <= MOST_COUNTS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    return figure


def calibration_figure(calibration: dict[str, Any], title: str) -> Figure:
    """Return a figure of accuracy against confidence, and of how many images have which.

    ``calibration`` is what ``inference.metrics.calibration`` returns.
    """
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = calibration["bins"]
    edges = np.linspace(0, 1, len(bins) + 1)
    top1 = [100 * (values["top1"] or 0) for values in bins]
    above.bar(edges[:-1], top1, 1 / len(bins), align="edge", edgecolor="white", label="images right")
    above.plot([0, 1], [0, 100], "k--", linewidth=1, label="perfect calibration")
    error, sure = calibration["expected_calibration_error"], calibration["mean_confidence"]
    above.set_title(f"{title}\nexpected calibration error {error:.1%}, mean confidence {sure:.1%}", fontsize=9)
    above.set(ylabel="images right (%)", ylim=(0, 100))
    above.legend(fontsize=8, loc="upper left")
    below.bar(edges[:-1], [values["n"] for values in bins], 1 / len(bins), align="edge", color="0.6", edgecolor="white")
    below.set(xlabel="probability of the answer", ylabel="images", xlim=(0, 1))
    return figure
