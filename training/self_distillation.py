"""Self-distillation: a ViT in training makes the maps that centre its own crops, from its EMA.

Every few epochs the EMA classifies all training images, whole. Those that it classifies correctly get its attention
map; the others keep a plain crop, since attention that led to a wrong answer does not show where the object is.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from jobs.loader import end_workers, workers_for
from localized_crops.map_file import MapCache, save_map_cache
from localizer.attention_maps import map_batches, plan_batches
from localizer.networks import as_localizer
from readers.data_set import DataSet
from training.distributed import on_rank_0
from training.run import Run
from training.train_data import build_train_loader, map_crops


def refresh_epoch(epoch: int, every: int, start: int) -> int | None:
    """Return the epoch (counted from 0) before which the maps that serve ``epoch`` are made; None: plain crops yet.

    ``every`` and ``start`` are the keys of the config's section self_distillation.
    """
    return None if not every or epoch < start else epoch - (epoch - start) % every


def with_own_maps(loader: DataLoader, run: Run, data: DataSet) -> DataLoader:
    """Return the training loader of the next epoch: a new one where self-distillation asks for other maps."""
    epoch = refresh_epoch(run.epoch, **run.config["self_distillation"])
    if epoch is None:
        return loader
    path = run.folder / f"own_epoch_{epoch}.maps.safetensors"
    if getattr(loader.dataset.crops.maps, "path", None) == path:
        return loader
    end_workers(loader)
    if epoch == run.epoch:
        on_rank_0(lambda: make_own_maps(path, run, data))
    crops = map_crops(run.config, data, MapCache.open(path))
    return build_train_loader(run.config, data, crops, run.device, loader.dataset.decoded)


def make_own_maps(path: Path, run: Run, data: DataSet) -> None:
    """Write the maps of the training images that the EMA classifies correctly; remove older maps of the run."""
    config, settings, rows = run.config, run.config["dino"], data.rows("train")
    network = {"image_size": config["image_size"], **{key: tuple(config["model"][key]) for key in ("mean", "std")}}
    localizer = as_localizer(run.ema.module, config["model"]["type"], "EMA of this run", **network)
    side = settings["image_size"] or localizer.image_size
    batches = plan_batches(data.image_sizes[rows], side, localizer.patch, settings["batch_size"])
    mapped = map_batches(
        localizer,
        batches,
        data.paths[rows],
        settings,
        amp=config["amp"],
        num_workers=workers_for(len(rows), config),
        with_logits=True,
    )
    maps: dict[int | str, np.ndarray] = {}
    for part in tqdm(mapped, total=len(batches), desc="own maps", unit=" batches", leave=False, disable=None):
        places = rows[part.rows]
        correct = part.logits.argmax(1).cpu().numpy() == data.labels[places]
        correct &= np.array([error is None for error in part.errors])
        maps |= dict(zip(data.ids[places][correct].tolist(), part.maps[correct], strict=True))
    cleaning = {key: settings[key] for key in ("autocontrast", "heads", "steps", "filter_size")}
    header = {
        "dataset": data.fingerprint(),
        "model": localizer.name,
        "weights_sha256": localizer.weights_sha256,
        "settings": cleaning | {"image_size": side},
        "made_by": "train.py, self_distillation",
    }
    save_map_cache(path, maps.items(), header)
    for older in set(path.parent.glob("own_epoch_*.maps.safetensors")) - {path}:
        older.unlink(missing_ok=True)
    print(f"own maps: the EMA classifies {len(maps)} of {len(rows)} training images rightly", flush=True)
