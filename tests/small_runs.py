"""Short trainings in this process, and their comparison, for several test files."""

import torch

import train
from training.log import load_log
from utils import load_tensors

SMALL = [
    "num_epochs=4",
    "log_interval=1",
    "image_size=32",
    "batch_size=8",
    "num_workers=0",
    "dataset.name=cub",
    "opt.warmup_epochs=1",
]


def words(birds, run_dir, *more):
    return [*SMALL, f"dataset.root={birds}", f"run_dir={run_dir}", *more]


def run(birds, run_dir, *more):
    """Train in this process as the command line would; return the summary."""
    return train.train_run(train.load_run_config(words(birds, run_dir, *more)))


def assert_same_run(a, b):
    """Check that two runs ended with the same weights, bit for bit, and logged the same numbers."""
    first, second = (load_tensors(folder / "last.pt") for folder in (a, b))
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    timed = {"seconds", "images_per_second"}
    logs = [[{k: v for k, v in r.items() if k not in timed} for r in load_log(f / "log.jsonl")] for f in (a, b)]
    assert logs[0] == logs[1]
    assert (a / "predictions.json").read_text() == (b / "predictions.json").read_text()
