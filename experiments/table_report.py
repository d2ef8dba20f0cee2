"""From the run folders of a table to its Markdown, JSON and picture: means, paired tests, what they could have seen."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.sweep import crop_family, load_summary
from experiments.tables import Table
from figures.plots import accuracy_figure, save_figure
from localized_crops.boxes import coverage, whole_image_boxes
from localized_crops.files import load_json, save_json, save_text, user_errors
from localized_crops.image_ids import key_to_id
from readers.data_set import DataSet
from training.evaluation import Comparison, compare
from utils import UNREADABLE, environment

THIRDS = ("smallest", "middle", "largest")


class Row(NamedTuple):
    """The finished trainings of one row."""

    seeds: list[int]
    correct: dict[str, np.ndarray]  # view -> (seeds, images) bool, of the EMA
    without_ema: list[float]  # top-1 of the model itself, first view
    maiou: list[float]
    validation: list[float]  # best top-1
    family: str  # kind of crop
    ids: list[int]  # of the test images


def place_of(table: Table, budget: str, row: str, seed: int) -> str:
    """Return the folder name of one training."""
    words = "".join(c if c.isalnum() else "_" for c in row.replace(".", "0"))
    return f"{list(table.budgets).index(budget)}_{words}_seed_{seed}".replace("__", "_")


def write_table(table: Table, name: str, seeds: range, folder: Path, data: DataSet) -> None:
    """Write NAME.md, NAME.json and NAME.png of the trainings that are done."""
    blocks = {}
    for budget in table.budgets:
        found = {row: load_row(table, budget, row, seeds, folder) for row in table.rows}
        blocks[budget] = {row: cells for row, cells in found.items() if cells.seeds}
    blocks = {budget: found for budget, found in blocks.items() if found}
    if not blocks:
        return
    parts = [
        part for block in blocks.items() for part in (block_text(table, *block), thirds_text(table, block[1], data))
    ]
    text = "\n".join([f"### {table.title}", "", *parts, machine_line()])
    save_text(folder / f"{name}.md", text + "\n")
    numbers = {budget: {row: numbers_of(cells) for row, cells in found.items()} for budget, found in blocks.items()}
    save_json(folder / f"{name}.json", numbers)
    save_figure(accuracy_figure(points_of(blocks), table.title), folder / f"{name}.png")
    print(f"\n{text}\n\nwritten to {folder / name}.md, .json and .png")


def load_row(table: Table, budget: str, row: str, seeds: range, folder: Path) -> Row:
    """Read the finished trainings of one row."""
    cells, correct = Row([], {}, [], [], [], "", []), {}
    for seed in seeds:
        place = folder / place_of(table, budget, row, seed)
        if not (place / "summary.json").exists():
            continue
        summary = load_summary(place)
        cells.seeds.append(seed)
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


def chosen_control(table: Table, found: dict[str, Row]) -> str | None:
    """Return the control that validates best, of those that are done."""
    done = [row for row in table.controls if row in found]
    return max(done, key=lambda row: np.mean(found[row].validation), default=None)


def block_text(table: Table, budget: str, found: dict[str, Row]) -> str:
    """Return one budget's rows as Markdown."""
    views = list(next(iter(found.values())).correct)
    control = chosen_control(table, found)
    heads = ["crops", "maIoU", "validation"]
    heads += [f"view {view}{' (oracle)' if view in table.oracles else ''}" for view in views]
    heads += [f"{views[0]}, without EMA", f"{views[0]}: against {control}", "seen from", "seeds"]
    heads += ["published (quoted)"] * bool(table.published)
    lines = [f"**{budget}**", ""] * bool(budget) + [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row, cells in found.items():
        result = None if row == control else against(cells, found.get(control), views[0])
        line = [
            row,
            f"{np.mean(cells.maiou):.3f}",
            spread(np.array(cells.validation)),
            *(spread(cells.correct[view].mean(1)) for view in views),
            spread(np.array(cells.without_ema)),
            difference_text(result),
            seen_text(result),
            str(len(cells.seeds)),
        ]
        lines.append(f"| {' | '.join(line + [table.published.get(row, '')] * bool(table.published))} |")
    return "\n".join([*lines, ""])


def thirds_text(table: Table, found: dict[str, Row], data: DataSet) -> str:
    """Return the first view's accuracy by the size of the object as Markdown: thirds of the test images."""
    view, control = next(iter(next(iter(found.values())).correct)), chosen_control(table, found)
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
            result = None if row == control else against(cells, found.get(control), view, images)
            texts.append(f"{spread(cells.correct[view][:, images].mean(1))} {difference_text(result)}".strip())
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join([*lines, ""])


def against(cells: Row, control: Row | None, view: str, images: np.ndarray | None = None) -> Comparison | None:
    """Compare a row with the control over the seeds that both have; ``images`` (N,) bool picks test images."""
    shared = [seed for seed in cells.seeds if control and seed in control.seeds]
    if not shared:
        return None
    a, b = (some.correct[view][[some.seeds.index(seed) for seed in shared]] for some in (cells, control))
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


def seen_text(result: Comparison | None) -> str:
    """Return from which difference on, in points, both tests would have seen one."""
    if result is None:
        return ""
    return " / ".join("n/a" if np.isnan(one) else f"{100 * one:.1f}" for one in (result.seen_seeds, result.seen_images))


def p_text(p: float) -> str:
    """Return a p-value, shortened."""
    return "n/a" if np.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def machine_line() -> str:
    """Return how the table is to be read, and the hardware and versions, for under it."""
    about = environment()
    gpu = f", {about['gpu']}" if about["gpu"] else ", no GPU"
    return (
        "Top-1 of the EMA in %, mean ± standard deviation over seeds, on the test images; validation: the best of a "
        "run's epochs. Seen from: the difference in points that the t-test over seeds / McNemar's test over (seed, "
        "image) pairs would have found at the 5% level in four of five such experiments. "
        f"{about['processor']}{gpu}; torch {about['torch']}, Python {about['python']}."
    )


# --- numbers and picture ------------------------------------------------------------------------------------------


def numbers_of(cells: Row) -> dict[str, Any]:
    """Return what the JSON keeps of a row."""
    top1 = {view: right.mean(1).tolist() for view, right in cells.correct.items()}
    return {"seeds": cells.seeds, "maiou": cells.maiou, "validation": cells.validation, "top1": top1}


def points_of(blocks: dict[str, dict[str, Row]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs by row and budget as points of the picture of accuracy against maIoU."""
    points = {}
    for budget, found in blocks.items():
        for row, cells in found.items():
            top1 = next(iter(cells.correct.values())).mean(1)
            label, family = (", ".join(filter(None, (name, budget))) for name in (row, cells.family))
            runs = zip(cells.maiou, top1, strict=True)
            points[label] = [{"maiou": maiou, "top1": float(one), "family": family} for maiou, one in runs]
    return points
