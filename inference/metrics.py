"""Metrics of a classifier's probabilities: accuracy, confusion, calibration, accuracy by a property of the images."""

from typing import Any

import numpy as np
import scipy

THIRDS = ("small", "medium", "large")  # of the images, by the size of something
BINS = 15  # of the calibration, as in Guo et al. (ICML 2017)
MOST_PAIRS = 10  # of confused classes


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """Return the share of right answers and its 95% interval (Wilson's), from (N,) bool."""
    count, n = int(right.sum()), len(right)
    if n == 0:
        return {"n": 0, "top1": None, "interval": None}
    interval = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
    return {"n": n, "top1": count / n, "interval": [float(interval.low), float(interval.high)]}


def top_k_accuracy(log_probs: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of images whose class is among the k most probable ones; (N, K) and (N,)."""
    k = min(k, log_probs.shape[1])
    best = np.argpartition(-log_probs, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (K, K) int64: how many images of the class of the row were taken for the class of the column."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(counts: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """Return images, recall (accuracy of the class) and precision of each class; None where nothing is counted."""
    right, rows, columns = np.diag(counts), counts.sum(1), counts.sum(0)
    return [
        {
            "class": name,
            "n": int(rows[k]),
            "recall": float(right[k] / rows[k]) if rows[k] else None,
            "precision": float(right[k] / columns[k]) if columns[k] else None,
        }
        for k, name in enumerate(class_names)
    ]


def most_confused(counts: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """Return the MOST_PAIRS pairs of classes that were confused most often, the most frequent first."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    return [
        {"class": class_names[k], "taken_for": class_names[j], "images": int(wrong[k, j]), "of": int(counts[k].sum())}
        for k, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[k, j]
    ]


def calibration(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the calibration of the largest probability (N, K) against the share of correct answers to labels (N,).

    Returns:
        expected_calibration_error (Guo et al., ICML 2017), mean_confidence, and for each of BINS bins of equal width
        over [0, 1] n, confidence and top1; a probability on an edge belongs to the bin below it.
    """
    confidence, right = np.exp(log_probs.max(1)).astype(float), log_probs.argmax(1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    n = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right)]
    means = [np.divide(one, n, out=np.zeros(BINS), where=n > 0) for one in sums]
    return {
        "expected_calibration_error": float((n * np.abs(means[0] - means[1])).sum() / len(labels)),
        "mean_confidence": float(confidence.mean()),
        "bins": [
            {"n": int(count), "confidence": float(sure) if count else None, "top1": float(share) if count else None}
            for count, sure, share in zip(n, *means, strict=True)
        ],
    }


def by_thirds(right: np.ndarray, share: np.ndarray) -> dict[str, dict[str, Any]] | None:
    """Return the accuracy on the images with the smallest, the middle and the largest share, a third each.

    Args:
        right: (N,) bool.
        share: (N,) such as that of the image's area that the object's box covers; images with NaN are left out.

    Returns:
        For each third what `accuracy` does, and its largest share; None if no share is known.
    """
    known = ~np.isnan(share)
    if not known.any():
        return None
    right, share = right[known], share[known]
    third = np.digitize(share, np.quantile(share, (1 / 3, 2 / 3)))
    groups = {name: third == number for number, name in enumerate(THIRDS)}
    return {
        name: accuracy(right[group]) | {"largest_share": float(share[group].max(initial=0))}
        for name, group in groups.items()
    }
