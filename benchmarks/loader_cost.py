"""Print images/s per core of our loading, with and without decoded images, over torchvision's usual pipeline.

The usual one: decode with Pillow, RandomResizedCrop, flip, ToTensor, Normalize. Ours: what a loader's worker does (flip
and normalisation are the device's). One process, one thread, CPU time, alternated rounds over the same images.

    python benchmarks/loader_cost.py FOLDER_IN_CUB_FORMAT [SIZE] [CACHE_FOLDER]
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import TrainImages, read_dataset, read_image
from dino_transform import MapCrops
from image_cache import cached_images
from transforms import IMAGENET_MEAN, IMAGENET_STD, BoxCrops, build_train_transform
from utils import environment

ROUNDS, IMAGES, BATCH = 7, 256, 32
SEED = 0
DRAWN_BEFORE = ", cache, drawn before"


def main(root: str, size: str = "224", cache_folder: str = "runs/loader_cost") -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    data = read_dataset("cub", root)
    rows = data.rows("train")[:IMAGES]
    about = data.fingerprint(), data.ids.tolist(), data.paths, data.image_sizes
    decoded = cached_images("disk", Path(cache_folder), *about, read_image)
    ways = {"torchvision's usual pipeline": usual([data.paths[row] for row in rows], int(size))}
    for name, crops in crops_of(data, rows).items():
        for kind, images in (("files", None), ("cache", decoded)):
            ways[f"{name}, {kind}"] = ours(data, rows, crops, int(size), images)
        ways[name + DRAWN_BEFORE] = ours(data, rows, DrawnBefore(crops), int(size), decoded)
    times = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.process_time()
            way(number)
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    print_table(times, len(rows))
    print_cost_of_drawing(times)
    print(f"\n{len(rows)} images, {size} px, {ROUNDS} rounds, one thread; {environment()['processor']}, torch "
          f"{environment()['torch']}")  # fmt: skip


def crops_of(data, rows) -> dict:
    """Return our kinds of crop."""
    boxes, sizes = data.boxes[rows], data.image_sizes[rows]
    maps = {int(image_id): np.random.default_rng(0).random((37, 49)).astype(np.float16) for image_id in data.ids[rows]}
    return {
        "RandomResizedCrop": BoxCrops(boxes, sizes, thr=-1.0),
        "reference, thr .5": BoxCrops(boxes, sizes, thr=0.5, mode="reference"),
        "exact, thr .5": BoxCrops(boxes, sizes, thr=0.5),
        "density map": MapCrops(maps, data.ids[rows], sizes, temperature=0.1),
    }


class DrawnBefore:
    """The crops that others draw in each round, ready: what loading the same pixels costs without drawing."""

    def __init__(self, crops) -> None:
        """Draw the crops of every round, of the random numbers that ``TrainImages`` gives."""
        rngs = [np.random.default_rng([SEED, number]).spawn(2)[0] for number in range(ROUNDS + 1)]
        drawn = [crops.draw(rng) for rng in rngs]
        self.drawn = iter([[tuple(map(int, epoch[row])) for row in range(len(crops.image_sizes))] for epoch in drawn])

    def draw(self, _rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
        """Return the next round's crops."""
        return next(self.drawn)


def usual(paths: list[Path], size: int):
    """Return torchvision's usual pipeline over the images."""
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def run(_epoch: int) -> None:
        for start in range(0, len(paths), BATCH):
            torch.stack([steps(read_image(path)) for path in paths[start : start + BATCH]])

    return run


def ours(data, rows, crops, size: int, decoded):
    """Return our loading over the images."""
    transform = build_train_transform(size, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    images = TrainImages(data, rows, crops, transform, flip=0.5, seed=SEED, decoded=decoded)

    def run(epoch: int) -> None:
        for start in range(0, len(images), BATCH):
            rows = list(range(start, min(start + BATCH, len(images))))
            images[epoch, rows, len(rows), len(rows)]

    return run


def print_table(times: dict[str, list[float]], count: int) -> None:
    """Print images/s and the ratio to the usual pipeline within a round."""
    base = np.array(next(iter(times.values())))
    print("| loading | images/s per core | over the usual pipeline (quartiles) |\n|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = np.quantile(base / seconds, (0.25, 0.5, 0.75))
        print(f"| {name} | {count / np.median(seconds):.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def print_cost_of_drawing(times: dict[str, list[float]]) -> None:
    """Print each crop's loading over that of the same crops drawn before."""
    print("\n| crop, cache | over the same crops drawn before (quartiles) |\n|---|---|")
    for name in times:
        if name.endswith(DRAWN_BEFORE):
            crop = name.removesuffix(DRAWN_BEFORE)
            ratios = np.array(times[f"{crop}, cache"]) / times[name]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            print(f"| {crop} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main(*sys.argv[1:])
