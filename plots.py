"""Pictures of runs: curves over epochs, accuracy against maIoU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from utils import whole_file


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=110)


def draw_curves(records: list[dict], path: Path | str) -> None:
    """Draw loss, accuracy, and learning rate with the crops' maIoU over the epochs of a log."""
    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "." if len(epochs) < 60 else ""

    def line(axes, key, label, factor=1.0, **style):
        axes.plot(epochs, [factor * record[key] for record in records], marker=marker, label=label, **style)

    line(loss, "train_loss", "training (smoothed labels)", color="0.6")
    line(loss, "loss", "validation, model")
    line(loss, "ema_loss", "validation, EMA")
    line(accuracy, "train_top1", "training crops", 100, color="0.6")
    line(accuracy, "top1", "validation, model", 100)
    line(accuracy, "ema_top1", "validation, EMA", 100)
    line(rate, "lr", "learning rate", color="tab:green")
    rate.set_yscale("log")
    kept = rate.twinx()
    line(kept, "maiou", "maIoU of the crops", color="tab:purple", linestyle="--")
    kept.set(ylim=(0, 1.05), ylabel="maIoU (dashed)")
    for axes, name in ((loss, "cross-entropy"), (accuracy, "top-1 (%)"), (rate, "learning rate")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8)
    accuracy.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Fit y = slope x + intercept by least squares; None where x has fewer than two values.

    Returns:
        slope, intercept, r2 and the number of points n.
    """
    if len(set(x)) < 2:
        return None
    fit = stats.linregress(x, y)
    r2 = fit.rvalue**2 if np.ptp(y) > 0 else 0.0
    return {"slope": float(fit.slope), "intercept": float(fit.intercept), "r2": float(r2), "n": len(x)}


def draw_sweep(rows: list[dict], path: Path | str, title: str) -> None:
    """Draw accuracy against the maIoU of the crops really drawn, each run a point, with the fitted line.

    Args:
        rows: one a run: maiou and top1 (fractions), value (of the swept key; negative THR is RandomResizedCrop).
        path: the PNG to write.
        title: over the picture.
    """
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    plain = [row for row in rows if row["value"] < 0]
    held = [row for row in rows if row["value"] >= 0]
    for some, label, style in ((held, "held to the boxes", "o"), (plain, "RandomResizedCrop", "s")):
        axes.plot([r["maiou"] for r in some], [100 * r["top1"] for r in some], style, alpha=0.7, label=label)
    fit = fit_line([row["maiou"] for row in held], [row["top1"] for row in held])
    if fit:
        x = np.array([min(row["maiou"] for row in held), max(row["maiou"] for row in held)])
        label = f"{100 * fit['slope']:+.1f} points per unit of maIoU, R² = {fit['r2']:.2f}, n = {fit['n']}"
        axes.plot(x, 100 * (fit["slope"] * x + fit["intercept"]), "k--", label=label)
    axes.set(xlabel="mean asymmetric IoU of the training crops", ylabel="test top-1 (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
