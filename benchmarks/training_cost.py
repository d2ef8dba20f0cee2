"""Print what loading costs an epoch of training: ratios to the same epoch on batches that lie on the device already.

All ways alternately in one run; median and quartiles over rounds of the ratio within a round. On the CPU with one
thread and, unless the words say otherwise, without loader processes, and then in CPU time (the machines are shared);
on a GPU with as many processes as training has. Takes the config's words.

    python benchmarks/training_cost.py dataset.name=cub dataset.root=FOLDER image_size=96 cache_folder=runs/decoded
"""

import itertools
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from loader_cost import random_maps
from measuring import alternated, ratio, timed_on

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import load_config
from jobs.machine import choose_device
from training import train_data, train_run
from training.batches import Batch
from training.epoch_crops import MapCrops
from training.loop import train_one_epoch
from training.run import Run
from utils import environment

ROUNDS = 21
CPU_STEPS = 12  # of an epoch on the CPU; whole epochs on a GPU, where what its processes loaded ahead would be lost
DENSITY = "cache=disk, density-map crops"
FOREACH = "cache=disk, optimizer not fused"
CONTIGUOUS = "cache=disk, weights not channels last"
CLIPPED, COMPILED = "cache=disk, clipped", "cache=disk, compile"
OTHER_STEPS = CLIPPED, COMPILED, FOREACH, CONTIGUOUS  # load as cache=disk does
WAYS = {  # what of the config differs
    "files": {"use_box": False},
    "cache=disk": {"use_box": False, "cache": "disk"},
    "cache=disk, exact crops": {"cache": "disk"},
    DENSITY: {"use_box": False, "cache": "disk"},
    "cache=disk, in 2 parts": {"use_box": False, "cache": "disk", "opt.accumulate": 2},
    CLIPPED: {"use_box": False, "cache": "disk", "opt.clip": 1.0},
    COMPILED: {"use_box": False, "cache": "disk", "compile": True},
    FOREACH: {"use_box": False, "cache": "disk"},
    CONTIGUOUS: {"use_box": False, "cache": "disk"},
}


class Steps:
    """The first batches of a loader, anew each epoch."""

    images = 0  # in them, once they were loaded

    def __init__(self, loader, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return self.count


def main(words: list[str]) -> None:
    """Measure and print the table."""
    device = choose_device(None)
    times, loader, workers = measure(words, list(WAYS), device, ROUNDS)
    print_table(times, loader.images)
    print(f"start of one loader process: {start_up(words, device):.1f} s; {peak_memory(device)}")
    about = environment()
    print(f"\n{len(loader)} steps an epoch, {ROUNDS} rounds, {workers} loader processes; "
          f"{about['gpu'] or about['processor']}, torch {about['torch']}")  # fmt: skip


def measure(
    words: list[str], names: list[str], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], Steps, int]:
    """Return the seconds of an epoch in each round, of synthetic batches and of ``names`` from WAYS, in turns.

    Returns:
        The seconds; the loader of cache=disk; and how many loader processes it has.
    """
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    runs = {name: prepare(words, WAYS[name], device) for name in dict.fromkeys(["cache=disk", *names])}
    if DENSITY in runs:
        use_maps(*runs[DENSITY])
    run, loader = runs["cache=disk"]
    workers = run.config["num_workers"]
    clock = time.perf_counter if workers else time.process_time  # that of one process
    for name in set(OTHER_STEPS) & runs.keys():
        runs[name] = (runs[name][0], loader)  # its processes serve all of them
    if FOREACH in runs:
        use_foreach_kernels(runs[FOREACH][0])
    if CONTIGUOUS in runs:
        runs[CONTIGUOUS][0].model.to(memory_format=torch.contiguous_format)
    synthetic = [on_device(batch, device) for batch in loader]
    loader.images = sum(batch.real for batch in synthetic)
    runs = {"synthetic": (run, synthetic)} | runs
    ways = {
        name: lambda _, parts=parts: timed_on(device, lambda: train_one_epoch(*parts), clock)
        for name, parts in runs.items()
    }
    times = alternated(ways, rounds)
    return times, loader, workers


def print_table(times: dict[str, list[float]], images: int) -> None:
    """Print the ratios of all epochs, the images/s of the first three, and how long the device waits."""
    print("| epoch | over the synthetic one (quartiles) | over `cache=disk` |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {ratio(seconds, times['synthetic'])} | {ratio(seconds, times['cache=disk'])} |")
    rates = ", ".join(f"{images / np.median(times[name]):.0f} {name}" for name in ("synthetic", "files", "cache=disk"))
    print(f"\nimages/s: {rates}")
    waits = {name: 1 - np.median(np.array(times["synthetic"]) / times[name]) for name in ("files", "cache=disk")}
    shares = ", ".join(f"{max(0.0, share):.0%} with {name}" for name, share in waits.items())
    print(f"share of the time in which the device waits for images: {shares}")


def prepare(words: list[str], changes: dict, device: torch.device) -> tuple:
    """Build the training of one way; return its run and loader."""
    more = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    config = load_config([*(["num_workers=0"] if device.type == "cpu" else []), *words, *more])
    torch.set_num_threads(config["num_threads"] or torch.get_num_threads())
    folder, data = Path("runs/training_cost"), train_data.load_data(config)
    boxes, _ = train_data.crop_boxes(config, data)
    train_run.resolve(config, folder, data, boxes)
    crops, decoded = train_data.build_crops(config, data, boxes), train_data.decoded_images(config, data)
    loader = train_data.build_train_loader(config, data, crops, device, decoded)
    steps = len(loader) if device.type == "cuda" else CPU_STEPS * config["opt"]["accumulate"]
    run = Run(folder, config, data.class_names, {}, device)
    run.is_begun = True  # config.json is not written
    return run, Steps(loader, steps)


def use_maps(run: Run, steps: Steps) -> None:
    """Crop by density maps, of random numbers: their cost does not depend on what they show."""
    images = steps.loader.dataset
    images.crops = MapCrops(
        random_maps(images.ids), images.ids, images.crops.image_sizes, temperature=run.config["crop"]["temperature"]
    )


def use_foreach_kernels(run: Run) -> None:
    """Step with torch's optimizer kernels for lists of weights in place of the fused one."""
    for group in run.optimizer.param_groups:
        group["fused"] = None  # not False, which leaves out these kernels too


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
    _, loader = prepare([*words, "num_workers=1"], WAYS["files"], device)
    start = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
