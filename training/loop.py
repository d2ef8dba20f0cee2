"""One epoch: training steps, validation, what is logged; and the classifier layer that a probe starts."""

import contextlib
import math
import time

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from figures.plots import draw_curves
from localized_crops.files import UserError
from training.batches import Batch
from training.distributed import all_rows, rank, world_size
from training.evaluation import loss_and_top1
from training.log import save_log
from training.run import Run, save_run
from transforms import flip_images
from utils import autocast, memory_errors

PENALTY = 0.03  # on squared weights for standardised features; 0.003 to 0.1 give about the same accuracy on photographs


def start_head_as_probe(run: Run, loader: DataLoader) -> None:
    """Set the classifier layer of model and EMA to a linear classifier of the features of the first epoch's crops.

    Linear probing before fine-tuning (LP-FT: Kumar et al., "Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution", ICLR 2022): a random head would first spoil the features that it learns from.
    """
    run.model.eval()
    features, labels = [], []
    for batch in tqdm(loader, desc="linear probe", leave=False, disable=True if rank() else None):
        images, flips = (values[: batch.real].to(run.device) for values in (batch.images, batch.flips))
        with torch.no_grad():
            pixels = run.normalize(flip_images(images, flips))
            features.append(models.features_of(run.model, pixels)[0].float().cpu())
        labels.append(batch.labels[: batch.real])
    inputs, targets = (all_rows(torch.cat(parts)).numpy() for parts in (features, labels))
    weights, biases = models.fit_linear(inputs, targets, len(run.class_names), PENALTY)
    for network in run.networks.values():
        head = models.head_of(network)
        with torch.no_grad():
            head.weight[: len(weights)].copy_(torch.from_numpy(weights))
            head.bias[: len(biases)].copy_(torch.from_numpy(biases))


def train_and_log_epoch(run: Run, train_loader: DataLoader, val_loader: DataLoader) -> None:
    """Train one epoch; every ``log_interval`` epochs validate, log and draw; save."""
    train_loader.sampler.epoch = run.epoch
    lr, start = run.scheduler.get_last_lr()[0], time.perf_counter()
    record = {"epoch": run.epoch + 1, **train_one_epoch(run, train_loader), "lr": lr}
    record["seconds"] = time.perf_counter() - start
    record["images_per_second"] = len(train_loader.dataset) / record["seconds"]
    check_finite(record, "train_loss")
    run.scheduler.step()
    run.epoch += 1
    is_best = False
    if run.epoch % run.config["log_interval"] == 0 or run.epoch == run.config["num_epochs"]:
        is_best = validate_and_log(run, record, val_loader)
    if run.config["save"] and rank() == 0:
        save_run(run, is_best)


def out_of_patience(records: list[dict], patience: int | None) -> bool:
    """Return whether none of the last ``patience`` validations was better than the best one before; a tie is not.

    Of model and EMA the higher top-1 counts. ``patience`` None: there is no limit.
    """
    if patience is None or len(records) <= patience:
        return False
    top1 = [max(record["top1"], record["ema_top1"]) for record in records]
    return max(top1[-patience:]) <= max(top1[:-patience])


def check_finite(record: dict, key: str) -> None:
    """Raise UserError if a loss is no longer a number."""
    if not math.isfinite(record[key]):
        raise UserError(f"epoch {record['epoch']}: {key} is {record[key]}; lower opt.lr (now {record['lr']:.3g})")


def train_one_epoch(run: Run, loader: DataLoader) -> dict[str, float]:
    """Update the model once over ``loader``; return loss, accuracy and maIoU as means over images."""
    config, freeze_from = run.config, run.config["model"]["freeze_bn_from"]
    models.train_mode(run.model, freeze_bn=freeze_from is not None and run.epoch >= freeze_from)
    if world_size() > 1:  # each process draws other numbers, by the epoch so that a resumed run draws the same
        torch.manual_seed(int(np.random.SeedSequence([config["seed"], run.epoch, rank()]).generate_state(1)[0]))
    # sums stay on the device: summed loss, right answers
    sums, seen, kept, boxed = torch.zeros(2, device=run.device), 0, 0.0, 0
    disable = True if rank() else None  # None: the bar is shown on a terminal only
    bar = tqdm(loader, desc=f"epoch {run.epoch + 1}/{config['num_epochs']}", leave=False, disable=disable)
    for number, batch in enumerate(bar, 1):
        is_last_part = number % config["opt"]["accumulate"] == 0
        what = f"training, {len(batch.images)} images of image_size={config['image_size']}"
        with memory_errors(what, "lower image_size or batch_size, or raise opt.accumulate"):
            sums += backward(run, batch, is_last_part)
        covered = batch.coverage[: batch.real]
        seen, kept, boxed = seen + batch.real, kept + float(covered.nansum()), boxed + int((~covered.isnan()).sum())
        if is_last_part:
            update(run)
            run.begin()
        if number % 20 == 0 and not bar.disable:  # reading the sums waits for the device
            rate = seen / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"loss {sums[0] / seen:.3f}, top-1 {sums[1] / seen:.1%}, {rate:.0f} images/s")
    mine = torch.cat([sums.cpu(), torch.tensor([seen, kept, boxed])]).double()
    loss, right, seen, kept, boxed = all_rows(mine[None]).sum(0).tolist()
    return {"train_loss": loss / seen, "train_top1": right / seen, "maiou": kept / boxed}


def backward(run: Run, batch: Batch, is_last_part: bool) -> torch.Tensor:
    """Add the gradient of the batch's share of the mean loss of the step; return (summed loss, right answers).

    Processes exchange their gradients with the last part of a step only.
    """
    parts = (batch.images, batch.labels, batch.flips)
    images, labels, flips = (part.to(run.device, non_blocking=True) for part in parts)
    labels = labels[: batch.real]
    keeps_gradients = isinstance(run.net, DistributedDataParallel) and not is_last_part
    with run.net.no_sync() if keeps_gradients else contextlib.nullcontext():
        with autocast(run.device, run.config["amp"]):
            logits = run.net(run.normalize(flip_images(images, flips)))[: batch.real]
            smoothing = run.config["other"]["label_smoothing"]
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        # DistributedDataParallel takes the mean of the processes' gradients
        run.scaler.scale(loss * (world_size() / batch.whole)).backward()
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == labels).sum()])


def update(run: Run) -> None:
    """Take one optimizer step and, every ``model.ema_step`` of them, update the EMA."""
    clip = run.config["opt"]["clip"]
    if clip is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.step % run.config["model"]["ema_step"] == 0:
        run.ema.update_parameters(run.model)


def validate_and_log(run: Run, record: dict, loader: DataLoader) -> bool:
    """Validate model and EMA, log and draw; return whether the better of the two is the best so far."""
    for network in run.networks.values():
        if world_size() > 1:  # BatchNorm's statistics differ between processes without model.sync_bn
            distribute_bn(network, world_size(), reduce=False)
    log_probs, labels = run.predict(loader, ["first"])
    for which, prefix in (("model", ""), ("ema", "ema_")):
        record[f"{prefix}loss"], record[f"{prefix}top1"] = loss_and_top1(log_probs[which]["first"], labels)
        check_finite(record, f"{prefix}loss")
    run.records.append(record)
    if rank() == 0:
        save_log(run.folder / "log.jsonl", run.records)
        draw_curves(run.records, run.folder / "curves.png")
    if run.wandb is not None:
        run.wandb.log(record, step=record["epoch"])
    print(
        f"epoch {record['epoch']:3d}/{run.config['num_epochs']}  train {record['train_loss']:.3f}  "
        f"val {record['loss']:.3f} top-1 {record['top1']:.1%}  EMA {record['ema_loss']:.3f} "
        f"top-1 {record['ema_top1']:.1%}  maIoU {record['maiou']:.3f}  {record['images_per_second']:.0f} images/s",
        flush=True,
    )
    run.chosen = "ema" if record["ema_top1"] >= record["top1"] else "model"
    is_best = max(record["top1"], record["ema_top1"]) >= run.best_top1  # on a tie keep the later epoch
    run.best_top1 = max(run.best_top1, record["top1"], record["ema_top1"])
    return is_best
