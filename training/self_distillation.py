"""Self-distillation: a ViT in training makes the maps that centre its own crops, from its EMA.

Every few epochs the EMA looks at all training images, whole. Those that it classifies rightly get its attention map;
the others keep a plain crop, since attention that led to a wrong answer is no word on where the object is.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from localized_crops.map_file import MapCache, save_map_cache
from localizer.attention_maps import attend_batches, clean_batch, plan_batches
from localizer.networks import Localizer
from readers.data_set import DataSet


def refresh_epoch(epoch: int, every: int, start: int) -> int | None:
    """Return the epoch (counted from 0) before which the maps that serve ``epoch`` are made; None: plain crops yet.

    Args:
        epoch: the one about to begin.
        every: epochs between two refreshes; 0: never.
        start: epochs before the first.
    """
    return None if not every or epoch < start else epoch - (epoch - start) % every


def maps_path(folder: Path, epoch: int) -> Path:
    """Return the file of the maps that a run makes before ``epoch``."""
    return folder / f"own_epoch_{epoch}.maps.safetensors"


def refresh_maps(
    path: Path,
    localizer: Localizer,
    data: DataSet,
    rows: np.ndarray,
    device: torch.device,
    wanted: dict[str, Any],
    *,
    precision: str = "float32",
    num_workers: int = 0,
) -> MapCache:
    """Write and return the cache of maps of the images among ``rows`` that the network classifies rightly.

    Args:
        path: the file to write; older maps of the run beside it are removed.
        localizer: the EMA, with its head, on ``device``.
        data: the data set.
        rows: its training images.
        device: of the network.
        wanted: image_size, batch_size, autocontrast, heads, steps, filter_size: the section ``dino`` of the config.
        precision, num_workers: see ``attention_maps.attend_batches``.
    """
    side = wanted["image_size"] or localizer.image_size
    batches = plan_batches(data.image_sizes[rows], side, localizer.patch, wanted["batch_size"])
    attended = attend_batches(
        localizer,
        batches,
        [data.paths[row] for row in rows],
        device,
        autocontrast=wanted["autocontrast"],
        precision=precision,
        num_workers=num_workers,
        with_logits=True,
    )
    maps: dict[int | str, np.ndarray] = {}
    for one in tqdm(attended, total=len(batches), desc="own maps", unit=" batches", leave=False, disable=None):
        places = rows[one.batch.rows]
        right = one.logits.argmax(1).cpu().numpy() == data.labels[places]
        right &= np.array([error is None for error in one.errors])
        maps |= dict(zip(data.ids[places][right].tolist(), clean_batch(one, wanted)[right], strict=True))
    settings = {key: wanted[key] for key in ("autocontrast", "heads", "steps", "filter_size")} | {"image_size": side}
    save_map_cache(
        path,
        maps.items(),
        {
            "dataset": data.fingerprint(),
            "model": localizer.name,
            "weights_sha256": localizer.weights_sha256,
            "settings": settings,
            "made_by": "train.py, self_distillation",
        },
    )
    _remove_older(path)
    return MapCache.open(path)


def _remove_older(path: Path) -> None:
    for index in path.parent.glob("own_epoch_*.maps.safetensors"):
        if index != path:
            index.unlink(missing_ok=True)
