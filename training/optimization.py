"""The optimizer and the learning rate of every epoch."""

import math

import torch
from torch.optim import lr_scheduler


def build_optimizer(groups: list[dict], opt: dict, *, fused: bool = True) -> torch.optim.Optimizer:
    """Build sgd, adam or adamw over parameter groups that carry their own weight decay; ``fused``: in one kernel."""
    shared = {"lr": opt["lr"], "fused": fused or None}  # None, not False, leaves torch its foreach kernels
    if opt["type"] == "sgd":
        return torch.optim.SGD(groups, momentum=opt["momentum"], **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[opt["type"]](groups, **shared)


def build_scheduler(
    optimizer: torch.optim.Optimizer, opt: dict, num_epochs: int, done: int = 0
) -> lr_scheduler.LambdaLR:
    """Build the schedule that gives every epoch its `learning_rate`, for every parameter group in proportion.

    ``done`` epochs of the training lie behind an optimizer that goes on.
    """
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: learning_rate(epoch, opt, num_epochs) / opt["lr"], done - 1)


def learning_rate(epoch: int, opt: dict, num_epochs: int) -> float:
    """Return the learning rate of an epoch, counted from 0.

    After ``warmup_epochs`` of a linear rise the first epoch has ``lr`` and the last one ``target_lr``: along half a
    cosine, or by equal factors every ``step_size`` epochs. A ``gamma`` that is given is the factor of a step, wherever
    it ends. The rise and the fall share the epochs; where there is no room for a fall the last epoch has ``lr``.

    Args:
        epoch: 0 to num_epochs - 1; beyond, the last one's.
        opt: scheduler, lr, target_lr, warmup_epochs, step_size, gamma.
        num_epochs: of the training.
    """
    warmup = min(opt["warmup_epochs"], num_epochs - 1)
    if epoch < warmup:
        return opt["lr"] * (epoch + 1) / (warmup + 1)
    last = num_epochs - 1 - warmup
    now = min(epoch - warmup, last)
    if opt["scheduler"] == "step":
        return opt["lr"] * step_gamma(opt, num_epochs) ** (now // opt["step_size"])
    fall = (1 - math.cos(math.pi * now / last)) / 2 if last else 0.0
    return opt["lr"] + fall * (opt["target_lr"] - opt["lr"])


def step_gamma(opt: dict, num_epochs: int) -> float:
    """Return the factor of one step of the schedule: ``gamma``, or the one with which the last step ends at target_lr.

    With the published (target_lr / lr) ** (step_size / num_epochs) the last step would end one step above it.
    """
    if opt["gamma"] is not None:
        return opt["gamma"]
    steps = (num_epochs - 1 - min(opt["warmup_epochs"], num_epochs - 1)) // opt["step_size"]
    return (opt["target_lr"] / opt["lr"]) ** (1 / steps) if steps else 1.0
