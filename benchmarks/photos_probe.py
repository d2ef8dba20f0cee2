"""What boxes are worth as views of a frozen, pretrained network: a linear probe and nearest neighbours, no training.

First come the stages that make the boxes, as in reproduce.py. The table lies in ``run_dir`` (default
runs/photos_probe), with the features of each view, so that an interrupted run goes on with the view that it had
reached. Minutes on a CPU.

    python benchmarks/photos_probe.py dataset.root=FOLDER model.weights=FILE dino.weights=FILE \\
        dino.object_weights=FILE num_workers=0
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reproduce
from config import load_config
from datasets import read_dataset, source_boxes
from experiments.paired_tests import compare
from experiments.table_report import spread
from experiments.tables import ATTENTION_BOXES, ATTENTION_STEP, OBJECT_BOXES, OBJECT_STEP, PRETRAINED
from jobs.guard import run_script, same_command, with_resume_hint
from jobs.machine import set_up_cpu
from jobs.settings import word_of
from localized_crops.boxes import coverage, iou, whole_image_boxes
from localized_crops.files import save_json, save_text, whole_file
from models import build_model, features_of, fit_linear, input_config
from readers.data_set import DataSet
from readers.images import read_image
from transforms import View, normalize
from utils import environment, markdown_table

PLAIN_VIEWS = ("full", "center", "whole")
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)  # chosen on the validation images, view by view
NEIGHBOURS = 10
BATCH = 16  # images
FEW, DRAWS = (5, 10, 20), 5  # training images a class, and how often they are drawn

STEPS = (ATTENTION_STEP, OBJECT_STEP)
SIDES = (224, 384)  # pixels, of the network's input
SOURCES = {
    "centred (control)": "center",
    "attention, component": ATTENTION_BOXES,
    "object head": OBJECT_BOXES,
    "true (oracle)": "gt",
}


def main(request: dict) -> None:
    """Make the boxes that are missing, then the table."""
    overrides = request["overrides"]
    shared = PRETRAINED | {"eval.crop_pct": 0.875} | overrides
    settings = [word_of(key, value) for key, value in shared.items()]
    configs = {f"{side} px": load_config(["preset=finetune", *settings, f"image_size={side}"]) for side in SIDES}
    with with_resume_hint(same_command):
        for step in STEPS:
            reproduce.run_step(step, overrides)
        data = read_dataset(**next(iter(configs.values()))["dataset"])
        write_probe(configs, "photos_probe", SOURCES, Path(request["run_dir"] or "runs/photos_probe"), data)


class Answers(NamedTuple):
    """One row: a probe trained on one view and tested on one or two."""

    validation: float  # top-1, of the probe without the validation images
    log_probs: np.ndarray  # (test images, K)
    neighbours: float | None  # top-1 of the nearest neighbours
    few: dict[int, np.ndarray]  # images a class -> (draws, test images) bool, right answers


def write_probe(configs: dict[str, dict], name: str, sources: dict[str, str], folder: Path, data: DataSet) -> None:
    """Write NAME.md and NAME.json: every view, and each box view averaged with the full view, block by block.

    Args:
        configs: title of a block -> its config, of which model.type, model.weights, image_size, eval.crop_pct,
            eval.box_margin and num_threads are read.
        sources: name of a row -> where its boxes come from, as ``source`` in config.py.
        data: the data set; its split "val" chooses the penalty and the plain view to compare with.
    """
    labels, texts, numbers = data.labels[data.rows("test")], [], {}
    for title, config in configs.items():
        set_up_cpu(config["num_threads"])
        features = {view: view_features(config, data, view, None, folder) for view in PLAIN_VIEWS}
        for row, source in sources.items():
            features[f"box: {row}"] = view_features(config, data, f"box: {row}", source, folder)
        rows = {view: probe(found, data) for view, found in features.items()}
        rows |= {f"full and box: {row}": averaged(rows["full"], rows[f"box: {row}"]) for row in sources}
        best = max(PLAIN_VIEWS, key=lambda view: rows[view].validation)
        network = f"{config['model']['type']} ({config['model']['weights']}), frozen, {config['image_size']} px"
        texts.append(
            "\n\n".join([f"### {title}", probe_text(rows, best, labels), network, *groups_text(rows, data, sources)])
        )
        numbers[title] = numbers_of(rows, labels)
    made_with = environment()
    machine = f"{made_with['processor']}; torch {made_with['torch']}, Python {made_with['python']}."
    text = "\n\n".join([*texts, machine])
    save_text(folder / f"{name}.md", text + "\n")
    save_json(folder / f"{name}.json", numbers)
    print(f"\n{text}\nwritten to {folder / name}.md and .json")


# --- features -----------------------------------------------------------------------------------------------------


def view_features(config: dict, data: DataSet, view: str, source: str | None, folder: Path) -> np.ndarray:
    """Return the features of all images in one view, (N, D) float32: from ``folder`` if they are of these settings."""
    boxes = None if source is None else source_boxes(source, data)[0]
    shown = config["image_size"], config["eval"]["crop_pct"], config["eval"]["box_margin"]
    made_of = [config["model"]["type"], config["model"]["weights"], *shown, data.fingerprint(), view.split(":")[0]]
    digest = hashlib.sha256(repr(made_of).encode() + (b"" if boxes is None else boxes.tobytes())).hexdigest()[:16]
    path = folder / f"features_{digest}.npy"
    if not path.exists():
        kind = View("box" if source else view, *shown)
        parts = tqdm(_batches(config, data, kind, boxes), desc=view, total=-(-len(data.ids) // BATCH))
        found = np.concatenate(list(parts))
        with whole_file(path) as scratch, open(scratch, "wb") as file:
            np.save(file, found)
    return np.load(path)


@torch.inference_mode()
def _batches(config: dict, data: DataSet, view: View, boxes: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the pretrained network's features (B, D) of all images, normalised as in its own training."""
    settings, sizes = config["model"], {"image_size": config["image_size"], "patch_size": config["patch_size"]}
    model = build_model(settings["type"], 2, weights=settings["weights"], **sizes)
    model = model.eval().to(memory_format=torch.channels_last)
    as_trained = {key: input_config(settings["type"])[key] for key in ("mean", "std")}
    for start in range(0, len(data.ids), BATCH):
        images = []
        for row in range(start, min(start + BATCH, len(data.ids))):
            image = torch.from_numpy(np.array(read_image(data.paths[row]))).permute(2, 0, 1)
            images.append(view(image, None if boxes is None else boxes[row]))
        yield features_of(model, normalize(torch.stack(images), **as_trained))[0].flatten(1).numpy()


# --- probes -------------------------------------------------------------------------------------------------------


def probe(features: np.ndarray, data: DataSet) -> Answers:
    """Fit a linear classifier on training images of one view and test it on the same view."""
    train, val, test = (data.rows(split) for split in ("train", "val", "test"))
    labels, n_classes = data.labels, int(data.labels.max()) + 1
    top1 = {}
    for penalty in PENALTIES:
        fitted = fit_linear(features[train], labels[train], n_classes, penalty)
        top1[penalty] = float((_log_probs(features[val], fitted).argmax(1) == labels[val]).mean())
    penalty = max(PENALTIES, key=top1.get)
    both = np.concatenate([train, val])
    fitted = fit_linear(features[both], labels[both], n_classes, penalty)
    few = {count: _few_images(features, data, both, count, penalty) for count in FEW}
    nearest = _neighbours(features[both], labels[both], features[test])
    return Answers(top1[penalty], _log_probs(features[test], fitted), float((nearest == labels[test]).mean()), few)


def averaged(a: Answers, b: Answers) -> Answers:
    """Return the row whose probabilities are the mean of two rows'; few images are not averaged."""
    return Answers(np.nan, np.logaddexp(a.log_probs, b.log_probs) - np.log(2), None, {})


def _log_probs(features: np.ndarray, fitted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    logits = features @ fitted[0].T + fitted[1]
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def _few_images(features: np.ndarray, data: DataSet, rows: np.ndarray, count: int, penalty: float) -> np.ndarray:
    test, n_classes, right = data.rows("test"), int(data.labels.max()) + 1, []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)  # the same images for every view
        of_class = [rows[data.labels[rows] == label] for label in range(n_classes)]
        few = np.concatenate([rng.choice(mine, min(count, len(mine)), replace=False) for mine in of_class])
        fitted = fit_linear(features[few], data.labels[few], n_classes, penalty)
        right.append(_log_probs(features[test], fitted).argmax(1) == data.labels[test])
    return np.stack(right)


def _neighbours(known: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the label that most of the nearest neighbours (cosine) have, the nearer ones counting more."""
    known, asked = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (known, asked))
    similarity = asked @ known.T
    nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
    votes = np.zeros((len(asked), labels.max() + 1))
    for place in nearest.T:
        votes[np.arange(len(asked)), labels[place]] += similarity[np.arange(len(asked)), place]
    return votes.argmax(1)


# --- the table ----------------------------------------------------------------------------------------------------


def probe_text(rows: dict[str, Answers], best: str, labels: np.ndarray) -> str:
    """Return the Markdown: top-1, the difference to the plain view ``best``, McNemar's p, few images a class."""
    right = {name: (row.log_probs.argmax(1) == labels)[None] for name, row in rows.items()}
    heads = ["view", "val", "test", f"against {best}", "p", f"{NEIGHBOURS}-NN", *(f"{count} a class" for count in FEW)]
    lines = []
    for name, row in rows.items():
        result = compare(right[name], right[best])
        val, near = ("" if x is None or np.isnan(x) else f"{100 * x:.1f}" for x in (row.validation, row.neighbours))
        few = [spread(row.few[count].mean(1)) if row.few else "" for count in FEW]
        gain = f"{100 * result.difference:+.1f}", f"{result.p_images:.3f}"
        lines.append([name, val, f"{100 * right[name].mean():.1f}", *gain, near, *few])
    note = (
        f"{len(labels)} test images; p: McNemar against {best}, the plain view that validates best; few images: mean ± "
        f"deviation over {DRAWS} draws."
    )
    return f"{markdown_table(heads, lines)}\n\n{note}"


def groups_text(rows: dict[str, Answers], data: DataSet, sources: dict[str, str]) -> list[str]:
    """Return top-1 in thirds of the test images: by the object's size, and by the IoU of each source's boxes.

    Nothing for a data set without true boxes.
    """
    test = data.rows("test")
    true, labels, sizes = data.boxes[test], data.labels[test], data.image_sizes[test]
    if np.isnan(true).any():
        return []
    measures = {"share of the image that the object covers": coverage(true, whole_image_boxes(sizes))}
    for label, source in sources.items():
        if source != "gt":
            measures[f"IoU of the boxes: {label}"] = iou(source_boxes(source, data)[0][test], true)
    lines = []
    for name, values in measures.items():
        for third in np.array_split(np.argsort(values, kind="stable"), 3):
            right = [row.log_probs[third].argmax(1) == labels[third] for row in rows.values()]
            span = f"{values[third].min():.2f} to {values[third].max():.2f}"
            lines.append([name, span, *(f"{100 * some.mean():.1f}" for some in right)])
    return [markdown_table(["test images in thirds by", "of", *rows], lines)]


def numbers_of(rows: dict[str, Answers], labels: np.ndarray) -> dict[str, Any]:
    """Return what the JSON holds of each row."""
    return {
        name: {
            "val": None if np.isnan(row.validation) else row.validation,
            "test": float((row.log_probs.argmax(1) == labels).mean()),
            "neighbours": row.neighbours,
            "few": {str(count): right.mean(1).tolist() for count, right in row.few.items()},
        }
        for name, row in rows.items()
    }


if __name__ == "__main__":
    run_script(main, reproduce.load_request)
