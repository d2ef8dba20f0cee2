"""Many trainings as one job: a grid of points, each in its own folder, done once; table, picture, wandb sweep.

A point that has its summary.json is done and not repeated, one that was interrupted goes on, one that another
process works on is left to it: the same command started twice shares the work.
"""

import copy
import fcntl
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from figures.plots import draw_sweep, fit_line
from jobs.guard import going_on_with, same_command
from localized_crops.files import UserError, load_json, remove_scratch, save_json, save_text, user_errors
from utils import UNREADABLE, lock_file, new_folder


class FolderInUseError(UserError):
    """Another process works in this run folder."""


Train = Callable[..., dict]  # (config, wandb_run=None) -> summary


# --- points -------------------------------------------------------------------------------------------------------


def with_overrides(config: dict, overrides: dict[str, Any], folder: Path) -> dict:
    """Return a copy of ``config`` for one training in ``folder``, with dotted keys laid over it."""
    changed = copy.deepcopy(config) | {"run_dir": str(folder), "sweeprun": False}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        target = changed
        for part in parents:
            target = target[part]
        target[last] = value
    changed["resume"] = (folder / "config.json").exists()
    return changed


def run_point(config: dict, overrides: dict[str, Any], folder: Path, train: Train, wandb_run: Any = None) -> dict:
    """Train one point unless it is done; return its summary.

    Raises:
        UserError: if the folder holds a run with other settings.
        FolderInUseError: if another process works on it.
    """
    point = with_overrides(config, overrides, folder)
    if point["resume"]:
        _check_same(folder, point, overrides)
    if (folder / "summary.json").exists():
        return load_summary(folder)
    return train(point, wandb_run)


def load_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        UserError: if summary.json lacks what tables are made of.
    """
    summary = load_json(folder / "summary.json")
    with user_errors(UNREADABLE, f"{folder / 'summary.json'}: not of a finished run, train it again: "):
        for number in (summary["THR"], summary["maiou"], summary["best_validation_top1"]):
            float(number)
        for both in summary["top1"].values():
            float(both["ema"])
    return summary


# Keys that a finished training does not depend on: of the machine, of logging, of other stages.
FREE_KEYS = {"preset", "run_dir", "resume", "A_machine", "num_workers", "device", "wandb", "log_interval"}
FREE_KEYS |= {"sweep", "sweeprun", "reproduce", "visualize", "dino", "out"}


def crop_family(config: dict) -> str:
    """Return the kind of a training's crops, whatever the share of the box that they keep."""
    if config["use_dino_maps"]:
        return "density maps"
    if not config["use_box"] or config["THR"] < 0:
        return "RandomResizedCrop"
    return f"{config['crop']['mode']}, {config['source']}"


def settings_key(config: dict) -> str:
    """Return what two trainings share if they are the same but for their seed, as text."""
    return json.dumps({key: config[key] for key in sorted(config.keys() - FREE_KEYS - {"seed"})}, sort_keys=True)


def _check_same(folder: Path, point: dict, overrides: dict[str, Any]) -> None:
    """Refuse a folder that was made with other settings than this point has."""
    saved = load_json(folder / "config.json")
    if not isinstance(saved, dict):
        raise UserError(f"{folder / 'config.json'}: holds no config; remove the folder or give another run_dir")
    derived = {"THR"} if "maiou" in overrides else set()
    for key in sorted((point.keys() & saved.keys()) - FREE_KEYS - derived):  # newer keys had no say then
        if not _agrees(point[key], saved[key]):
            raise UserError(f"{folder}: holds a run with {key}={saved[key]}; give another run_dir")


def _agrees(wanted: Any, saved: Any) -> bool:
    """Tell whether a saved value is the wanted one; None was resolved to something when the run began."""
    if isinstance(wanted, dict) and isinstance(saved, dict):
        return all(_agrees(wanted[key], saved[key]) for key in wanted.keys() & saved.keys())
    return wanted is None or wanted == saved


# --- the sweep over THR or maIoU ----------------------------------------------------------------------------------


def grid(config: dict) -> list[dict[str, Any]]:
    """Return the overrides of each point: every value with every seed."""
    swept = config["sweep"]
    return [
        {swept["parameter"]: value, "seed": config["seed"] + number}
        for value in swept["values"]
        for number in range(swept["seeds"])
    ]


def point_name(overrides: dict[str, Any]) -> str:
    """Return the folder name of a point, such as THR=0.5,seed=0."""
    return ",".join(f"{key}={value:g}" for key, value in sorted(overrides.items()))


def run_sweep(config: dict, train: Train) -> None:
    """Run the sweep of ``config``: by wandb if it is on, else here, one run after the other."""
    folder = Path(config["run_dir"]) if config["run_dir"] else new_folder("runs", "sweep")
    with going_on_with(lambda: same_command(f"run_dir={folder}")):
        if config["wandb"]:
            run_wandb_sweep(config, train, folder)
        else:
            run_local_sweep(config, train, folder)
        write_summary(config, folder)


def run_local_sweep(config: dict, train: Train, folder: Path) -> None:
    """Train the points that are not done, one after the other, at most ``sweep.count`` of them."""
    for done, (overrides, place) in enumerate(_points_to_do(config, folder)):
        if done >= config["sweep"]["count"]:
            print(f"sweep.count={config['sweep']['count']} reached; the same command goes on")
            break
        print(f"--- {point_name(overrides)}", flush=True)
        try:
            run_point(config, overrides, place, train)
        except FolderInUseError:
            print("another process works on it")


def _points_to_do(config: dict, folder: Path) -> Iterator[tuple[dict, Path]]:
    for overrides in grid(config):
        place = folder / point_name(overrides)
        if (place / "summary.json").exists():
            run_point(config, overrides, place, train=None)  # refuses one with other settings
            print(f"--- {point_name(overrides)}: done already")
        else:
            yield overrides, place


def write_summary(config: dict, folder: Path) -> None:
    """Write sweep.json, sweep.md and sweep.png of the points that are done."""
    if not any((folder / point_name(overrides) / "summary.json").exists() for overrides in grid(config)):
        return
    with lock_file(folder / ".lock", fcntl.LOCK_EX):  # of two processes the later one finds at least as many points
        remove_scratch(folder)
        _write_summary(config, folder)


def _write_summary(config: dict, folder: Path) -> None:
    rows = []
    for overrides in grid(config):
        place = folder / point_name(overrides)
        if (place / "summary.json").exists():
            rows.append(_row(config, overrides, load_summary(place)))
    if not rows:
        return
    held = [row for row in rows if row["value"] >= 0]
    fit = fit_line([row["maiou"] for row in held], [row["top1"] for row in held])
    save_json(folder / "sweep.json", {"parameter": config["sweep"]["parameter"], "rows": rows, "fit": fit})
    table = sweep_table(rows, config["sweep"]["parameter"])
    save_text(folder / "sweep.md", table)
    view = config["eval"]["views"][0]
    draw_sweep(rows, folder / "sweep.png", f"{config['dataset']['name']}, {config['num_epochs']} epochs, view {view}")
    print(f"\n{table}\n{len(rows)} of {len(grid(config))} trainings done; table and picture in {folder}")


def _row(config: dict, overrides: dict[str, Any], summary: dict) -> dict[str, float]:
    view = config["eval"]["views"][0]
    return {
        "value": overrides[config["sweep"]["parameter"]],
        "seed": overrides["seed"],
        "THR": summary["THR"],
        "maiou": summary["maiou"],
        "top1": summary["top1"][view]["ema"],
    }


def sweep_table(rows: list[dict], parameter: str) -> str:
    """Return the Markdown table: one line per value, mean and standard deviation over seeds."""
    lines = [f"| {parameter} | maIoU of the crops | test top-1, EMA (%) | seeds |", "|---|---|---|---|"]
    for value in dict.fromkeys(row["value"] for row in rows):
        same = [row for row in rows if row["value"] == value]
        top1 = 100 * np.array([row["top1"] for row in same])
        spread = f" ± {top1.std(ddof=1):.1f}" if len(same) > 1 else ""
        name = "RandomResizedCrop" if value < 0 else f"{value:g}"
        maiou = np.mean([row["maiou"] for row in same])
        lines.append(f"| {name} | {maiou:.3f} | {top1.mean():.1f}{spread} | {len(same)} |")
    return "\n".join(lines) + "\n"


# --- wandb --------------------------------------------------------------------------------------------------------


def start_wandb(config: dict, folder: Path) -> Any:
    """Start (or, after an interruption, go on with) the wandb run of a run folder.

    Raises:
        UserError: if wandb is not installed or cannot start.
    """
    wandb = _import_wandb()
    try:
        return wandb.init(
            project=config["sweep"]["project"],
            name=folder.name,
            id=re.sub(r"\W", "_", f"{folder.resolve().parent.name}_{folder.name}"),  # tables share row names
            resume="allow" if config["resume"] else None,
            dir=str(folder),
            config=config,
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb=true: {_first_line(error)}; set WANDB_MODE=offline, or wandb=false") from None


def _import_wandb() -> Any:
    try:
        import wandb  # takes seconds: only when it is asked for
    except ImportError:
        raise UserError("wandb=true: wandb is not installed; pip install wandb, or set wandb=false") from None
    return wandb


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def run_wandb_sweep(config: dict, train: Train, folder: Path) -> None:
    """Let a wandb agent work through the grid; points that are done are reported to wandb, not trained again.

    wandb ignores ``resume`` inside a sweep: what is done is told by the run folders.

    Raises:
        UserError: if wandb cannot be reached.
    """
    wandb = _import_wandb()
    project = config["sweep"]["project"]

    def train_point() -> None:
        with wandb.init(dir=str(folder)) as run:
            overrides = {key: run.config[key] for key in (config["sweep"]["parameter"], "seed")}
            summary = run_point(config, overrides, folder / point_name(overrides), train, run)
            run.log({"test_top1": _row(config, overrides, summary)["top1"], "maiou": summary["maiou"]})

    try:
        sweep_id = config["sweep"]["id"] if config["sweep"]["resume"] else _new_wandb_sweep(wandb, config)
        print(f"wandb sweep {sweep_id}; to join it: sweep.resume=true sweep.id={sweep_id} run_dir={folder}")
        wandb.agent(sweep_id, train_point, project=project, count=config["sweep"]["count"])
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"sweeprun=true, wandb=true: wandb cannot be reached ({_first_line(error)}); log in with `wandb login`, "
            "or set wandb=false to run the same grid here"
        ) from None


def _new_wandb_sweep(wandb: Any, config: dict) -> str:
    points = grid(config)
    parameters = {key: {"values": list(dict.fromkeys(point[key] for point in points))} for key in points[0]}
    metric = {"name": "test_top1", "goal": "maximize"}
    return wandb.sweep({"method": "grid", "metric": metric, "parameters": parameters}, config["sweep"]["project"])
