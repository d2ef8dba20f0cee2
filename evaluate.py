"""Evaluate trained classifiers on labelled images, without training; or export one for use elsewhere.

Reads checkpoints of train.py and a data set: that of the first one's training, unless dataset.root names another. The
split is evaluate.split; the views and the boxes for them are those of each training, unless eval.views and eval_box say
otherwise. Writes into evaluate.out (None: the first free folder evaluation_SPLIT_{i} beside the first checkpoint)

    evaluation.json, .md   top-1 with its interval, top-5, cross-entropy and calibration by view; accuracy by the size
                           of the object where true boxes are known, and by class; McNemar's paired test of every two
                           checkpoints, or of trainings that differ in their seed alone, a row for each
    predictions.csv        a row for each checkpoint, view and image
    confusion.png, calibration.png

    python evaluate.py checkpoint=runs/photos_0/best.pt
    python evaluate.py checkpoint=runs/photos_0/best.pt,runs/photos_1/best.pt evaluate.split=val eval.views=full,center
    python evaluate.py checkpoint=runs/photos_0/best.pt export=exported   # weights for timm, ONNX, names, preprocessing
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

import time
from pathlib import Path

from config import load_config
from datasets import read_dataset
from inference.classifier import load_classifier, training_defaults
from inference.evaluation import evaluate, write_report
from inference.export import export_classifier
from jobs.guard import run_script
from jobs.machine import set_up_cpu
from localized_crops.files import UserError, check_output, no_empty_folder, user_errors
from utils import environment, new_folder

REPORT = ("evaluation.*", "predictions.csv", "confusion*.png", "calibration*.png")  # its files


def main(configs: list[dict]) -> None:
    """Evaluate or export the checkpoint of each config, which differ in what their trainings used."""
    set_up_cpu(configs[0]["num_threads"])
    with user_errors(ValueError):
        if configs[0]["export"]:
            print(export_classifier(load_classifier(configs[0]["checkpoint"][0], localize=False), configs[0]["export"]))
        else:
            run_evaluation(configs)


def load_evaluation_configs(arguments: list[str]) -> list[dict] | None:
    """Return a config for each checkpoint: what its training used, and config.py and the command line over it."""
    config = load_config(arguments)
    if config is None:
        return None
    paths = config["checkpoint"]
    if not paths or len(set(paths)) < len(paths):
        raise UserError("evaluate.py needs checkpoint=FILE[,FILE...], such as best.pt of a run, each once")
    if config["export"] and len(paths) > 1:
        raise UserError(f"export={config['export']}: is for one checkpoint, checkpoint names {len(paths)}")
    return [load_config(arguments, base=training_defaults(path)) for path in paths]


def run_evaluation(configs: list[dict]) -> None:
    """Evaluate every checkpoint on the same images and write the report."""
    first, split = configs[0], configs[0]["evaluate"]["split"]
    data = read_dataset(**first["dataset"] | {"check": False})
    rows = data.rows(split)
    if not len(rows):
        counts = ", ".join(f"{name} has {len(data.rows(name))}" for name in ("train", "val", "test"))
        raise UserError(f"{data.root}: no image in the split {split}; set evaluate.split: {counts}")
    folder = claim_folder(first)
    with no_empty_folder(folder, is_new=not first["evaluate"]["out"]):
        start, evaluated = time.perf_counter(), []
        for path, config in zip(first["checkpoint"], configs, strict=True):
            classifier = load_classifier(path, config=config, device=config["device"], localize=False)
            evaluated.append(evaluate(classifier, data, rows))
        seconds = round(time.perf_counter() - start, 2)
        header = {"split": split, "seconds": seconds, "environment": environment(), "settings": configs}
        print(write_report(folder, evaluated, data, rows, header))
        print(f"{folder}: evaluation.md, evaluation.json, predictions.csv, pictures; {seconds:.1f} s")


def claim_folder(config: dict) -> Path:
    """Return the folder of the report.

    Raises:
        UserError: if files lie there that the report would replace, or it cannot be written.
    """
    settings = config["evaluate"]
    if not settings["out"]:
        return new_folder(Path(config["checkpoint"][0]).parent, f"evaluation_{settings['split']}")
    folder = Path(settings["out"])
    if existing := [path for name in REPORT for path in folder.glob(name)]:
        raise UserError(f"{existing[0]}: exists already; give another evaluate.out")
    check_output(folder / "evaluation.json")
    return folder


if __name__ == "__main__":
    run_script(main, load_evaluation_configs)
