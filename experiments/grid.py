"""The grid runner: many trainings, each in a folder of its own and done once.

A training whose summary.json is there is done and not repeated, one that was interrupted goes on, and one that another
process works on is left to that process: the same command started twice shares the work.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jobs.schema import DEFAULTS, NOT_SWEPT
from jobs.settings import is_read_by, leaves, set_key
from localized_crops.files import UserError, load_json, user_errors
from utils import UNREADABLE, FolderInUseError

Train = Callable[..., dict]  # (config, wandb_run=None) -> summary


class Point(NamedTuple):
    """One training of a grid."""

    label: str
    overrides: dict[str, Any]  # dotted key -> value, laid over the config that all points share
    folder: Path


def run_grid(config: dict, points: list[Point], train: Train, at_most: int | None = None) -> None:
    """Train the points that are not done, one after the other; no more than ``at_most`` of them.

    Raises:
        UserError: if a folder holds a run with other settings.
    """
    trained = 0
    for number, point in enumerate(points, 1):
        done = (point.folder / "summary.json").exists()
        if not done and trained == at_most:
            print(f"{at_most} trainings done by this process; run the same command again for the others")
            return
        print(f"--- {number}/{len(points)} {point.label}{': done already' * done}", flush=True)
        trained += not done
        try:
            run_point(config, point, train)
        except FolderInUseError:
            print("another process works on it")


def run_point(config: dict, point: Point, train: Train, wandb_run: Any = None) -> dict:
    """Train one point unless it is done; return its summary.

    Raises:
        UserError: if the folder holds a run with other settings.
        FolderInUseError: if another process works on it.
    """
    settings = point_config(config, point)
    if settings["resume"]:
        _check_same(settings, point)
    if (point.folder / "summary.json").exists():
        return load_summary(point.folder)
    return train(settings, wandb_run)


def point_config(config: dict, point: Point) -> dict:
    """Return the config of one training: a copy of ``config`` with the overrides of the point."""
    changed = copy.deepcopy(config) | {"run_dir": str(point.folder), "sweeprun": False}
    for key, value in point.overrides.items():
        set_key(changed, key, copy.deepcopy(value))
    changed["resume"] = (point.folder / "config.json").exists()
    return changed


def _check_same(config: dict, point: Point) -> None:
    """Refuse a folder that was made with other settings than ``config``, in which None stands for any value."""
    saved = load_json(point.folder / "config.json")
    if not isinstance(saved, dict):
        raise UserError(f"{point.folder / 'config.json'}: holds no config; remove the folder or give another run_dir")
    settings, saved = leaves(config), leaves(saved)
    derived = {"THR"} if settings["maiou"] is not None else set()
    for key in sorted((settings.keys() & saved.keys()) - derived):  # later versions have further keys
        differs = settings[key] is not None and settings[key] != saved[key]
        if differs and (key == "seed" or _is_depended_on(key, settings)):
            raise UserError(f"{point.folder}: holds a run with {key}={saved[key]}; give another run_dir")


def _is_depended_on(key: str, settings: dict[str, Any]) -> bool:
    """Return whether a training's result depends on a dotted key of its settings, which are given by dotted keys.

    It does not depend on the machine's, on logging and on other stages.
    """
    if key.split(".")[0] == "dino":
        return settings["self_distillation.every"] > 0
    return is_read_by("train", key) and key.split(".")[0] not in NOT_SWEPT


# --- finished trainings -------------------------------------------------------------------------------------------


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


def crop_family(config: dict) -> str:
    """Return the kind of a training's crops, whatever the share of the box that they keep."""
    if config["use_dino_maps"]:
        return "density maps"
    if not config["use_box"] or config["THR"] < 0:
        return "RandomResizedCrop"
    return f"{config['crop']['mode']}, {config['source']}"


def settings_key(config: dict) -> str:
    """Return as text what two trainings share if they are the same but for their seed."""
    settings = DEFAULTS | leaves(config)  # an earlier version had fewer keys
    return json.dumps({key: settings[key] for key in sorted(settings) if _is_depended_on(key, settings)})


def group_by_settings(settings: dict[Path, str]) -> dict[str, list[Path]]:
    """Return the run folders that share their `settings_key`, by a label: the first one's name without its seed."""
    groups = {}
    for folder, key in settings.items():
        groups.setdefault(key, []).append(folder)
    names = [re.sub(r"[,_-]*seed[=_]?\d+", "", members[0].name) for members in groups.values()]
    if len(set(names)) < len(names):
        names = [str(members[0]) for members in groups.values()]
    counts = [f", n = {len(members)}" if len(members) > 1 else "" for members in groups.values()]
    return {name + count: members for name, count, members in zip(names, counts, groups.values(), strict=True)}
