"""Train a classifier on crops that are held to boxes.

Reads a data set and, where ``source`` names one, a box JSON. Writes a run folder: config.json, log.jsonl, last.pt,
best.pt, predictions.json, summary.json, curves.png.

    python train.py                                            # ToyBirds, two cores, about 1 minute
    python train.py run_dir=runs/toybirds_0 resume=true        # go on with a run that was interrupted
    python train.py preset=cub_first_training dataset.root=CUB_200_2011
    python train.py sweeprun=true run_dir=runs/sweep           # the grid sweep.values, run after run
    torchrun --nproc-per-node 8 train.py preset=cub_first_training     # one training on eight GPUs
"""

import contextlib
import copy
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from config import load_config
from experiments.sweep import FolderInUseError, run_sweep, start_wandb
from figures.plots import draw_curves
from jobs.guard import going_on_with, run_script
from jobs.settings import ConfigError, check_config, leaves
from jobs.shared_work import choose_device
from localized_crops.attention import last_attention
from localized_crops.boxes import maiou_to_thr
from localized_crops.crops import ratio_gives_way
from localized_crops.files import UserError, load_json, save_json, user_errors
from localized_crops.map_file import MapCache, cache_paths
from localizer.networks import as_localizer
from readers.data_set import DataSet
from training.batches import Batch
from training.distributed import (
    LostProcessError,
    copy_buffers_of_rank_0,
    lost_process,
    on_rank_0,
    process_group,
    rank,
    refuse_many,
    seed_rank,
    sum_over_ranks,
    world_size,
)
from training.evaluation import loss_and_top1, predict
from training.self_distillation import maps_path, refresh_epoch, refresh_maps
from training.train_data import (
    WORTH_A_WORKER,
    build_crops,
    build_train_loader,
    build_view_loaders,
    crop_boxes,
    decoded_images,
    load_data,
    loading,
    map_crops,
    test_views,
)
from transforms import flip_images, normalize
from utils import (
    UNREADABLE,
    environment,
    load_log,
    load_tensors,
    locked,
    new_folder,
    save_log,
    save_tensors,
    seed_everything,
)

# What may change between a run and its continuation: it does not change the numbers.
RESUME_MAY_CHANGE = {"preset", "resume", "run_dir", "num_workers", "device", "wandb", "A_machine", "log_interval"}

# The numbers that log.jsonl holds of every epoch that was validated.
LOGGED = (
    *("epoch", "train_loss", "train_top1", "maiou", "lr", "seconds", "images_per_second"),
    *("loss", "top1", "ema_loss", "ema_top1"),
)


def main(config: dict) -> None:
    """Train once, or run the sweep."""
    if config["sweeprun"]:
        refuse_many("sweeprun=true")
        run_sweep(config, train_run)
    else:
        train_run(config)


def load_run_config(arguments: list[str]) -> dict | None:
    """Return the config of a run; with resume=true the run's own config.json takes the place of config.py.

    Raises:
        ConfigError: if a continued run is asked to change what its numbers depend on.
    """
    config = load_config(arguments)
    if config is None or config["sweeprun"] or not config["resume"]:
        return config
    return resumed_config(arguments, Path(config["run_dir"] or unfinished_run(config["dataset"]["name"])))


def unfinished_run(stem: str) -> Path:
    """Return the newest run under runs/ that has begun and not ended.

    Raises:
        ConfigError: if there is none.
    """
    begun = [path for path in Path("runs").glob(f"{stem}_*/config.json") if not (path.parent / "summary.json").exists()]
    if not begun:
        raise ConfigError(f"resume=true: no unfinished run in runs/{stem}_*; name the run with run_dir=FOLDER")
    return max(begun, key=lambda path: path.stat().st_mtime).parent


def resumed_config(arguments: list[str], folder: Path) -> dict:
    """Return the saved config of the run in ``folder`` with the command line laid over it."""
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder}: holds no run to go on with (no config.json); leave out resume=true")
    saved = load_json(folder / "config.json")
    check_config(saved, f"{folder / 'config.json'}: ")
    config = load_config(arguments, base=saved) | {"run_dir": str(folder)}
    before, now = leaves(saved), leaves(config)
    for key in sorted(before.keys() - RESUME_MAY_CHANGE):
        if before[key] != now[key]:
            raise ConfigError(f"{key}={now[key]}: the run in {folder} has {before[key]}; a continued run keeps it")
    return config


# --- one run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training in progress: what is saved, and how far it is."""

    folder: Path
    model: nn.Module
    net: nn.Module  # the model as the training step calls it: compiled, and wrapped for several processes
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best_top1: float = -1.0  # of the EMA on the validation images
    records: list[dict] = field(default_factory=list)  # log.jsonl


def train_run(config: dict, wandb_run: Any = None) -> dict:
    """Train one model from data to summary.json; return the summary.

    Args:
        config: the resolved config.
        wandb_run: log to this wandb run; None: to a new one if ``wandb`` is on.
    """
    device = choose_device(config["device"])
    with process_group(device), user_errors(ValueError), contextlib.ExitStack() as held:
        folder = on_rank_0(lambda: claim_folder(config, held))
        with going_on_with(lambda: resume_command(folder) if rank() == 0 else None), others_may_die(folder):
            return _train_in(folder, copy.deepcopy(config), device, wandb_run)


def claim_folder(config: dict, held: contextlib.ExitStack) -> Path:
    """Return the folder of the run, locked for as long as ``held`` is open."""
    folder = Path(config["run_dir"]) if config["run_dir"] else new_folder("runs", config["dataset"]["name"])
    if not held.enter_context(locked(folder)):
        raise FolderInUseError(f"{folder}: another process works there; wait for it, or give another run_dir")
    if (folder / "config.json").exists() and not config["resume"]:
        raise UserError(f"{folder}: holds a run already; resume=true goes on with it, or give another run_dir")
    return folder


def _train_in(folder: Path, config: dict, device: torch.device, wandb_run: Any) -> dict:
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    config["seed"] = on_rank_0(lambda: config["seed"])  # one that was drawn differs from rank to rank
    seed_everything(config["seed"], config["deterministic"])
    data = on_rank_0(lambda: load_data(config))
    boxes, notes = crop_boxes(config, data)
    resolve(config, folder, data, boxes)
    decoded = decoded_images(config, data)
    train_loader = build_train_loader(config, data, build_crops(config, data, boxes), device, decoded)
    val_loader, test_loader = build_view_loaders(config, data, device, decoded)
    run = build_run(folder, config, device)
    print(describe(config, run, data, device))
    if config["resume"]:
        load_run(run, device)
    if rank() == 0:
        save_json(folder / "config.json", config)  # not before: a run that cannot go on stays as it was
    own_wandb = wandb_run is None and config["wandb"] and rank() == 0
    if own_wandb:
        wandb_run = start_wandb(config, folder)
    for _ in range(run.epoch, config["num_epochs"]):
        train_loader = with_own_maps(train_loader, run, config, data, device)
        train_and_log_epoch(run, config, train_loader, val_loader, device, wandb_run)
    summary = finish(run, config, data, test_loader, device, notes)
    if wandb_run is not None:
        wandb_run.summary.update({"test": summary["top1"], "THR": summary["THR"], "maiou": summary["maiou"]})
    if own_wandb:
        wandb_run.finish()
    return summary


def resume_command(folder: Path) -> str | None:
    """Return the command that goes on with the run in ``folder``, None before it has begun."""
    many = f"torchrun --nproc-per-node {world_size()}" if world_size() > 1 else "python"
    begun = (folder / "config.json").exists()
    return f"{many} train.py resume=true run_dir={shlex.quote(str(folder))}" if begun else None


@contextlib.contextmanager
def others_may_die(folder: Path) -> Iterator[None]:
    """Say how to go on when another process of the run is gone."""
    try:
        with lost_process():
            yield
    except LostProcessError as error:
        raise UserError(f"{error}; to go on with this run: {resume_command(folder)}") from error


# --- config, own maps -------------------------------------------------------------------------------------------------


def resolve(config: dict, folder: Path, data: DataSet, boxes: np.ndarray) -> None:
    """Fill in what the config leaves to be derived, so that config.json tells all."""
    config["run_dir"] = str(folder)
    config["dataset"]["root"] = str(data.root)
    config["model"]["n_classes"] = config["model"]["n_classes"] or len(data.class_names)
    if config["model"]["n_classes"] < len(data.class_names):
        raise UserError(f"model.n_classes={config['model']['n_classes']}: the data set has {len(data.class_names)}")
    if config["opt"]["scheduler"] == "step":
        config["opt"]["gamma"] = step_gamma(config["opt"], config["num_epochs"])
    if config["maiou"] is not None and config["use_box"]:
        rows, crop = data.rows("train"), config["crop"]
        config["THR"] = maiou_to_thr(
            config["maiou"],
            boxes[rows],
            data.image_sizes[rows],
            mode=crop["mode"],
            scale=tuple(crop["scale"]),
            ratio=tuple(crop["ratio"]),
        )


def with_own_maps(loader: DataLoader, run: Run, config: dict, data: DataSet, device: torch.device) -> DataLoader:
    """Return the training loader of the next epoch: with self-distillation a new one where the maps are others."""
    epoch = refresh_epoch(run.epoch, **config["self_distillation"])
    if epoch is None:
        return loader
    path = maps_path(run.folder, epoch)
    if getattr(loader.dataset.crops.maps, "path", None) == cache_paths(path)[1]:
        return loader
    if epoch == run.epoch:
        on_rank_0(lambda: make_own_maps(path, run, config, data, device))
    return build_train_loader(
        config, data, map_crops(config, data, MapCache.open(path)), device, loader.dataset.decoded
    )


def make_own_maps(path: Path, run: Run, config: dict, data: DataSet, device: torch.device) -> None:
    """Write the maps of the training images that the EMA classifies rightly."""
    ema = run.ema.module
    localizer = as_localizer(ema, config["model"]["type"], "EMA of this run", image_size=config["image_size"])
    on_cuda = device.type == "cuda" and config["amp"] != "none"
    maps = refresh_maps(
        path,
        localizer,
        data,
        data.rows("train"),
        device,
        config["dino"],
        precision=config["amp"] if on_cuda else "float32",
        num_workers=0 if len(data.rows("train")) < WORTH_A_WORKER else loading(config, device)["num_workers"],
    )
    print(f"own maps: the EMA classifies {len(maps)} of {len(data.rows('train'))} training images rightly", flush=True)


# --- model, optimizer, schedule -----------------------------------------------------------------------------------


def build_run(folder: Path, config: dict, device: torch.device) -> Run:
    """Build model, EMA, optimizer, schedule and scaler."""
    wanted = config["model"]
    model = models.build_model(
        wanted["type"],
        wanted["n_classes"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        weights=wanted["weights"],
    )
    for name, view in test_views(config).items():
        models.check_patches(f"eval.views={name}: size", view.size, models.patch_of(model))
    if wanted["resumed_model"]:
        models.load_trained(model, wanted["resumed_model"], ema=wanted["resumed_ema"])
    if config["self_distillation"]["every"]:
        with user_errors(ValueError, f"self_distillation.every: model.type={wanted['type']} gives no maps: "):
            last_attention(model)
    models.set_trainable(model, freeze_backbone=wanted["freeze_backbone"], train_cls=wanted["train_cls"])
    if wanted["sync_bn"]:
        model = models.sync_bn(model, device)
    model = model.to(device, memory_format=torch.channels_last)  # faster on GPUs and CPUs (docs/benchmarks.md)
    groups = models.parameter_groups(model, config["opt"]["weight_decay"])
    optimizer = build_optimizer(groups, config["opt"])
    net = models.compiled(model, device) if config["compile"] else model
    return Run(
        folder=folder,
        model=model,
        net=DistributedDataParallel(net, device_ids=[device] if device.index is not None else None)
        if world_size() > 1
        else net,
        ema=models.build_ema(model, config["other"]["ema_decay"]),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config["opt"], config["num_epochs"]),
        scaler=torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and config["amp"] == "fp16"),
    )


def build_optimizer(groups: list[dict], opt: dict, *, fused: bool = True) -> torch.optim.Optimizer:
    """Build sgd, adam or adamw over parameter groups that carry their own weight decay; ``fused``: in one kernel."""
    how = {"lr": opt["lr"], "fused": fused or None}  # None, not False, leaves torch its foreach kernels
    if opt["type"] == "sgd":
        return torch.optim.SGD(groups, momentum=opt["momentum"], **how)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[opt["type"]](groups, **how)


def step_gamma(opt: dict, num_epochs: int) -> float:
    """Return the factor of one fall of the step schedule, so that it ends near ``target_lr``."""
    if opt["gamma"] is not None:
        return opt["gamma"]
    return (opt["target_lr"] / opt["lr"]) ** (opt["step_size"] / num_epochs)


def build_scheduler(optimizer: torch.optim.Optimizer, opt: dict, num_epochs: int) -> lr_scheduler.LRScheduler:
    """Build the schedule over epochs: cosine or steps down to target_lr, after a linear rise if there is one."""
    warmup = min(opt["warmup_epochs"], num_epochs - 1)
    if opt["scheduler"] == "step":
        main_part = lr_scheduler.StepLR(optimizer, opt["step_size"], step_gamma(opt, num_epochs))
    else:
        main_part = lr_scheduler.CosineAnnealingLR(optimizer, num_epochs - warmup, eta_min=opt["target_lr"])
    if not warmup:
        return main_part
    rise = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main_part], milestones=[warmup])


def describe(config: dict, run: Run, data: DataSet, device: torch.device) -> str:
    """Return the lines that a run starts with."""
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    splits = ", ".join(f"{len(data.rows(name))} {name}" for name in ("train", "val", "test"))
    crop = f"crops held to {config['source']}, {config['crop']['mode']}, THR={config['THR']:.3g}"
    if config["use_dino_maps"]:
        maps = config["dino_maps"] or f"its own EMA, made every {config['self_distillation']['every']} epochs"
        crop = f"crops centred by the maps of {maps}, temperature {config['crop']['temperature']:g}"
    elif not config["use_box"] or config["THR"] < 0:
        crop = f"RandomResizedCrop, scale {config['crop']['scale']}"
    many = f" in {world_size()} processes" if world_size() > 1 else ""
    validated = "val" if len(data.rows("val")) else "test, as published (choose nothing by it)"
    return "\n".join(
        [
            f"{data.name}: {splits} images, {len(data.class_names)} classes; validated on {validated}",
            f"{config['model']['type']}: {parameters:,} parameters learn, on {device}{many}; {crop}",
            f"run folder: {run.folder}",
        ]
    )


# --- the loop -----------------------------------------------------------------------------------------------------


def train_and_log_epoch(
    run: Run,
    config: dict,
    train_loader: DataLoader,
    val_loader: DataLoader,
    device: torch.device,
    wandb_run: Any,
) -> None:
    """Train one epoch; every ``log_interval`` epochs validate, log and draw; save."""
    train_loader.sampler.epoch = run.epoch
    lr, start = run.scheduler.get_last_lr()[0], time.perf_counter()
    record = {"epoch": run.epoch + 1, **train_one_epoch(run, config, train_loader, device), "lr": lr}
    record["seconds"] = time.perf_counter() - start
    record["images_per_second"] = len(train_loader.dataset) / record["seconds"]
    check_finite(record, "train_loss")
    run.scheduler.step()
    run.epoch += 1
    is_best = False
    if run.epoch % config["log_interval"] == 0 or run.epoch == config["num_epochs"]:
        is_best = validate_and_log(run, record, val_loader, config, device, wandb_run)
    if config["save"] and rank() == 0:
        save_run(run, config, is_best, device)


def check_finite(record: dict, key: str) -> None:
    """Raise UserError if a loss is no longer a number."""
    if not math.isfinite(record[key]):
        raise UserError(f"epoch {record['epoch']}: {key} is {record[key]}; lower opt.lr (now {record['lr']:.3g})")


def train_one_epoch(run: Run, config: dict, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Update the model once over ``loader``; return loss, accuracy and maIoU as means over images."""
    freeze_from = config["model"]["freeze_bn_from"]
    models.train_mode(run.model, freeze_bn=freeze_from is not None and run.epoch >= freeze_from)
    seed_rank(config["seed"], run.epoch)
    criterion = nn.CrossEntropyLoss(label_smoothing=config["other"]["label_smoothing"], reduction="sum")
    autocast, parts = autocast_of(config, device), config["opt"]["accumulate"]
    sums, seen, kept = torch.zeros(2, device=device), 0, 0.0  # loss, right answers: stay on the device
    # None: no bar where nobody watches, such as in a log file
    hidden = True if rank() else None
    bar = tqdm(loader, desc=f"epoch {run.epoch + 1}/{config['num_epochs']}", leave=False, disable=hidden)
    for number, batch in enumerate(bar, 1):
        is_last_part = number % parts == 0
        sums += backward(run, batch, criterion, autocast, device, is_last_part)
        seen, kept = seen + batch.real, kept + float(batch.coverage[: batch.real].sum())
        if is_last_part:
            update(run, config["model"]["ema_step"], config["opt"]["clip"])
        if number % 20 == 0 and not bar.disable:  # reading the sums waits for the device
            rate = seen / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"loss {sums[0] / seen:.3f}, top-1 {sums[1] / seen:.1%}, {rate:.0f} images/s")
    counts = torch.tensor([seen, kept], device=device)
    loss, right, seen, kept = sum_over_ranks(torch.cat([sums, counts]).double()).tolist()
    return {"train_loss": loss / seen, "train_top1": right / seen, "maiou": kept / seen}


def autocast_of(config: dict, device: torch.device) -> torch.autocast:
    """Return what forward passes are run under: bf16 or fp16 on CUDA, else nothing."""
    dtype = torch.float16 if config["amp"] == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda" and config["amp"] != "none")


def backward(
    run: Run, batch: Batch, criterion: nn.Module, autocast: torch.autocast, device: torch.device, is_last_part: bool
) -> torch.Tensor:
    """Add the gradient of the batch's share of the mean loss of the step; return (summed loss, right answers).

    Processes exchange their gradients with the last part of a step only.
    """
    images, labels, flips = (part.to(device, non_blocking=True) for part in batch[:3])
    labels = labels[: batch.real]
    keeps_to_itself = isinstance(run.net, DistributedDataParallel) and not is_last_part
    with run.net.no_sync() if keeps_to_itself else contextlib.nullcontext():
        with autocast:
            logits = run.net(normalize(flip_images(images, flips)))[: batch.real]
            loss = criterion(logits, labels)  # summed over images
        # DistributedDataParallel takes the mean of the processes' gradients
        run.scaler.scale(loss * (world_size() / batch.whole)).backward()
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == labels).sum()])


def update(run: Run, ema_step: int, clip: float | None) -> None:
    """Take one optimizer step and, every ``ema_step`` of them, update the EMA."""
    if clip is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.step % ema_step == 0:
        run.ema.update_parameters(run.model)


def validate_and_log(
    run: Run, record: dict, loader: DataLoader, config: dict, device: torch.device, wandb_run: Any
) -> bool:
    """Validate model and EMA, log and draw; return whether the EMA is the best so far."""
    copy_buffers_of_rank_0(run.model, run.ema.module)
    found, labels = predict([run.model, run.ema], loader, ["first"], device, autocast_of(config, device))
    for prefix, log_probs in zip(("", "ema_"), found, strict=True):
        record[f"{prefix}loss"], record[f"{prefix}top1"] = loss_and_top1(log_probs["first"], labels)
        check_finite(record, f"{prefix}loss")
    run.records.append(record)
    if rank() == 0:
        save_log(run.folder / "log.jsonl", run.records)
        draw_curves(run.records, run.folder / "curves.png")
    if wandb_run is not None:
        wandb_run.log(record, step=record["epoch"])
    print(
        f"epoch {record['epoch']:3d}/{config['num_epochs']}  train {record['train_loss']:.3f}  "
        f"val {record['loss']:.3f} top-1 {record['top1']:.1%}  EMA {record['ema_loss']:.3f} "
        f"top-1 {record['ema_top1']:.1%}  maIoU {record['maiou']:.3f}  {record['images_per_second']:.0f} images/s",
        flush=True,
    )
    is_best = record["ema_top1"] >= run.best_top1  # of equals the later one: trained for longer
    run.best_top1 = max(run.best_top1, record["ema_top1"])
    return is_best


# --- checkpoints --------------------------------------------------------------------------------------------------


def save_run(run: Run, config: dict, is_best: bool, device: torch.device) -> None:
    """Write best.pt if this epoch is the best so far, then last.pt, from which the run can go on."""
    weights = {"model": run.model.state_dict(), "ema": run.ema.module.state_dict()}
    about = {"epoch": run.epoch, "step": run.step, "best_top1": run.best_top1, "config": config}
    if is_best:
        save_tensors(run.folder / "best.pt", weights | about)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema_updates": run.ema.n_averaged,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    save_tensors(run.folder / "last.pt", weights | about | state)


def load_run(run: Run, device: torch.device) -> None:
    """Go on from last.pt where there is one; epochs logged after it are done again."""
    if not (run.folder / "last.pt").exists():
        print("no last.pt yet: starting from the first epoch")
        return
    state = load_tensors(run.folder / "last.pt")
    with user_errors(UNREADABLE, f"{run.folder / 'last.pt'}: not of this run: "):
        if not isinstance(state, dict):
            raise TypeError("it holds no dict")
        run.model.load_state_dict(state["model"])
        run.ema.module.load_state_dict(state["ema"])
        run.ema.n_averaged.copy_(state["ema_updates"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.scaler.load_state_dict(state["scaler"])
        run.epoch, run.step, run.best_top1 = int(state["epoch"]), int(state["step"]), float(state["best_top1"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    records = load_log(run.folder / "log.jsonl", LOGGED)
    run.records = [record for record in records if record["epoch"] <= run.epoch]
    print(f"going on after epoch {run.epoch}")


# --- the end ------------------------------------------------------------------------------------------------------


def finish(
    run: Run, config: dict, data: DataSet, loader: DataLoader, device: torch.device, notes: dict
) -> dict[str, Any]:
    """Test the final model and its EMA in every view; write predictions.json and summary.json."""
    names, rows = list(test_views(config)), data.rows("test")
    top1, classes = {}, {}
    found, labels = predict([run.model, run.ema], loader, names, device, autocast_of(config, device))
    for which, log_probs in zip(("model", "ema"), found, strict=True):
        for view, values in log_probs.items():
            top1.setdefault(view, {})[which] = loss_and_top1(values, labels)[1]
            classes.setdefault(view, {})[which] = values.argmax(1).tolist()
    predictions = {
        str(image_id): {
            "label": int(data.labels[row]),
            "model": classes[names[0]]["model"][n],
            "ema": classes[names[0]]["ema"][n],
            "views": {view: {which: found[n] for which, found in both.items()} for view, both in classes.items()},
        }
        for n, (row, image_id) in enumerate(zip(rows, data.ids[rows], strict=True))
    }
    summary = summarize(run, config, data, top1, notes)
    if rank() == 0:
        save_json(run.folder / "predictions.json", predictions)
        save_json(run.folder / "summary.json", summary)
    for view, both in top1.items():
        oracle = " (oracle: true boxes at test)" if view.startswith("box") and config["eval_box"] == "gt" else ""
        print(f"test, view {view}: model {both['model']:.1%}, EMA {both['ema']:.1%}{oracle}")
    return summary


def summarize(run: Run, config: dict, data: DataSet, top1: dict, notes: dict) -> dict[str, Any]:
    """Return what a table needs to know of a finished run."""
    thr = config["THR"] if config["use_box"] else -1.0
    train = data.rows("train")
    gave_way = ratio_gives_way(data.boxes[train], data.image_sizes[train], thr) if thr > 0 else np.zeros(1, bool)
    seconds = sum(record["seconds"] for record in run.records)
    return {
        "top1": top1,  # view -> model, ema: fractions of the test images
        "n_test": len(data.rows("test")),
        "best_validation_top1": run.best_top1,
        "epochs": run.epoch,
        "THR": thr,
        "maiou": float(np.mean([record["maiou"] for record in run.records])),
        "training_seconds_of_logged_epochs": seconds,
        "images_per_second": float(np.median([record["images_per_second"] for record in run.records])),
        "images_whose_crop_ratio_gave_way": int(gave_way.sum()),
        **notes,
        "environment": environment(),
    }


if __name__ == "__main__":
    run_script(main, load_run_config)
