"""One training: the run folder is claimed, the parts are built, the epochs are trained, the result is tested."""

import contextlib
import copy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import models
from datasets import stem_of
from jobs.guard import with_resume_hint
from jobs.loader import end_workers, start_server
from jobs.machine import choose_device, seed_everything, set_up_cpu
from jobs.wandb_runs import start_wandb
from localized_crops.boxes import maiou_to_thr
from localized_crops.crops import ratio_gives_way
from localized_crops.files import UserError, check_output, save_json, user_errors
from readers.data_set import DataSet
from training import train_data
from training.batches import TrainImages
from training.distributed import lost_process, on_rank_0, process_group, rank, world_size
from training.evaluation import loss_and_top1
from training.fingerprints import fingerprints
from training.loop import out_of_patience, start_head_as_probe, train_and_log_epoch
from training.run import Run, load_run
from training.self_distillation import with_own_maps
from utils import environment, locked, new_folder

RUN_FILES = ("config.json", "log.jsonl", "last.pt", "best.pt", "predictions.json", "summary.json", "curves.png")


def train_run(config: dict, wandb_run: Any = None) -> dict:
    """Train one model from data to summary.json; return the summary.

    It is logged to ``wandb_run``; None: to a new wandb run if ``wandb`` is on.
    """
    device = choose_device(config["device"])
    with process_group(device), user_errors(ValueError), contextlib.ExitStack() as held:
        folder = on_rank_0(lambda: claim_folder(config, held))
        with with_resume_hint(lambda: resume_command(folder)), lost_process():
            return _train_in(folder, copy.deepcopy(config), device, wandb_run)


def run_stem(config: dict) -> str:
    """Return the first part of the names of run folders."""
    return stem_of(config["dataset"]["name"], config["dataset"]["root"])


def claim_folder(config: dict, held: contextlib.ExitStack) -> Path:
    """Return the folder of the run, locked for as long as ``held`` is open."""
    is_new = not config["run_dir"]
    folder = new_folder("runs", run_stem(config)) if is_new else Path(config["run_dir"])
    held.enter_context(locked(folder, "run_dir", is_new=is_new))
    if config["resume"]:
        return folder
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: holds a run already; resume=true goes on with it, or give another run_dir")
    for name in RUN_FILES:
        check_output(folder / name)
    return folder


def _train_in(folder: Path, config: dict, device: torch.device, wandb_run: Any) -> dict:
    set_up_cpu(config["num_threads"])
    start_server(TrainImages, config["num_workers"])
    config["seed"] = on_rank_0(lambda: config["seed"])  # one that was drawn differs from rank to rank
    seed_everything(config["seed"], config["deterministic"])
    data = on_rank_0(lambda: train_data.load_data(config))
    boxes, notes = train_data.crop_boxes(config, data)
    resolve(config, folder, data, boxes)
    decoded, crops = train_data.decoded_images(config, data), train_data.build_crops(config, data, boxes)
    train_loader = train_data.build_train_loader(config, data, crops, device, decoded)
    val_loader, test_loader = train_data.build_view_loaders(config, data, device, decoded)
    notes["images_whose_crop_ratio_gave_way"] = count_ratios_that_gave_way(config, data, boxes)
    made_from = fingerprints(data, boxes, train_data.view_boxes(config, data), getattr(crops, "maps", None))
    run = Run(folder, config, data.class_names, made_from, device, train_data.localizer_settings(config, data))
    describe(run, data)
    if config["resume"]:
        load_run(run)
    if config["model"]["head_start"] == "probe" and not (run.step or config["model"]["resumed_model"]):
        start_head_as_probe(run, train_loader)
    run.wandb = wandb_run
    if wandb_run is None and config["wandb"] and rank() == 0:
        run.wandb = start_wandb(config, folder)
    while run.epoch < config["num_epochs"] and not out_of_patience(run.records, config["patience"]):
        train_loader = with_own_maps(train_loader, run, data)
        train_and_log_epoch(run, train_loader, val_loader)
    if run.epoch < config["num_epochs"]:
        print(f"stopped early after epoch {run.epoch}: patience={config['patience']}")
    summary = finish(run, data, test_loader, notes)
    for loader in (train_loader, val_loader, test_loader):
        end_workers(loader)  # frames that a drawn figure keeps alive refer to them: at exit they would print tracebacks
    if run.wandb is not None:
        run.wandb.summary.update({"test": summary["top1"], "THR": summary["THR"], "maiou": summary["maiou"]})
        if wandb_run is None:
            run.wandb.finish()
    return summary


def count_ratios_that_gave_way(config: dict, data: DataSet, boxes: np.ndarray) -> int:
    """Return the number of training images in which no exact crop of a ratio in range can keep THR of the box."""
    crop, rows = config["crop"], data.rows("train")
    if not config["use_box"] or config["THR"] <= 0 or crop["mode"] != "exact":
        return 0
    return int(ratio_gives_way(boxes[rows], data.image_sizes[rows], config["THR"], crop["scale"], crop["ratio"]).sum())


def resume_command(folder: Path) -> str | None:
    """Return the command that goes on with the run in ``folder``, None before it has begun."""
    if not (folder / "config.json").exists():
        return None
    start = f"torchrun --nproc-per-node {world_size()}" if world_size() > 1 else "python"
    return f"{start} train.py resume=true run_dir={shlex.quote(str(folder))}"


def resolve(config: dict, folder: Path, data: DataSet, boxes: np.ndarray) -> None:
    """Fill in the settings that are derived from the data and the network where they are None."""
    config["run_dir"] = str(folder)
    config["dataset"]["root"] = str(data.root)
    config["model"]["n_classes"] = config["model"]["n_classes"] or len(data.class_names)
    network = models.input_config(config["model"]["type"])
    for section, key in (("model", "mean"), ("model", "std"), ("eval", "interpolation"), ("eval", "crop_pct")):
        config[section][key] = config[section][key] or network[key]
    if config["model"]["n_classes"] < len(data.class_names):
        raise UserError(f"model.n_classes={config['model']['n_classes']}: the data set has {len(data.class_names)}")
    if config["maiou"] is not None and config["use_box"]:
        rows, crop = data.rows("train"), {key: config["crop"][key] for key in ("mode", "scale", "ratio")}
        config["THR"] = maiou_to_thr(config["maiou"], boxes[rows], data.image_sizes[rows], **crop)


def describe(run: Run, data: DataSet) -> None:
    """Print the lines that a run starts with."""
    config = run.config
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    splits = ", ".join(f"{len(data.rows(name))} {name}" for name in ("train", "val", "test"))
    crop = f"crops held to {config['source']}, {config['crop']['mode']}, THR={config['THR']:.3g}"
    if config["use_dino_maps"]:
        maps = config["dino_maps"] or f"its own EMA, made every {config['self_distillation']['every']} epochs"
        crop = f"crops centred by the maps of {maps}, temperature {config['crop']['temperature']:g}"
    elif not config["use_box"] or config["THR"] < 0:
        crop = f"RandomResizedCrop, scale {config['crop']['scale']}"
    processes = f" in {world_size()} processes" if world_size() > 1 else ""
    validated = "val" if len(data.rows("val")) else "test, as published (choose nothing by it)"
    if not len(data.rows("test")):
        validated += ", and tested on it too: there is no test part"
    print(f"{data.name}: {splits} images, {len(data.class_names)} classes; validated on {validated}")
    print(f"{config['model']['type']}: {parameters:,} parameters learn, on {run.device}{processes}; {crop}")
    print(f"run folder: {run.folder}")


# --- the end ------------------------------------------------------------------------------------------------------


def finish(run: Run, data: DataSet, loader: DataLoader, notes: dict) -> dict[str, Any]:
    """Test the final model and its EMA in every view; write predictions.json and summary.json."""
    names, rows = list(train_data.test_views(run.config)), data.rows(*train_data.REPORTED)
    log_probs, labels = run.predict(loader, names)
    top1, classes = {}, {}  # view -> model, ema
    for view in log_probs["model"]:  # with several their average too
        both = {which: by_view[view] for which, by_view in log_probs.items()}
        top1[view] = {which: loss_and_top1(values, labels)[1] for which, values in both.items()}
        classes[view] = {which: values.argmax(1).tolist() for which, values in both.items()}
    predictions = {}
    for n, (row, image_id) in enumerate(zip(rows, data.ids[rows], strict=True)):
        answers = {view: {which: found[n] for which, found in both.items()} for view, both in classes.items()}
        predictions[str(image_id)] = {"label": int(data.labels[row]), **answers[names[0]], "views": answers}
    has_test = len(data.rows("test")) > 0
    summary = {
        "top1": top1,  # fractions of the images tested on
        "n_test": len(rows),
        "best_validation_top1": run.best_top1,
        "validation_of_last_100_epochs": last_epochs(run.records, run.epoch),
        "epochs": run.epoch,
        "THR": run.config["THR"] if run.config["use_box"] else -1.0,
        "maiou": float(np.mean([record["maiou"] for record in run.records])),
        "training_seconds_of_logged_epochs": sum(record["seconds"] for record in run.records),
        "images_per_second": float(np.median([record["images_per_second"] for record in run.records])),
        "environment": environment(),
        **notes,
        "tested_on": "test" if has_test else "val",
    }
    if rank() == 0:
        save_json(run.folder / "predictions.json", predictions)
        save_json(run.folder / "summary.json", summary)
    split = "test" if has_test else "validation (there is no test part)"
    for view, both in top1.items():
        is_oracle = view.startswith("box") and run.config["eval_box"] == "gt"
        shares = f"model {both['model']:.1%}, EMA {both['ema']:.1%}{' (oracle: true boxes at test)' * is_oracle}"
        print(f"{split} after epoch {run.epoch}, view {view}: {shares}")
    return summary


def last_epochs(records: list[dict], epoch: int) -> dict[str, dict[str, float]]:
    """Return the published measure for model and EMA: mean, first and last validated top-1 of the last 100 epochs."""
    late = [record for record in records if record["epoch"] > epoch - 100]
    return {
        which: {"mean": float(np.mean([r[key] for r in late])), "first": late[0][key], "last": late[-1][key]}
        for which, key in (("model", "top1"), ("ema", "ema_top1"))
    }
