"""Every method that turns a map into a box, on real maps of real photographs: IoU and coverage on test images.

Reads a folder in CUB's file format and a file of maps (``ids`` (N,), ``maps`` (N, h, w), stretched over the image).
Every parameter is chosen on the training images; prints one Markdown table of the test images.

    python benchmarks/box_methods.py saliency=cub24_saliency.npz root=cub24
    python benchmarks/box_methods.py saliency=... root=... seeds=0      # without the learned head: half a minute

Three to five minutes per seed of the learned head on one CPU core. ``images`` is how many training images the head
sees, ``transfer`` adds altered maps (coarser, blurred, squared, noisy) for which the head is not fitted again (it
sees blur and exponents, drawn anew, while it learns; coarser cells and noise it does not).
"""

import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from box_head import fit_box_head, head_box
from datasets import read_dataset
from localized_crops.boxes import center_boxes, coverage, iou, whole_image_boxes
from localized_crops.map_boxes import component_box, min_max, published_box
from readers.data_set import DataSet
from utils import cpu_name

SETTINGS = {
    "saliency": "",  # .npz with ids and maps
    "root": "",  # folder with images.txt
    "seeds": 1,  # how many heads are fitted; 0: none
    "images": 0,  # training images that the head sees; 0: all
    "epochs": 60,  # of the head
    "transfer": False,
}
PUBLISHED_GRID = {"threshold": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, "otsu")}
COMPONENT_GRID = {
    "threshold": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, "otsu"),
    "choose": ("heaviest", "strongest"),
    "size_factor": (0.95, 1.0, 1.05, 1.1),
}
ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "16 x 16 cells": lambda cells: cells.reshape(16, cells.shape[0] // 16, 16, -1).mean(axis=(1, 3)),
    "blurred by a cell": lambda cells: ndimage.gaussian_filter(cells, 1.0),
    "squared": np.square,
    "noise of 0.1": lambda cells: cells + 0.1 * np.random.default_rng(0).random(cells.shape),
}


def main(settings: dict) -> None:
    """Choose on train, print the table of test."""
    torch.set_num_threads(1)
    data = read_dataset("cub", settings["root"])
    maps = load_maps(settings["saliency"], data.ids)
    print(f"{cpu_name()}, 1 thread; Python {platform.python_version()}, ", end="")
    print(f"numpy {np.__version__}, scipy {scipy.__version__}, torch {torch.__version__}\n{json.dumps(settings)}\n")
    print(f"{len(data.rows('train'))} training images choose, {len(data.rows('test'))} test images are shown\n")
    print("| method | parameters, chosen on train | mean IoU | coverage | IoU >= .3 | >= .5 | >= .7 | ms/image |")
    print("|---|---|---|---|---|---|---|---|")
    print_trivial(data)
    evaluate_rule("published", published_box, {"threshold": (0.5,)}, data, maps)
    evaluate_rule("published, threshold chosen", published_box, PUBLISHED_GRID, data, maps)
    chosen = evaluate_rule("component", component_box, COMPONENT_GRID, data, maps)
    heads = [fit_head(data, maps, chosen["threshold"], settings, seed) for seed in range(settings["seeds"])]
    for seed, head in enumerate(heads):
        show_head(f"head fitted to true boxes, seed {seed}", head, chosen["threshold"], data, maps)
    for name, alter in ALTERED.items() if settings["transfer"] else ():
        altered = [min_max(alter(cells)) for cells in maps]
        chosen = evaluate_rule(f"{name}: component", component_box, COMPONENT_GRID, data, altered)
        for head in heads[:1]:
            show_head(f"{name}: head of seed 0, not fitted again", head, chosen["threshold"], data, altered)


def load_maps(path: str, ids: np.ndarray) -> list[np.ndarray]:
    """Return one min-maxed map per id, in the order of ``ids``."""
    with np.load(path) as file:
        row_of = {int(image_id): row for row, image_id in enumerate(file["ids"])}
        maps = file["maps"].astype(np.float64)
    return [min_max(maps[row_of[int(image_id)]]) for image_id in ids]


def print_trivial(data: DataSet) -> None:
    """Print the boxes that look at no map."""
    sizes, train = np.tile(data.image_sizes, 2).astype(float), data.rows("train")
    median = np.median(data.boxes[train] / sizes[train], axis=0)
    trivial = {
        "whole image": whole_image_boxes(data.image_sizes),
        "centred, 0.65 of each side": center_boxes(data.image_sizes),
        "median training box": median * sizes,
    }
    for name, boxes in trivial.items():
        print_row(name, "", boxes[data.rows("test")], data.boxes[data.rows("test")], 0.0)


def evaluate_rule(name: str, rule: Callable, grid: dict[str, tuple], data: DataSet, maps: list) -> dict:
    """Choose the parameters of ``rule`` with the best mean IoU on train, print its row on test, return them."""
    train, test = data.rows("train"), data.rows("test")
    options = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    scores = [
        iou(rule_boxes(rule, option, data, maps, train), data.boxes[train]).mean() if len(options) > 1 else 0.0
        for option in options
    ]
    best = options[int(np.argmax(scores))]
    start = time.perf_counter()
    boxes = rule_boxes(rule, best, data, maps, test)
    print_row(name, as_text(best), boxes, data.boxes[test], (time.perf_counter() - start) / len(test))
    return best


def rule_boxes(rule: Callable, option: dict, data: DataSet, maps: list, rows: np.ndarray) -> np.ndarray:
    """Return (len(rows), 4), the boxes of ``rule`` with one choice of parameters."""
    return np.array([rule(maps[row], tuple(data.image_sizes[row]), **option).xywh for row in rows])


def fit_head(data: DataSet, maps: list, threshold: float | str, settings: dict, seed: int) -> torch.nn.Module:
    """Fit a head to (a drawn part of) the training images."""
    rows = np.random.default_rng(seed).permutation(data.rows("train"))[: settings["images"] or None]
    epochs = round(settings["epochs"] * len(data.rows("train")) / len(rows))  # as many steps for fewer images
    inputs = [maps[row] for row in rows], data.image_sizes[rows], data.boxes[rows]
    return fit_box_head(*inputs, threshold=threshold, epochs=epochs, seed=seed)


def show_head(name: str, head: torch.nn.Module, threshold: float | str, data: DataSet, maps: list) -> None:
    """Print the test row of a fitted head."""
    test, start = data.rows("test"), time.perf_counter()
    boxes = np.array([head_box(head, maps[row], tuple(data.image_sizes[row]), threshold).xywh for row in test])
    parameters = sum(weights.numel() for weights in head.parameters())
    seconds = (time.perf_counter() - start) / len(test)
    print_row(name, f"{parameters:,} weights", boxes, data.boxes[test], seconds)


def print_row(name: str, parameters: str, boxes: np.ndarray, true_boxes: np.ndarray, seconds: float) -> None:
    """Print one Markdown row; fractions are of images."""
    ious = iou(boxes, true_boxes)
    shares = " | ".join(f"{(ious >= level).mean():.3f}" for level in (0.3, 0.5, 0.7))
    covered = coverage(boxes, true_boxes).mean()
    print(f"| {name} | {parameters} | {ious.mean():.3f} | {covered:.3f} | {shares} | {seconds * 1e3:.2f} |", flush=True)


def as_text(option: dict) -> str:
    """Return ``key=value`` pairs."""
    return ", ".join(f"{key}={value}" for key, value in option.items())


def parse_settings(arguments: list[str]) -> dict:
    """Return SETTINGS with ``key=value`` arguments laid over it, each of the type of its default."""
    settings = dict(SETTINGS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in settings:
            raise SystemExit(f"unknown setting {key!r}; known: {', '.join(settings)}")
        settings[key] = value == "true" if isinstance(settings[key], bool) else type(settings[key])(value)
    missing = [key for key in ("saliency", "root") if not settings[key]]
    if missing:
        raise SystemExit(f"give {' and '.join(f'{key}=PATH' for key in missing)}")
    return settings


if __name__ == "__main__":
    main(parse_settings(sys.argv[1:]))
