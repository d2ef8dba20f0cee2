"""The report of a table: from its run folders to Markdown and a picture, with means and paired tests."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.grid import Point, crop_family, load_summary
from experiments.paired_tests import Comparison, compare
from experiments.tables import Table
from figures.plots import accuracy_figure, save_figure
from localized_crops.boxes import coverage, whole_image_boxes
from localized_crops.files import load_json, save_text, user_errors
from localized_crops.image_ids import key_to_id
from readers.data_set import DataSet
from utils import UNREADABLE, environment

THIRDS = ("smallest", "middle", "largest")


class Row(NamedTuple):
    """The finished trainings of one row."""

    seeds: list[int]
    thr: list[float]
    maiou: list[float]
    validation: list[float]  # best top-1 on the validation images
    without_ema: list[float]  # test top-1 of the model itself, first view
    correct: dict[str, np.ndarray]  # view -> (seeds, images) bool: the EMA's correct answers on the test images
    family: str  # kind of crop
    ids: list  # of the test images


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
) -> dict[str, dict[str, Row]]:
    """Write NAME.md and NAME.png of the trainings that are done; return their rows by budget.

    Args:
        table: says which trainings there are.
        name: of the files.
        seeds: of each row.
        folder: holds the run folders, and gets the files.
        data: the data set of the trainings.
        against: the key whose values are the picture's x-axis; None: the maIoU of the crops.
    """
    blocks = {}
    for budget in table.budgets:
        found = {row: load_row(table, budget, row, seeds, folder) for row in table.rows}
        blocks[budget] = {row: cells for row, cells in found.items() if cells.seeds}
    blocks = {budget: found for budget, found in blocks.items() if found}
    if not blocks:
        return blocks
    parts = [f"### {table.title}", ""]
    for budget, found in blocks.items():
        parts += [block_text(table, budget, found), *views_text(table, found), *thirds_text(table, found, data)]
    text = "\n".join([*parts, machine_line()])
    save_text(folder / f"{name}.md", text + "\n")
    if against is None:
        figure = accuracy_figure(points_of(blocks), table.title)
    else:
        ticks = [str(overrides[against]) for overrides in table.rows.values()]
        figure = accuracy_figure(points_of(blocks, list(table.rows)), table.title, against, ticks)
    save_figure(figure, folder / f"{name}.png")
    print(f"\n{text}\n\nwritten to {folder / name}.md and .png")
    return blocks


def load_row(table: Table, budget: str, row: str, seeds: range, folder: Path) -> Row:
    """Read the finished trainings of one row."""
    cells, correct = Row([], [], [], [], [], {}, "", []), {}
    for seed in seeds:
        place = folder / place_of(table, budget, row, seed)
        if not (place / "summary.json").exists():
            continue
        summary = load_summary(place)
        cells.seeds.append(seed)
        cells.thr.append(summary["THR"])
        cells.maiou.append(summary["maiou"])
        cells.validation.append(summary["best_validation_top1"])
        predictions = load_json(place / "predictions.json")
        with user_errors(UNREADABLE, f"{place / 'predictions.json'}: not of a finished run, train it again: "):
            cells.without_ema.append(np.mean([entry["model"] == entry["label"] for entry in predictions.values()]))
            for view in summary["top1"]:
                right = [entry["views"][view]["ema"] == entry["label"] for entry in predictions.values()]
                correct.setdefault(view, []).append(right)
        with user_errors(UNREADABLE, f"{place / 'config.json'}: not of a finished run, train it again: "):
            family = crop_family(load_json(place / "config.json"))
        cells = cells._replace(family=family, ids=list(map(key_to_id, predictions)))
    return cells._replace(correct={view: np.array(right) for view, right in correct.items()})


# --- the table ----------------------------------------------------------------------------------------------------


def best_by_validation(found: dict[str, Row], names: Iterable[str]) -> str | None:
    """Return which of the rows of these names, as far as they are done, has the best mean validation accuracy."""
    done = [row for row in names if row in found]
    return max(done, key=lambda row: np.mean(found[row].validation), default=None)


def block_text(table: Table, budget: str, found: dict[str, Row]) -> str:
    """Return one budget's rows as Markdown."""
    views = list(next(iter(found.values())).correct)
    control, best = best_by_validation(found, table.controls), best_by_validation(found, found)
    heads = ["crops", "maIoU", "validation"]
    heads += [f"view {view}{' (oracle)' if view in table.oracles else ''}" for view in views]
    heads += [f"{views[0]}, without EMA", f"{views[0]}: against {control}", "detectable from", "seeds"]
    heads += ["published (quoted)"] * bool(table.published)
    lines = [f"**{budget}**", ""] * bool(budget) + [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row, cells in found.items():
        result = None if row == control else compared(cells, found.get(control), views[0])
        validation = spread(np.array(cells.validation))
        line = [
            row,
            f"{np.mean(cells.maiou):.3f}",
            f"**{validation}**" if row == best else validation,
            *(spread(cells.correct[view].mean(1)) for view in views),
            spread(np.array(cells.without_ema)),
            difference_text(result),
            detectable_text(result),
            str(len(cells.seeds)),
        ]
        lines.append(f"| {' | '.join(line + [table.published.get(row, '')] * bool(table.published))} |")
    return "\n".join([*lines, ""])


def views_text(table: Table, found: dict[str, Row]) -> list[str]:
    """Return each row's further views beside the control's first view, as Markdown; nothing where there is one view.

    This is what crops and test view are worth together.
    """
    control = best_by_validation(found, table.controls)
    first, *others = next(iter(found.values())).correct
    others = [view for view in others if view not in table.oracles]
    if control is None or not others:
        return []
    lines = [
        f"Each view, difference to {control} in view {first}:",
        "",
        f"| crops | {' | '.join(f'view {view}' for view in others)} |",
        "|" + "---|" * (1 + len(others)),
    ]
    for row, cells in found.items():
        texts = []
        for view in others:
            result = compared(cells, found[control], view, against=first)
            texts.append(f"{spread(cells.correct[view].mean(1))} {difference_text(result)}".strip())
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return ["\n".join([*lines, ""])]


def thirds_text(table: Table, found: dict[str, Row], data: DataSet) -> list[str]:
    """Return the first view's accuracy by the size of the object as Markdown: thirds of the test images.

    Nothing for a data set without true boxes.
    """
    if np.isnan(data.boxes).any():
        return []
    view, control = next(iter(next(iter(found.values())).correct)), best_by_validation(found, table.controls)
    covered = coverage(data.boxes, whole_image_boxes(data.image_sizes))
    share = dict(zip(data.ids.tolist(), covered, strict=True))
    test = [share[image_id] for image_id in next(iter(found.values())).ids]
    edges = np.quantile(test, (1 / 3, 2 / 3))
    ranges = (f"up to {edges[0]:.2f}", f"to {edges[1]:.2f}", "above")
    heads = ["crops", *(f"{name} ({how})" for name, how in zip(THIRDS, ranges, strict=True))]
    lines = [
        f"By the share of the image that the object's true box covers, view {view}, difference to {control}:",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for row, cells in found.items():
        third = np.digitize([share[image_id] for image_id in cells.ids], edges)
        texts = []
        for number in range(len(THIRDS)):
            images = third == number
            result = None if row == control else compared(cells, found.get(control), view, images)
            texts.append(f"{spread(cells.correct[view][:, images].mean(1))} {difference_text(result)}".strip())
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return ["\n".join([*lines, ""])]


def compared(
    cells: Row, control: Row | None, view: str, images: np.ndarray | None = None, against: str | None = None
) -> Comparison | None:
    """Compare a row with the control over the seeds that both have.

    Args:
        cells, control: the rows.
        view: of the row.
        images: (N,) bool, which test images; None: all.
        against: view of the control; None: the same.
    """
    shared = [seed for seed in cells.seeds if control and seed in control.seeds]
    if not shared:
        return None
    views = ((cells, view), (control, against or view))
    a, b = (some.correct[name][[some.seeds.index(seed) for seed in shared]] for some, name in views)
    return compare(a, b) if images is None else compare(a[:, images], b[:, images])


def spread(top1: np.ndarray) -> str:
    """Return mean ± standard deviation over seeds, per cent."""
    mean = f"{100 * top1.mean():.1f}"
    return f"{mean} ± {100 * top1.std(ddof=1):.1f}" if len(top1) > 1 else mean


def difference_text(result: Comparison | None) -> str:
    """Return the difference in points, with both tests."""
    if result is None:
        return ""
    return f"{100 * result.difference:+.1f} (p {p_text(result.p_seeds)} seeds, {p_text(result.p_images)} McNemar)"


def detectable_text(result: Comparison | None) -> str:
    """Return the minimum detectable difference at 80% power, in points: of the t-test / of McNemar's test."""
    if result is None:
        return ""
    both = (result.detectable_seeds, result.detectable_images)
    return " / ".join("n/a" if np.isnan(difference) else f"{100 * difference:.1f}" for difference in both)


def p_text(p: float) -> str:
    """Return a p-value, shortened."""
    return "n/a" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def machine_line() -> str:
    """Return how the table is to be read, and the hardware and versions, for under it."""
    made_with = environment()
    gpu = f", {made_with['gpu']}" if made_with["gpu"] else ", no GPU"
    return (
        "Top-1 of the EMA in %, mean ± standard deviation over seeds, on the test images. Validation: the best of a "
        "run's epochs; bold: the best row by it. Detectable from: minimum detectable difference in points at 80% "
        "power and the 5% level, of the t-test over seeds / of McNemar's test over (seed, image) pairs. "
        f"{made_with['processor']}{gpu}; torch {made_with['torch']}, Python {made_with['python']}."
    )


# --- numbers and picture ------------------------------------------------------------------------------------------


def numbers_of(cells: Row) -> dict[str, Any]:
    """Return what the JSON keeps of a row."""
    top1 = {view: right.mean(1).tolist() for view, right in cells.correct.items()}
    return {"seeds": cells.seeds, "maiou": cells.maiou, "validation": cells.validation, "top1": top1}


def points_of(blocks: dict[str, dict[str, Row]], order: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the runs by row and budget as points of the picture of accuracy.

    Their x is the maIoU of the crops or, where ``order`` is given, the place of the row in it.
    """
    points = {}
    for budget, found in blocks.items():
        for row, cells in found.items():
            top1 = next(iter(cells.correct.values())).mean(1).tolist()
            x = cells.maiou if order is None else [order.index(row)] * len(top1)
            label, family = (", ".join(filter(None, (name, budget))) for name in (row, cells.family))
            runs = zip(x, top1, strict=True)
            points[label] = [{"x": place, "top1": value, "family": family} for place, value in runs]
    return points
