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

from crop_cost import ratio

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import TrainImages, read_dataset, read_image
from dino_transform import MapCrops
from image_cache import cached_images
from transforms import IMAGENET_MEAN, IMAGENET_STD, BoxCrops, build_train_transform
from utils import environment

ROUNDS, IMAGES, BATCH = 9, 256, 32
SEED = 0
PLAIN, CACHE, DRAWN_BEFORE = "RandomResizedCrop", ", cache=disk", ", cache=disk, drawn before"


def main(root: str, size: str = "224", cache_folder: str = "runs/loader_cost") -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    data = read_dataset("cub", root)
    rows = data.rows("train")[:IMAGES]
    about = data.fingerprint(), data.ids.tolist(), data.paths, data.image_sizes
    kinds = {"files": None} | {
        f"cache={mode}": cached_images(mode, Path(cache_folder), *about, read_image) for mode in ("disk", "ram")
    }
    ways = {"torchvision's usual pipeline": usual([data.paths[row] for row in rows], int(size))}
    crops_by_name = crops_of(data, rows)
    for name, crops in crops_by_name.items():
        for kind, decoded in kinds.items():
            ways[f"{name}, {kind}"] = ours(data, rows, crops, int(size), decoded)
        ways[name + DRAWN_BEFORE] = ours(data, rows, DrawnBefore(crops), int(size), kinds["cache=disk"])
    for name, crops in as_large(crops_by_name, data, rows).items():
        ways[name + CACHE] = ours(data, rows, crops, int(size), kinds["cache=disk"])
    times = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.process_time()
            way(number)
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    print_table(times, len(rows))
    print_cost_of_crops(times)
    print(f"\n{len(rows)} images, {size} px, {ROUNDS} rounds, one thread; {environment()['processor']}, torch "
          f"{environment()['torch']}")  # fmt: skip


def crops_of(data, rows) -> dict:
    """Return our kinds of crop."""
    boxes, sizes = data.boxes[rows], data.image_sizes[rows]
    return {
        PLAIN: BoxCrops(boxes, sizes, thr=-1.0),
        "reference, thr .5": BoxCrops(boxes, sizes, thr=0.5, mode="reference"),
        "exact, thr .5": BoxCrops(boxes, sizes, thr=0.5),
        "density map": MapCrops(random_maps(data.ids[rows]), data.ids[rows], sizes, temperature=0.1),
    }


def random_maps(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Return a map of random numbers by image id."""
    rng = np.random.default_rng(0)
    return {image_id: rng.random((37, 49)).astype(np.float16) for image_id in ids.tolist()}


def as_large(crops_by_name: dict, data, rows) -> dict:
    """Return, for each kind of held crop, the RandomResizedCrop whose crops have the same mean area."""
    found, boxes, sizes = {}, data.boxes[rows], data.image_sizes[rows]
    choices = [BoxCrops(boxes, sizes, thr=-1.0, scale=(least, 1.0)) for least in np.linspace(0.08, 0.98, 91)]
    areas = np.array([mean_area(crops) for crops in choices])
    for name, crops in crops_by_name.items():
        if isinstance(crops, BoxCrops) and name != PLAIN:
            found[as_large_as(name)] = choices[np.abs(areas - mean_area(crops)).argmin()]
    return found


def as_large_as(name: str) -> str:
    """Return the name of the plain crop that is as large as a held one."""
    return f"{PLAIN} as large as {name}"


def mean_area(crops: BoxCrops) -> float:
    """Return the mean area in pixels over some epochs of crops."""
    return float(np.mean([crops.draw(np.random.default_rng(number))[:, 2:].prod(1) for number in range(20)]))


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


def print_cost_of_crops(times: dict[str, list[float]]) -> None:
    """Print each crop's loading over RandomResizedCrop's, over one as large, and over the same crops drawn before."""
    others = (lambda _: PLAIN + CACHE, lambda crop: as_large_as(crop) + CACHE, lambda crop: crop + DRAWN_BEFORE)
    print(f"\n| crop, cache=disk | over {PLAIN} (quartiles) | over one as large | over the same crops drawn before |")
    print("|---|---|---|---|")
    for crop in (name.removesuffix(DRAWN_BEFORE) for name in times if name.endswith(DRAWN_BEFORE)):
        bases = [times.get(other(crop)) for other in others]
        print(f"| {crop} | {' | '.join('–' if base is None else ratio(times[crop + CACHE], base) for base in bases)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
