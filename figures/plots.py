"""Pictures: curves over epochs, accuracy against maIoU, histograms, images with boxes, attention maps and masks."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL.Image
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from localized_crops.files import UserError, check_output, whole_file

OUTLINE = [withStroke(linewidth=2.8, foreground="#000a")]  # so that a line is seen on bright images too
TRUE_BOX = {"edgecolor": "white", "linewidth": 1.6, "linestyle": "--", "path_effects": OUTLINE}
FOUND_BOX = {"edgecolor": "orange", "linewidth": 1.6}
# a title on an image
NOTE = {"fontsize": 7, "color": "white", "bbox": {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}}
CELL = 1.3  # inches, both sides of a panel in a picture of images
LONGEST_TITLE = 18  # characters of an image id
BINS = 50  # of a histogram over [0, 1]
MARKERS, LINE_STYLES = "soD^vP", ("--", ":", "-.")  # of families of crops
COLOURS = matplotlib.colormaps["tab20"]
LEGEND_COLUMNS = 2  # folder names are long
LEAST_POINTS = 5  # runs; a line is fitted through no fewer
MADE_BY = "localized-crops"  # in the metadata of every picture, by which its files are recognised
MAIOU = "mean asymmetric IoU of the training crops"


def check_picture(path: Path | str) -> None:
    """Make sure that a picture can be written later, and that it will replace nothing but a picture of this program.

    Raises:
        UserError: if its name is not that of a PNG, something else lies there, or it cannot be written.
    """
    if Path(path).suffix != ".png":
        raise UserError(f"{path}: pictures are written as .png; give such a name")
    check_output(path, MADE_BY.encode())


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png", metadata={"Software": MADE_BY})


def draw_curves(records: list[dict], path: Path | str) -> None:
    """Draw loss, accuracy, and learning rate with the crops' maIoU over the epochs of a log; titled by the folder."""
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
    figure.suptitle(f"{Path(path).resolve().parent.name}, {epochs[-1]} epochs", fontsize=10)
    save_figure(figure, path)


# --- several runs over each other ---------------------------------------------------------------------------------


def run_curves_figure(groups: dict[str, list[dict[str, np.ndarray]]], titles: dict[str, str]) -> Figure:
    """Return a figure with one curve per group of runs: the mean of its runs, with a band of a standard deviation.

    Args:
        groups: label -> logs of the runs that differ in their seed alone; a log: key -> a value per logged epoch.
        titles: key of a log -> what stands at the axis of its panel.
    """
    height = 3.6 + 0.2 * math.ceil(len(groups) / LEGEND_COLUMNS)
    figure = Figure(figsize=(4 * len(titles), height), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for number, logs in enumerate(groups.values()):
            epochs = reduce(np.intersect1d, [log["epoch"] for log in logs])
            values = np.array([log[key][np.isin(log["epoch"], epochs)] for log in logs])
            mean = values.mean(0)
            axes.plot(epochs, mean, color=f"C{number}", marker="." if len(epochs) < 60 else "")
            if len(values) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(epochs, mean - spread, mean + spread, color=f"C{number}", alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel=title)
        axes.grid(alpha=0.3)
    figure.legend(figure.axes[0].lines, list(groups), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    return figure


def accuracy_figure(
    groups: dict[str, list[dict]], title: str, x_label: str = MAIOU, ticks: Sequence[str] | None = None
) -> Figure:
    """Return a figure of accuracy against a number: the mean of each group of runs, with bars of a standard deviation.

    A line is fitted through the runs of each family that has several groups and at least LEAST_POINTS runs.

    Args:
        groups: label -> runs that differ in their seed alone: x, top1 (a fraction) and family, which names what
            a line may go through: one kind of crop, trained on one budget.
        ticks: names of x = 0, 1, ...; no line is fitted then.
    """
    figure = Figure(figsize=(8, 4.2 + 0.2 * math.ceil(len(groups) / LEGEND_COLUMNS)), layout="constrained")
    axes = figure.subplots()
    families = {}
    for number, (label, runs) in enumerate(groups.items()):
        families.setdefault(runs[0]["family"], []).append(runs)
        points = np.array([[run["x"], 100 * run["top1"]] for run in runs])
        bars = points.std(axis=0, ddof=1) if len(runs) > 1 else (0, 0)
        marker = MARKERS[list(families).index(runs[0]["family"]) % len(MARKERS)]
        style = {"color": COLOURS(number % COLOURS.N), "fmt": marker, "capsize": 3, "label": label}
        axes.errorbar(*points.mean(axis=0), xerr=bars[0], yerr=bars[1], **style)
    if ticks is None:
        _draw_fits(axes, families)
    else:
        axes.set_xticks(range(len(ticks)), ticks)
    axes.set(title=title, xlabel=x_label, ylabel="test top-1 of the EMA (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    return figure


def _draw_fits(axes: Axes, families: dict[str, list[list[dict]]]) -> None:
    """Draw the least-squares line of top1 over x through the runs of each family that has enough of them."""
    styles = cycle(LINE_STYLES)
    for family, groups in families.items():
        x, top1 = (np.array([run[key] for runs in groups for run in runs]) for key in ("x", "top1"))
        if len(groups) < 2 or len(x) < LEAST_POINTS or np.ptp(x) == 0:
            continue
        fit, ends = scipy.stats.linregress(x, 100 * top1), np.array([x.min(), x.max()])
        r2 = fit.rvalue**2 if np.ptp(top1) > 0 else 0.0
        label = f"{family}: {fit.slope:+.1f} points per unit of maIoU, R² = {r2:.2f}, n = {len(x)}"
        axes.plot(ends, fit.slope * ends + fit.intercept, next(styles), color="grey", label=label)


# --- histograms ---------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Values in [0, 1] that make one histogram."""

    label: str
    values: np.ndarray
    colour: str


def histogram_figure(rows: dict[str, dict[str, list[Sample]]], lines: dict[str, dict[str, float]]) -> Figure:
    """Return a figure of histograms over each other, in rows and columns of panels.

    Args:
        rows: name of a row -> name of a column -> samples; every row has the same columns.
        lines: name of a column -> label -> where a vertical line stands in it.
    """
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(4.6 * columns, 3.2 * len(rows)), layout="constrained")
    for line, (row, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        for axes, (column, samples) in zip(line, panels.items(), strict=True):
            _draw_histograms(axes, samples, lines.get(column, {}))
            axes.set(xlabel=column, ylabel=f"{row}: share (%)")
    return figure


def _draw_histograms(axes: Axes, samples: list[Sample], lines: dict[str, float]) -> None:
    for label, values, colour in samples:
        counts, edges = np.histogram(values, BINS, (0, 1))
        axes.stairs(100 * counts / len(values), edges, color=colour, label=f"{label}, mean {values.mean():.3f}")
    for label, place in lines.items():
        axes.axvline(place, color="black", linestyle=":", linewidth=1.2, label=label)
    axes.set(xlim=(-0.02, 1.02), yscale="log", ylim=(0.01, 130))  # down to one crop in 10,000
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


# --- images -------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One picture of an image, with what is drawn over it."""

    image: PIL.Image.Image | np.ndarray  # an array is (H, W, 3) uint8
    attention_map: np.ndarray | None = None  # (feat_h, feat_w), stretched over the image
    box_xywh: Sequence[float] | None = None  # orange; None or NaN: none, here and below
    true_xywh: Sequence[float] | None = None  # white dashes
    title: str = ""
    masks: Sequence[np.ndarray] = ()  # (H, W) bool each, small ones over large ones
    candidates_xywh: Sequence[Sequence[float]] = ()


def short(image_id: int | str) -> str:
    """Return an image id, shortened to fit over a panel: a long path keeps its end."""
    text = str(image_id)
    return text if len(text) <= LONGEST_TITLE else f"...{text[-LONGEST_TITLE:]}"


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw an image with attention, masks and boxes, without its title."""
    height, width = np.shape(panel.image)[:2]
    axes.set_axis_off()
    axes.imshow(panel.image, extent=(0, width, height, 0))
    if panel.attention_map is not None:
        overlay = np.nan_to_num(np.asarray(panel.attention_map, dtype=np.float64))
        axes.imshow(overlay, cmap="inferno", alpha=0.45, extent=(0, width, height, 0), interpolation="bilinear")
    if len(panel.masks):
        axes.imshow(paint_masks(panel.masks), extent=(0, width, height, 0), interpolation="nearest")
    candidates = enumerate(panel.candidates_xywh)
    boxes = [(box, {"edgecolor": _colour(number), "linewidth": 0.8}) for number, box in candidates]
    for box, style in (*boxes, (panel.true_xywh, TRUE_BOX), (panel.box_xywh, FOUND_BOX)):
        if box is not None and not np.isnan(box).any():
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, **style))


def paint_masks(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return (H, W, 4) colours in [0, 1], half transparent: a colour per mask (H, W) bool, the small ones on top."""
    canvas = np.zeros((*masks[0].shape, 4))
    for number, mask in enumerate(sorted(masks, key=np.sum, reverse=True)):
        canvas[mask] = (*_colour(number)[:3], 0.5)
    return canvas


def _colour(number: int) -> tuple[float, float, float, float]:
    return matplotlib.colormaps["hsv"](0.618 * number % 1)  # by the golden section: neighbours differ


def panel_sheet(lines: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Return a contact sheet: lines of panels, which may differ in length, each under its own title."""
    columns = max(map(len, lines))
    figure = Figure(figsize=(2.1 * columns, 2.2 * len(lines) + 0.4), layout="constrained")
    for axes_of_line, panels in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for axes, panel in zip_longest(axes_of_line, panels):
            axes.set_axis_off()
            if panel is not None:
                draw_panel(axes, panel)
                axes.set_title(panel.title, fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def panels_figure(groups: dict[str, list[list[Panel]]], legend: str) -> Figure:
    """Return a figure with a line per image and a group of columns per name.

    Args:
        groups: what stands over the columns -> for each image the panels that lie side by side.
        legend: under the picture.
    """
    widths = [max(len(lines[0]), 1.25) for lines in groups.values()]  # a panel by itself has room for its title
    figure = Figure(figsize=(CELL * sum(widths), CELL * len(next(iter(groups.values()))) + 0.6), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1, len(groups), width_ratios=widths))
    for part, (name, lines) in zip(parts, groups.items(), strict=True):
        part.suptitle(name, fontsize=9)
        grid = part.subplots(len(lines), len(lines[0]), squeeze=False)
        for axes, panel in zip(grid.flat, chain.from_iterable(lines), strict=True):
            draw_panel(axes, panel)
            axes.annotate(panel.title, (0, 0), (3, 3), "axes fraction", "offset points", **NOTE)
    figure.supxlabel(legend, fontsize=8)
    return figure
