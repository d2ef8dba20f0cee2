"""Draw a data set's images, boxes and crops, or the results of finished trainings: one PNG a call.

``visualize.what`` chooses the picture:

    crops      a row per image: the image with its true box (dashed) and the box of ``source`` (orange), the attention
               (where ``dino_maps`` is given), the best candidate masks (where ``masks`` is; their boxes where no mask
               was stored), then crops of RandomResizedCrop, of both localized crops at THR or maiou, and centred by the
               maps, each with the share of the true box that it keeps
    boxes      histograms of IoU and coverage of the boxes of ``source`` and of the trivial boxes, and of what crops
               keep of the true box and of the box that they are held to, on training and test images
    curves     training loss, validated accuracy and maIoU over the epochs of ``visualize.runs``
    accuracy   test accuracy against maIoU of ``visualize.runs``, with a line for each kind of crop and number of epochs
               that has at least 5 runs

Runs that differ in their seed alone are drawn as one, with their standard deviation. A folder of runs, such as a sweep,
stands for all runs in it. The README's first picture, after ``python generate_dino_boxes.py num_workers=0``:

    python visualize.py visualize.out=docs/crops.png visualize.images=4 seed=3 \\
        source=runs/dino_boxes_toybirds/boxes.json dino_maps=runs/dino_boxes_toybirds/boxes.json crop.temperature=0.1

The others:

    python visualize.py visualize.what=boxes source=runs/dino_boxes_toybirds/boxes.json THR=0.8
    python visualize.py visualize.what=curves visualize.runs=runs/toybirds_0,runs/toybirds_1
    python visualize.py visualize.what=accuracy visualize.runs=runs/sweep
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import pil_to_tensor

from config import load_config
from datasets import DataSet, known_boxes, read_dataset
from experiments.grid import crop_family, group_by_settings, load_summary, settings_key
from figures import plots
from figures.box_report import METHOD_NAMES, split_rows
from figures.plots import Panel, Sample, short
from jobs.guard import run_script
from localized_crops.boxes import (
    center_boxes,
    coverage,
    crops_to_xywh,
    fill_missing,
    iou,
    maiou_to_thr,
    whole_image_boxes,
)
from localized_crops.files import UserError, load_json, user_errors
from localized_crops.map_file import MapCache
from masks.mask_files import load_masks, load_masks_info, mask_names
from readers.images import read_image
from training.epoch_crops import BoxCrops, Crops, MapCrops, draw_seed
from training.log import load_log
from transforms import TrainTransform

EPOCHS = 20  # of crops that a histogram counts
MOST_CANDIDATES = 5  # drawn over an image: more cannot be told apart
MAX_IMAGES = 64  # rows of a picture: as many as visualize.images may ask for
CURVES = {"train_loss": "training loss", "ema_top1": "validated top-1 of the EMA (%)", "maiou": "maIoU of the crops"}
CROP_COLOURS = ("0.5", "tab:blue", "tab:green", "tab:purple")  # in the order of `crop_methods`
CROPS_KEEP = "share of the {} that crops keep"  # a column of the histograms


def main(config: dict) -> None:
    """Draw the picture that ``config`` asks for."""
    what = config["visualize"]["what"]
    out = config["visualize"]["out"] or f"runs/{what}.png"
    plots.check_picture(out)
    with user_errors(ValueError):
        figure, shown = PICTURES[what](config)
    plots.save_figure(figure, out)
    print(f"{shown} drawn to {out}")


# --- what is drawn from -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A data set with the boxes, attention maps and candidate masks of its images."""

    data: DataSet
    boxes: np.ndarray  # (N, 4) of the source, the whole image where it has none
    has_box: np.ndarray  # (N,) bool: the source has a box
    maps: MapCache | None
    # of each image the file of its candidate masks (None: only their boxes are stored), and their entries with bbox
    candidates: list[tuple[Path | None, list[dict[str, Any]]]] | None


def read_subject(config: dict) -> Subject:
    """Read the data set, the boxes of ``source`` and, where they are named, maps and candidate masks."""
    data = read_dataset(**config["dataset"])
    boxes = known_boxes(config["source"], data, **config["boxes"])
    has_box = ~np.isnan(boxes[:, 0])
    if not has_box.all():
        print(f"{config['source']}: no box for {(~has_box).sum()} images; the whole image serves as theirs")
    maps = MapCache.open(config["dino_maps"], dataset=data.fingerprint()) if config["dino_maps"] else None
    candidates = None
    if config["masks"]:
        setup, info = load_masks_info(config["masks"], dataset=data.fingerprint())
        stored = setup.get("store") != "none"
        files = {name: Path(config["masks"], f"{name}.pt") for name in mask_names(data.ids.tolist(), data.paths)}
        candidates = [(path if stored else None, info.get(name, [])) for name, path in files.items()]
    return Subject(data, fill_missing(boxes, data.image_sizes), has_box, maps, candidates)


def crop_methods(config: dict, subject: Subject, rows: np.ndarray) -> dict[str, Crops]:
    """Return the crop samplers for some images, by the name of the method."""
    crop, ids, sizes = config["crop"], subject.data.ids[rows], subject.data.image_sizes[rows]
    shape = {key: crop[key] for key in ("scale", "ratio")}
    methods = {"RandomResizedCrop": BoxCrops(subject.boxes[rows], sizes, thr=-1.0, **shape)}
    for mode, thr in thresholds(config, subject).items():
        methods[f"{mode}, THR={thr:.3g}"] = BoxCrops(subject.boxes[rows], sizes, thr=thr, mode=mode, **shape)
    if subject.maps is not None:
        name, temperature = f"density map, T={crop['temperature']:g}", crop["temperature"]
        methods[name] = MapCrops(subject.maps, ids, sizes, temperature=temperature, **shape)
    return methods


def thresholds(config: dict, subject: Subject) -> dict[str, float]:
    """Return the threshold of each crop that is held to boxes, by its mode: THR, or what reaches ``maiou``."""
    modes, crop, train = ("reference", "exact"), config["crop"], subject.data.rows("train")
    if config["maiou"] is None:
        return dict.fromkeys(modes, config["THR"]) if config["THR"] >= 0 else {}
    if not len(train):
        raise UserError(f"maiou={config['maiou']}: {subject.data.root} has no training image to find THR on; give THR")
    shape = {key: crop[key] for key in ("scale", "ratio")}
    boxes, sizes = subject.boxes[train], subject.data.image_sizes[train]
    return {mode: maiou_to_thr(config["maiou"], boxes, sizes, mode=mode, **shape) for mode in modes}


# --- crops --------------------------------------------------------------------------------------------------------


def crops_picture(config: dict) -> tuple[Figure, str]:
    """Return the picture of images and crops, and what it shows."""
    subject, rng = read_subject(config), np.random.default_rng(config["seed"])
    rows = choose_rows(config["visualize"], subject.data, rng)
    images = [read_image(subject.data.paths[row]) for row in rows]
    groups = image_panels(subject, rows, images) | crop_panels(config, subject, rows, images, rng)
    legend = [] if config["source"] == "gt" else [f"box of {Path(config['source']).name}: orange"]
    if subject.data.has_box[rows].any():
        legend += ["true box: white dashes", "number on a crop: share of the true box that it keeps"]
    return plots.panels_figure(groups, "; ".join(legend)), f"{len(rows)} images of {subject.data.root}"


def choose_rows(settings: dict, data: DataSet, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of the images that the section visualize names, or of a sample."""
    if not settings["ids"]:
        rows = data.rows(settings["split"])
        if not len(rows):
            raise UserError(f"visualize.split={settings['split']}: {data.root} has no image in it")
        return np.sort(rng.choice(rows, min(settings["images"], len(rows)), replace=False))
    row_of = {str(image_id): row for row, image_id in enumerate(data.ids.tolist())}
    unknown = [image_id for image_id in settings["ids"] if image_id not in row_of]
    if unknown:
        ids = "an id is a number of images.txt or a path below root"
        raise UserError(f"visualize.ids: {data.root} has no image {unknown[0]}; {ids}")
    if len(settings["ids"]) > MAX_IMAGES:
        raise UserError(f"visualize.ids: names {len(settings['ids'])} images; {MAX_IMAGES} at most fit into a picture")
    return np.array([row_of[image_id] for image_id in settings["ids"]])


def image_panels(subject: Subject, rows: np.ndarray, images: list[PIL.Image.Image]) -> dict[str, list[list[Panel]]]:
    """Return the whole images, with boxes, attention and candidate masks, by what stands over them."""
    ids, pairs = subject.data.ids.tolist(), list(zip(rows.tolist(), images, strict=True))
    groups = {"image": [[boxes_panel(subject, row, image)] for row, image in pairs]}
    if subject.maps is not None:
        groups["attention"] = [[Panel(image, subject.maps.get(ids[row]))] for row, image in pairs]
    if subject.candidates is not None:
        groups["candidates"] = [[candidates_panel(subject, row, image)] for row, image in pairs]
    return groups


def boxes_panel(subject: Subject, row: int, image: PIL.Image.Image) -> Panel:
    """Return an image with its true box and, where it is another, the source's."""
    true, box, title = subject.data.boxes[row], subject.boxes[row], short(subject.data.ids[row])
    if not subject.has_box[row]:
        box, title = None, f"{title}, no box"
    elif np.array_equal(true, box):
        box = None
    elif subject.data.has_box[row]:
        title = f"{title}, IoU {iou(box, true):.2f}"
    return Panel(image, None, box, true, title)


def candidates_panel(subject: Subject, row: int, image: PIL.Image.Image) -> Panel:
    """Return an image with its best candidates, as masks if these are stored, else as boxes."""
    path, entries = subject.candidates[row]
    scores = [(entry.get("predicted_iou", 0), entry.get("stability_score", 0)) for entry in entries]
    best = sorted(range(len(entries)), key=lambda number: scores[number], reverse=True)[:MOST_CANDIDATES]
    title = f"best {MOST_CANDIDATES} of {len(entries)}" if len(entries) > len(best) else f"{len(entries)} found"
    panel = Panel(image, true_xywh=subject.data.boxes[row], title=title)
    if path is not None and entries:
        return panel._replace(masks=load_masks(path).numpy()[best])
    return panel._replace(candidates_xywh=[entries[number]["bbox"] for number in best])


def crop_panels(
    config: dict, subject: Subject, rows: np.ndarray, images: list[PIL.Image.Image], rng: np.random.Generator
) -> dict[str, list[list[Panel]]]:
    """Return drawn crops as the training makes them (not flipped), by the method's name."""
    settings = {key: config[key] for key in ("augment", "augment_p", "augment_strength", "use_augment_mix")}
    transform = TrainTransform(config["image_size"], config["crop"]["interpolation"], **settings)
    pixels = [pil_to_tensor(image) for image in images]

    def panel(place: int, number: int, crop: np.ndarray) -> Panel:
        row = rows[place]
        shown = transform(pixels[place], crop, lambda: draw_seed(0, number, subject.data.ids[row].item()))
        kept = coverage(crops_to_xywh(crop), subject.data.boxes[row])
        return Panel(shown.permute(1, 2, 0).numpy(), title="" if np.isnan(kept) else f"{kept:.0%}")

    groups = {}
    for name, crops in crop_methods(config, subject, rows).items():
        drawn = [crops.draw(rng) for _ in range(config["visualize"]["crops"])]
        groups[name] = [[panel(place, n, crop[place]) for n, crop in enumerate(drawn)] for place in range(len(rows))]
    return groups


# --- boxes --------------------------------------------------------------------------------------------------------


def boxes_picture(config: dict) -> tuple[Figure, str]:
    """Return the histograms of boxes and of crops, and what they are of."""
    subject, rng, source = read_subject(config), np.random.default_rng(config["seed"]), config["source"]
    if not subject.data.has_box.any():
        remedy = "visualize.what=crops draws the images"
        raise UserError(f"{subject.data.root}: has no true boxes to compare with; {remedy}")
    columns = {CROPS_KEEP.format("true box"): subject.data.boxes}
    if source != "gt":
        columns[CROPS_KEEP.format(f"box of {Path(source).name}")] = subject.boxes
    histograms = {}
    for name, rows in split_rows(subject.data.split, subject.data.has_box).items():
        methods = crop_methods(config, subject, rows)
        crops = {column: crop_samples(methods, boxes[rows], rng) for column, boxes in columns.items()}
        histograms[f"{name}, {len(rows)} images"] = box_samples(source, subject, rows) | crops
    promise = {f"THR={thr:.3g}": thr for thr in thresholds(config, subject).values()}
    # the promise is for the boxes that crops are held to
    figure = plots.histogram_figure(histograms, {list(columns)[-1]: promise})
    return figure, f"{len(subject.data.ids)} images of {subject.data.root}"


def box_samples(source: str, subject: Subject, rows: np.ndarray) -> dict[str, list[Sample]]:
    """Return IoU and coverage of the trivial boxes and of the source's, unless it is one of these or the true boxes."""
    true, sizes = subject.data.boxes[rows], subject.data.image_sizes[rows]
    boxes = {
        METHOD_NAMES["whole_image"]: (whole_image_boxes(sizes), "tab:blue"),
        METHOD_NAMES["center"]: (center_boxes(sizes), "tab:green"),
    }
    if source not in ("gt", "center", "image"):
        boxes[Path(source).name] = (subject.boxes[rows], "tab:orange")
    return {
        title: [Sample(name, measure(found, true), colour) for name, (found, colour) in boxes.items()]
        for title, measure in (("IoU of the boxes", iou), ("share of the true box that boxes cover", coverage))
    }


def crop_samples(methods: dict[str, Crops], boxes: np.ndarray, rng: np.random.Generator) -> list[Sample]:
    """Return the shares of boxes (N, 4) that the crops of each method keep, drawn over EPOCHS epochs."""
    samples = []
    for (name, crops), colour in zip(methods.items(), CROP_COLOURS, strict=False):
        drawn = np.stack([crops.draw(rng) for _ in range(EPOCHS)])
        samples.append(Sample(name, coverage(crops_to_xywh(drawn), boxes).ravel(), colour))
    return samples


# --- runs ---------------------------------------------------------------------------------------------------------


def curves_picture(config: dict) -> tuple[Figure, str]:
    """Return the curves of several runs, and what they are of."""
    groups = group_runs(config["visualize"]["runs"])
    logs = {label: [read_curves(folder) for folder in folders] for label, folders in groups.items()}
    return plots.run_curves_figure(logs, CURVES), f"{sum(map(len, groups.values()))} runs"


def accuracy_picture(config: dict) -> tuple[Figure, str]:
    """Return accuracy against maIoU of several runs, and what it is of."""
    groups, view = group_runs(config["visualize"]["runs"]), config["eval"]["views"][0]
    points = {label: [read_point(folder, view) for folder in folders] for label, folders in groups.items()}
    return plots.accuracy_figure(points, f"view {view}"), f"{sum(map(len, groups.values()))} runs"


def group_runs(names: list[str]) -> dict[str, list[Path]]:
    """Return the run folders that are named, by a label those that differ in their seed alone.

    A folder of runs stands for all runs in it.

    Raises:
        UserError: if none is named, or one is no run and holds none.
    """
    if not names:
        raise UserError("visualize.runs: none given; name run folders: visualize.runs=runs/a,runs/b")
    keys = {}
    for folder in map(Path, names):
        configs = [*folder.glob("config.json"), *sorted(folder.glob("*/config.json"))]
        if not configs:
            raise UserError(f"visualize.runs: {folder} is no run folder of train.py and holds none (no config.json)")
        for path in configs:
            with user_errors((KeyError, AttributeError), f"{path}: not of this version: "):
                keys[path.parent] = settings_key(load_json(path))
    return group_by_settings(keys)


def read_curves(folder: Path) -> dict[str, np.ndarray]:
    """Return a run's log: the epochs, and a value for each by the keys of CURVES (accuracy in per cent).

    Raises:
        UserError: if no epoch was logged, or the log lacks a key.
    """
    records = load_log(folder / "log.jsonl", numbers=("epoch", *CURVES))
    if not records:
        raise UserError(f"{folder}: no epoch was logged yet (no log.jsonl)")
    log = {key: np.array([record[key] for record in records]) for key in ("epoch", *CURVES)}
    return log | {"ema_top1": 100 * log["ema_top1"]}


def read_point(folder: Path, view: str) -> dict[str, Any]:
    """Return a run's x (maIoU of its crops), top1 (of the EMA in this view) and family (kind of crop and budget).

    Raises:
        UserError: if the training has not ended or was not tested in this view.
    """
    if not (folder / "summary.json").exists():
        command = f"python train.py resume=true run_dir={folder}"
        raise UserError(f"{folder}: has not ended (no summary.json); go on: {command}")
    summary, settings = load_summary(folder), load_json(folder / "config.json")
    if view not in summary["top1"]:
        raise UserError(f"{folder}: has no view {view}; choose with eval.views from: {', '.join(summary['top1'])}")
    family = f"{crop_family(settings)}, {settings['num_epochs']} epochs"
    return {"x": summary["maiou"], "top1": summary["top1"][view]["ema"], "family": family}


PICTURES = {"crops": crops_picture, "boxes": boxes_picture, "curves": curves_picture, "accuracy": accuracy_picture}

if __name__ == "__main__":
    run_script(main, load_config)
