"""Print how the cost per image and the memory grow with the data set: the same images once, 4 and 16 times over.

Each measurement is a process of its own, alternated; ratios to the data set taken once, within a round.

    python benchmarks/growth.py FOLDER_IN_CUB_FORMAT
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from measuring import memory

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset
from jobs.loader import build_loader
from readers.data_set import DataSet
from readers.image_cache import cached_images
from training.batches import EpochBatches, TrainImages
from training.epoch_crops import BoxCrops
from transforms import TrainTransform
from utils import environment

ROUNDS, IMAGES, BATCH, SIZE = 3, 128, 32, 96
TIMES = (1, 4, 16)


def main(root: str) -> None:
    """Measure and print the table."""
    measured = {times: [] for times in TIMES}
    for _ in range(ROUNDS):
        for times in TIMES:
            done = subprocess.run(
                [sys.executable, __file__, root, str(times)], stdout=subprocess.PIPE, check=True, text=True
            )
            measured[times].append(json.loads(done.stdout.splitlines()[-1]))  # the cache says that it decodes
    print("| | " + " | ".join(f"x{times}" for times in TIMES) + " |\n|---|" + "---|" * len(TIMES))
    for name in measured[1][0]:
        print(f"| {name} | " + " | ".join(cell(measured, name, times) for times in TIMES) + " |")
    about = environment()
    print(f"\n{IMAGES} images once, {SIZE} px, {ROUNDS} rounds; {about['processor']}, torch {about['torch']}")


def cell(measured: dict[int, list[dict]], name: str, times: int) -> str:
    """Return the median of one measurement; for times per image its ratio to that of the data set taken once."""
    values = np.array([one[name] for one in measured[times]])
    if times == 1 or "per image" not in name:
        return f"{np.median(values):.3g}"
    low, middle, high = np.quantile(values / [one[name] for one in measured[1]], (0, 0.5, 1))
    return f"{middle:.2f} times ({low:.2f} to {high:.2f})"


def measure(root: str, times: int) -> dict[str, float]:
    """Return the measurements of one data set."""
    torch.set_num_threads(1)
    data = repeated(read_dataset("cub", root), times)
    found = {"first batch of a loader process, s": start_up(train_images(data, None))}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        decoded = cached_images(Path(folder), data)
        found["building the cache, ms per image"] = 1e3 * (time.perf_counter() - start) / len(data.ids)
        start = time.perf_counter()
        cached_images(Path(folder), data)
        found["opening the cache, ms per image"] = 1e3 * (time.perf_counter() - start) / len(data.ids)
        for name, images in (("files", None), ("cache", decoded)):
            loaded = train_images(data, images)
            start = time.process_time()
            for batch in batches(len(data.ids)):
                loaded[0, batch, len(batch), len(batch)]
            found[f"loading, {name}, CPU ms per image"] = 1e3 * (time.process_time() - start) / len(data.ids)
        found["memory of the process, MiB"] = memory("RssAnon")
    return found


def repeated(data: DataSet, times: int) -> DataSet:
    """Return a data set of the first images, ``times`` times over, each time under new ids."""
    rows = np.tile(np.arange(min(IMAGES, len(data.ids))), times)
    fields = {name: getattr(data, name)[rows] for name in ("paths", "labels", "boxes", "split", "image_sizes")}
    return dataclasses.replace(data, ids=np.arange(1, len(rows) + 1), **fields)


def train_images(data: DataSet, decoded) -> TrainImages:
    """Return the training images of a whole data set, plainly cropped."""
    crops = BoxCrops(data.boxes, data.image_sizes, thr=0.5)
    transform = TrainTransform(SIZE, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    return TrainImages(data, np.arange(len(data.ids)), crops, transform, flip=0.5, seed=0, decoded=decoded)


def batches(count: int) -> list[list[int]]:
    """Return the rows of an epoch in order, in batches."""
    return [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]


def start_up(images: TrainImages) -> float:
    """Return the seconds to the first batch of a loader with one process."""
    sampler = EpochBatches(len(images), BATCH, seed=0)
    start = time.perf_counter()
    next(iter(build_loader(images, num_workers=1, pin_memory=False, batch_size=None, sampler=sampler)))
    return time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main(*sys.argv[1:])
