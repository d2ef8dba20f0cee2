"""One of everything that the scripts read, all of it sound, for tests to damage."""

import shutil
from pathlib import Path

import numpy as np
import torch

import train
from config import load_config
from datasets import read_dataset
from localized_crops.box_file import save_boxes
from localized_crops.map_file import save_map_cache
from masks.mask_files import info_entry, mask_names, save_masks, save_masks_info
from readers.data_set import DataSet

COUNTS = (5, 1, 0, 9, 3)  # candidates of the images, in turn


def make_sound_folder(birds: Path, folder: Path) -> None:
    """Fill ``folder``: birds/, boxes.json, its maps, masks/, and run/ of one epoch.

    Args:
        birds: a small data set in CUB's file format, to be copied.
        folder: exists and is empty.
    """
    shutil.copytree(birds, folder / "birds")
    data = read_dataset("cub", folder / "birds")
    sizes = dict(zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True))
    boxes = dict(zip(data.ids.tolist(), data.boxes.tolist(), strict=True))
    save_boxes(folder / "boxes.json", boxes, sizes, made_by="test", settings={})
    make_maps(folder, data)
    make_masks(folder, data)
    words = [f"dataset.root={folder}/birds", f"run_dir={folder}/run", "dataset.name=cub", "dataset.val_fraction=0"]
    machine = ["num_workers=0", "num_epochs=1", "image_size=32", "device=cpu", "eval.views=full"]
    train.train_run(load_config(words + machine))
    (folder / "run" / "curves.png").unlink()


def make_maps(folder: Path, data: DataSet) -> None:
    """Write a cache of maps beside boxes.json."""
    maps = [(image_id, np.full((3, 5), image_id, np.float16)) for image_id in data.ids.tolist()]
    header = {"dataset": data.fingerprint(), "model": "test", "weights_sha256": "0", "settings": {}}
    save_map_cache(folder / "boxes.json", maps, header)


def make_masks(folder: Path, data: DataSet) -> None:
    """Write a folder of masks, one an image."""
    (folder / "masks").mkdir()
    record = {"bbox": [1, 2, 9, 8], "area": 5, "predicted_iou": 1, "stability_score": 1}
    entry = info_entry(record | {"point_coords": [], "crop_box": [0, 0, 9, 9]})
    names = mask_names(data.ids.tolist(), data.paths)
    for name in names:
        save_masks(folder / "masks" / f"{name}.pt", torch.ones(1, 7, 9, dtype=torch.bool), "packed")
    about = {"dataset": data.fingerprint(), "store": "packed"}
    save_masks_info(folder / "masks", about, {name: [entry] for name in names})


def write_candidates(folder: Path, data: DataSet) -> None:
    """Write a masks_info.json with random boxes of candidates, as many an image as COUNTS says in turn."""
    rng, images = np.random.default_rng(0), {}
    for row, name in enumerate(mask_names(data.ids.tolist(), data.paths)):
        near = rng.random((COUNTS[row % 5], 2)) * (data.image_sizes[row] - 12)
        side = 3 + rng.random(near.shape) * (data.image_sizes[row] - near - 3)
        images[name] = [{"bbox": box} for box in np.floor(np.concatenate([near, side], axis=1)).tolist()]
    save_masks_info(folder, {"dataset": data.fingerprint(), "store": "none"}, images)
