"""The data set, boxes, crops, decoded images and loaders of a training, from its config."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets import box_file_of, read_dataset, source_boxes, source_set
from jobs.loader import build_loader, workers_for
from localized_crops.box_file import load_boxes
from localized_crops.files import UserError
from localized_crops.map_file import MapCache, remake_command
from readers.data_set import DataSet
from readers.image_cache import ImageCache, cached_images
from readers.splits import class_notes
from training.batches import EpochBatches, TrainImages, ViewImages
from training.distributed import my_rows, rank, world_size
from training.epoch_crops import BoxCrops, Crops, MapCrops
from transforms import TrainTransform, build_views

REPORTED, VALIDATED = ("test", "val"), ("val", "test")  # a run reports on, and validates on, the first that has images


def load_data(config: dict) -> DataSet:
    """Return the data set, with images to train and to test on, and print the notes of its reader."""
    data = read_dataset(**config["dataset"])
    if len(data.class_names) < 2 or not len(data.rows("train")):
        counts = f"{len(data.class_names)} classes, {len(data.rows('train'))} images in the train split"
        raise UserError(f"{data.root}: {counts}; two classes are the least that can be told apart")
    if not len(data.rows(*REPORTED)):
        raise UserError(
            f"{data.root}: no image in the test split, nor in val, to report on; see dataset.split, "
            "dataset.test_fraction and dataset.val_fraction"
        )
    for line in (*data.notes, *class_notes(data)):
        print(f"{data.root}: {line}")
    return data


def view_boxes(config: dict, data: DataSet) -> np.ndarray:
    """Return the boxes (N, 4) that test views look at, x y width height; whole images where ``eval_box`` is None."""
    return source_boxes(config["eval_box"] or "image", data, **config["boxes"])[0]


def localizer_settings(config: dict, data: DataSet) -> dict | None:
    """Return how the boxes of ``eval_box`` were made, so that prediction makes those of other images the same way.

    That is its section ``dino`` and its ``object_head``, a classifier of cells (None: its method has none). None where
    ``eval_box`` is no file of generate_dino_boxes.py.
    """
    path = box_file_of(config["eval_box"] or "image", data)
    settings = {} if path is None else load_boxes(path).settings
    if not isinstance(settings.get("dino"), dict) or "maps" not in settings:
        return None
    return {"dino": settings["dino"], "object_head": settings.get("object_head")}


def crop_boxes(config: dict, data: DataSet) -> tuple[np.ndarray, dict]:
    """Return the boxes that training crops are held to, (N, 4), and what summary.json tells of them."""
    boxes, missing = source_boxes(config["source"] if config["use_box"] else "image", data, **config["boxes"])
    if missing:
        print(f"{config['source']}: no box for {missing} images; the whole image serves as theirs")
    return boxes, {"images_without_box": missing, "boxes_clipped": data.clipped, "maiou_of": reference(config, data)}


def reference(config: dict, data: DataSet) -> str:
    """Return the source of the boxes that maIoU is measured on: true boxes if the data set has any, else ``source``.

    Without either it is measured on the whole image: the mean share of the image that crops keep.
    """
    if data.has_box[data.rows("train")].any():
        return "gt"
    return config["source"] if config["source"] != "gt" else "image"


def decoded_images(config: dict, data: DataSet) -> ImageCache | None:
    """Return the cache of decoded images that ``cache`` asks for; UserError if crops or views would be enlarged."""
    if config["cache"] == "none":
        return None
    needed = needed_side(config, data)
    if config["cache_side"] is not None and config["cache_side"] < needed:
        raise UserError(
            f"cache_side={config['cache_side']}: the smallest crops and views need a short side of {needed} pixels; "
            "set that, or none"
        )
    return cached_images(Path(config["cache_folder"] or data.root), data, config["cache_side"])


def needed_side(config: dict, data: DataSet) -> int:
    """Return the short side in pixels of an image whose smallest crop and view need not be enlarged."""
    scale, ratio = config["crop"]["scale"][0], config["crop"]["ratio"]
    crop_side = math.sqrt(scale / max(ratio[1], 1 / ratio[0]))  # share of the short side
    rows = np.concatenate([data.rows(*REPORTED), data.rows(*VALIDATED)])
    sides = view_boxes(config, data)[rows, 2:].max(1) * (1 + 2 * config["eval"]["box_margin"])
    smallest_box = min(1.0, float((sides / data.image_sizes[rows].min(1)).min()))
    shares = {"full": 1.0, "center": config["eval"]["crop_pct"], "whole": 1.0, "box": smallest_box}
    views = [view.size / shares[view.kind] for view in test_views(config).values()]
    return math.ceil(max(config["image_size"] / crop_side, *views))


def build_train_loader(
    config: dict, data: DataSet, crops: Crops, device: torch.device, decoded: ImageCache | None
) -> DataLoader:
    """Build the loader of training crops."""
    colours = {key: config[key] for key in ("augment", "augment_p", "augment_strength", "use_augment_mix")}
    transform = TrainTransform(config["image_size"], config["crop"]["interpolation"], **colours)
    rows, source, seed = data.rows("train"), reference(config, data), config["seed"]
    boxes = (data.boxes if source == "gt" else source_boxes(source, data, **config["boxes"])[0])[rows]
    if isinstance(crops, BoxCrops) and np.array_equal(boxes, crops.boxes):
        boxes = crops.boxes  # one array for a loader process, not two
    images = TrainImages(data, rows, crops, transform, flip=config["flip"], seed=seed, decoded=decoded, reference=boxes)
    batches = EpochBatches(
        len(rows), config["batch_size"], seed, config["opt"]["accumulate"], rank=rank(), world_size=world_size()
    )
    pin, workers = device.type == "cuda", config["num_workers"]
    return build_loader(images, batch_size=None, sampler=batches, num_workers=workers, pin_memory=pin)


def build_view_loaders(
    config: dict, data: DataSet, device: torch.device, decoded: ImageCache | None
) -> tuple[DataLoader, DataLoader]:
    """Build the loaders of validation (first view only) and test (all views)."""
    views, boxes = list(test_views(config).values()), view_boxes(config, data)
    size, pin, loaders = config["eval"]["batch_size"], device.type == "cuda", []
    for rows, shown in ((my_rows(data.rows(*VALIDATED)), views[:1]), (my_rows(data.rows(*REPORTED)), views)):
        images, workers = ViewImages(data, rows, boxes, shown, decoded), workers_for(len(rows), config)
        loaders.append(build_loader(images, batch_size=size, num_workers=workers, pin_memory=pin))
    return tuple(loaders)


def build_crops(config: dict, data: DataSet, boxes: np.ndarray) -> Crops:
    """Build the crops of the training images: held to boxes, centred by attention maps, or plain."""
    if config["use_dino_maps"]:
        return map_crops(config, data, open_maps(config, data))
    rows, crop, redraw = data.rows("train"), config["crop"], None
    if config["use_box"] and config["boxes"]["several"] == "random":
        pool = source_set(config["source"], data, config["boxes"]["allow_missing"])
        redraw = None if pool is None else pool.of(rows).drawn
    thr = config["THR"] if config["use_box"] else -1.0
    return BoxCrops(boxes[rows], data.image_sizes[rows], thr, crop["mode"], crop["scale"], crop["ratio"], redraw)


def map_crops(config: dict, data: DataSet, maps: Mapping[int, np.ndarray]) -> MapCrops:
    """Build the density-map crops of the training images; ``maps``: image id -> attention map."""
    rows, crop = data.rows("train"), config["crop"]
    return MapCrops(maps, data.ids[rows], data.image_sizes[rows], crop["temperature"], crop["scale"], crop["ratio"])


def open_maps(config: dict, data: DataSet) -> Mapping[int, np.ndarray]:
    """Return the maps of ``dino_maps``; none with self-distillation, which makes them later."""
    if config["self_distillation"]["every"]:
        return {}
    if config["dino_maps"] is None:
        raise UserError("use_dino_maps=true needs dino_maps=FILE: the box JSON that generate_dino_boxes.py wrote")
    maps = MapCache.open(config["dino_maps"], dataset=data.fingerprint())
    ids = data.ids[data.rows("train")].tolist()
    missing = len(ids) - len(set(maps).intersection(ids))
    if missing == len(ids):
        raise UserError(f"{maps.path}: has no map of a training image; make it again: {remake_command(maps.path)}")
    if missing:
        print(f"{maps.path}: no map for {missing} of {len(ids)} training images; they get plain crops")
    return maps


def test_views(config: dict) -> dict:
    """Return the test views by name, in order; ``eval_box`` adds the view box."""
    settings = config["eval"]
    names, size = list(settings["views"]), settings["size"] or config["image_size"]
    has_box = any(name.startswith("box") for name in names)
    if has_box and config["eval_box"] is None:
        raise UserError("eval.views asks for the view box, but eval_box is None: give gt, center or a box JSON")
    if config["eval_box"] is not None and not has_box:
        names.append("box")
    interpolation = settings.get("interpolation") or "bilinear"
    return build_views(names, size, settings["crop_pct"], settings["box_margin"], interpolation)
