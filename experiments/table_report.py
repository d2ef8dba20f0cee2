"""The report of a table: from its run folders to Markdown and a picture, with means and paired tests."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets import DataSet, read_dataset
from experiments.grid import Point, Train, crop_family, load_summary, run_grid
from experiments.paired_tests import Comparison, compare
from experiments.tables import Table
from figures.plots import MAIOU, accuracy_figure, save_figure
from localized_crops.boxes import coverage, whole_image_boxes
from localized_crops.files import load_json, save_json, save_text, user_errors
from localized_crops.image_ids import key_to_id
from utils import UNREADABLE, environment, markdown_table


class Run(NamedTuple):
    """One finished training."""

    seed: int
    thr: float
    maiou: float
    validation: float  # best top-1 on the validation images
    without_ema: float  # test top-1 of the model itself, first view
    correct: dict[str, np.ndarray]  # view -> (images,) bool: the EMA's correct answers on the test images
    family: str  # kind of crop
    ids: list  # of the test images


Rows = dict[str, list[Run]]  # name of a row -> its finished trainings


def make_table(config: dict, table: Table, name: str, seeds: range, folder: Path, train: Train) -> None:
    """Train what a table lacks, then write NAME.md, NAME.png and the numbers, NAME.json.

    ``config`` is what all trainings share; ``folder`` holds the run folders and gets the files.
    """
    run_grid(config, table_points(table, seeds, folder), train)
    blocks = write_report(table, name, seeds, folder, read_dataset(**config["dataset"]))
    if blocks:
        save_json(folder / f"{name}.json", {budget: numbers_of(rows) for budget, rows in blocks.items()})


def numbers_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return what the JSON keeps of each row."""
    return {
        row: {
            "seeds": [run.seed for run in runs],
            "maiou": [run.maiou for run in runs],
            "validation": [run.validation for run in runs],
            "top1": {view: top1_of(runs, view) for view in runs[0].correct},
        }
        for row, runs in rows.items()
    }


def table_points(table: Table, seeds: range, folder: Path) -> list[Point]:
    """Return the trainings of a table: every row's first seed before any second one."""
    return [
        Point(
            ", ".join(filter(None, [row, budget, f"seed {seed}"])),
            table.rows[row] | table.budgets[budget] | {"seed": seed},
            folder / place_of(table, budget, row, seed),
        )
        for budget in table.budgets
        for seed in seeds
        for row in table.rows
    ]


def place_of(table: Table, budget: str, row: str, seed: int) -> str:
    """Return the folder name of one training."""
    if row in table.folders:
        return f"{table.folders[row]},seed={seed}"
    short = re.sub(r"\b0\.", ".", row).replace(".", "0")  # 0.35 -> 035
    words = "".join(c if c.isalnum() else "_" for c in short)
    return f"{list(table.budgets).index(budget)}_{words}_seed_{seed}".replace("__", "_")


def write_report(
    table: Table, name: str, seeds: range, folder: Path, data: DataSet, against: str | None = None
) -> dict[str, Rows]:
    """Write NAME.md and NAME.png of the trainings that are done; return their rows by budget.

    Args:
        folder: holds the run folders, and gets the files.
        against: the key whose values are the picture's x-axis; None: the maIoU of the crops.
    """
    blocks = {}
    for budget in table.budgets:
        for row in table.rows:
            places = {seed: folder / place_of(table, budget, row, seed) for seed in seeds}
            runs = [load_run(place, seed) for seed, place in places.items() if (place / "summary.json").exists()]
            if runs:
                blocks.setdefault(budget, {})[row] = runs
    if not blocks:
        return blocks
    parts = [f"### {table.title}", ""]
    for budget, rows in blocks.items():
        control = best_by_validation(rows, table.controls)
        parts += [block_text(table, budget, rows, control), *views_text(table, rows, control)]
        parts += thirds_text(rows, control, data)
    text = "\n".join([*parts, machine_line()])
    save_text(folder / f"{name}.md", text + "\n")
    order = None if against is None else list(table.rows)
    ticks = order and [str(table.rows[row][against]) for row in order]
    save_figure(accuracy_figure(points_of(blocks, order), table.title, against or MAIOU, ticks), folder / f"{name}.png")
    print(f"\n{text}\n\nwritten to {folder / name}.md and .png")
    return blocks


def load_run(folder: Path, seed: int) -> Run:
    """Read the results of one finished training.

    Raises:
        UserError: if its files are not those of a finished training.
    """
    summary, predictions = load_summary(folder), load_json(folder / "predictions.json")
    with user_errors(UNREADABLE, f"{folder}: holds no finished run, train it again: "):
        answers = list(predictions.values())
        correct = {
            view: np.array([answer["views"][view]["ema"] == answer["label"] for answer in answers])
            for view in summary["top1"]
        }
        without_ema = float(np.mean([answer["model"] == answer["label"] for answer in answers]))
        numbers = summary["THR"], summary["maiou"], summary["best_validation_top1"], without_ema
        family = crop_family(load_json(folder / "config.json"))
        return Run(seed, *numbers, correct, family, list(map(key_to_id, predictions)))


# --- the table ----------------------------------------------------------------------------------------------------


def best_by_validation(rows: Rows, names: Iterable[str]) -> str | None:
    """Return the row with the best mean validation accuracy among those of these names that have finished runs."""
    done = [row for row in names if row in rows]
    return max(done, key=lambda row: np.mean([run.validation for run in rows[row]]), default=None)


def block_text(table: Table, budget: str, rows: Rows, control: str | None) -> str:
    """Return one budget's rows, beside the row ``control``, as Markdown."""
    views, best = list(next(iter(rows.values()))[0].correct), best_by_validation(rows, rows)
    heads = ["crops", "maIoU", "validation"]
    heads += [f"view {view}{' (oracle)' if view in table.oracles else ''}" for view in views]
    heads += [f"{views[0]}, without EMA", f"{views[0]}: against {control}", "detectable from", "seeds"]
    heads += ["published (quoted)"] * bool(table.published)
    lines = []
    for row, runs in rows.items():
        result = None if row == control else compared(runs, rows.get(control, []), Column(views[0], views[0]))
        validation = spread([run.validation for run in runs])
        line = [
            row,
            f"{np.mean([run.maiou for run in runs]):.3f}",
            f"**{validation}**" if row == best else validation,
            *(spread(top1_of(runs, view)) for view in views),
            spread([run.without_ema for run in runs]),
            difference_text(result),
            detectable_text(result),
            len(runs),
        ]
        lines.append(line + [table.published.get(row, "")] * bool(table.published))
    return f"**{budget}**\n\n" * bool(budget) + markdown_table(heads, lines) + "\n"


def views_text(table: Table, rows: Rows, control: str | None) -> list[str]:
    """Return each row's further views beside the control's first view, as Markdown; nothing where there is one view.

    This is what crops and test view are worth together.
    """
    first, *others = next(iter(rows.values()))[0].correct
    columns = {f"view {view}": Column(view, first) for view in others if view not in table.oracles}
    if control is None or not columns:
        return []
    title = f"Each view, difference to {control} in view {first}:\n"
    return [title, difference_table("crops", rows, control, columns) + "\n"]


def thirds_text(rows: Rows, control: str | None, data: DataSet) -> list[str]:
    """Return the first view's accuracy by the size of the object as Markdown: thirds of the test images.

    Nothing for a data set without true boxes.
    """
    if np.isnan(data.boxes).any():
        return []
    some_run = next(iter(rows.values()))[0]
    view = next(iter(some_run.correct))
    covered = coverage(data.boxes, whole_image_boxes(data.image_sizes))
    share_of = dict(zip(data.ids.tolist(), covered, strict=True))
    shares = [share_of[image_id] for image_id in some_run.ids]
    small, large = np.quantile(shares, (1 / 3, 2 / 3))
    third = np.digitize(shares, (small, large))
    heads = f"smallest (up to {small:.2f})", f"middle (to {large:.2f})", "largest (above)"
    columns = {head: Column(view, view, third == number) for number, head in enumerate(heads)}
    title = f"By the share of the image that the object's true box covers, view {view}, difference to {control}:\n"
    return [title, difference_table("crops", rows, control, columns) + "\n"]


class Column(NamedTuple):
    """What a column of a table of differences tells of each row, beside the control."""

    view: str
    against: str  # view of the control
    images: np.ndarray | slice = slice(None)  # (N,) bool, which test images


def difference_table(first_head: str, rows: Rows, control: str | None, columns: dict[str, Column]) -> str:
    """Return a line per row in Markdown: its top-1 in each column and the difference to the row ``control``.

    ``columns``: by their heads. Of the runs, seed and correct answers are read.
    """
    lines = []
    for row, runs in rows.items():
        line = [row]
        for column in columns.values():
            is_itself = row == control and column.view == column.against
            result = None if is_itself else compared(runs, rows.get(control, []), column)
            line.append(f"{spread(top1_of(runs, column.view, column.images))} {difference_text(result)}".strip())
        lines.append(line)
    return markdown_table([first_head, *columns], lines)


def top1_of(runs: list[Run], view: str, images: np.ndarray | slice = slice(None)) -> list[float]:
    """Return the test top-1 of each run in one view, of all images or of those that ``images`` (N,) bool selects."""
    return [float(run.correct[view][images].mean()) for run in runs]


def compared(runs: list[Run], control: list[Run], column: Column) -> Comparison | None:
    """Compare a row with the control over the seeds that both have; None: they share none."""
    pairs = [
        (run.correct[column.view][column.images], other.correct[column.against][column.images])
        for run in runs
        for other in control
        if run.seed == other.seed
    ]
    return compare(*map(np.array, zip(*pairs, strict=True))) if pairs else None


def spread(top1: Sequence[float]) -> str:
    """Return mean ± standard deviation over seeds, per cent."""
    mean = f"{100 * np.mean(top1):.1f}"
    return f"{mean} ± {100 * np.std(top1, ddof=1):.1f}" if len(top1) > 1 else mean


def difference_text(result: Comparison | None) -> str:
    """Return the difference in points, with both tests."""
    if result is None:
        return ""
    seeds, images = (
        "n/a" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in (result.p_seeds, result.p_images)
    )
    return f"{100 * result.difference:+.1f} (p {seeds} seeds, {images} McNemar)"


def detectable_text(result: Comparison | None) -> str:
    """Return the minimum detectable difference at 80% power, in points: of the t-test / of McNemar's test."""
    if result is None:
        return ""
    both = (result.detectable_seeds, result.detectable_images)
    return " / ".join("n/a" if np.isnan(difference) else f"{100 * difference:.1f}" for difference in both)


def machine_line() -> str:
    """Return the footnote of a table: how to read it, hardware and versions."""
    made_with = environment()
    gpu = f", {made_with['gpu']}" if made_with["gpu"] else ", no GPU"
    return (
        "Top-1 of the EMA in %, mean ± standard deviation over seeds, on the test images. Validation: the best of a "
        "run's epochs; bold: the best row by it. Detectable from: minimum detectable difference in points at 80% "
        "power and the 5% level, of the t-test over seeds / of McNemar's test over (seed, image) pairs. "
        f"{made_with['processor']}{gpu}; torch {made_with['torch']}, Python {made_with['python']}."
    )


def points_of(blocks: dict[str, Rows], order: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    """Return the runs by row and budget as points of the picture of accuracy.

    Their x is the maIoU of the crops or, where ``order`` is given, the place of the row in it.
    """
    points = {}
    for budget, rows in blocks.items():
        for row, runs in rows.items():
            label, family = (", ".join(filter(None, (name, budget))) for name in (row, runs[0].family))
            top1 = top1_of(runs, next(iter(runs[0].correct)))
            x = [run.maiou if order is None else order.index(row) for run in runs]
            points[label] = [{"x": a, "top1": b, "family": family} for a, b in zip(x, top1, strict=True)]
    return points
