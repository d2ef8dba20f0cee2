"""A training in progress: building it, its checkpoints, going on from them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import models
from jobs.settings import leaves
from localized_crops.attention import last_attention
from localized_crops.files import UserError, user_errors
from training.distributed import rank, world_size
from training.fingerprints import first_difference, misfit, optimizer_fault
from training.optimization import build_optimizer, build_scheduler
from training.train_data import test_views
from utils import UNREADABLE, environment, load_log, load_tensors, save_tensors

# The numbers that log.jsonl holds of every epoch that was validated.
LOGGED = (
    *("epoch", "train_loss", "train_top1", "maiou", "lr", "seconds", "images_per_second"),
    *("loss", "top1", "ema_loss", "ema_top1"),
)


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
    mean: list[float]  # of the network's input, by which images are normalised
    std: list[float]
    class_names: list[str]
    made_from: dict[str, str]  # fingerprints of data, boxes and maps
    localizer: dict | None = None  # of `how_boxes_are_found`
    begin: Callable[[], None] = lambda: None  # called after every optimizer step
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best_top1: float = -1.0  # of the model or the EMA on the validation images
    chosen: str = "ema"  # which of the two validated better when they were last looked at: model | ema
    records: list[dict] = field(default_factory=list)  # log.jsonl


def build_run(
    folder: Path, config: dict, class_names: list[str], made_from: dict[str, str], device: torch.device
) -> Run:
    """Build model, EMA, optimizer, schedule and scaler."""
    wanted = config["model"]
    model = models.build_model(
        wanted["type"],
        wanted["n_classes"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        weights=wanted["weights"],
        drop_path=wanted["drop_path"],
    )
    for name, view in test_views(config).items():
        models.check_patches(f"eval.views={name}: size", view.size, models.patch_of(model))
    if wanted["resumed_model"]:
        which = models.load_trained(model, wanted["resumed_model"], ema=wanted["resumed_ema"])
        if rank() == 0:
            print(f"starting from {wanted['resumed_model']}, {'its EMA' if which == 'ema' else 'the model'}")
    if config["self_distillation"]["every"]:
        with user_errors(ValueError, f"self_distillation.every: model.type={wanted['type']} gives no maps: "):
            last_attention(model)
    learning = {key: wanted[key] for key in ("freeze_backbone", "train_cls", "freeze_layers")}
    models.set_trainable(model, **learning)
    if wanted["sync_bn"]:
        model = models.sync_bn(model, device)
    model = model.to(device, memory_format=torch.channels_last)  # faster on GPUs and CPUs (docs/benchmarks.md)
    rates = {key: config["opt"][key] for key in ("lr", "weight_decay", "head_lr", "layer_decay")}
    groups = models.parameter_groups(model, **rates)
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
        mean=wanted["mean"],
        std=wanted["std"],
        class_names=class_names,
        made_from=made_from,
    )


def save_run(run: Run, config: dict, is_best: bool, device: torch.device) -> None:
    """Write best.pt if this epoch is the best so far, then last.pt, from which the run can go on.

    Both hold all that prediction needs. What timm loads of them, ``state_dict``, are the weights that validated better.
    """
    weights = {"model": run.model.state_dict(), "ema": run.ema.module.state_dict()}
    about = {
        "state_dict": weights[run.chosen],  # the same tensors, stored once
        "chosen": run.chosen,
        "class_names": run.class_names,
        "epoch": run.epoch,
        "step": run.step,
        "best_top1": run.best_top1,
        "config": config,
        "made_from": run.made_from,
        "localizer": run.localizer,
        "versions": environment(),
    }
    if is_best:
        save_tensors(run.folder / "best.pt", weights | about)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema_updates": run.ema.n_averaged,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    save_tensors(run.folder / "last.pt", weights | about | state)


def load_run(run: Run, config: dict, may_change: Collection[str], device: torch.device) -> None:
    """Go on from last.pt where there is one; epochs logged after it are done again.

    Raises:
        UserError: if it is of another run: of other data, boxes, maps, or settings other than ``may_change``.
    """
    if not (run.folder / "last.pt").exists():
        print("no last.pt yet: starting from the first epoch")
        return
    state = load_tensors(run.folder / "last.pt")
    with user_errors(UNREADABLE, f"{run.folder / 'last.pt'}: not of this run: "):
        if not isinstance(state, dict):
            raise TypeError("it holds no dict")
        check_origin(run, state, config, may_change)
        run.model.load_state_dict(state["model"])
        run.ema.module.load_state_dict(state["ema"])
        run.ema.n_averaged.copy_(state["ema_updates"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.epoch, run.step, run.best_top1 = int(state["epoch"]), int(state["step"]), float(state["best_top1"])
        run.chosen = str(state["chosen"])
        run.scheduler = build_scheduler(run.optimizer, config["opt"], config["num_epochs"], done=run.epoch)
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    records = load_log(run.folder / "log.jsonl", LOGGED)
    run.records = [record for record in records if record["epoch"] <= run.epoch]
    if run.epoch >= config["log_interval"] and not run.records:
        raise UserError(f"{run.folder / 'log.jsonl'}: has no epoch up to {run.epoch}, the one of last.pt; restore it")
    print(f"going on after epoch {run.epoch}")


def check_origin(run: Run, state: dict, config: dict, may_change: Collection[str]) -> None:
    """Raise ValueError if a checkpoint was made from other things than this run, or its tensors do not fit."""
    known = {"images", *state["made_from"]}  # an earlier version wrote fewer
    changed = first_difference(state["made_from"], {key: run.made_from[key] for key in known & run.made_from.keys()})
    if changed:
        raise ValueError(f"{changed}: not what they were when it was written; start a new run")
    free = {*may_change, "num_epochs", "dataset.root"}  # a training may be extended; the images are compared themselves
    kept = {key: value for key, value in leaves(config).items() if key not in free}
    changed = first_difference(leaves(state["config"]), kept)
    if changed:
        raise ValueError(f"it was trained with {changed}={leaves(state['config']).get(changed)}, now {kept[changed]}")
    fault = (
        misfit(run.model.state_dict(), state["model"])
        or misfit(run.ema.module.state_dict(), state["ema"])
        or optimizer_fault(run.optimizer, state["optimizer"], config["opt"])
    )
    if fault:
        raise ValueError(fault)
