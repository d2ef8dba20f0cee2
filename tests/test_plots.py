"""figures/plots.py: fitted lines and the curves of a run."""

import numpy as np
import pytest

from figures.plots import accuracy_figure, draw_curves


def fits(groups):
    labels = [text.get_text() for text in accuracy_figure(groups, "title").legends[0].get_texts()]
    return [label for label in labels if "R² =" in label]


def points(family, *pairs):
    return [{"x": x, "top1": top1, "family": family} for x, top1 in pairs]


def test_a_line_is_fitted_as_numpy_does():
    x, y = [0.5, 0.7, 0.9, 1.0, 1.0], [0.1, 0.35, 0.4, 0.5, 0.45]
    pairs = list(zip(x, y, strict=True))
    (label,) = fits({"a": points("exact", *pairs[:2]), "b": points("exact", *pairs[2:])})
    slope, r2 = np.polyfit(x, y, 1)[0], np.corrcoef(x, y)[0, 1] ** 2
    assert label == f"exact: {100 * slope:+.1f} points per unit of maIoU, R² = {r2:.2f}, n = 5"


@pytest.mark.parametrize(
    "groups",
    [
        {"a": points("exact", (0.5, 0.1)), "b": points("exact", (0.7, 0.2), (0.7, 0.3), (0.7, 0.25))},  # 4 runs
        {"a": points("exact", *[(0.5, 0.1)] * 3), "b": points("exact", *[(0.5, 0.2)] * 3)},  # one maIoU
        {"a": points("exact, 1 epoch", *[(0.5, 0.1)] * 3), "b": points("exact, 9 epochs", *[(0.6, 0.2)] * 3)},
    ],
)
def test_no_line_through_few_runs_one_maiou_or_several_budgets(groups):
    assert fits(groups) == []


def test_a_run_has_curves_with_a_title(tmp_path):
    keys = ("train_loss", "train_top1", "loss", "top1", "ema_loss", "ema_top1", "lr", "maiou")
    draw_curves([{"epoch": n, **dict.fromkeys(keys, 0.1 * n)} for n in (1, 2)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
