"""Turn the attention of a Vision Transformer into pseudo ground-truth boxes and a cache of attention maps.

Reads a data set. Writes, for out=FOLDER/STEM.json:

    STEM.json            the boxes: train.py source=FOLDER/STEM.json holds its crops to them
    STEM.maps.json/.bin  the attention maps, for density-map crops
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

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import map_boxes
from attention import cls_attention, last_attention, nearest_patch_size
from box_report import Panel, best_median_worst, draw_contact_sheet, evaluate_boxes, report_table, save_report
from boxes import iou, save_boxes
from config import load_config, worker_count
from datasets import DataSet, build_loader, read_dataset, read_image
from localizer import Localizer, build_localizer
from map_cache import MapCache, RecordFile, cache_paths, read_records, save_map_cache
from utils import UserError, load_json, locked, pick_device, run_script, save_json, save_text, user_errors

LONGEST = 4  # an image's long side is cut to this many times the short one: memory stays bounded
SHEET_COLUMNS = 5  # images a row of the contact sheet
STALLED_SECONDS = 1800  # without a finished batch of any process, the others are taken for dead


def main(config: dict) -> None:
    """Make maps, boxes and their evaluation; with several processes each makes its share of the maps."""
    with user_errors(ValueError):
        stage = prepare(config)
    make_maps(stage, missing_batches(stage))
    if stage.rank == 0:
        wait_for_others(stage)
        cache = gather_maps(stage)
        boxes = find_boxes(stage, cache)
        report(stage, cache, boxes)
        refuse_to_hide_errors(stage, cache)


# --- what is to be done -------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images of one shape that go through the network together; the unit of resuming and of sharding."""

    number: int
    rows: list[int]  # of the data set
    height: int  # of the network's input, pixels
    width: int


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    out: Path
    data: DataSet
    localizer: Localizer
    device: torch.device
    identity: dict[str, Any]  # all that the maps depend on
    batches: list[Batch]
    rank: int
    world_size: int
    seconds: dict[str, float] = field(default_factory=dict)
    images_mapped: int = 0  # in this run, by this process

    @property
    def work_folder(self) -> Path:
        """Finished batches lie here until all are there."""
        return self.out.with_name(f"{self.out.stem}.partial")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside the with block to a stage's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def prepare(config: dict) -> Stage:
    """Read the data set, build the network, plan the batches, and check that ``out`` is free or ours."""
    start = time.perf_counter()
    wanted, rank, world_size = config["dino"], *process_numbers()
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    device = choose_device(config["device"])
    data = read_dataset(**config["dataset"] | {"check": False})  # an image that cannot be read is this stage's to list
    read = time.perf_counter()
    localizer = build_localizer(wanted["model"], wanted["weights"])
    localizer.model.to(device)
    side = wanted["image_size"] or localizer.image_size
    check_settings(wanted, localizer, side)
    out = Path(config["out"] or f"runs/dino_boxes_{config['dataset']['name']}/boxes.json")
    stage = Stage(
        config=config,
        out=out,
        data=data,
        localizer=localizer,
        device=device,
        identity=map_identity(config, data, localizer, side, device),
        batches=plan_batches(data.image_sizes, side, localizer.patch, wanted["batch_size"]),
        rank=rank,
        world_size=world_size,
        seconds={"data": round(read - start, 3), "model": round(time.perf_counter() - read, 3)},
    )
    claim_out(stage)
    if rank == 0:
        network = f"{localizer.name} ({localizer.weights})"
        print(f"{len(data.ids)} images of {data.root}; maps by {network} at {side} px on {device}")
    return stage


def process_numbers() -> tuple[int, int]:
    """Return (rank, world size), as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device: str | None) -> torch.device:
    """Return the device; None or "cuda": this process's own GPU where there is one."""
    own_gpu = device in (None, "cuda") and torch.cuda.is_available()
    return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if own_gpu else device)


def check_settings(wanted: dict, localizer: Localizer, side: int) -> None:
    """Raise before any work if the cleaning or the box method would refuse the settings.

    Raises:
        ValueError, UserError: with the key.
    """
    if side < max(localizer.patch):
        raise UserError(f"dino.image_size={side}: smaller than one patch; set at least {max(localizer.patch)}")
    heads = last_attention(localizer.model).num_heads
    trial = clean(np.random.default_rng(0).random((heads, 5, 7)), wanted)
    map_to_box(trial, (70, 50), wanted)


def map_identity(config: dict, data: DataSet, localizer: Localizer, side: int, device: torch.device) -> dict[str, Any]:
    """Return everything that the maps depend on: maps of another identity are other maps."""
    wanted = config["dino"]
    return {
        "dataset": data.fingerprint(),
        "model": localizer.name,
        "weights_sha256": localizer.weights_sha256,
        "precision": config["amp"] if device.type == "cuda" and config["amp"] != "none" else "float32",
        "settings": {"image_size": side}
        | {key: wanted[key] for key in ("autocontrast", "batch_size", "heads", "steps", "filter_size")},
    }


def plan_batches(image_sizes: np.ndarray, side: int, patch: tuple[int, int], batch_size: int) -> list[Batch]:
    """Group images by the shape of their input and cut the groups into batches; depends on the data set alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(image_sizes.tolist()):
        groups.setdefault(input_shape(size, side, patch), []).append(row)
    cut = [
        (shape, rows[start : start + batch_size])
        for shape, rows in sorted(groups.items())
        for start in range(0, len(rows), batch_size)
    ]
    return [Batch(number, rows, *shape) for number, (shape, rows) in enumerate(cut)]


def input_shape(image_size: tuple[int, int], side: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the network's input: short side near ``side``, whole patches, aspect kept.

    Args:
        image_size: (width, height) of the image in pixels.
        side: of the input's short side, pixels.
        patch: (height, width) in pixels.
    """
    width, height = image_size
    scale = side / min(width, height)
    sides = (min(length * scale, LONGEST * side) for length in (height, width))
    return tuple(nearest_patch_size(length, one) for length, one in zip(sides, patch, strict=True))


# --- what lies at `out` already -----------------------------------------------------------------------------------


def claim_out(stage: Stage) -> None:
    """Make sure that what lies at ``out`` is of this very run, or nothing; ``dino.again`` removes it.

    Raises:
        UserError: if it is of other settings, another model or data set, or of another script.
    """
    if stage.config["dino"]["again"]:
        remove_earlier(stage)
    index, _ = cache_paths(stage.out)
    if index.exists():
        header = MapCache.open(stage.out).header
        check_identity(stage, header, f"{index}: made")
    elif stage.out.exists():
        raise UserError(f"{stage.out}: was not made by this script (it has no maps beside it); give another out=FILE")
    settings = stage.work_folder / "identity.json"
    if settings.exists():
        check_identity(stage, load_json(settings), f"{stage.work_folder}: begun")


def remove_earlier(stage: Stage) -> None:
    """Remove finished and unfinished work at ``out``."""
    if stage.world_size > 1:
        raise UserError(f"dino.again=true is for one process: remove {stage.work_folder} and {stage.out} by hand")
    for path in (*cache_paths(stage.out), stage.out):
        path.unlink(missing_ok=True)
    shutil.rmtree(stage.work_folder, ignore_errors=True)


def check_identity(stage: Stage, found: Any, what: str) -> None:
    """Raise UserError if ``found`` is not this run's identity."""
    found = found if isinstance(found, dict) else {}
    for key, value in _flat(stage.identity).items():
        before = _flat(found).get(key)
        if before != value:
            raise UserError(
                f"{what} with {key}={str(before)[:40]}, now {str(value)[:40]}; give another out=FILE, or start anew: "
                f"python generate_dino_boxes.py out={stage.out} dino.again=true"
            )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    settings = identity.get("settings")
    own = {f"dino.{key}": value for key, value in settings.items()} if isinstance(settings, dict) else {}
    return {key: value for key, value in identity.items() if key != "settings"} | own


def finished_batches(stage: Stage) -> set[int]:
    """Return the batches that need not be done: those in a finished cache without a failed image, and in parts."""
    done = {record.header["batch"] for record in all_records(stage)}
    index, _ = cache_paths(stage.out)
    if index.exists():
        failed = set(MapCache.open(stage.out).header["errors"])
        done |= {b.number for b in stage.batches if failed.isdisjoint(str(i) for i in stage.data.ids[b.rows])}
    return done


def missing_batches(stage: Stage) -> list[Batch]:
    """Return the batches that are still to be done, by whichever process; say how much was found."""
    done = finished_batches(stage)
    if stage.rank == 0 and done:
        count = sum(len(batch.rows) for batch in stage.batches if batch.number in done)
        print(f"the maps of {count} of {len(stage.data.ids)} images are there already")
    return [batch for batch in stage.batches if batch.number not in done]


def all_records(stage: Stage) -> Iterator[Any]:
    """Yield the finished records of all processes, those of earlier runs too."""
    for path in sorted(stage.work_folder.glob("process_*/maps.records")):
        yield from read_records(path)


# --- maps ---------------------------------------------------------------------------------------------------------


def make_maps(stage: Stage, todo: list[Batch]) -> None:
    """Make this process's share of the missing maps and append each finished batch to its record file."""
    mine = [batch for batch in todo if batch.number % stage.world_size == stage.rank]
    if not mine:
        return
    folder = stage.work_folder / f"process_{stage.rank}"
    with locked(folder) as free, stage.timed("maps"):
        if not free:
            raise UserError(f"{folder}: another process works there; wait for it, or give another out=FILE")
        if not (stage.work_folder / "identity.json").exists():
            save_json(stage.work_folder / "identity.json", stage.identity)
        records = RecordFile(folder / "maps.records")
        try:
            for header, maps in mapped_batches(stage, mine):
                records.append(header, maps.tobytes())
        finally:
            records.close()


def mapped_batches(stage: Stage, batches: list[Batch]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield (record header, cleaned maps (B, feat_h, feat_w) float16) of each batch.

    The maps of a batch are cleaned while the GPU works on the next one.
    """
    paths = [[stage.data.paths[row] for row in batch.rows] for batch in batches]
    images = MapImages(batches, paths, stage.localizer.patch, stage.config["dino"]["autocontrast"])
    workers = worker_count(stage.config["num_workers"], stage.config["A_machine"])
    loader = build_loader(images, num_workers=workers, pin_memory=stage.device.type == "cuda", batch_size=None)
    total = sum(len(batch.rows) for batch in batches)
    with tqdm(total=total, desc="maps", unit=" images", disable=stage.rank > 0, mininterval=1.0) as bar:
        pending = None
        for number, (pixels, errors) in enumerate(loader):
            attention = attend(stage, pixels)
            if pending is not None:
                yield finished(stage, *pending)
                bar.update(len(pending[0].rows))
            pending = batches[number], attention, errors
        yield finished(stage, *pending)
        bar.update(len(pending[0].rows))
    stage.images_mapped = total


class MapImages(Dataset):
    """Whole batches of decoded and resized images."""

    def __init__(
        self, batches: list[Batch], paths: list[list[Path]], patch: tuple[int, int], autocontrast: bool
    ) -> None:
        """Keep the image paths of each batch."""
        self.batches, self.paths, self.patch, self.autocontrast = batches, paths, patch, autocontrast

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[str | None]]:
        """Return images (B, H, W, 3) uint8 of the batch, zeros where one failed, and what failed (None: nothing)."""
        batch = self.batches[number]
        pixels = np.zeros((len(batch.rows), batch.height, batch.width, 3), dtype=np.uint8)
        errors = []
        for place, path in zip(pixels, self.paths[number], strict=True):
            try:
                place[:] = self.read(path, batch)
                errors.append(None)
            except Exception as error:  # whatever one image does, the others go on; decoders raise many kinds
                errors.append(" ".join(str(error).split())[:300] or type(error).__name__)
        return torch.from_numpy(pixels), errors

    def read(self, path: Path, batch: Batch) -> np.ndarray:
        """Return one image as the network's input, (H, W, 3) uint8."""
        image = read_image(path)
        if image.height < self.patch[0] or image.width < self.patch[1]:
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels, smaller than one patch of {max(self.patch)}"
            )
        image = image.resize((batch.width, batch.height), PIL.Image.Resampling.BICUBIC)
        return np.asarray(PIL.ImageOps.autocontrast(image) if self.autocontrast else image)


def attend(stage: Stage, pixels: torch.Tensor) -> torch.Tensor:
    """Return the CLS attention (B, heads, feat_h, feat_w) of (B, H, W, 3) uint8 images; on CUDA it is only begun."""
    images = pixels.to(stage.device, non_blocking=True).permute(0, 3, 1, 2)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(stage.identity["precision"])
    cast = torch.autocast("cuda", dtype=precision) if precision else nullcontext()
    with torch.inference_mode(), cast:
        return cls_attention(stage.localizer.model, stage.localizer.normalize(images))


def finished(
    stage: Stage, batch: Batch, attention: torch.Tensor, errors: list[str | None]
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the record header and the cleaned maps (B, feat_h, feat_w) float16 of a batch; blank maps are zeros."""
    ids = stage.data.ids[batch.rows].tolist()
    failed = {str(i): error for i, error in zip(ids, errors, strict=True) if error is not None}
    cleaned = [clean(heads, stage.config["dino"]) for heads in attention.cpu().numpy()]
    maps = np.stack(cleaned).astype(np.float16)
    blank = [str(i) in failed or map_boxes.is_blank(one) for i, one in zip(ids, maps, strict=True)]
    maps[blank] = 0
    header = {"batch": batch.number, "ids": ids, "feat": list(maps.shape[1:]), "errors": failed}
    return header, maps


def clean(attention: np.ndarray, wanted: dict) -> np.ndarray:
    """Return the cleaned map (feat_h, feat_w) of one image's attention (heads, feat_h, feat_w)."""
    heads = wanted["heads"]
    return map_boxes.clean_map(
        attention,
        heads=int(heads) if heads.isdecimal() else heads,
        steps=wanted["steps"],
        filter_size=wanted["filter_size"] or max(3, round(0.1 * min(attention.shape[1:]))),
    )


def wait_for_others(stage: Stage) -> None:
    """Wait until the batches of all processes are there.

    Raises:
        UserError: if none has come for a long time.
    """
    index, _ = cache_paths(stage.out)
    if stage.world_size == 1 or (index.exists() and not stage.work_folder.exists()):
        return
    missing, since = None, time.monotonic()
    while found := {batch.number for batch in stage.batches} - finished_batches(stage):
        if found != missing:
            missing, since = found, time.monotonic()
        if time.monotonic() - since > STALLED_SECONDS:
            raise UserError(f"{len(found)} batches of other processes do not come; start the same command again")
        time.sleep(1.0)


def gather_maps(stage: Stage) -> MapCache:
    """Put all maps into the cache, in the order of the data set; the parts go once it is written."""
    index, _ = cache_paths(stage.out)
    if stage.work_folder.exists():
        with stage.timed("cache"):
            errors, maps = {}, {}
            if index.exists():
                maps = dict(_cached_maps(MapCache.open(stage.out)))
            for record in all_records(stage):
                batch = np.frombuffer(record.payload, np.float16).reshape(-1, *record.header["feat"])
                maps |= dict(zip(record.header["ids"], batch, strict=True))
                errors |= record.header["errors"]
            ordered = ((image_id, maps[image_id]) for image_id in stage.data.ids.tolist())
            save_map_cache(index, ordered, stage.identity | {"errors": errors} | cache_about(stage))
        shutil.rmtree(stage.work_folder)
    return MapCache.open(stage.out, dataset=stage.identity["dataset"])


def _cached_maps(cache: MapCache) -> Iterator[tuple[int, np.ndarray]]:
    return ((image_id, cache[image_id]) for image_id in cache.ids.tolist())


def cache_about(stage: Stage) -> dict[str, Any]:
    """Return what else the cache's header tells a person."""
    return {
        "made_by": Path(__file__).name,
        "weights": stage.localizer.weights,
        "patch": list(stage.localizer.patch),
        "dataset_name": stage.data.name,
    }


# --- boxes --------------------------------------------------------------------------------------------------------


def find_boxes(stage: Stage, cache: MapCache) -> list[map_boxes.MapBox]:
    """Return the box of each image, in the order of the data set, and write the box file."""
    data, wanted = stage.data, stage.config["dino"]
    with stage.timed("boxes"):
        boxes = [
            map_to_box(cache[image_id], tuple(size), wanted)
            for image_id, size in zip(data.ids.tolist(), data.image_sizes.tolist(), strict=True)
        ]
        ids = data.ids.tolist()
        save_boxes(
            stage.out,
            {i: box.xywh if box.found else None for i, box in zip(ids, boxes, strict=True)},
            dict(zip(ids, data.image_sizes.tolist(), strict=True)),
            made_by=Path(__file__).name,
            settings=stage.config | {"maps": stage.identity},
        )
    return boxes


def map_to_box(attention_map: np.ndarray, image_size: tuple[int, int], wanted: dict) -> map_boxes.MapBox:
    """Return the box that the configured method finds in a cleaned map (feat_h, feat_w)."""
    cells = map_boxes.min_max(np.asarray(attention_map, dtype=np.float64))  # thresholds are shares of the maximum
    threshold = "otsu" if wanted["otsu"] else wanted["threshold"]
    if wanted["method"] == "published":
        return map_boxes.published_box(cells, image_size, threshold=threshold)
    options = {key: wanted[key] for key in ("upsample", "choose", "size_factor")}
    return map_boxes.component_box(cells, image_size, threshold=threshold, **options)


# --- report -------------------------------------------------------------------------------------------------------


def report(stage: Stage, cache: MapCache, boxes: list[map_boxes.MapBox]) -> None:
    """Print and save the evaluation, the contact sheet and errors.txt."""
    data = stage.data
    xywh, found = np.array([box.xywh for box in boxes]), np.array([box.found for box in boxes])
    scores = evaluate_boxes(xywh, found, data.boxes, data.image_sizes, data.split)
    with stage.timed("contact_sheet"):
        draw_contact_sheet(contact_panels(stage, cache, xywh), stage.out.with_suffix(".png"))
    speed = stage.images_mapped / stage.seconds["maps"] if stage.images_mapped else None
    save_report(stage.out, scores, stage.seconds, images_mapped=stage.images_mapped, maps_per_second=speed)
    errors = cache.header["errors"]
    lines = [f"{len(errors)} images failed", *(f"{image_id}: {error}" for image_id, error in errors.items())]
    save_text(stage.out.with_name("errors.txt"), "\n".join(lines) + "\n")
    print(report_table(scores))
    print(f"{stage.out}: {int(found.sum())} boxes, no box for {int((~found).sum())} images; seconds: {stage.seconds}")


def contact_panels(stage: Stage, cache: MapCache, xywh: np.ndarray) -> dict[str, list[Panel]]:
    """Return the panels of the contact sheet, of test images where there are any."""
    data, failed = stage.data, set(map(int, cache.header["errors"]))
    rows = data.rows("test") if len(data.rows("test")) else np.arange(len(data.ids))
    rows = np.array([row for row in rows if int(data.ids[row]) not in failed], dtype=np.int64)
    ious = iou(xywh[rows], data.boxes[rows])

    def panel(place: int) -> Panel:
        row = rows[place]
        title = f"image {data.ids[row]}, IoU {ious[place]:.2f}"
        return Panel(read_image(data.paths[row]), cache[int(data.ids[row])], xywh[row], data.boxes[row], title)

    chosen = best_median_worst(ious, SHEET_COLUMNS)
    return {name: [panel(place) for place in places] for name, places in chosen.items()}


def refuse_to_hide_errors(stage: Stage, cache: MapCache) -> None:
    """End with status 2 if images failed, after everything else was written."""
    errors = cache.header["errors"]
    if errors:
        raise UserError(
            f"{len(errors)} of {len(stage.data.ids)} images failed and have no box, see "
            f"{stage.out.with_name('errors.txt')}; the rest is done: mend them and run the same command again"
        )


if __name__ == "__main__":
    run_script(main, load_config)
