"""Decode every image of a data set and print a report.

Reads any data set that dataset.name knows, writes nothing. Status 2 if anything is wrong.

    python check_dataset.py dataset.name=folder dataset.root=photos
    python check_dataset.py dataset.name=cub dataset.root=CUB_200_2011 find_duplicates=true
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import load_config
from datasets import DataSet, read_dataset
from jobs.guard import run_script
from localized_crops.boxes import center_boxes, iou
from localized_crops.files import UserError
from readers.images import unreadable_images
from readers.splits import class_notes
from utils import file_sha256

SHOWN = 20  # lines of one kind; the rest is counted


def main(config: dict) -> None:
    """Check the data set of ``config``."""
    # all faults are listed here, not the first alone
    data = read_dataset(**config["dataset"] | {"check": False, "keep_going": True})
    total = len(data.ids) + len(data.unreadable)
    if not len(data.ids):
        raise UserError(f"{data.root}: none of {total} images can be read: {next(iter(data.unreadable.values()))}")
    print(report(data))
    same = same_files(data, config["find_duplicates"])
    faults = [*data.unreadable.values(), *unreadable_images(data.paths)]
    for lines in (data.notes, class_notes(data), faults, same):
        for line in lines[:SHOWN]:
            print(line)
        if len(lines) > SHOWN:
            print(f"... and {len(lines) - SHOWN} more like this")
    if faults:
        raise UserError(f"{data.root}: {len(faults)} of {total} images cannot be read; they are listed above")
    if same:
        raise UserError(f"{data.root}: {len(same)} images stand under several ids; they are listed above")
    print(f"all {total} images can be read")


def report(data: DataSet) -> str:
    """Return a few lines on images, classes, splits and boxes."""
    splits = Counter(data.split.tolist())
    per_class = np.bincount(data.labels[data.labels >= 0], minlength=max(1, len(data.class_names)))
    lines = [
        f"{data.root}: {len(data.ids)} images, {len(data.class_names)} classes",
        f"images a class: {per_class.min()} to {per_class.max()}",
        "splits: " + ", ".join(f"{name} {count}" for name, count in sorted(splits.items())),
        f"image sizes: {data.image_sizes.min(0).tolist()} to {data.image_sizes.max(0).tolist()} (width, height)",
    ]
    if data.rotated:
        lines.append(f"{data.rotated} images are rotated by EXIF: boxes and crops are in the {data.pixel_grid} pixels")
    boxes, sizes = data.boxes[data.has_box], data.image_sizes[data.has_box]
    if not len(boxes):
        return "\n".join([*lines, "no true boxes"])
    if len(boxes) < len(data.ids):
        lines.append(f"images without a box: {len(data.ids) - len(boxes)}")
    low, median, high = np.quantile(boxes[:, 2:].prod(1) / sizes.prod(1), (0.05, 0.5, 0.95))
    lines += [
        f"box area / image area: median {median:.2f}, 90% between {low:.2f} and {high:.2f}",
        f"boxes that reached past their image, clipped: {data.clipped}",
        f"IoU of a constant centred box with the true one: {iou(center_boxes(sizes), boxes).mean():.3f}",
    ]
    return "\n".join(lines)


def same_files(data: DataSet, by_content: bool) -> list[str]:
    """Return a line for each group of images whose files hold the same bytes, or are links to one file."""
    key, what = (file_sha256, "equal images") if by_content else (_place, "one file")
    groups = defaultdict(list)
    with ThreadPoolExecutor(16) as pool:
        keys = tqdm(pool.map(key, data.paths), total=len(data.ids), desc="comparing files", unit=" images", delay=5)
        for row, value in enumerate(keys):
            groups[value].append(row)
    ids, splits = data.ids.tolist(), data.split.tolist()
    return [
        f"{what} under {len(rows)} ids: {', '.join(f'{ids[row]} ({splits[row]})' for row in rows[:4])}"
        for rows in groups.values()
        if len(rows) > 1
    ]


def _place(path: Path) -> tuple[int, int]:
    """Return the file's device and inode, which all its links share."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


if __name__ == "__main__":
    run_script(main, load_config)
