"""Make a table of the README or docs/results.md: run its trainings, write the finished table.

Writes ``run_dir`` (default runs/TABLE): one run folder per training, table.md, table.json. Trainings that are done are
not repeated; the same command started twice shares the work (one per core: num_workers=0 num_threads=1).

    python reproduce.py reproduce.table=toybirds_crops num_workers=0    # 50 trainings, about 50 minutes on two cores
    python reproduce.py reproduce.table=toybirds_boxes num_workers=0    # 20 trainings, about 12
    python reproduce.py reproduce.table=toybirds_masks num_workers=0    # 10 trainings, about 6
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import apply_preset, check_config, load_config, set_key
from evaluation import Comparison, compare
from parallel import refuse_many
from sweep import FolderInUseError, load_summary, run_point
from train import train_run
from utils import (
    UNREADABLE,
    UserError,
    environment,
    going_on_with,
    load_json,
    run_script,
    same_command,
    save_json,
    save_text,
    user_errors,
)


@dataclass(frozen=True)
class Table:
    """A table: each row a method, each budget a block of rows, every cell over several seeds."""

    title: str
    preset: str
    rows: dict[str, dict[str, Any]]  # name in the table -> overrides
    controls: tuple[str, ...]  # rows that the others are compared with: with the one that validates best
    budgets: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    common: dict[str, Any] = field(default_factory=dict)
    oracles: tuple[str, ...] = ()  # views that see true boxes at test
    needs: str | None = None  # a box file that generate_dino_boxes.py must have written


PLAIN = {"use_box": False}
TOY_BOXES = "runs/dino_boxes_toybirds/boxes.json"  # where generate_dino_boxes.py writes by default
MASK_BOXES = "runs/mask_boxes_toybirds/boxes.json"  # where generate_bbox.py writes by default
# Plain crops: the controls of every table, of which the one that validates best is compared with.
SCALES = {
    f"RandomResizedCrop, scale {least:g}".replace("0.", "."): PLAIN | {"crop.scale": [least, 1.0]}
    for least in (0.08, 0.2, 0.35, 0.5)
}
EMA_10 = {"other.ema_decay": 0.99}  # averages over 100 of ToyBirds' 1,000 steps
TABLES = {
    "toybirds_crops": Table(
        title="Training crops on ToyBirds",
        preset="toybirds",
        rows={
            **SCALES,
            "reference, true boxes, thr 1": {"crop.mode": "reference"},
            "exact, true boxes, maIoU .9": {"maiou": 0.9},
            "exact, true boxes, thr 1": {},
            "exact, centred boxes, thr 1": {"source": "center"},
            "whole image": {"source": "image"},
            "RandomResizedCrop, scale .35, EMA over 10%": SCALES["RandomResizedCrop, scale .35"] | EMA_10,
            "exact, true boxes, thr 1, EMA over 10%": EMA_10,
        },
        controls=tuple(SCALES),
        common={"eval.views": ["full", "center", "full@80", "full@96"], "eval_box": "gt", "log_interval": 10},
        oracles=("box", "average"),
    ),
    "toybirds_crops_long": Table(
        title="Training crops on ToyBirds, 120 epochs",
        preset="toybirds",
        rows={
            "RandomResizedCrop, scale .08": SCALES["RandomResizedCrop, scale .08"],
            "RandomResizedCrop, scale .35": SCALES["RandomResizedCrop, scale .35"],
            "reference, true boxes, thr 1": {"crop.mode": "reference"},
            "exact, true boxes, thr 1": {},
            "exact, centred boxes, thr 1": {"source": "center"},
        },
        controls=("RandomResizedCrop, scale .08", "RandomResizedCrop, scale .35"),
        common={
            "num_epochs": 120,
            "eval.views": ["full", "center", "full@96"],
            "eval_box": "gt",
            "log_interval": 10,
        },
        oracles=("box", "average"),
    ),
    "small_photos": Table(
        title="Training crops on photographs, a small network from scratch",
        preset="toybirds",
        rows={
            **SCALES,
            "reference, true boxes, maIoU .8": {"crop.mode": "reference", "maiou": 0.8},
            "reference, true boxes, maIoU .9": {"crop.mode": "reference", "maiou": 0.9},
            "reference, true boxes, thr 1": {"crop.mode": "reference"},
            "exact, true boxes, maIoU .8": {"maiou": 0.8},
            "exact, true boxes, maIoU .9": {"maiou": 0.9},
            "exact, true boxes, thr 1": {},
            "exact, centred boxes, thr 1": {"source": "center"},
            "whole image": {"source": "image"},
        },
        controls=tuple(SCALES),
        common={
            "dataset.name": "cub",
            "dataset.val_fraction": 0.2,
            "cache": "disk",
            "image_size": 96,
            "num_epochs": 60,
            "eval.views": ["full", "center", "full@128"],
            "eval_box": "gt",
            "log_interval": 10,
        },
        oracles=("box", "average"),
    ),
    "toybirds_boxes": Table(
        title="Boxes and maps of the built-in localizer on ToyBirds",
        preset="toybirds",
        rows={
            "RandomResizedCrop, scale .35": PLAIN | {"crop.scale": [0.35, 1.0]},
            "held to true boxes": {},
            "held to the localizer's boxes": {"source": TOY_BOXES},
            "centred by the localizer's maps": PLAIN
            | {"use_dino_maps": True, "dino_maps": TOY_BOXES, "crop.temperature": 0.1},
        },
        controls=("RandomResizedCrop, scale .35",),
        common={"eval.views": ["full"], "eval_box": TOY_BOXES, "log_interval": 10},
        needs=TOY_BOXES,
    ),
    "toybirds_masks": Table(
        title="Boxes of candidate masks on ToyBirds",
        preset="toybirds",
        rows={
            "RandomResizedCrop, scale .35": PLAIN | {"crop.scale": [0.35, 1.0]},
            "held to the boxes of generate_bbox.py": {"source": MASK_BOXES},
        },
        controls=("RandomResizedCrop, scale .35",),
        common={"eval.views": ["full"], "log_interval": 10},
        needs=MASK_BOXES,
    ),
}


def main(config: dict) -> None:
    """Run what is missing of the table, then write it."""
    name = config["reproduce"]["table"]
    if name not in TABLES:
        raise UserError(f"reproduce.table={name}: there is no such table; there are {', '.join(TABLES)}")
    if TABLES[name].needs and not Path(TABLES[name].needs).exists():
        raise UserError(f"{TABLES[name].needs}: missing; make it first, see the README's section on its stage")
    refuse_many("reproduce.py")
    folder = Path(config["run_dir"] or f"runs/{name}")
    with going_on_with(same_command):
        run_table(config, TABLES[name], folder)


def run_table(config: dict, table: Table, folder: Path) -> None:
    """Train the points of a table that are not done, and write it."""
    points = table_points(table, config["reproduce"]["seeds"])
    for number, (label, overrides, place) in enumerate(points, 1):
        print(f"--- {number}/{len(points)} {label}", flush=True)
        try:
            run_point(point_config(config, table), overrides, folder / place, train_run)
        except FolderInUseError:
            print("another process works on it")
    write_table(table, config["reproduce"]["seeds"], folder)


def point_config(config: dict, table: Table) -> dict:
    """Return the config that all trainings of the table share."""
    apply_preset(config, table.preset)
    for key, value in table.common.items():
        set_key(config, key, value)
    check_config(config)
    return config


def table_points(table: Table, seeds: int) -> list[tuple[str, dict, str]]:
    """Return (label, overrides, folder name) of each training; every row's first seed before any second."""
    return [
        (
            f"{row}, {budget}, seed {seed}",
            table.rows[row] | table.budgets[budget] | {"seed": seed},
            place_of(table, budget, row, seed),
        )
        for budget in table.budgets
        for seed in range(seeds)
        for row in table.rows
    ]


def place_of(table: Table, budget: str, row: str, seed: int) -> str:
    """Return the folder name of one training."""
    words = "".join(c if c.isalnum() else "_" for c in row.replace(".", "0"))
    return f"{list(table.budgets).index(budget)}_{words}_seed_{seed}".replace("__", "_")


# --- the table ----------------------------------------------------------------------------------------------------


def write_table(table: Table, seeds: int, folder: Path) -> None:
    """Write table.md and table.json of the trainings that are done."""
    blocks = []
    for budget in table.budgets:
        found = {row: load_row(table, budget, row, seeds, folder) for row in table.rows}
        found = {row: cells for row, cells in found.items() if cells["seeds"]}
        if found:
            blocks.append((budget, found))
    if not blocks:
        return
    text = "\n".join([f"### {table.title}", "", *(block_text(table, *block) for block in blocks), machine_line()])
    save_text(folder / "table.md", text + "\n")
    save_json(folder / "table.json", {budget: {row: numbers(c) for row, c in rows.items()} for budget, rows in blocks})
    print(f"\n{text}\n\nwritten to {folder / 'table.md'}")


def load_row(table: Table, budget: str, row: str, seeds: int, folder: Path) -> dict[str, Any]:
    """Read the finished trainings of one row: seeds, right answers by view, maIoU, best validation accuracy."""
    cells = {"seeds": [], "correct": {}, "maiou": [], "validation": []}
    for seed in range(seeds):
        place = folder / place_of(table, budget, row, seed)
        if not (place / "summary.json").exists():
            continue
        summary = load_summary(place)
        cells["seeds"].append(seed)
        cells["maiou"].append(summary["maiou"])
        cells["validation"].append(summary["best_validation_top1"])
        predictions = load_json(place / "predictions.json")
        with user_errors(UNREADABLE, f"{place / 'predictions.json'}: not of a finished run, train it again: "):
            for view in summary["top1"]:
                right = [entry["views"][view]["ema"] == entry["label"] for entry in predictions.values()]
                cells["correct"].setdefault(view, []).append(right)
    cells["correct"] = {view: np.array(right) for view, right in cells["correct"].items()}
    return cells


def block_text(table: Table, budget: str, found: dict[str, dict]) -> str:
    """Return one budget's rows as Markdown."""
    views = list(next(iter(found.values()))["correct"])
    control = max(table.controls, key=lambda row: np.mean(found[row]["validation"]) if row in found else -1.0)
    heads = [f"view {view}{' (oracle)' if view in table.oracles else ''}" for view in views]
    lines = [
        f"**{budget}**" if budget else "",
        "",
        f"| crops | maIoU | {' | '.join(heads)} | {views[0]}: against {control} | seeds |",
        "|" + "---|" * (len(views) + 4),
    ]
    for row, cells in found.items():
        tops = [spread(cells["correct"][view].mean(1)) for view in views]
        against = "" if row == control else versus(cells, found.get(control), views[0])
        maiou = f"{np.mean(cells['maiou']):.3f}"
        lines.append(f"| {row} | {maiou} | {' | '.join(tops)} | {against} | {len(cells['seeds'])} |")
    return "\n".join([*lines, ""])


def spread(top1: np.ndarray) -> str:
    """Return mean ± standard deviation over seeds, per cent."""
    mean = f"{100 * top1.mean():.1f}"
    return f"{mean} ± {100 * top1.std(ddof=1):.1f}" if len(top1) > 1 else mean


def versus(cells: dict, control: dict | None, view: str) -> str:
    """Return the difference to the control in points, with both tests, over the seeds that both have."""
    shared = [seed for seed in cells["seeds"] if control and seed in control["seeds"]]
    if not shared:
        return ""
    a, b = (some["correct"][view][[some["seeds"].index(seed) for seed in shared]] for some in (cells, control))
    result: Comparison = compare(a, b)
    return f"{100 * result.difference:+.1f} (p {p_text(result.p_seeds)} seeds, {p_text(result.p_images)} McNemar)"


def p_text(p: float) -> str:
    """Return a p-value, shortened."""
    return "n/a" if np.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def numbers(cells: dict) -> dict[str, Any]:
    """Return what table.json keeps of a row."""
    top1 = {view: right.mean(1).tolist() for view, right in cells["correct"].items()}
    return {"seeds": cells["seeds"], "maiou": cells["maiou"], "top1": top1}


def machine_line() -> str:
    """Return the hardware and versions that stand under a table."""
    about = environment()
    gpu = f", {about['gpu']}" if about["gpu"] else ", no GPU"
    return (
        f"Test top-1 of the EMA in %, mean ± standard deviation over seeds. {about['processor']}{gpu}; "
        f"torch {about['torch']}, Python {about['python']}."
    )


if __name__ == "__main__":
    run_script(main, load_config)
