"""The optimizer and the learning rate of every epoch."""

import math

import torch
from torch.optim import lr_scheduler


def build_optimizer(groups: list[dict], opt: dict) -> torch.optim.Optimizer:
    """Build sgd, adam or adamw over parameter groups that carry their own weight decay."""
    if opt["type"] == "sgd":
        return torch.optim.SGD(groups, lr=opt["lr"], momentum=opt["momentum"], fused=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[opt["type"]](groups, lr=opt["lr"], fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, opt: dict, num_epochs: int, done: int = 0
) -> lr_scheduler.LambdaLR:
    """Build the schedule of `learning_rate` for every parameter group; ``done``: epochs that it was trained for."""
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: learning_rate(epoch, opt, num_epochs) / opt["lr"], done - 1)


def learning_rate(epoch: int, opt: dict, num_epochs: int) -> float:
    """Return the learning rate of an epoch, counted from 0.

    It rises linearly to ``lr`` over ``warmup_epochs``, then falls to ``target_lr`` in the last epoch: along half a
    cosine, or by equal factors every ``step_size`` epochs. If ``gamma`` is given, it is the factor of a step and
    ``target_lr`` is not used. If the warm-up takes all epochs, the last one has ``lr``. Epochs beyond the last one have
    its rate. ``opt`` is that section of the config.
    """
    warmup = min(opt["warmup_epochs"], num_epochs - 1)
    if epoch < warmup:
        return opt["lr"] * (epoch + 1) / (warmup + 1)
    last = num_epochs - 1 - warmup
    now = min(epoch - warmup, last)
    if opt["scheduler"] == "step":
        gamma, steps = opt["gamma"], last // opt["step_size"]
        if gamma is None:  # the published (target_lr / lr) ** (step_size / num_epochs) would end a step above target_lr
            gamma = (opt["target_lr"] / opt["lr"]) ** (1 / steps) if steps else 1.0
        return opt["lr"] * gamma ** (now // opt["step_size"])
    fall = (1 - math.cos(math.pi * now / last)) / 2 if last else 0.0
    return opt["lr"] + fall * (opt["target_lr"] - opt["lr"])
