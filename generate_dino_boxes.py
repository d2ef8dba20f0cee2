"""Turn the attention of a Vision Transformer into pseudo ground-truth boxes and a cache of attention maps.

Reads a data set. Writes, for out=FOLDER/STEM.json:

    STEM.json            the boxes: train.py source=FOLDER/STEM.json holds its crops to them; and how they were found,
                         so that predict.py finds boxes likewise
    STEM.maps.safetensors  the attention maps, for density-map crops
    STEM.eval.json/.md   mean IoU, coverage and shares beside the trivial boxes, time per stage
    STEM.png             best, median and worst boxes
    errors.txt           a count, then a line per image that could not be read (it gets no box; exit status 2)

    python generate_dino_boxes.py                                  # ToyBirds, its own small localizer
    python generate_dino_boxes.py preset=cub_dino dataset.root=CUB_200_2011
    python generate_dino_boxes.py dino.weights=runs/cls/best.pt    # a ViT trained by train.py
    torchrun --nproc-per-node 8 generate_dino_boxes.py preset=cub_dino

The same command goes on where a killed run stopped, a batch at a time. Maps that are there already are used again
when only the way from map to box changes (dino.method and what follows it).
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import load_config
from datasets import DataSet, dino_boxes_path, read_dataset, save_source
from figures.box_report import raise_if_any_failed, report_boxes
from jobs.guard import run_script, same_command, with_resume_hint
from jobs.loader import start_server
from jobs.machine import choose_device, precision_on, set_up_cpu
from jobs.shared_work import Result, SharedWork, box_path, refuse_foreign
from localized_crops import map_boxes
from localized_crops.attention import last_attention
from localized_crops.files import UserError, user_errors
from localized_crops.image_ids import key_to_id
from localized_crops.map_file import MapCache, maps_path, save_map_cache
from localizer.attention_maps import Batch, clean, map_batches, map_to_box, plan_batches
from localizer.batches import BatchImages
from localizer.networks import Localizer, configured_localizer
from localizer.object_head import ObjectHead, build_features, find_objects, learn_head
from utils import timed


def main(config: dict) -> None:
    """Make maps, boxes and their evaluation; with several processes each makes its share of the maps."""
    with user_errors(ValueError):
        stage = prepare(config)
    with with_resume_hint(same_command), stage.work.claimed(again=config["dino"]["again"]):
        take_over(stage)
        with timed(stage.seconds, "maps"):
            stage.images_mapped = stage.work.run_units(partial(mapped_batches, stage), "maps")
        if stage.work.rank == 0:
            cache = gather_maps(stage)
            report(stage, cache, find_boxes(stage, cache))


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    out: Path
    data: DataSet
    localizer: Localizer
    cells: Localizer | None  # the network whose cells dino.method=object_head classifies
    batches: list[Batch]  # the units of ``work``
    work: SharedWork
    seconds: dict[str, float] = field(default_factory=dict)
    images_mapped: int = 0  # in this run, by this process
    failed: dict[int | str, str] = field(default_factory=dict)  # image id -> why it could not be read for its box


def prepare(config: dict) -> Stage:
    """Read the data set, build the network, and plan the batches."""
    settings, seconds = config["dino"], {}
    out = box_path(config["out"], dino_boxes_path(config["dataset"]["name"], config["dataset"]["root"]))
    set_up_cpu(config["num_threads"])
    start_server(BatchImages, config["num_workers"])
    device = choose_device(config["device"])
    with timed(seconds, "data"):
        data = read_dataset(**config["dataset"] | {"check": False}, keep_going=True)  # faulty images go to errors.txt
    with timed(seconds, "model"):
        localizer = configured_localizer(config)
        localizer.model.to(device)
        side = settings["image_size"] or localizer.image_size
        check_settings(settings, localizer, side)
        is_taught = settings["method"] == "object_head"
        cells = build_features(settings["object_model"], settings["object_weights"]) if is_taught else None
    batches = plan_batches(data.image_sizes, side, localizer.patch, settings["batch_size"])
    again = f"python generate_dino_boxes.py out={out} dino.again=true"
    identity, units = map_identity(config, data, localizer, side), [batch.rows for batch in batches]
    work = SharedWork(out.with_name(f"{out.stem}.partial"), identity, "dino", again, units, data.paths)
    if work.rank == 0:
        network = f"{localizer.name} ({localizer.weights})"
        print(f"{len(data.ids)} images of {data.root}; maps by {network} at {side} px on {device}")
    return Stage(config, out, data, localizer, cells, batches, work, seconds)


def check_settings(settings: dict, localizer: Localizer, side: int) -> None:
    """Raise before any work if the cleaning or the box method would refuse the settings.

    Raises:
        ValueError, UserError: with the key.
    """
    if side < max(localizer.patch):
        raise UserError(f"dino.image_size={side}: smaller than one patch; set at least {max(localizer.patch)}")
    heads = last_attention(localizer.model).num_heads
    trial = clean(np.random.default_rng(0).random((heads, 5, 7)), settings)
    map_to_box(trial, (70, 50), settings)


def map_identity(config: dict, data: DataSet, localizer: Localizer, side: int) -> dict[str, Any]:
    """Return everything that the maps depend on: maps of another identity are other maps."""
    settings = config["dino"]
    return {
        "dataset": data.fingerprint(),
        "model": localizer.name,
        "weights_sha256": localizer.weights_sha256,
        "precision": precision_on(localizer.device, config["amp"]),
        "settings": {"image_size": side}
        | {key: settings[key] for key in ("autocontrast", "batch_size", "heads", "steps", "filter_size")},
    }


def take_over(stage: Stage) -> None:
    """Reuse the maps at ``out`` if they were made with the same settings and data; ``dino.again`` removes them.

    Raises:
        UserError: if they are of other settings, another model or data set, or the files are of another script.
    """
    index = maps_path(stage.out)
    was_ours = index.exists()
    if stage.config["dino"]["again"]:
        for path in (index, stage.out):
            path.unlink(missing_ok=True)
    if index.exists():
        header = MapCache.open(stage.out).header
        has_errors = isinstance(header.get("errors"), dict)
        failed = header["errors"] if has_errors else {}
        rows = [row for row, image_id in enumerate(stage.data.ids.tolist()) if str(image_id) in failed]
        stage.work.take_over(index, header, header.get("batches"), rows)
        if not has_errors:
            raise UserError(f"{index}: does not say which images failed; start anew: {stage.work.again}")
    elif not was_ours:
        refuse_foreign(stage.out)


# --- maps ---------------------------------------------------------------------------------------------------------


def mapped_batches(stage: Stage, numbers: list[int]) -> Iterator[Result]:
    """Yield the cleaned maps (B, feat_h, feat_w) float16 of each batch; blank maps are zeros."""
    options = {key: stage.config[key] for key in ("amp", "num_workers")}
    batches = [stage.batches[number] for number in numbers]
    for batch in map_batches(stage.localizer, batches, stage.data.paths, stage.config["dino"], **options):
        ids = stage.data.ids[batch.rows].tolist()
        errors = {str(i): error for i, error in zip(ids, batch.errors, strict=True) if error is not None}
        yield Result({"ids": ids, "errors": errors}, {"maps": batch.maps})


def gather_maps(stage: Stage) -> MapCache:
    """Put all maps into one file, in the order of the data set; the parts are removed once it is written."""
    path = maps_path(stage.out)
    if stage.work.has_new_units or not path.exists():
        with timed(stage.seconds, "cache"):
            errors, maps = {}, dict(MapCache.open(stage.out)) if path.exists() else {}
            for about, arrays in stage.work.results():
                maps |= dict(zip(about["ids"], arrays["maps"], strict=True))
                errors |= about["errors"]
            header = stage.work.identity | {
                "errors": errors,
                "batches": stage.work.keys,
                "made_by": Path(__file__).name,
                "weights": stage.localizer.weights,
                "patch": list(stage.localizer.patch),
                "dataset_name": stage.data.name,
            }
            save_map_cache(path, ((image_id, maps[image_id]) for image_id in stage.data.ids.tolist()), header)
    stage.work.remove()
    return MapCache.open(stage.out, dataset=stage.work.identity["dataset"])


# --- boxes --------------------------------------------------------------------------------------------------------


def find_boxes(stage: Stage, cache: MapCache) -> np.ndarray:
    """Write the box file; return its boxes (N, 4), NaN for none."""
    data, settings = stage.data, stage.config | {"maps": stage.work.identity}
    with timed(stage.seconds, "boxes"):
        if stage.cells is not None:
            boxes, head = object_boxes(stage, stage.cells, cache)
            settings["object_head"] = head.plain()
        else:
            boxes = [
                map_to_box(cache[image_id], tuple(size), stage.config["dino"])
                for image_id, size in zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True)
            ]
        xywh = np.array([box.xywh if box.found else [np.nan] * 4 for box in boxes])
        save_source(stage.out, data, xywh, made_by=Path(__file__).name, settings=settings)
    return xywh


def object_boxes(stage: Stage, cells: Localizer, cache: MapCache) -> tuple[list[map_boxes.MapBox], ObjectHead]:
    """Return the box of each image by a classifier of cells that the attention maps teach, and that classifier."""
    data, settings = stage.data, stage.config["dino"]
    cells.model.to(stage.localizer.device)
    head = learn_head(cells, data, cache, settings, stage.config["num_workers"])
    found = find_objects(cells, head, data.paths, data.image_sizes, settings, stage.config["num_workers"])
    boxes = {}
    for row, box, error in tqdm(found, total=len(data.ids), desc="boxes", unit=" images", mininterval=1.0):
        boxes[row] = box
        if error is not None:
            stage.failed[data.ids[row].item()] = error
    return [boxes[row] for row in range(len(data.ids))], head


# --- report -------------------------------------------------------------------------------------------------------


def report(stage: Stage, cache: MapCache, boxes_xywh: np.ndarray) -> None:
    """Print and save the evaluation, the contact sheet and errors.txt; errors end the script with status 2."""
    unmapped = {key_to_id(image_id): error for image_id, error in cache.header["errors"].items()}
    errors = stage.data.unreadable | stage.failed | unmapped
    report_boxes(
        stage.out,
        stage.data,
        boxes_xywh,
        seconds=stage.seconds,
        errors=errors,
        maps=cache,
        images_mapped=stage.images_mapped,
        maps_per_second=stage.images_mapped / stage.seconds["maps"] if stage.images_mapped else None,
    )
    raise_if_any_failed(errors, stage.out.with_name("errors.txt"))


if __name__ == "__main__":
    run_script(main, load_config)
