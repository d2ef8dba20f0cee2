"""Print images/s per core of our loading, with and without decoded images, over torchvision's usual pipeline.

The usual one: decode with Pillow, RandomResizedCrop, flip, ToTensor, Normalize. Ours: what a loader's worker does (flip
and normalisation are the device's). One process, one thread, CPU time, alternated rounds over the same images.

    python benchmarks/loader_cost.py FOLDER_IN_CUB_FORMAT [SIZE] [CACHE_FOLDER]
"""

import importlib.util
import sys
import tarfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms

from measuring import alternated, ratio, timed

sys.path.insert(0, str(Path(__file__).parent.parent))

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from datasets import read_dataset
from localized_crops.map_file import MapCache, save_map_cache
from readers.image_cache import cached_images
from readers.images import read_image
from training.batches import TrainImages
from training.epoch_crops import BoxCrops, MapCrops
from transforms import TrainTransform
from utils import environment

ROUNDS, IMAGES, BATCH = 9, 256, 32
EPOCHS = 32  # whose crops are drawn: what is kept of maps serves all
SEED = 0
PLAIN, CACHE = "RandomResizedCrop", ", cache=disk"


def main(root: str, size: str = "224", cache_folder: str = "runs/loader_cost") -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    data = read_dataset("cub", root)
    rows = data.rows("train")[:IMAGES]
    kinds = {"files": None, "cache=disk": cached_images(Path(cache_folder), data)}
    files = [data.paths[row] for row in rows]
    ways = {"torchvision's usual pipeline": usual(files, int(size))}
    if importlib.util.find_spec("webdataset"):
        ways["webdataset, the same steps"] = from_shards(Path(cache_folder) / "webdataset.tar", files, int(size))
    crops_by_name = crops_of(data, rows, saved_maps(Path(cache_folder), data.ids[rows]))
    for name, crops in crops_by_name.items():
        for kind, decoded in kinds.items():
            ways[f"{name}, {kind}"] = ours(data, rows, crops, int(size), decoded)
    for name, crops in as_large(crops_by_name, data, rows).items():
        ways[name + CACHE] = ours(data, rows, crops, int(size), kinds["cache=disk"])
    times = alternated(ways, ROUNDS)
    print_table(times, len(rows))
    print_cost_of_crops(times, {name: drawing(crops) / len(rows) for name, crops in crops_by_name.items()})
    print(f"\n{len(rows)} images, {size} px, {ROUNDS} rounds, one thread; {environment()['processor']}, torch "
          f"{environment()['torch']}")  # fmt: skip


def saved_maps(folder: Path, ids: np.ndarray) -> MapCache:
    """Return random maps by image id, read from a file as in a training."""
    about = {"dataset": "", "model": "", "weights_sha256": "", "settings": {}}
    save_map_cache(folder / "random.maps.safetensors", random_maps(ids).items(), about)
    return MapCache.open(folder / "random.maps.safetensors")


def crops_of(data, rows, maps: MapCache) -> dict:
    """Return our kinds of crop."""
    boxes, sizes = data.boxes[rows], data.image_sizes[rows]
    return {
        PLAIN: BoxCrops(boxes, sizes, thr=-1.0),
        "reference, thr .5": BoxCrops(boxes, sizes, thr=0.5, mode="reference"),
        "exact, thr .5": BoxCrops(boxes, sizes, thr=0.5),
        "density map": MapCrops(maps, data.ids[rows], sizes, temperature=0.1),
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


def usual_steps(size: int) -> transforms.Compose:
    """Return torchvision's usual pipeline for one image."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def usual(paths: list[Path], size: int):
    """Return what loads the images by torchvision's usual pipeline, and returns the seconds."""
    steps = usual_steps(size)

    def load() -> None:
        for start in range(0, len(paths), BATCH):
            torch.stack([steps(read_image(path)) for path in paths[start : start + BATCH]])

    return lambda _epoch: timed(load)


def from_shards(tar: Path, paths: list[Path], size: int):
    """Return what loads the images by the usual pipeline from one webdataset shard, and returns the seconds."""
    webdataset = importlib.import_module("webdataset")
    with tarfile.open(tar, "w") as file:
        for number, path in enumerate(paths):
            file.add(path.resolve(), f"{number:06}.jpg")
    images = webdataset.WebDataset(str(tar), shardshuffle=False).decode("pilrgb").to_tuple("jpg")
    batches = images.map_tuple(usual_steps(size)).batched(BATCH)
    return lambda _epoch: timed(lambda: deque(batches, maxlen=0))


def ours(data, rows, crops, size: int, decoded):
    """Return what loads the images of an epoch our way, and returns the seconds, those of drawing its crops too."""
    transform = TrainTransform(size, "bilinear", augment=False, augment_p=1.0, use_augment_mix=False)
    images = TrainImages(data, rows, crops, transform, flip=0.5, seed=SEED, decoded=decoded)

    def load(epoch: int) -> None:
        for start in range(0, len(images), BATCH):
            rows = list(range(start, min(start + BATCH, len(images))))
            images[epoch, rows, len(rows), len(rows)]

    def seconds(epoch: int) -> float:
        images[epoch, [0, 1], 2, 2]  # draws the crops
        return timed(lambda: load(epoch)) + drawing(crops)

    return seconds


def drawing(crops) -> float:
    """Return the seconds of drawing one epoch's crops, the mean of several."""
    return timed(lambda: [crops.draw(np.random.default_rng(number)) for number in range(EPOCHS)]) / EPOCHS


def print_table(times: dict[str, list[float]], count: int) -> None:
    """Print images/s and the ratio to the usual pipeline within a round."""
    base = np.array(next(iter(times.values())))
    print("| loading | images/s per core | over the usual pipeline (quartiles) |\n|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = np.quantile(base / seconds, (0.25, 0.5, 0.75))
        print(f"| {name} | {count / np.median(seconds):.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def print_cost_of_crops(times: dict[str, list[float]], drawings: dict[str, float]) -> None:
    """Print each crop's loading over RandomResizedCrop's and over one as large, and what drawing takes."""
    print(f"\n| crop, cache=disk | over {PLAIN} (quartiles) | over one as large | drawing (µs per image) |")
    print("|---|---|---|---|")
    for crop, seconds in drawings.items():
        bases = times[PLAIN + CACHE], times.get(as_large_as(crop) + CACHE)
        ratios = ["–" if base is None else ratio(times[crop + CACHE], base) for base in bases]
        print(f"| {crop} | {' | '.join(ratios)} | {seconds * 1e6:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
