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

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import load_config
from datasets import read_dataset
from figures.box_report import raise_if_any_failed, report_boxes
from jobs.guard import run_script, same_command, with_resume_hint
from jobs.loader import build_loader
from jobs.settings import ConfigError, check_value, get_key
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
from localized_crops.files import UserError, user_errors
from localized_crops.image_ids import ImageId, key_to_id
from localizer.networks import state_hash
from masks.cut_outs import CutOuts
from masks.mask_files import load_masks_info, mask_names
from models import build_model, features_of, load_trained
from readers.data_set import DataSet
from transforms import normalize
from utils import autocast, file_sha256, load_tensors, memory_errors, set_threads, timed


def main(config: dict) -> None:
    """Score the candidates, choose the boxes, evaluate; with several processes each scores its share."""
    with user_errors(ValueError):
        stage = prepare(config)
    with with_resume_hint(same_command), stage.work.claimed():
        claim_out(stage.out, stage.work, config["bbox"]["again"])
        score_images(stage)
        if stage.work.rank == 0:
            scores, errors = gather_scores(stage)
            report(stage, *choose_boxes(stage, scores), errors)


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One run of this script."""

    config: dict
    out: Path
    data: DataSet
    candidates: dict[int, np.ndarray]  # row of the data set -> (N, 4) boxes x y width height inside the image
    model: nn.Module
    statistics: dict[str, list[float]]  # mean and std of the model's input
    image_size: int  # of the cut-outs, pixels
    device: torch.device
    work: SharedWork  # finished units, until all are there
    units: list[list[int]]  # rows that are scored together
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(config: dict) -> Stage:
    """Read data set, candidates and classifier."""
    wanted = config["bbox"]
    out = box_path(config["out"], f"runs/mask_boxes_{config['dataset']['name']}/boxes.json")
    set_threads(config["num_threads"])
    if config["masks"] is None:
        raise UserError("masks: none given; make candidates with python generate_mask.py, then masks=FOLDER")
    data = read_dataset(**config["dataset"] | {"check": False}, keep_going=True)  # faults are this stage's to list
    candidates, setup = read_folders(config["masks"], wanted["folders"], data)
    device = choose_device(config["device"])
    model, image_size, statistics = load_classifier(wanted["classifier"], data)
    identity = {
        "dataset": data.fingerprint(),
        "masks": setup,
        "classifier_sha256": state_hash(model),
        "precision": config["amp"] if device.type == "cuda" else "none",
        "settings": {"image_size": wanted["image_size"] or image_size, "padding": wanted["padding"]}
        | {key: wanted[key] for key in ("score", "batch_size")},
    }
    units = plan_units(candidates, len(data.ids), wanted["batch_size"])
    work = SharedWork(
        out.with_name(f"{out.stem}.partial"),
        identity,
        "bbox",
        f"python generate_bbox.py out={out} bbox.again=true",
        *process_numbers(),
        content_keys([[data.paths[row] for row in unit] for unit in units]),
    )
    stage = Stage(
        config=config,
        out=out,
        data=data,
        candidates=candidates,
        model=model.to(device),
        statistics=statistics,
        image_size=wanted["image_size"] or image_size,
        device=device,
        work=work,
        units=units,
    )
    if work.rank == 0:
        count = sum(map(len, candidates.values()))
        print(
            f"{count} candidates of {len(data.ids)} images, {config['masks']}; scored by {wanted['score']} on {device}"
        )
    return stage


def read_folders(masks: str, folders: str, data: DataSet) -> tuple[dict[int, np.ndarray], list[dict[str, Any]]]:
    """Return the candidate boxes by row, (N, 4), of one or several folders, and how each of these was made.

    Args:
        masks: the folder, or several, separated by commas.
        folders: "first" (an image's candidates are those of the first folder that has any) or "all".
        data: the data set.
    """
    paths = [Path(masks)] if Path(masks).exists() else [Path(part) for part in masks.split(",")]
    read = [read_candidates(path, data) for path in paths]
    joined = {}
    for row in range(len(data.ids)):
        parts = [boxes[row] for boxes, _ in read if len(boxes[row])] or [np.zeros((0, 4))]
        joined[row] = np.concatenate(parts) if folders == "all" else parts[0]
    return joined, [about for _, about in read]


def read_candidates(folder: Path, data: DataSet) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """Return the candidate boxes by row, (N, 4), and the setup that they were made with.

    Raises:
        UserError: if the masks are of another data set.
    """
    setup, info = load_masks_info(folder, dataset=data.fingerprint())
    setup |= {"masks_info_sha256": file_sha256(folder / "masks_info.json")}
    boxes = {}
    for row, name in enumerate(mask_names(data.ids.tolist(), data.paths)):
        found = np.array([entry["bbox"] for entry in info.get(name, [])], dtype=np.float64).reshape(-1, 4)
        found[:, 2:] = np.maximum(found[:, 2:], 1)  # SAM's boxes end at the last pixel: one pixel wide is 0
        size = data.image_sizes[row]
        found[:, :2] = np.minimum(found[:, :2], size - 1)
        boxes[row] = clip_boxes(found, np.tile(size, (len(found), 1)))
        if outside := np.flatnonzero((boxes[row][:, 2:] <= 0).any(1)).tolist():
            raise UserError(f"{folder}: image {name[:60]}, mask {outside[0]}: its box lies outside the image, {size}")
    return boxes, setup


def load_classifier(path: str | None, data: DataSet) -> tuple[nn.Module, int, dict[str, list[float]]]:
    """Return a trained network in eval mode, the side of its training crops, and mean and std of its input.

    Its weights are the EMA or the model, whichever validated better.

    Raises:
        UserError: if there is none, it is no checkpoint of train.py, or it knows another number of classes.
    """
    if path is None:
        raise UserError("bbox.classifier: none given; train one: python train.py, then bbox.classifier=RUN/best.pt")
    about = load_tensors(path)
    about = about.get("config") if isinstance(about, dict) else None
    try:
        with user_errors(ConfigError, f"{path}: its config: "):
            for key in ("model.type", "model.n_classes", "image_size", "patch_size"):
                check_value(key, get_key(about, key))
        wanted, image_size, patch_size = about["model"], about["image_size"], about["patch_size"]
        model = build_model(wanted["type"], wanted["n_classes"], image_size=image_size, patch_size=patch_size)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: is no checkpoint of train.py (it names no model and image_size)") from None
    if wanted["n_classes"] < len(data.class_names):
        raise UserError(f"{path}: knows {wanted['n_classes']} classes, the data set has {len(data.class_names)}")
    load_trained(model, path)
    statistics = {key: wanted[key] for key in ("mean", "std") if wanted.get(key)}  # older ones: ImageNet's
    return model.eval(), image_size, statistics


def claim_out(out: Path, work: SharedWork, again: bool) -> None:
    """Make sure that what lies at ``out`` is of this very run, or nothing; ``again`` removes it.

    Raises:
        UserError: if it is of other settings, candidates or another classifier, or of another script.
    """
    was_ours = out.exists()
    if again:
        work.start_anew()
        out.unlink(missing_ok=True)
    if not was_ours:
        refuse_foreign(out)
    elif out.exists():
        with user_errors(UserError, f"{out}: was not made by this script, give another out=FILE: "):
            made = load_boxes(out)
        if "identity" not in made.settings or made.scores.keys() != made.boxes.keys():
            raise UserError(f"{out}: was not made by this script; give another out=FILE")
        work.check_identity(made.settings["identity"], f"{out}: made")
    work.check()


def plan_units(candidates: dict[int, np.ndarray], images: int, batch_size: int) -> list[list[int]]:
    """Cut the rows into units of some batches of candidates each; depends on the candidates alone."""
    units, size = [[]], 0
    for row in range(images):
        if size >= 4 * batch_size:
            units.append([])
            size = 0
        units[-1].append(row)
        size += len(candidates[row])
    return [unit for unit in units if unit]


# --- scores -------------------------------------------------------------------------------------------------------


def score_images(stage: Stage) -> None:
    """Score this process's share of the candidates."""
    with timed(stage.seconds, "scores"):
        sizes = [len(rows) for rows in stage.units]
        stage.work.run_units(sizes, partial(scored_units, stage), done=finished_units(stage), what="candidates")


def scored_units(stage: Stage, numbers: list[int]) -> Iterator[Result]:
    """Yield the scores of units of candidates, and why images failed."""
    means = class_means(stage) if stage.config["bbox"]["score"] == "ncm" else None
    for number, (crops, errors) in zip(numbers, cut_out(stage, [stage.units[n] for n in numbers], stage.candidates),
                                       strict=True):  # fmt: skip
        yield Result({"scores": score_crops(stage, stage.units[number], crops, errors, means), "errors": errors})


def finished_units(stage: Stage) -> set[int]:
    """Return the units of which ``out`` has a box for each image with candidates, and whose images did not change."""
    if not stage.out.exists():
        return set()
    made = load_made(stage)
    lacking = {row for row, i in enumerate(stage.data.ids.tolist()) if i not in made and len(stage.candidates[row])}
    whole = {n for n, rows in enumerate(stage.units) if lacking.isdisjoint(rows)}
    return whole & stage.work.unchanged(load_boxes(stage.out).settings.get("batches"))


def load_made(stage: Stage) -> dict[int, tuple[tuple[float, ...], float]]:
    """Return the boxes and scores that an earlier run of the same settings wrote, by image id."""
    if not stage.out.exists():
        return {}
    file = load_boxes(stage.out)
    scores = dict(file.scores.items())
    return {i: (box, scores[i]) for i, box in file.boxes.items() if box is not None}


def cut_out(
    stage: Stage, units: list[list[int]], boxes: dict[int, np.ndarray]
) -> Iterator[tuple[torch.Tensor, dict[str, str]]]:
    """Yield the cut-outs of units, (B, 3, size, size) uint8 in the order of rows and boxes, made ahead by workers."""
    images = CutOuts(units, stage.data, boxes, stage.config["bbox"]["padding"], stage.image_size)
    workers, pin = stage.config["num_workers"], stage.device.type == "cuda"
    yield from build_loader(images, num_workers=workers, pin_memory=pin, batch_size=None)


def score_crops(
    stage: Stage, rows: list[int], crops: torch.Tensor, errors: dict[str, str], means: torch.Tensor | None
) -> dict[str, list[float]]:
    """Return the scores of a unit's candidates by image id; images that failed have none."""
    labels = np.concatenate([np.full(len(stage.candidates[row]), stage.data.labels[row]) for row in rows])
    parts = [_scores(stage, part, torch.from_numpy(own), means) for part, own in batches(stage, crops, labels)]
    scores = np.concatenate([np.zeros(0), *parts])
    ends = np.cumsum([len(stage.candidates[row]) for row in rows])[:-1]
    ids = [str(stage.data.ids[row]) for row in rows]
    split = zip(ids, np.split(scores, ends), strict=True)
    return {image_id: found.tolist() for image_id, found in split if image_id not in errors}


def batches(stage: Stage, crops: torch.Tensor, labels: np.ndarray) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yield (crops, labels) in batches of the configured size."""
    size = stage.config["bbox"]["batch_size"]
    for start in range(0, len(crops), size):
        yield crops[start : start + size], labels[start : start + size]


def _scores(stage: Stage, crops: torch.Tensor, labels: torch.Tensor, means: torch.Tensor | None) -> np.ndarray:
    """Return the scores, (B,) float64, of cut-outs (B, 3, H, W) uint8 whose images have these labels (B,)."""
    kind = stage.config["bbox"]["score"]
    features, logits = features_and_logits(stage, crops)
    if kind == "ncm":
        scores = nn.functional.cosine_similarity(features, means[labels.to(stage.device)])
    elif kind == "logit":
        scores = logits.gather(1, labels[:, None].to(stage.device))[:, 0]
    else:
        scores = logits.softmax(1).amax(1)
    return scores.double().cpu().numpy()


def features_and_logits(stage: Stage, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, D) features before the classifier's last layer, and (B, K) logits, float32."""
    what = f"{len(crops)} cut-outs of {stage.image_size} pixels"
    less = memory_errors(what, "lower bbox.batch_size or bbox.image_size")
    with less, torch.inference_mode(), autocast(stage.device, stage.config["amp"]):
        features, logits = features_of(
            stage.model, normalize(crops.to(stage.device, non_blocking=True), **stage.statistics)
        )
    return features.float(), logits.float()


def class_means(stage: Stage) -> torch.Tensor:
    """Return (K, D), the mean of the normalised features of each class's training images, shown whole."""
    rows = [row for name in ("train", "val") for row in stage.data.rows(name).tolist()]
    whole = dict(enumerate(whole_image_boxes(stage.data.image_sizes)[:, None]))
    size = stage.config["bbox"]["batch_size"]
    units = [rows[start : start + size] for start in range(0, len(rows), size)]
    sums = None
    for unit, (crops, errors) in zip(units, cut_out(stage, units, whole), strict=True):
        features = nn.functional.normalize(features_and_logits(stage, crops)[0])
        good = torch.tensor([str(stage.data.ids[row]) not in errors for row in unit], device=stage.device)
        labels = torch.from_numpy(stage.data.labels[unit]).to(stage.device)
        if sums is None:
            sums = features.new_zeros(len(stage.data.class_names), features.shape[1])
        sums.index_add_(0, labels[good], features[good])
    if sums is None:
        raise UserError("bbox.score=ncm: there is no training image to make class means of; use bbox.score=logit")
    return nn.functional.normalize(sums)


# --- boxes --------------------------------------------------------------------------------------------------------


def gather_scores(stage: Stage) -> tuple[dict[ImageId, list[float]], dict[ImageId, str]]:
    """Return the scores of all processes by image id, and why images failed."""
    scores, errors = {}, dict(stage.data.unreadable)
    for about, _ in stage.work.results(set(range(len(stage.units))) - finished_units(stage)):
        scores |= {key_to_id(image_id): found for image_id, found in about["scores"].items()}
        errors |= {key_to_id(image_id): error for image_id, error in about["errors"].items()}
    return scores, errors


def choose_boxes(stage: Stage, scores: dict[int, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Write the box file; return boxes (N, 4), the whole image where there is none, and (N,) bool, which were found."""
    data, made = stage.data, load_made(stage)
    boxes, ids = whole_image_boxes(data.image_sizes), data.ids.tolist()
    for row, image_id in enumerate(ids):
        if scores.get(image_id):
            winner = int(np.argmax(scores[image_id]))
            made[image_id] = stage.candidates[row][winner].tolist(), scores[image_id][winner]
        if image_id in made:
            boxes[row] = made[image_id][0]
    nothing = dict.fromkeys([*ids, *data.unreadable])
    save_boxes(
        stage.out,
        nothing | {image_id: box for image_id, (box, _) in made.items()},
        nothing | dict(zip(ids, data.image_sizes.tolist(), strict=True)),
        made_by=Path(__file__).name,
        pixel_grid=data.pixel_grid,
        settings=stage.config | {"identity": stage.work.identity, "batches": list(stage.work.keys)},
        scores=nothing | {image_id: score for image_id, (_, score) in made.items()},
    )
    stage.work.remove()
    return boxes, np.array([image_id in made for image_id in ids])


def report(stage: Stage, boxes: np.ndarray, found: np.ndarray, errors: dict[int, str]) -> None:
    """Print and save the evaluation; images that failed end the script with status 2."""
    count = sum(map(len, stage.candidates.values()))
    report_boxes(stage.out, stage.data, boxes, found, seconds=stage.seconds, errors=errors, candidates=count)
    raise_if_any_failed(errors, stage.out.with_name("errors.txt"))


if __name__ == "__main__":
    run_script(main, load_config)
