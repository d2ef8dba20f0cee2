"""Train a classifier on crops that are held to boxes.

Reads a data set and, where ``source`` names one, a box JSON. Writes a run folder: config.json, log.jsonl, last.pt,
best.pt, predictions.json, summary.json, curves.png.

    python train.py                                            # ToyBirds, two cores, about 1 minute
    python train.py run_dir=runs/toybirds_0 resume=true        # go on with a run that was interrupted
    python train.py preset=cub_first_training dataset.root=CUB_200_2011
    python train.py sweeprun=true run_dir=runs/sweep           # the grid sweep.values, run after run
    torchrun --nproc-per-node 8 train.py preset=cub_first_training     # one training on eight GPUs
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from pathlib import Path

from config import load_config
from experiments.sweep import run_sweep
from jobs.guard import run_script
from jobs.settings import check_config, leaves
from jobs.torchrun import require_single_process
from localized_crops.files import UserError, load_json
from training.run import RESUME_MAY_CHANGE
from training.train_run import run_stem, train_run


def main(config: dict) -> None:
    """Train once, or run the sweep."""
    if config["sweeprun"]:
        require_single_process("sweeprun=true")
        run_sweep(config, train_run)
    else:
        train_run(config)


def load_run_config(arguments: list[str]) -> dict | None:
    """Return the config of a run; with resume=true the run's own config.json takes the place of config.py."""
    config = load_config(arguments)
    if config is None or config["sweeprun"]:
        return config
    if config["resume"]:
        return resumed_config(arguments, Path(config["run_dir"] or unfinished_run(run_stem(config))))
    return forked_config(arguments, Path(config["init_from"])) if config["init_from"] else config


def unfinished_run(stem: str) -> Path:
    """Return the newest unfinished run under runs/; raise UserError if there is none."""
    begun = [path for path in Path("runs").glob(f"{stem}_*/config.json") if not (path.parent / "summary.json").exists()]
    if not begun:
        raise UserError(f"resume=true: no unfinished run in runs/{stem}_*; name the run with run_dir=FOLDER")
    return max(begun, key=lambda path: path.stat().st_mtime).parent


def forked_config(arguments: list[str], folder: Path) -> dict:
    """Return the config of a new run with the settings of the run in ``folder``, started from its best weights."""
    saved = saved_config(folder)
    saved |= {"run_dir": None, "resume": False, "num_workers": None, "A_machine": None}
    saved["model"] |= {"weights": None, "resumed_model": str(folder / "best.pt")}
    return load_config(arguments, base=saved)


def saved_config(folder: Path) -> dict:
    """Return the checked config.json of the run in ``folder``; keys newer than the run have their defaults."""
    return check_config(load_json(folder / "config.json"), f"{folder / 'config.json'}: ", is_saved=True)


def resumed_config(arguments: list[str], folder: Path) -> dict:
    """Return the saved config of the run in ``folder`` with the command line laid over it."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no run to go on with (no config.json); leave out resume=true")
    saved = saved_config(folder)
    config = load_config(arguments, base=saved) | {"run_dir": str(folder)}
    before, now = leaves(saved), leaves(config)
    for key in sorted(before.keys() - RESUME_MAY_CHANGE):
        is_extended = key == "num_epochs" and now[key] > before[key]
        if before[key] != now[key] and not is_extended:
            raise UserError(
                f"{key}={now[key]}: the run in {folder} has {before[key]}; a continued run keeps it; "
                f"init_from={folder} starts a new one with other settings"
            )
    return config


if __name__ == "__main__":
    run_script(main, load_run_config)
