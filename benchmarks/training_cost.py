"""Print what loading costs an epoch of training: ratios to the same epoch on batches that lie on the device already.

All ways alternately in one run; median and quartiles over rounds of the ratio within a round. Takes the config's words.

    python benchmarks/training_cost.py dataset.name=cub dataset.root=FOLDER image_size=96 cache_folder=runs/decoded
"""

import itertools
import sys
import time
from pathlib import Path

import torch

from crop_cost import one_epoch, ratio, timed

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from config import load_config
from datasets import Batch
from utils import environment

ROUNDS, STEPS = 5, 12
WAYS = {
    "files": {"use_box": False},
    "cache=disk": {"use_box": False, "cache": "disk"},
    "cache=disk, exact crops": {"cache": "disk"},
    "cache=disk, in 2 parts": {"use_box": False, "cache": "disk", "opt.accumulate": 2},
    "cache=disk, clipped": {"use_box": False, "cache": "disk", "opt.clip": 1.0},
}


class Steps:
    """The first batches of a loader, anew each epoch."""

    def __init__(self, loader, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return self.count


def main(words: list[str]) -> None:
    """Measure and print the table."""
    device = train.choose_device(None)
    runs = {name: prepare(words, changes, device) for name, changes in WAYS.items()}
    run, config, loader = runs["cache=disk"]
    runs = {"synthetic": (run, config, [on_device(batch, device) for batch in loader])} | runs
    times = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, (run, config, loader) in runs.items():
            seconds = timed(lambda run=run, config=config, loader=loader: one_epoch(run, config, loader))
            if number:  # the first round warms up
                times[name].append(seconds)
    print("| epoch | over the synthetic one (quartiles) |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {ratio(seconds, times['synthetic'])} |")
    print(f"| start of one loader process, seconds | {start_up(words, device):.1f} |")
    about = environment()
    machine = about["gpu"] or about["processor"]
    print(f"\n{STEPS} steps an epoch, {ROUNDS} rounds, no loader processes; {machine}, torch {about['torch']}")


def prepare(words: list[str], changes: dict, device: torch.device, workers: int = 0) -> tuple:
    """Build the training of one way; return its run, config and loader."""
    more = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    config = load_config([*words, *more, f"num_workers={workers}"])
    torch.set_num_threads(config["num_threads"] or torch.get_num_threads())
    folder, data = Path("runs/training_cost"), train.load_data(config)
    boxes, _ = train.crop_boxes(config, data)
    train.resolve(config, folder, data, boxes)
    crops, decoded = train.build_crops(config, data, boxes), train.decoded_images(config, data)
    loader = train.build_train_loader(config, data, crops, device, decoded)
    return train.build_run(folder, config, device), config, Steps(loader, STEPS * config["opt"]["accumulate"])


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its images, labels and flips on the device."""
    return batch._replace(**{name: getattr(batch, name).to(device) for name in ("images", "labels", "flips")})


def start_up(words: list[str], device: torch.device) -> float:
    """Return the seconds to the first batch of a loader with one process."""
    _, _, loader = prepare(words, WAYS["files"], device, workers=1)
    start = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
