"""A training in progress: building it, its checkpoints, going on from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import models
from jobs.settings import DEFAULTS, leaves
from localized_crops.attention import last_attention
from localized_crops.files import UserError, save_json, user_errors
from training.distributed import rank, world_size
from training.evaluation import predict
from training.fingerprints import first_difference, optimizer_state, structure
from training.log import load_log
from training.optimization import build_optimizer, build_scheduler
from training.train_data import test_views
from transforms import normalize
from utils import UNREADABLE, environment, load_tensors, save_tensors

# What may change between a run and its continuation: it does not change the numbers.
RESUME_MAY_CHANGE = {"num_workers", "device", "A_machine", "preset", "patience", "resume", "run_dir", "wandb"}
RESUME_MAY_CHANGE |= {"log_interval"}

# The numbers that log.jsonl holds of every epoch that was validated.
LOGGED = (
    *("epoch", "train_loss", "train_top1", "maiou", "lr", "seconds", "images_per_second"),
    *("loss", "top1", "ema_loss", "ema_top1"),
)


@dataclass
class Run:
    """A training in progress: what is saved, and how far it is."""

    folder: Path
    config: dict  # with all that was to be derived
    class_names: list[str]
    made_from: dict[str, str]  # fingerprints of data, boxes and maps
    device: torch.device
    localizer: dict | None = None  # of `localizer_settings`
    wandb: Any = None  # the wandb run to log to
    is_begun: bool = False  # config.json is written
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best_top1: float = -1.0  # of the model or the EMA on the validation images
    chosen: str = "ema"  # which of the two had the higher top-1 at the last validation: model | ema
    records: list[dict] = field(default_factory=list)  # log.jsonl

    def __post_init__(self) -> None:
        """Build model, EMA, optimizer, schedule and scaler."""
        config, opt, device = self.config, self.config["opt"], self.device
        self.model = self.net = _build_model(config, device)
        rates = {key: opt[key] for key in ("lr", "weight_decay", "head_lr", "layer_decay")}
        self.optimizer = build_optimizer(models.parameter_groups(self.model, **rates), opt)
        self.scheduler = build_scheduler(self.optimizer, opt, config["num_epochs"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and config["amp"] == "fp16")
        # ``net`` is the model as the training step calls it: compiled, and wrapped for several processes
        if config["compile"]:
            self.net = models.compiled(self.model, device)
        if world_size() > 1:
            self.net = DistributedDataParallel(self.net, device_ids=[device] if device.index is not None else None)
        self.ema = models.build_ema(self.model, config["other"]["ema_decay"])

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The model and its EMA, by the names that checkpoints, predictions.json and summary.json give them."""
        return {"model": self.model, "ema": self.ema.module}

    def begin(self) -> None:
        """Write config.json, once: after the first step, so that a start that fails leaves nothing behind."""
        if not self.is_begun and rank() == 0:
            save_json(self.folder / "config.json", self.config)
        self.is_begun = True

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) uint8 as the network takes them."""
        return normalize(images, self.config["model"]["mean"], self.config["model"]["std"])

    def predict(self, loader: DataLoader, view_names: Sequence[str]) -> tuple[dict, torch.Tensor]:
        """Return the log-probabilities (N, K) of "model" and "ema" by view, and the labels (N,)."""
        return predict(self.networks, loader, view_names, self.device, self.config["amp"], self.normalize)


def _build_model(config: dict, device: torch.device) -> nn.Module:
    """Return the network on its device, with the weights that the training starts from and those that learn marked."""
    settings = config["model"]
    shape = {"image_size": config["image_size"], "patch_size": config["patch_size"]}
    more = {"weights": settings["weights"], "drop_path": settings["drop_path"]}
    model = models.build_model(settings["type"], settings["n_classes"], **shape, **more)
    for name, view in test_views(config).items():
        models.check_patches(f"eval.views={name}: size", view.size, models.patch_of(model))
    if settings["resumed_model"]:
        which = models.load_trained(model, settings["resumed_model"], ema=settings["resumed_ema"])
        print(f"starting from {settings['resumed_model']}, {'its EMA' if which == 'ema' else 'the model'}")
    if config["self_distillation"]["every"]:
        with user_errors(ValueError, f"self_distillation.every: model.type={settings['type']} gives no maps: "):
            last_attention(model)
    models.set_trainable(model, **{key: settings[key] for key in ("freeze_backbone", "train_cls", "freeze_layers")})
    if settings["sync_bn"]:
        if device.type != "cuda":
            raise UserError("model.sync_bn=true: synchronised BatchNorm is for GPUs; set model.sync_bn=false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)  # faster on GPUs and CPUs (docs/benchmarks.md)


def save_run(run: Run, is_best: bool) -> None:
    """Write best.pt if this epoch is the best so far, then last.pt, from which the run can go on.

    Both hold all that prediction needs. What timm loads of them, ``state_dict``, are the weights with the higher top-1.
    """
    weights = {name: network.state_dict() for name, network in run.networks.items()}
    checkpoint = {
        **weights,
        "state_dict": weights[run.chosen],  # the same tensors, stored once
        "chosen": run.chosen,
        "class_names": run.class_names,
        "epoch": run.epoch,
        "step": run.step,
        "best_top1": run.best_top1,
        "config": run.config,
        "made_from": run.made_from,
        "localizer": run.localizer,
        "versions": environment(),
    }
    if is_best:
        save_tensors(run.folder / "best.pt", checkpoint)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema_updates": run.ema.n_averaged,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }
    save_tensors(run.folder / "last.pt", checkpoint | state)


def load_run(run: Run) -> None:
    """Go on from last.pt where there is one; epochs logged after it are done again.

    Raises:
        UserError: if it is of another run: of other data, boxes, maps, or settings other than RESUME_MAY_CHANGE.
    """
    path, config = run.folder / "last.pt", run.config
    if not path.exists():
        print("no last.pt yet: starting from the first epoch")
        return
    state = load_tensors(path)
    with user_errors(UNREADABLE, f"{path}: not of this run: "):
        if not isinstance(state, dict):
            raise TypeError("it holds no dict")
        check_origin(run, state)
        for name, network in run.networks.items():
            network.load_state_dict(state[name])
        run.ema.n_averaged.copy_(state["ema_updates"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.epoch, run.step, run.best_top1 = int(state["epoch"]), int(state["step"]), float(state["best_top1"])
        run.chosen = str(state["chosen"])
        run.scheduler = build_scheduler(run.optimizer, config["opt"], config["num_epochs"], done=run.epoch)
        torch.set_rng_state(state["rng"])
        if run.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    records = load_log(run.folder / "log.jsonl", LOGGED)
    run.records = [record for record in records if record["epoch"] <= run.epoch]
    if run.epoch >= config["log_interval"] and not run.records:
        raise UserError(f"{run.folder / 'log.jsonl'}: has no epoch up to {run.epoch}, the one of last.pt; restore it")
    print(f"going on after epoch {run.epoch}")


def check_origin(run: Run, state: dict) -> None:
    """Raise ValueError if a checkpoint was made from other things than this run, or its tensors do not fit."""
    changed = first_difference(run.made_from, {"images": None} | state["made_from"])  # an earlier version wrote fewer
    if changed:
        raise ValueError(f"{changed}: not what they were when it was written; start a new run")
    free = RESUME_MAY_CHANGE | {"num_epochs", "dataset.root"}  # it may be extended; the images are compared themselves
    before, now = DEFAULTS | leaves(state["config"]), leaves(run.config)  # an earlier version had fewer keys
    changed = first_difference(before, {key: value for key, value in now.items() if key not in free})
    if changed:
        raise ValueError(f"it was trained with {changed}={before.get(changed)}, now {now[changed]}")
    expected = {name: network.state_dict() for name, network in run.networks.items()}
    expected["optimizer"] = optimizer_state(run.optimizer, run.config["opt"])
    before, now = structure({key: state[key] for key in expected}), structure(expected)
    changed = first_difference(before, now)
    if changed:
        raise ValueError(f"{changed} is {before.get(changed)}, not {now[changed]}")
