"""Print what cropping large JPEGs costs, decoded at reduced scale, over torchvision's usual pipeline.

Photographs of 4000 x 3000 pixels are drawn here, or made of the first ones of a folder, enlarged, with grain. One
process, one thread, CPU time, alternated rounds over the same images; then how far the pixels are from those of the
whole image, decoded at full scale and cropped alike.

    python benchmarks/large_photos.py [FOLDER_IN_CUB_FORMAT] [SIZE]
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import torch

from loader_cost import ours, usual
from measuring import alternated, build_images, ratio, write_cub

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset
from readers.data_set import DataSet
from readers.images import read_image
from training import batches
from training.epoch_crops import BoxCrops
from utils import environment

ROUNDS, IMAGES = 5, 8
LARGE = (4000, 3000)  # width height, pixels
GRAIN = 5.0  # grey levels: a file has 3 to 4 MB, as a telephone's


def main(source: str | None = None, size: str = "224") -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_cub(Path(folder) / "photos", photographs(source), IMAGES, 2)
        data = read_dataset("cub", root)
        rows = np.arange(IMAGES)
        megabytes = np.mean([path.stat().st_size for path in data.paths]) / 1e6
        ways = {"torchvision's usual pipeline": usual(list(data.paths), int(size))}
        kinds = {f"{name}": BoxCrops(data.boxes, data.image_sizes, thr=thr)
                 for name, thr in (("RandomResizedCrop", -1.0), ("exact, thr 0.5", 0.5))}  # fmt: skip
        for name, crops in kinds.items():
            ways[name] = ours(data, rows, crops, int(size), None)
            ways[f"{name}, at full scale"] = at_full_scale(ways[name])
        times = alternated(ways, ROUNDS)
        print_table(times)
        print("\n" + differences(data, kinds["RandomResizedCrop"], int(size)))
    about = environment()
    print(f"{IMAGES} JPEGs of {LARGE[0]} x {LARGE[1]} pixels, {megabytes:.1f} MB each, {size} px, {ROUNDS} rounds, one "
          f"thread, CPU time; {about['processor']}, torch {about['torch']}")  # fmt: skip


def photographs(source: str | None) -> list[np.ndarray]:
    """Return IMAGES large photographs."""
    if source is None:
        return build_images(IMAGES, (LARGE[::-1],), GRAIN)
    paths, rng = list(read_dataset("cub", source).paths)[:IMAGES], np.random.default_rng(0)
    images = (np.asarray(read_image(path).resize(LARGE, PIL.Image.Resampling.BICUBIC)) for path in paths)
    return [np.clip(one + rng.normal(0, GRAIN, one.shape), 0, 255).astype(np.uint8) for one in images]


def at_full_scale(way):
    """Return the way of loading, without reduced scales."""

    def seconds(epoch: int) -> float:
        with mock.patch.object(batches, "reduction_for", lambda crop, size: 1):
            return way(epoch)

    return seconds


def differences(data: DataSet, crops: BoxCrops, size: int) -> str:
    """Return how far the pixels of reduced crops are from those of the whole images, in grey levels."""
    transform = batches.TrainTransform(size)
    images = batches.TrainImages(data, np.arange(IMAGES), crops, transform, flip=0.0, seed=0)
    everything = (0, list(range(IMAGES)), IMAGES, IMAGES)
    reduced = images[everything].images.float()
    with mock.patch.object(batches, "reduction_for", lambda crop, size: 1):
        gaps = (reduced - images[everything].images.float()).abs()
    scales = [batches.reduction_for(crop, size) for crop in images.drawn.tolist()]
    counts = ", ".join(f"{scale} ({scales.count(scale)} crops)" for scale in sorted(set(scales)))
    return (
        f"sides reduced by {counts}; difference in grey levels: mean {gaps.mean():.2f}, 99% under "
        f"{np.quantile(gaps.numpy(), 0.99):.1f}, most {gaps.max():.0f}"
    )


def print_table(times: dict[str, list[float]]) -> None:
    """Print images/s and the ratio to the usual pipeline."""
    base = next(iter(times.values()))
    print("| loading | images/s per core | over the usual pipeline (quartiles) |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {IMAGES / np.median(seconds):.1f} | {ratio(base, seconds)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
