"""Make a table of docs/results.md: from data and weights to the finished Markdown and picture.

First come the stages that the table needs (boxes, maps, a classifier), each only if its result does not exist yet;
then the trainings. Writes ``run_dir`` (default runs/TABLE): a run folder per training, TABLE.md, TABLE.json, TABLE.png.
What is done is not repeated; the same command started twice shares the trainings (one process per core, each with
num_workers=0). A table has as many trainings as it has rows and budgets, times ``reproduce.seeds``.

    python reproduce.py reproduce.table=toybirds_crops num_workers=0
    python reproduce.py reproduce.table=toybirds_boxes num_workers=0
    python reproduce.py reproduce.table=small_photos reproduce.seeds=3 dataset.root=FOLDER num_workers=0
    python reproduce.py reproduce.table=photos_pretrained dataset.root=FOLDER model.weights=FILE \\
        dino.weights=FILE dino.object_weights=FILE num_workers=0
    python reproduce.py reproduce.table=cub_dino_boxes dataset.root=CUB_200_2011    # a GPU, weights from the hub

The other words of the command line go to stages and trainings alike; wandb=true logs each training to wandb too.
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

import shlex
import subprocess
import sys
from pathlib import Path

from config import load_config
from experiments.table_report import make_table
from experiments.tables import TABLES, Step, Table
from jobs.guard import run_script, same_command, with_resume_hint
from jobs.settings import is_read_by, parse_value, split_word, word_of
from jobs.torchrun import require_single_process
from localized_crops.files import UserError
from training.train_run import train_run

NOT_PASSED_ON = ("run_dir", "resume", "reproduce.table", "reproduce.seeds")  # that stages and trainings do not get


def load_request(arguments: list[str]) -> dict | None:
    """Return what the command line asks for: table, seeds (a range), run_dir, and its other words by key (overrides).

    Raises:
        UserError: as load_config does; on preset=, which the table names.
    """
    config = load_config(arguments)
    if config is None:
        return None
    if config["preset"] is not None:
        raise UserError(f"preset={config['preset']}: each table has its own preset; leave it out")
    words = dict(map(split_word, arguments))
    overrides = {key: parse_value(key, text) for key, text in words.items() if key not in NOT_PASSED_ON}
    seeds = range(config["seed"], config["seed"] + config["reproduce"]["seeds"])
    return {"table": config["reproduce"]["table"], "seeds": seeds, "run_dir": config["run_dir"], "overrides": overrides}


def main(request: dict) -> None:
    """Run the stages and trainings that the table still lacks, then write it."""
    name, seeds, overrides = request["table"], request["seeds"], request["overrides"]
    if name not in TABLES:
        raise UserError(f"reproduce.table={name}: there is no such table; there are {', '.join(TABLES)}")
    require_single_process("reproduce.py")
    table = TABLES[name]
    folder = Path(request["run_dir"] or f"runs/{table.folder or name}")
    shared = point_config(table, overrides)
    with with_resume_hint(same_command):
        for step in table.steps:
            run_step(step, overrides)
        make_table(shared, table, name, seeds, folder, train_run)


def run_step(step: Step, overrides: dict) -> None:
    """Run a stage unless what it makes is there; an interrupted one goes on.

    Raises:
        UserError: if it fails.
    """
    if Path(step.makes).exists():
        return
    used = {key: value for key, value in overrides.items() if is_read_by(Path(step.script).stem, key)}
    words = [*(word_of(key, value) for key, value in used.items()), *step.words]  # the later one holds
    if step.script == "train.py" and (Path(step.makes).parent / "config.json").exists():
        words.append("resume=true")
    print(f"--- python {step.script} {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(step.script)), *words])
    if done.returncode or not Path(step.makes).exists():
        raise UserError(f"{step.script} ended with status {done.returncode} and did not make {step.makes}; see above")


def point_config(table: Table, overrides: dict) -> dict:
    """Return the config that all trainings of the table share; ``overrides`` (dotted key -> value) is laid over it."""
    words = (word_of(key, value) for key, value in (table.common | overrides).items())
    return load_config([f"preset={table.preset}", *words])


if __name__ == "__main__":
    run_script(main, load_request)
