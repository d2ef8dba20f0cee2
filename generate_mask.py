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

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator

from config import load_config
from datasets import read_dataset
from figures.box_report import raise_if_any_failed, report_boxes, save_errors
from jobs.guard import dead_workers, run_script, same_command, with_resume_hint
from jobs.loader import build_loader
from jobs.shared_work import (
    Result,
    SharedWork,
    box_path,
    choose_device,
    content_keys,
    refuse_foreign,
)
from jobs.torchrun import process_numbers
from localized_crops.box_file import load_boxes, save_boxes
from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.files import UserError, no_empty_folder, user_errors
from localized_crops.image_ids import ImageId, key_to_id
from localized_crops.map_file import MapCache
from masks.mask_files import (
    info_entry,
    load_masks,
    load_masks_info,
    mask_names,
    new_mask_folder,
    save_masks,
    save_masks_info,
)
from masks.mask_generator import MaskGenerator
from masks.sam_models import load_sam
from masks.sam_prompts import PromptedMasks
from masks.segments import SegmentGenerator
from readers.data_set import DataSet
from readers.image_batches import ImageBatches, as_it_is
from utils import precision_on, set_threads

__all__ = ["MaskGenerator", "load_masks"]  # found here by the names that the stage is known by
OWN_SAM_KEYS = ("model", "checkpoint", "compile_encoder", "prompt_box", "prompt_points", "prompt_background")

Records = list[dict[str, Any]]  # of one image, as SamAutomaticMaskGenerator returns them


def main(config: dict) -> None:
    """Make the masks; with several processes each makes its share, and the first writes the info."""
    with user_errors(ValueError):
        stage = prepare(config)
    command = partial(same_command, f"mask.folder={stage.folder}")
    folder = no_empty_folder(stage.folder, is_new=config["mask"]["folder"] is None)
    with with_resume_hint(command), folder, stage.work.claimed():
        claim_folder(stage.folder, stage.work)
        if config["mask"]["prompt"] == "dino":
            claim_out(box_path(config["out"], f"runs/sam_boxes_{config['dataset']['name']}/boxes.json"))
        make_masks(stage)
        if stage.work.rank == 0:
            errors = gather_info(stage)
            if config["mask"]["prompt"] == "dino":
                write_boxes(stage, errors)
            raise_if_any_failed(errors, stage.folder / "errors.txt", command())


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    data: DataSet
    names: list[str]  # of each image's files
    folder: Path
    generate: Callable[[Sequence[np.ndarray], Sequence[int]], list[Records]]  # images, their ids -> records of each
    work: SharedWork
    batches: list[list[int]]  # rows of the data set that go through the network together
    seconds: float = 0.0


def prepare(config: dict) -> Stage:
    """Read the data set, build the engine, and find the folder."""
    set_threads(config["num_threads"])
    rank, world_size = process_numbers()
    if world_size > 1 and config["mask"]["folder"] is None:
        raise UserError("several processes write to one folder: name it, such as mask.folder=CUB_200_2011/masks_0")
    data = read_dataset(**config["dataset"] | {"check": False}, keep_going=True)  # faults are this stage's to list
    generate, identity = build_engine(config, data, choose_device(config["device"]))
    identity |= {"dataset": data.fingerprint(), "store": config["mask"]["store"]}
    folder = Path(config["mask"]["folder"] or new_mask_folder(data.root))
    again = f"remove {folder} and run the same command"
    size = config["mask"]["image_batch"]
    rows = list(range(len(data.ids)))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    keys = content_keys([[data.paths[row] for row in batch] for batch in batches])
    work = SharedWork(folder / "unfinished", identity, "mask", again, rank, world_size, keys)
    if rank == 0:
        print(f"{len(rows)} images of {data.root}; masks by {identity['engine']} to {folder}")
        print(f"if this run is interrupted, mask.folder={folder} goes on with it", flush=True)
    return Stage(
        config=config,
        data=data,
        names=mask_names(data.ids.tolist(), data.paths),
        folder=folder,
        generate=generate,
        work=work,
        batches=batches,
    )


def claim_folder(folder: Path, work: SharedWork) -> None:
    """Make sure that ``folder`` holds masks of this very run, or nothing.

    Raises:
        UserError: if it is of other settings or another data set, or no folder of masks.
    """
    if (folder / "masks_info.json").exists():
        work.check_identity(load_masks_info(folder)[0], f"{folder}: made")
    elif not work.begun and any(path != work.folder for path in folder.iterdir()):
        raise UserError(f"{folder}: is no folder of this script (no masks_info.json); name another mask.folder")
    work.check()


def claim_out(out: Path) -> None:
    """Raise UserError if another program's files lie where the boxes of prompted masks go."""
    if not out.exists() or load_boxes(out).made_by != Path(__file__).name:
        refuse_foreign(out)


def build_engine(config: dict, data: DataSet, device: torch.device) -> tuple[Callable, dict[str, Any]]:
    """Return what makes the records of images, given with their ids, and all that its masks depend on."""
    wanted, sam_wanted = config["mask"], config["sam"]
    identity = {"engine": wanted["engine"], "prompt": wanted["prompt"]}
    if wanted["engine"] == "segments":
        engine = SegmentGenerator()
        return lambda images, _ids: engine.generate(images), identity | {"settings": engine.settings()}
    sam, sha256 = load_sam(sam_wanted["model"], sam_wanted["checkpoint"])
    sam = sam.to(device)
    precision = precision_on(device, config["amp"])
    identity |= {"model": sam_wanted["model"], "weights_sha256": sha256, "precision": precision}
    if wanted["prompt"] == "dino":
        return prompted_engine(config, data, sam, identity)
    settings = {key: value for key, value in sam_wanted.items() if key not in OWN_SAM_KEYS}
    identity |= {"settings": settings}
    if wanted["engine"] == "official":
        official = SamAutomaticMaskGenerator(sam, **settings)
        return lambda images, _ids: [official.generate(image) for image in images], identity | {"precision": "float32"}
    ours = MaskGenerator(
        sam,
        **settings,
        image_batch=wanted["image_batch"],
        precision=precision,
        compile_encoder=sam_wanted["compile_encoder"],
    )
    keep = wanted["store"] != "none"
    return lambda images, _ids: [one.records() for one in ours.generate_tensors(images, masks=keep)], identity


def prompted_engine(config: dict, data: DataSet, sam: Any, identity: dict) -> tuple[Callable, dict[str, Any]]:
    """Return the engine that asks SAM where the maps point."""
    maps = MapCache.open(config["dino_maps"], dataset=data.fingerprint())
    prompt = {key.removeprefix("prompt_"): config["sam"][key] for key in OWN_SAM_KEYS if key.startswith("prompt_")}
    prompt |= {key: config["dino"][key] for key in ("upsample", "choose", "size_factor")}
    prompt["threshold"] = "otsu" if config["dino"]["otsu"] else config["dino"]["threshold"]
    engine = PromptedMasks(sam, identity["precision"], **prompt)
    identity |= {"settings": prompt, "maps_sha256": maps.header["sha256"]}
    return lambda images, ids: engine.generate(images, [maps[image_id] for image_id in ids]), identity


# --- masks --------------------------------------------------------------------------------------------------------


def make_masks(stage: Stage) -> None:
    """Make this process's share of the missing masks; a batch is finished once its mask files are written."""
    start = time.perf_counter()
    sizes = [len(rows) for rows in stage.batches]
    stage.work.run_units(sizes, partial(made_batches, stage), done=finished_batches(stage), what="masks")
    stage.seconds = round(time.perf_counter() - start, 3)


def finished_batches(stage: Stage) -> set[int]:
    """Return the batches that a finished folder holds: those without a failed image whose images did not change."""
    if not (stage.folder / "masks_info.json").exists():
        return set()
    setup, info = load_masks_info(stage.folder)
    whole = {n for n, rows in enumerate(stage.batches) if all(stage.names[row] in info for row in rows)}
    return whole & stage.work.unchanged(setup.get("batches"))


def made_batches(stage: Stage, numbers: list[int]) -> Iterator[Result]:
    """Write the masks of batches, whose images are decoded ahead by workers; yield their entries and failures."""
    data = stage.data
    images = ImageBatches([[(data.ids[r].item(), data.paths[r]) for r in stage.batches[n]] for n in numbers])
    workers = stage.config["num_workers"]
    loader = build_loader(images, num_workers=workers, pin_memory=False, batch_size=None, collate_fn=as_it_is)
    for number, (pixels, errors) in zip(numbers, loader, strict=True):
        found = masks_of_batch(stage, stage.batches[number], pixels, errors)
        yield Result({"images": found, "errors": errors})


def masks_of_batch(
    stage: Stage, rows: list[int], images: list[np.ndarray | None], errors: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Make and write the masks of a batch; return image name -> entries; failures go into ``errors``."""
    readable = [(row, image) for row, image in zip(rows, images, strict=True) if image is not None]
    try:
        made = list(zip(readable, generated(stage, readable), strict=True))
    except Exception as error:  # one of them fails: each by itself, so that the others go on
        _unless_a_worker_died(error)
        made = []
        for one in readable:
            try:
                made.append((one, generated(stage, [one])[0]))
            except Exception as error:  # whatever it is, the other images go on
                _unless_a_worker_died(error)
                errors[str(stage.data.ids[one[0]])] = " ".join(str(error).split())[:300] or type(error).__name__
    store = stage.config["mask"]["store"]
    for (row, image), records in made:
        if store != "none":
            save_masks(stage.folder / f"{stage.names[row]}.pt", stacked(records, image.shape[:2]), store)
    return {stage.names[row]: [info_entry(record) for record in records] for (row, _), records in made}


def _unless_a_worker_died(error: Exception) -> None:
    """Raise the error again if torch's signal handler threw it into the work on an image, which is not at fault."""
    if dead_workers():
        raise error


def generated(stage: Stage, readable: list[tuple[int, np.ndarray]]) -> list[Records]:
    """Return the records of (row, image) pairs."""
    if not readable:
        return []
    with torch.no_grad():
        return stage.generate([image for _, image in readable], stage.data.ids[[row for row, _ in readable]].tolist())


def stacked(records: Records, size: tuple[int, int]) -> torch.Tensor:
    """Return the masks of one image, (N, H, W) bool."""
    masks = np.zeros((len(records), *size), dtype=bool)
    for place, record in zip(masks, records, strict=True):
        place[:] = record["segmentation"]
    return torch.from_numpy(masks)


def gather_info(stage: Stage) -> dict[ImageId, str]:
    """Write masks_info.json and errors.txt of all processes' work; return why images failed."""
    finished = (stage.folder / "masks_info.json").exists()
    info = load_masks_info(stage.folder)[1] if finished else {}
    missing = set(range(len(stage.batches))) - finished_batches(stage)
    errors = dict(stage.data.unreadable)
    for about, _ in stage.work.results(missing):
        info |= about["images"]
        errors |= {key_to_id(image_id): error for image_id, error in about["errors"].items()}
    failed = {name for name, i in zip(stage.names, stage.data.ids.tolist(), strict=True) if i in errors}
    ordered = {name: info[name] for name in stage.names if name in info and name not in failed}
    counts = [len(entries) for entries in ordered.values()]
    if missing or not finished:
        about = {"made_by": Path(__file__).name, "seconds": stage.seconds, "batches": list(stage.work.keys)}
        save_masks_info(stage.folder, stage.work.identity | about, ordered)
        save_errors(stage.folder / "errors.txt", errors)
    stage.work.remove()
    print(
        f"{stage.folder}: {sum(counts)} masks of {len(counts)} images ({np.mean(counts or [0]):.1f} each), none for "
        f"{counts.count(0)}; {len(errors)} images failed; {stage.seconds:.1f} s"
    )
    return errors


# --- boxes of prompted masks --------------------------------------------------------------------------------------


def write_boxes(stage: Stage, errors: dict[int, str]) -> None:
    """Write the box JSON of prompted masks, one an image, and its report."""
    data, config = stage.data, stage.config
    out = box_path(config["out"], f"runs/sam_boxes_{config['dataset']['name']}/boxes.json")
    _, info = load_masks_info(stage.folder)
    entries = [info.get(name) for name in stage.names]
    found = np.array([bool(entry) for entry in entries])
    boxes = whole_image_boxes(data.image_sizes)
    boxes[found] = clip_boxes(np.array([e[0]["bbox"] for e in entries if e]).reshape(-1, 4), data.image_sizes[found])
    ids, unreadable = data.ids.tolist(), dict.fromkeys(data.unreadable)
    save_boxes(
        out,
        {i: box if has else None for i, box, has in zip(ids, boxes.tolist(), found, strict=True)} | unreadable,
        dict(zip(ids, data.image_sizes.tolist(), strict=True)) | unreadable,
        made_by=Path(__file__).name,
        settings=config | {"masks": stage.work.identity},
        pixel_grid=data.pixel_grid,
        scores={i: e[0]["predicted_iou"] if e else None for i, e in zip(ids, entries, strict=True)} | unreadable,
    )
    maps = MapCache.open(config["dino_maps"])
    report_boxes(out, data, boxes, found, seconds={"masks": stage.seconds}, errors=errors, maps=maps)


if __name__ == "__main__":
    run_script(main, load_config)
