import numpy as np
import pytest
from scipy import stats

from inference.metrics import (
    accuracy,
    by_thirds,
    calibration,
    confusion_counts,
    most_confused,
    per_class,
    top_k_accuracy,
)


def answers(n=211, classes=7):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, classes)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), rng.integers(0, classes - 1, n)  # the last: none


def test_confusion_and_what_follows_from_it_count_every_image_once():
    log_probs, labels = answers()
    predicted = log_probs.argmax(1)
    counts = confusion_counts(labels, predicted, 7)
    for row in range(7):
        for column in range(7):
            assert counts[row, column] == ((labels == row) & (predicted == column)).sum()
    names = [f"class {k}" for k in range(7)]
    classes = per_class(counts, names)
    assert classes[2]["recall"] == pytest.approx((predicted[labels == 2] == 2).mean())
    assert classes[2]["precision"] == pytest.approx((labels[predicted == 2] == 2).mean())
    assert classes[6]["n"] == 0 and classes[6]["recall"] is None
    worst = most_confused(counts, names)
    assert worst[0]["images"] == (counts - np.diag(np.diag(counts))).max()
    assert most_confused(np.eye(3, dtype=int), names[:3]) == []


def test_top_k_counts_the_label_among_the_k_best():
    log_probs, labels = answers()
    best = np.argsort(-log_probs, axis=1)
    for k in (1, 3):
        assert top_k_accuracy(log_probs, labels, k) == pytest.approx(
            np.mean([label in row[:k] for row, label in zip(best, labels, strict=True)])
        )
    assert top_k_accuracy(log_probs, labels, 99) == 1


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    sure = np.log(np.array([[0.9, 0.1]] * 10 + [[0.62, 0.38]] * 5))
    labels = np.array([0] * 7 + [1] * 3 + [0] * 5)  # at 0.9 7 of 10 are right, at 0.62 all 5
    found = calibration(sure, labels)
    assert found["expected_calibration_error"] == pytest.approx((10 * 0.2 + 5 * 0.38) / 15)
    assert [one["n"] for one in found["bins"]] == [0] * 9 + [5, 0, 0, 0, 10, 0]
    assert found["bins"][13]["top1"] == pytest.approx(0.7) and found["bins"][0]["top1"] is None
    certain = calibration(np.array([[0.0, -np.inf]] * 3), np.zeros(3, int))
    assert certain["expected_calibration_error"] == 0


def test_accuracy_by_thirds_divides_the_images_into_thirds():
    share = np.linspace(0.01, 0.9, 31)[np.random.default_rng(1).permutation(31)]
    found = by_thirds(share > np.quantile(share, 0.5), share)
    assert sum(one["n"] for one in found.values()) == 31
    assert found["small"]["top1"] == 0 and found["large"]["top1"] == 1
    assert found["small"]["largest_share"] < found["medium"]["largest_share"] < found["large"]["largest_share"]
    known = np.where(np.arange(31) < 16, share, np.nan)
    assert sum(one["n"] for one in by_thirds(share > 0, known).values()) == 16
    assert by_thirds(share > 0, np.full(31, np.nan)) is None


def test_the_interval_holds_the_true_share_in_nineteen_of_twenty_samples():
    right = np.random.default_rng(2).random((2000, 400)) < 0.8
    inside = [low <= 0.8 <= high for low, high in (accuracy(one)["interval"] for one in right)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)
    assert accuracy(np.zeros(0, bool))["top1"] is None
    assert accuracy(right[0])["interval"][0] == pytest.approx(
        stats.binomtest(int(right[0].sum()), 400).proportion_ci(method="wilson").low
    )
