"""Make candidate masks for every image of a data set, for generate_bbox.py to choose from.

Reads a data set. Writes a folder masks_{i} beside its images folder (the next free i, or mask.folder):

    {image_name}.pt    a bool tensor (N_masks, H, W); read back by load_masks, however it was stored
    masks_info.json    per image an entry per mask: bbox, area, predicted_iou, stability_score, ...; and the setup
    errors.txt         a count, then a line per image that failed (exit status 2)

    python generate_mask.py                                            # ToyBirds, classical segments, no checkpoint
    python generate_mask.py preset=cub_sam_masks_0 dataset.root=CUB_200_2011 sam.checkpoint=sam_vit_h_4b8939.pth
    python generate_mask.py preset=cub_sam_masks_0 ... mask.prompt=dino dino_maps=runs/dino_boxes_cub/boxes.json
    torchrun --nproc-per-node 8 generate_mask.py ... mask.folder=CUB_200_2011/masks_0

With mask.prompt=dino SAM is asked once an image, where DINO's attention points, and the box of the answer needs no
classifier: out=FILE is written too, with its evaluation. A killed run goes on when its folder is named.
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator

from config import load_config
from datasets import DataSet, read_dataset, save_source
from figures.box_report import raise_if_any_failed, report_boxes, save_errors
from jobs.guard import DeadWorkerError, run_script, same_command, with_resume_hint
from jobs.loader import build_loader, start_server
from jobs.machine import choose_device, precision_on, set_up_cpu
from jobs.shared_work import Result, SharedWork, box_path, refuse_foreign
from jobs.torchrun import process_numbers
from localized_crops.box_file import load_boxes
from localized_crops.boxes import clip_boxes
from localized_crops.files import UserError, no_empty_folder, user_errors
from localized_crops.image_ids import ImageId, key_to_id
from localized_crops.map_file import MapCache
from masks.image_batches import ImageBatches, as_it_is
from masks.mask_files import info_entry, load_masks, load_masks_info, mask_names, save_masks, save_masks_info
from masks.mask_generator import MaskGenerator
from masks.sam_models import load_sam
from masks.sam_prompts import PromptedMasks
from masks.segments import SETTINGS, segment_image
from utils import batched, new_folder, timed

__all__ = ["MaskGenerator", "load_masks"]  # found here by the names that the stage is known by
OWN_SAM_KEYS = ("model", "checkpoint", "compile_encoder", "prompt_box", "prompt_points", "prompt_background")

Records = list[dict[str, Any]]  # of one image, as SamAutomaticMaskGenerator returns them
Engine = Callable[[Sequence[np.ndarray], Sequence[ImageId]], list[Records]]  # images, their ids -> records of each


def main(config: dict) -> None:
    """Make the masks; with several processes each makes its share, and the first writes the info."""
    with user_errors(ValueError):
        stage = prepare(config)
    command = partial(same_command, f"mask.folder={stage.folder}")
    folder = no_empty_folder(stage.folder, is_new=config["mask"]["folder"] is None)
    with with_resume_hint(command), folder, stage.work.claimed():
        take_over(stage)
        with timed(stage.seconds, "masks"):
            stage.work.run_units(partial(made_batches, stage), "masks")
        if stage.work.rank == 0:
            errors = gather_info(stage)
            if stage.out is not None:
                write_boxes(stage, stage.out, errors)
            raise_if_any_failed(errors, stage.folder / "errors.txt", command())


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    data: DataSet
    names: list[str]  # of each image's files
    folder: Path
    out: Path | None  # the box JSON of mask.prompt=dino
    generate: Engine
    work: SharedWork  # its units: images that go through the network together
    info: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # image name -> entries, of an earlier run
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(config: dict) -> Stage:
    """Read the data set, build the engine, and find the folder."""
    set_up_cpu(config["num_threads"])
    start_server(ImageBatches, config["num_workers"])
    settings = config["mask"]
    if process_numbers()[1] > 1 and settings["folder"] is None:
        raise UserError("several processes write to one folder: name it, such as mask.folder=CUB_200_2011/masks_0")
    data = read_dataset(**config["dataset"] | {"check": False}, keep_going=True)  # faulty images go to errors.txt
    generate, identity = build_engine(config, data, choose_device(config["device"]))
    identity |= {"dataset": data.fingerprint(), "store": settings["store"]}
    is_prompted = settings["prompt"] == "dino"
    out = box_path(config["out"], f"runs/sam_boxes_{config['dataset']['name']}/boxes.json") if is_prompted else None
    folder = Path(settings["folder"] or new_folder(data.root, "masks"))
    again = f"remove {folder} and run the same command"
    batches = list(batched(range(len(data.ids)), settings["image_batch"]))
    work = SharedWork(folder / "unfinished", identity, "mask", again, batches, data.paths)
    if work.rank == 0:
        print(f"{len(data.ids)} images of {data.root}; masks by {identity['engine']} to {folder}")
        print(f"if this run is interrupted, mask.folder={folder} goes on with it", flush=True)
    names = mask_names(data.ids.tolist(), data.paths)
    return Stage(config, data, names, folder, out, generate, work)


def take_over(stage: Stage) -> None:
    """Reuse the masks in the folder if they were made with the same settings and data.

    Raises:
        UserError: if they are of other settings or another data set, or other files lie there or at ``out``.
    """
    folder, work, path = stage.folder, stage.work, stage.folder / "masks_info.json"
    if path.exists():
        setup, stage.info = load_masks_info(folder)
        failed = [row for row, name in enumerate(stage.names) if name not in stage.info]
        work.take_over(folder, setup, setup.get("batches"), failed)
    elif not work.begun and any(path != work.folder for path in folder.iterdir()):
        raise UserError(f"{folder}: is no folder of this script (no masks_info.json); name another mask.folder")
    out = stage.out
    if out is not None and (not out.exists() or load_boxes(out).made_by != Path(__file__).name):
        refuse_foreign(out)


def build_engine(config: dict, data: DataSet, device: torch.device) -> tuple[Engine, dict[str, Any]]:
    """Return what makes the records of images, and all that its masks depend on."""
    settings, sam_settings = config["mask"], config["sam"]
    identity = {"engine": settings["engine"], "prompt": settings["prompt"]}
    if settings["engine"] == "segments":
        return lambda images, _ids: [segment_image(image) for image in images], identity | {"settings": SETTINGS}
    sam, sha256 = load_sam(sam_settings["model"], sam_settings["checkpoint"])
    sam = sam.to(device)
    precision = precision_on(device, config["amp"])
    identity |= {"model": sam_settings["model"], "weights_sha256": sha256, "precision": precision}
    if settings["prompt"] == "dino":
        return prompted_engine(config, data, sam, identity)
    network_settings = {key: value for key, value in sam_settings.items() if key not in OWN_SAM_KEYS}
    identity |= {"settings": network_settings}
    if settings["engine"] == "official":
        official = SamAutomaticMaskGenerator(sam, **network_settings)
        return lambda images, _ids: [official.generate(image) for image in images], identity | {"precision": "float32"}
    ours = MaskGenerator(
        sam,
        **network_settings,
        image_batch=settings["image_batch"],
        precision=precision,
        compile_encoder=sam_settings["compile_encoder"],
    )
    with_masks = settings["store"] != "none"
    return lambda images, _ids: ours.generate(images, with_masks=with_masks), identity


def prompted_engine(config: dict, data: DataSet, sam: Any, identity: dict) -> tuple[Engine, dict[str, Any]]:
    """Return the engine that asks SAM where the maps point."""
    maps = MapCache.open(config["dino_maps"], dataset=data.fingerprint())
    prompt = {key.removeprefix("prompt_"): config["sam"][key] for key in OWN_SAM_KEYS if key.startswith("prompt_")}
    prompt |= {key: config["dino"][key] for key in ("upsample", "choose", "size_factor")}
    prompt["threshold"] = "otsu" if config["dino"]["otsu"] else config["dino"]["threshold"]
    engine = PromptedMasks(sam, identity["precision"], **prompt)
    identity |= {"settings": prompt, "maps_sha256": maps.header["sha256"]}
    return lambda images, ids: [engine.generate(image, maps[i]) for image, i in zip(images, ids, strict=True)], identity


# --- masks --------------------------------------------------------------------------------------------------------


def made_batches(stage: Stage, numbers: list[int]) -> Iterator[Result]:
    """Write the masks of batches, whose images are decoded ahead by workers; yield their entries and failures."""
    batches, workers = [stage.work.units[number] for number in numbers], stage.config["num_workers"]
    images = ImageBatches(batches, stage.data)
    loader = build_loader(images, num_workers=workers, pin_memory=False, batch_size=None, collate_fn=as_it_is)
    for rows, (pixels, errors) in zip(batches, loader, strict=True):
        entries = masks_of_batch(stage, rows, pixels, errors)
        yield Result({"images": entries, "errors": errors})


def masks_of_batch(
    stage: Stage, rows: Sequence[int], images: list[np.ndarray | None], errors: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Make and write the masks of a batch; return image name -> entries; failures go into ``errors``."""
    readable = {row: image for row, image in zip(rows, images, strict=True) if image is not None}
    made, store = records_of(stage, readable, errors), stage.config["mask"]["store"]
    for row, records in made.items():
        if store != "none":
            masks = np.array([record["segmentation"] for record in records], dtype=bool)
            masks = masks.reshape(-1, *readable[row].shape[:2])
            save_masks(stage.folder / f"{stage.names[row]}.pt", torch.from_numpy(masks), store)
    return {stage.names[row]: [info_entry(record) for record in records] for row, records in made.items()}


def records_of(stage: Stage, images: dict[int, np.ndarray], errors: dict[str, str]) -> dict[int, Records]:
    """Return the records of images by row, without those that fail, whose reasons go into ``errors``."""
    ids = stage.data.ids[list(images)].tolist()
    try:
        with torch.no_grad():
            return dict(zip(images, stage.generate(list(images.values()), ids), strict=True))
    except DeadWorkerError:  # raised by a signal handler while an image was in work: not its fault
        raise
    except Exception as error:  # one image must not stop the others, whatever it raises
        if len(images) == 1:
            errors[str(ids[0])] = " ".join(str(error).split())[:300] or type(error).__name__
            return {}
    alone = [records_of(stage, {row: image}, errors) for row, image in images.items()]
    return {row: records for part in alone for row, records in part.items()}


def gather_info(stage: Stage) -> dict[ImageId, str]:
    """Write masks_info.json and errors.txt of all processes' work; return why images failed."""
    info, errors = stage.info, dict(stage.data.unreadable)
    for about, _ in stage.work.results():
        info |= about["images"]
        errors |= {key_to_id(image_id): error for image_id, error in about["errors"].items()}
    failed = {name for name, i in zip(stage.names, stage.data.ids.tolist(), strict=True) if i in errors}
    stage.info = {name: info[name] for name in stage.names if name in info and name not in failed}
    counts, seconds = [len(entries) for entries in stage.info.values()], stage.seconds["masks"]
    if stage.work.has_new_units or not (stage.folder / "masks_info.json").exists():
        setup = stage.work.identity | {"made_by": Path(__file__).name, "seconds": seconds, "batches": stage.work.keys}
        save_masks_info(stage.folder, setup, stage.info)
        save_errors(stage.folder / "errors.txt", errors)
    stage.work.remove()
    print(
        f"{stage.folder}: {sum(counts)} masks of {len(counts)} images ({np.mean(counts or [0]):.1f} each), none for "
        f"{counts.count(0)}; {len(errors)} images failed; {seconds:.1f} s"
    )
    return errors


# --- boxes of prompted masks --------------------------------------------------------------------------------------


def write_boxes(stage: Stage, out: Path, errors: dict[ImageId, str]) -> None:
    """Write the box JSON of prompted masks, one an image, and its report."""
    data, entries = stage.data, [stage.info.get(name) for name in stage.names]
    boxes, scores = np.full((len(entries), 4), np.nan), np.zeros(len(entries))
    for row, entry in enumerate(entries):
        if entry:
            boxes[row] = clip_boxes(np.array(entry[0]["bbox"]), data.image_sizes[row])
            scores[row] = entry[0]["predicted_iou"]
    settings = stage.config | {"masks": stage.work.identity}
    save_source(out, data, boxes, made_by=Path(__file__).name, settings=settings, scores=scores)
    maps = MapCache.open(stage.config["dino_maps"])
    report_boxes(out, data, boxes, seconds=stage.seconds, errors=errors, maps=maps)


if __name__ == "__main__":
    run_script(main, load_config)
