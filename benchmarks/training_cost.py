"""Print what loading costs an epoch of training: ratios to the same epoch on batches that lie on the device already.

All ways alternately in one run; median and quartiles over rounds of the ratio within a round. On the CPU with one
thread and in CPU time (the machines are shared). Takes the config's words.

    python benchmarks/training_cost.py dataset.name=cub dataset.root=FOLDER image_size=96 cache_folder=runs/decoded
"""

import itertools
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from crop_cost import one_epoch, ratio, timed
from loader_cost import random_maps

sys.path.insert(0, str(Path(__file__).parent.parent))

import models
import train
import train_data
from config import load_config
from datasets import Batch
from dino_transform import MapCrops
from utils import environment

ROUNDS, STEPS = 7, 12
DENSITY = "cache=disk, density-map crops"
FOREACH = "cache=disk, optimizer not fused"
CONTIGUOUS = "cache=disk, weights not channels last"
WAYS = {  # what of the config differs
    "files": {"use_box": False},
    "cache=disk": {"use_box": False, "cache": "disk"},
    "cache=ram": {"use_box": False, "cache": "ram"},
    "cache=disk, exact crops": {"cache": "disk"},
    DENSITY: {"use_box": False, "cache": "disk"},
    "cache=disk, in 2 parts": {"use_box": False, "cache": "disk", "opt.accumulate": 2},
    "cache=disk, clipped": {"use_box": False, "cache": "disk", "opt.clip": 1.0},
    "cache=disk, compile": {"use_box": False, "cache": "disk", "compile": True},
    FOREACH: {"use_box": False, "cache": "disk"},
    CONTIGUOUS: {"use_box": False, "cache": "disk"},
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
    on_cpu = device.type == "cpu"
    torch.set_num_threads(1 if on_cpu else torch.get_num_threads())
    clock = time.process_time if on_cpu else time.perf_counter
    runs = {name: prepare(words, changes, device) for name, changes in WAYS.items()}
    use_maps(*runs[DENSITY][1:])
    use_foreach_kernels(*runs[FOREACH][:2])
    runs[CONTIGUOUS][0].model.to(memory_format=torch.contiguous_format)
    run, config, loader = runs["cache=disk"]
    runs = {"synthetic": (run, config, [on_device(batch, device) for batch in loader])} | runs
    times = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, (run, config, loader) in runs.items():
            seconds = timed(lambda run=run, config=config, loader=loader: one_epoch(run, config, loader, device), clock)
            if number:  # the first round warms up
                times[name].append(seconds)
    print("| epoch | over the synthetic one (quartiles) | over `cache=disk` |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {ratio(seconds, times['synthetic'])} | {ratio(seconds, times['cache=disk'])} |")
    waits = {name: 1 - np.median(np.array(times["synthetic"]) / times[name]) for name in ("files", "cache=disk")}
    shares = ", ".join(f"{max(0.0, share):.0%} with {name}" for name, share in waits.items())
    print(f"\nshare of the time in which the device waits for images: {shares}")
    print(f"start of one loader process: {start_up(words, device):.1f} s; {peak_memory(device)}")
    about = environment()
    machine = about["gpu"] or about["processor"]
    print(f"\n{STEPS} steps an epoch, {ROUNDS} rounds, no loader processes; {machine}, torch {about['torch']}")


def prepare(words: list[str], changes: dict, device: torch.device, workers: int = 0) -> tuple:
    """Build the training of one way; return its run, config and loader."""
    more = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    config = load_config([*words, *more, f"num_workers={workers}"])
    torch.set_num_threads(config["num_threads"] or torch.get_num_threads())
    folder, data = Path("runs/training_cost"), train_data.load_data(config)
    boxes, _ = train_data.crop_boxes(config, data)
    train.resolve(config, folder, data, boxes)
    crops, decoded = train_data.build_crops(config, data, boxes), train_data.decoded_images(config, data)
    loader = train_data.build_train_loader(config, data, crops, device, decoded)
    return train.build_run(folder, config, device), config, Steps(loader, STEPS * config["opt"]["accumulate"])


def use_maps(config: dict, steps: Steps) -> None:
    """Crop by density maps, of random numbers: their cost does not depend on what they show."""
    images = steps.loader.dataset
    images.crops = MapCrops(
        random_maps(images.ids), images.ids, images.crops.image_sizes, temperature=config["crop"]["temperature"]
    )


def use_foreach_kernels(run: train.Run, config: dict) -> None:
    """Step with torch's optimizer kernels for lists of weights in place of the fused one."""
    groups = models.parameter_groups(run.model, config["opt"]["weight_decay"])
    run.optimizer = train.build_optimizer(groups, config["opt"], fused=False)


def peak_memory(device: torch.device) -> str:
    """Return the most memory held at once, of the process and of the GPU."""
    words = f"most memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if device.type == "cuda":
        words += f", of the GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return words


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
