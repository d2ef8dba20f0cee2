"""Choose, among the candidate masks of every image, the box that a trained classifier believes in.

Reads a folder of generate_mask.py (its masks_info.json alone) and a checkpoint of train.py. Every candidate is cut
out of its image by its box, resized and classified; the box with the best score wins. Writes, for
out=FOLDER/STEM.json:

    STEM.json            the boxes with their scores: train.py source=FOLDER/STEM.json holds its crops to them
    STEM.eval.json/.md   mean IoU, coverage and shares beside the trivial boxes, time per stage
    STEM.png             best, median and worst boxes
    errors.txt           a count, then a line per image that could not be read (it gets no box; exit status 2)

    python generate_bbox.py masks=A,B ...  # B's candidates for images that have none in A (bbox.folders=all: the best)
    python generate_bbox.py masks=data/toybirds/masks_0 bbox.classifier=runs/toybirds_0/best.pt
    python generate_bbox.py preset=cub_dino dataset.root=CUB_200_2011 masks=CUB_200_2011/masks_0 \\
        bbox.classifier=runs/cub_first_training/best.pt

The published protocol knows the label of every image, test images included: bbox.score=logit and ncm do. Boxes that are
to be used on images without a label, or as an honest test view, need bbox.score=label_free.
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import load_config
from datasets import DataSet, read_dataset, save_source
from figures.box_report import raise_if_any_failed, report_boxes
from inference.classifier import Classifier, load_classifier
from jobs.guard import run_script, same_command, with_resume_hint
from jobs.loader import build_loader, start_server
from jobs.machine import set_up_cpu
from jobs.shared_work import Result, SharedWork, box_path, refuse_foreign
from localized_crops.box_file import load_boxes
from localized_crops.boxes import clip_boxes, whole_image_boxes
from localized_crops.files import UserError, user_errors
from localized_crops.image_ids import ImageId, key_to_id
from masks.image_batches import CutOuts
from masks.mask_files import load_masks_info, mask_names
from utils import batched, file_sha256, memory_errors, timed


def main(config: dict) -> None:
    """Score the candidates, choose the boxes, evaluate; with several processes each scores its share."""
    with user_errors(ValueError):
        stage = prepare(config)
    with with_resume_hint(same_command), stage.work.claimed(again=config["bbox"]["again"]):
        take_over(stage)
        with timed(stage.seconds, "scores"):
            stage.work.run_units(partial(scored_units, stage), "candidates")
        if stage.work.rank == 0:
            boxes, errors = choose_boxes(stage)
            count = sum(map(len, stage.candidates))
            report_boxes(stage.out, stage.data, boxes, seconds=stage.seconds, errors=errors, candidates=count)
            raise_if_any_failed(errors, stage.out.with_name("errors.txt"))


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    out: Path
    data: DataSet
    candidates: list[np.ndarray]  # of each image: (N, 4) boxes x y width height inside the image
    classifier: Classifier
    image_size: int  # of the cut-outs, pixels
    work: SharedWork
    chosen: dict[ImageId, tuple[list[float], float]] = field(default_factory=dict)  # image id -> box, score
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(config: dict) -> Stage:
    """Read data set, candidates and classifier."""
    settings = config["bbox"]
    out = box_path(config["out"], f"runs/mask_boxes_{config['dataset']['name']}/boxes.json")
    set_up_cpu(config["num_threads"])
    if config["masks"] is None:
        raise UserError("masks: none given; make candidates with python generate_mask.py, then masks=FOLDER")
    start_server(CutOuts, config["num_workers"])
    data = read_dataset(**config["dataset"] | {"check": False}, keep_going=True)  # faulty images go to errors.txt
    candidates, setup = read_folders(config["masks"], settings["folders"], data)
    classifier = load_scorer(settings["classifier"], config["device"], data)
    image_size = settings["image_size"] or classifier.trained["image_size"]
    identity = {
        "dataset": data.fingerprint(),
        "masks": setup,
        "classifier_sha256": classifier.weights_sha256,
        "precision": config["amp"] if classifier.device.type == "cuda" else "none",
        "settings": {"image_size": image_size} | {key: settings[key] for key in ("padding", "score", "batch_size")},
    }
    again = f"python generate_bbox.py out={out} bbox.again=true"
    units = plan_units(candidates, settings["batch_size"])
    work = SharedWork(out.with_name(f"{out.stem}.partial"), identity, "bbox", again, units, data.paths)
    if work.rank == 0:
        count = f"{sum(map(len, candidates))} candidates of {len(data.ids)} images"
        print(f"{count}, {config['masks']}; scored by {settings['score']} on {classifier.device}")
    return Stage(config, out, data, candidates, classifier, image_size, work)


def read_folders(masks: str, folders: str, data: DataSet) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Return the candidate boxes of each image, (N, 4), of one or several folders, and how each folder was made.

    Args:
        masks: the folder, or several, separated by commas.
        folders: "first" (an image's candidates are those of the first folder that has any) or "all".
    """
    paths = [Path(masks)] if Path(masks).exists() else [Path(part) for part in masks.split(",")]
    columns, setups = zip(*(candidate_boxes(path, data) for path in paths), strict=True)
    if folders == "all":
        return [np.concatenate(parts) for parts in zip(*columns, strict=True)], list(setups)
    return [next((part for part in parts if len(part)), parts[0]) for parts in zip(*columns, strict=True)], list(setups)


def candidate_boxes(folder: Path, data: DataSet) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return the candidate boxes of each image, (N, 4), and the setup that they were made with.

    Raises:
        UserError: if the masks are of another data set.
    """
    setup, info = load_masks_info(folder, dataset=data.fingerprint())
    setup["masks_info_sha256"] = file_sha256(folder / "masks_info.json")
    names = mask_names(data.ids.tolist(), data.paths)
    counts = [len(info.get(name, [])) for name in names]
    entries = (entry for name in names for entry in info.get(name, []))
    xywh = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    sizes = np.repeat(data.image_sizes, counts, axis=0)
    near, sides = np.minimum(xywh[:, :2], sizes - 1), np.maximum(xywh[:, 2:], 1)  # SAM's may be 0 pixels wide
    boxes = clip_boxes(np.hstack([near, sides]), sizes)
    if (outside := (boxes[:, 2:] <= 0).any(1)).any():
        name = names[np.repeat(np.arange(len(names)), counts)[outside][0]]
        raise UserError(f"{folder}: image {name[:60]}: the box of a mask lies outside the image; make the masks again")
    return np.split(boxes, np.cumsum(counts)[:-1]), setup


def load_scorer(path: str | None, device: str | None, data: DataSet) -> Classifier:
    """Return the classifier of a checkpoint of train.py; UserError if there is none, or it knows too few classes."""
    if path is None:
        raise UserError("bbox.classifier: none given; train one: python train.py, then bbox.classifier=RUN/best.pt")
    classifier = load_classifier(path, device=device, localize=False)
    known = len(classifier.class_names)
    if known < len(data.class_names):
        raise UserError(f"{path}: knows {known} classes, the data set has {len(data.class_names)}")
    return classifier


def plan_units(candidates: list[np.ndarray], batch_size: int) -> list[list[int]]:
    """Cut the rows into units of some batches of candidates each; depends on the candidates alone."""
    units, size = [[]], 0
    for row, boxes in enumerate(candidates):
        if size >= 4 * batch_size:
            units.append([])
            size = 0
        units[-1].append(row)
        size += len(boxes)
    return [unit for unit in units if unit]


def take_over(stage: Stage) -> None:
    """Reuse the boxes at ``out`` if they were made with the same settings and data; ``bbox.again`` removes them.

    Raises:
        UserError: if they are of other settings, candidates or another classifier, or the file is of another script.
    """
    out, was_ours = stage.out, stage.out.exists()
    if stage.config["bbox"]["again"]:
        out.unlink(missing_ok=True)
    if not was_ours:
        refuse_foreign(out)
    elif out.exists():
        with user_errors(UserError, f"{out}: was not made by this script, give another out=FILE: "):
            file = load_boxes(out)
        if "identity" not in file.settings or file.scores.keys() != file.boxes.keys():
            raise UserError(f"{out}: was not made by this script; give another out=FILE")
        scores = dict(file.scores.items())
        stage.chosen = {i: (list(box), scores[i]) for i, box in file.boxes.items() if box is not None}
        ids, candidates = stage.data.ids.tolist(), stage.candidates
        failed = [row for row, i in enumerate(ids) if i not in stage.chosen and len(candidates[row])]
        stage.work.take_over(out, file.settings["identity"], file.settings.get("batches"), failed)


# --- scores -------------------------------------------------------------------------------------------------------


def scored_units(stage: Stage, numbers: list[int]) -> Iterator[Result]:
    """Yield the scores of units of candidates, and why images failed."""
    means = class_means(stage) if stage.config["bbox"]["score"] == "ncm" else None
    units = [stage.work.units[number] for number in numbers]
    for rows, (crops, errors) in zip(units, cut_out(stage, units, stage.candidates), strict=True):
        yield Result({"scores": score_crops(stage, rows, crops, errors, means), "errors": errors})


def cut_out(
    stage: Stage, units: list[list[int]], boxes: Sequence[np.ndarray]
) -> Iterator[tuple[torch.Tensor, dict[str, str]]]:
    """Yield the cut-outs of units, (B, 3, size, size) uint8 in the order of rows and boxes, made ahead by workers."""
    images = CutOuts(units, stage.data, boxes, stage.config["bbox"]["padding"], stage.image_size)
    workers, pin = stage.config["num_workers"], stage.classifier.device.type == "cuda"
    yield from build_loader(images, num_workers=workers, pin_memory=pin, batch_size=None)


def score_crops(
    stage: Stage, rows: list[int], crops: torch.Tensor, errors: dict[str, str], means: torch.Tensor | None
) -> dict[str, list[float]]:
    """Return the scores of a unit's candidates by image id; images that failed have none."""
    score, size = stage.config["bbox"]["score"], stage.config["bbox"]["batch_size"]
    counts = [len(stage.candidates[row]) for row in rows]
    labels = torch.from_numpy(np.repeat(stage.data.labels[rows], counts)).to(stage.classifier.device)
    parts = [torch.zeros(0, device=stage.classifier.device)]
    for batch, of_images in zip(crops.split(size), labels.split(size), strict=True) if len(crops) else ():
        features, logits = features_and_logits(stage, batch)
        if score == "ncm":
            parts.append(nn.functional.cosine_similarity(features, means[of_images]))
        elif score == "logit":
            parts.append(logits.gather(1, of_images[:, None])[:, 0])
        else:
            parts.append(logits.softmax(1).amax(1))
    scores = torch.cat(parts).double().cpu().numpy()
    ids = [str(stage.data.ids[row]) for row in rows]
    of_image = zip(ids, np.split(scores, np.cumsum(counts)[:-1]), strict=True)
    return {i: part.tolist() for i, part in of_image if i not in errors}


def features_and_logits(stage: Stage, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, D) features before the classifier's last layer, and (B, K) logits, float32."""
    what = f"{len(crops)} cut-outs of {stage.image_size} pixels"
    with memory_errors(what, "lower bbox.batch_size or bbox.image_size"):
        return stage.classifier.features_and_logits(crops, stage.config["amp"])


def class_means(stage: Stage) -> torch.Tensor:
    """Return (K, D), the mean of the normalised features of each class's training images, shown whole."""
    rows = [row for name in ("train", "val") for row in stage.data.rows(name).tolist()]
    whole = whole_image_boxes(stage.data.image_sizes)[:, None]
    units = [list(unit) for unit in batched(rows, stage.config["bbox"]["batch_size"])]
    sums = None
    for unit, (crops, errors) in zip(units, cut_out(stage, units, whole), strict=True):
        features = nn.functional.normalize(features_and_logits(stage, crops)[0])
        good = torch.tensor([str(stage.data.ids[row]) not in errors for row in unit], device=stage.classifier.device)
        labels = torch.from_numpy(stage.data.labels[unit]).to(stage.classifier.device)
        if sums is None:
            sums = features.new_zeros(len(stage.data.class_names), features.shape[1])
        sums.index_add_(0, labels[good], features[good])
    if sums is None:
        raise UserError("bbox.score=ncm: there is no training image to make class means of; use bbox.score=logit")
    return nn.functional.normalize(sums)


# --- boxes --------------------------------------------------------------------------------------------------------


def choose_boxes(stage: Stage) -> tuple[np.ndarray, dict[ImageId, str]]:
    """Write the box file from the scores of all processes; return boxes (N, 4), NaN for none, and why images failed."""
    data, chosen, errors = stage.data, stage.chosen, dict(stage.data.unreadable)
    row_of = {image_id: row for row, image_id in enumerate(data.ids.tolist())}
    for about, _ in stage.work.results():
        errors |= {key_to_id(key): error for key, error in about["errors"].items()}
        for image_id, scores in ((key_to_id(key), scores) for key, scores in about["scores"].items() if scores):
            best = int(np.argmax(scores))
            chosen[image_id] = stage.candidates[row_of[image_id]][best].tolist(), scores[best]
    boxes, scores = np.full((len(row_of), 4), np.nan), np.zeros(len(row_of))
    for image_id in chosen.keys() - errors.keys():  # an image that was replaced and fails now loses its box
        boxes[row_of[image_id]], scores[row_of[image_id]] = chosen[image_id]
    settings = stage.config | {"identity": stage.work.identity, "batches": stage.work.keys}
    save_source(stage.out, data, boxes, made_by=Path(__file__).name, settings=settings, scores=scores)
    stage.work.remove()
    return boxes, errors


if __name__ == "__main__":
    run_script(main, load_config)
