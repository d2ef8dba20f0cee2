"""A sweep: a table with a row per value of one key, made here or by a wandb agent, and judged on validation images."""

import json
import re
from pathlib import Path
from typing import Any

from datasets import read_dataset
from experiments.grid import Point, Train, point_config, run_grid, run_point
from experiments.table_report import best_by_validation, table_points, write_report
from experiments.tables import Table
from jobs.guard import same_command, with_resume_hint
from jobs.wandb_runs import LONGEST_NAME, import_wandb, short_hash
from localized_crops.files import UserError, first_line, remove_scratch, save_json
from utils import lock_file, new_folder

CROP_KEYS = ("THR", "maiou")  # swept over these, accuracy is drawn against the crops' maIoU


def run_sweep(config: dict, train: Train) -> None:
    """Run the sweep of ``config`` by a wandb agent if wandb is on, otherwise here; write sweep.md, .json and .png."""
    folder = Path(config["run_dir"]) if config["run_dir"] else new_folder("runs", "sweep")
    table, seeds = sweep_table(config), range(config["seed"], config["seed"] + config["sweep"]["seeds"])
    points = table_points(table, seeds, folder)
    with with_resume_hint(lambda: same_command(f"run_dir={folder}")):
        if config["wandb"]:
            run_wandb_sweep(config, points, list(seeds), train, folder)
        else:
            run_grid(config, points, train, config["sweep"]["count"])
        if any((point.folder / "summary.json").exists() for point in points):
            # of two processes the one that writes last has seen all runs
            with lock_file(folder / ".lock"):
                remove_scratch(folder)
                write_summary(config, table, seeds, folder)


def sweep_table(config: dict) -> Table:
    """Return the sweep as a table: plain crops, or else all values, are the controls."""
    key, rows, folders = config["sweep"]["parameter"], {}, {}
    for value in config["sweep"]["values"]:
        plain = key == "THR" and value < 0
        row = f"RandomResizedCrop (THR={value_text(value)})" if plain else f"{key}={value_text(value)}"
        rows[row], folders[row] = {key: value}, folder_name(key, value)
    controls = [row for row in rows if row.startswith("RandomResizedCrop")] or list(rows)
    title = f"Sweep over {key}: {config['dataset']['name']}, {config['num_epochs']} epochs"
    return Table(title, rows, controls=tuple(controls), common={"eval_box": config["eval_box"]}, folders=folders)


def value_text(value: Any) -> str:
    """Return a value as short text; two values never have the same one."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(key: str, value: Any) -> str:
    """Return the folder name of a value, such as THR=0.5; where it cannot be taken literally, with a hash."""
    text = f"{key}={value_text(value)}"
    clean = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:LONGEST_NAME]
    return clean if clean == text else f"{clean}_{short_hash(text)}"


def write_summary(config: dict, table: Table, seeds: range, folder: Path) -> None:
    """Write table and picture of the trainings that are done, and sweep.json with a record for each of them."""
    key = config["sweep"]["parameter"]
    data = read_dataset(**config["dataset"])
    blocks = write_report(table, "sweep", seeds, folder, data, against=None if key in CROP_KEYS else key)
    rows = blocks[""]
    best = best_by_validation(rows, rows)
    records = [
        {"seed": run.seed, "THR": run.thr, "maiou": run.maiou, "validation": run.validation}
        | {"top1": float(next(iter(run.correct.values())).mean()), "value": table.rows[row][key]}
        for row, runs in rows.items()
        for run in runs
    ]
    save_json(folder / "sweep.json", {"parameter": key, "best": table.rows[best][key], "rows": records})
    validated = "validation images" if len(data.rows("val")) else "the test images, as published: choose nothing by it"
    done = f"{len(records)} of {len(table.rows) * len(seeds)} trainings are done"
    print(f"{done}; best on {validated}: {best}")


# --- wandb --------------------------------------------------------------------------------------------------------


def run_wandb_sweep(config: dict, points: list[Point], seeds: list[int], train: Train, folder: Path) -> None:
    """Let a wandb agent work through the grid; points that are done are reported to wandb, not trained again.

    wandb ignores ``resume`` inside a sweep: the run folders say what is done.

    Raises:
        UserError: if wandb cannot be reached.
    """
    wandb, sweep = import_wandb(), config["sweep"]
    parameters = {sweep["parameter"]: {"values": sweep["values"]}, "seed": {"values": seeds}}
    metric = {"name": "validation_top1", "goal": "maximize"}
    grid = {"method": "grid", "metric": metric, "parameters": parameters}

    def train_point() -> None:
        with wandb.init(dir=str(folder)) as run:
            overrides = {key: run.config[key] for key in parameters}
            point = next((point for point in points if point.overrides == overrides), None)
            if point is None:
                raise UserError(f"sweep.id={sweep['id']}: asks for {overrides}, not among sweep.values")
            run.config.update(point_config(config, point), allow_val_change=True)
            summary = run_point(config, point, train, run)
            first_view = next(iter(summary["top1"].values()))
            figures = {"test_top1": first_view["ema"], "validation_top1": summary["best_validation_top1"]}
            run.log(figures | {"maiou": summary["maiou"]})

    try:
        sweep_id = sweep["id"] if sweep["resume"] else wandb.sweep(grid, sweep["project"])
        print(f"wandb sweep {sweep_id}; to join it: sweep.resume=true sweep.id={sweep_id} run_dir={folder}")
        wandb.agent(sweep_id, train_point, project=sweep["project"], count=sweep["count"])
    except (wandb.errors.Error, OSError) as error:
        remedy = "log in with `wandb login`, or set wandb=false to run the same grid here"
        raise UserError(f"sweeprun=true, wandb=true: wandb cannot be reached ({first_line(error)}); {remedy}") from None
