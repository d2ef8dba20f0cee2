"""Decode every image of a data set and print a report.

Reads a folder in CUB-200-2011's file format, writes nothing. Status 2 if anything is wrong.

    python check_dataset.py dataset.name=cub dataset.root=CUB_200_2011
"""

from collections import Counter

import numpy as np

from config import load_config
from datasets import read_dataset
from jobs.guard import run_script
from localized_crops.boxes import center_boxes, iou
from localized_crops.files import UserError
from readers.data_set import DataSet
from readers.images import unreadable_images


def main(config: dict) -> None:
    """Check the data set of ``config``."""
    data = read_dataset(**config["dataset"] | {"check": False})  # all faults are listed here, not the first alone
    print(report(data))
    faults = unreadable_images(data)
    for line in faults:
        print(line)
    if faults:
        raise UserError(f"{data.root}: {len(faults)} of {len(data.ids)} images cannot be read; they are listed above")
    print(f"all {len(data.ids)} images can be read")


def report(data: DataSet) -> str:
    """Return a few lines on images, classes, splits and boxes."""
    splits = Counter(data.split.tolist())
    per_class = np.bincount(data.labels, minlength=len(data.class_names))
    share = data.boxes[:, 2:].prod(1) / data.image_sizes.prod(1)
    low, median, high = np.quantile(share, (0.05, 0.5, 0.95))
    centred = iou(center_boxes(data.image_sizes), data.boxes).mean()
    return "\n".join(
        [
            f"{data.root}: {len(data.ids)} images, {len(data.class_names)} classes",
            f"images a class: {per_class.min()} to {per_class.max()}",
            "splits: " + ", ".join(f"{name} {count}" for name, count in sorted(splits.items())),
            f"image sizes: {data.image_sizes.min(0).tolist()} to {data.image_sizes.max(0).tolist()} (width, height)",
            f"box area / image area: median {median:.2f}, 90% between {low:.2f} and {high:.2f}",
            f"boxes that reached past their image, clipped: {data.clipped}",
            f"IoU of a constant centred box with the true one: {centred:.3f}",
        ]
    )


if __name__ == "__main__":
    run_script(main, load_config)
