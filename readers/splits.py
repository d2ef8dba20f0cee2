"""The train, val and test splits: the official ones, filled up, or drawn class by class."""

import hashlib
import math
from dataclasses import replace

import numpy as np

from readers.data_set import DataSet

TRAIN_SHARE = 0.7  # of the 70/30 split
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def fill_train(data: DataSet) -> DataSet:
    """Return the data set with the first test images, in file order, moved to train until it holds 70%."""
    count = math.ceil(TRAIN_SHARE * len(data.ids)) - len(data.rows("train"))
    return _with_split(data, data.rows("test")[: max(0, count)], "train")


def hold_out(data: DataSet, fraction: float, split: str, seed: int | None) -> DataSet:
    """Return the data set with a share of each class's training images moved to ``split``; one at least is kept.

    The draw depends on ``seed`` and the ids alone: it is the same on every run, and nearly the same when images are
    added. Without a seed the last images in file order are moved.
    """
    train = data.rows("train")
    if seed is not None:
        texts = (f"{seed}/{image_id}".encode(errors="surrogateescape") for image_id in data.ids[train].tolist())
        keys = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
        train = train[np.argsort(np.array(keys, dtype="S8"), kind="stable")[::-1]]
    train = train[np.argsort(data.labels[train], kind="stable")]
    counts = np.bincount(data.labels[train], minlength=len(data.class_names))
    moved = np.minimum(np.round(fraction * counts).astype(np.int64), np.maximum(counts - 1, 0))
    is_moved = np.arange(len(train)) >= np.repeat(np.cumsum(counts) - moved, counts)  # the last ones of each class
    return _with_split(data, train[is_moved], split)


def _with_split(data: DataSet, rows: np.ndarray, name: str) -> DataSet:
    split = data.split.copy()
    split[rows] = name
    return replace(data, split=split)


def class_notes(data: DataSet) -> list[str]:
    """Return a line for each kind of class that has too few images to learn or to test."""
    count = len(data.class_names)
    if not count:
        return [f"{len(data.ids)} images without labels: there are no class folders; they cannot be trained on"]
    labels = {split: np.bincount(data.labels[data.rows(split)], minlength=count) for split in ("train", "val", "test")}
    used = sum(labels.values())
    kinds = {
        "have no image": used == 0,
        "have no training image: they are tested or validated, never learned": (used > 0) & (labels["train"] == 0),
        "have a single training image": labels["train"] == 1,
    }
    for split in ("val", "test"):
        if labels[split].any():
            left = f"{(labels[split] > 0).sum()} classes are left there"
            kinds[f"have no image in {split}, {left}"] = (labels[split] == 0) & (used > 0)
    lines = []
    for what, which in kinds.items():
        if which.any():
            first = ", ".join(repr(data.class_names[label]) for label in np.flatnonzero(which)[:3])
            lines.append(f"{which.sum()} of {count} classes {what}: {first}{', ...' if which.sum() > 3 else ''}")
    return lines
