"""Accuracy of a classifier: log-probabilities in several test views and their average."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from training.distributed import all_rows
from transforms import normalize
from utils import autocast, memory_errors

AVERAGE = "average"  # of the softmax over all views


@torch.inference_mode()
def predict(
    models: Sequence[nn.Module],
    loader: DataLoader,
    view_names: Sequence[str],
    device: torch.device,
    amp: str = "none",
    normalize: Callable[[torch.Tensor], torch.Tensor] = normalize,
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Return for each model the log-probabilities by view, each (N, K) on the CPU, and the labels (N,).

    With several views the mean of their probabilities is added as ``average``. Each of several processes evaluates
    its own shard and gets the results of all.

    Args:
        models: map (B, 3, H, W) normalised images to (B, K) logits; left in eval mode.
        loader: yields a tuple of views, each (B, 3, H, W) uint8, and labels (B,).
        amp: precision of the forward passes on CUDA: none | bf16 | fp16.
    """
    for model in models:
        model.eval()
    log_probs, labels = [[[] for _ in view_names] for _ in models], []
    for batch, batch_labels in loader:
        for number, images in enumerate(batch):
            what = f"view {view_names[number]}, {len(images)} images of {images.shape[-1]} pixels"
            with memory_errors(what, "lower eval.batch_size or eval.size"):
                pixels = normalize(images.to(device, non_blocking=True))
                for model, views in zip(models, log_probs, strict=True):
                    with autocast(device, amp):
                        logits = model(pixels)
                    views[number].append(logits.float().log_softmax(1))
        labels.append(batch_labels)
    return [_by_view(views, view_names) for views in log_probs], all_rows(torch.cat(labels))


def _by_view(views: list[list[torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    log_probs = {name: all_rows(torch.cat(parts).cpu()) for name, parts in zip(names, views, strict=True)}
    if len(log_probs) > 1:
        log_probs[AVERAGE] = average(log_probs.values())
    return log_probs


def average(log_probs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of the mean of probabilities that are given by their logarithms."""
    stacked = torch.stack(list(log_probs))
    return stacked.logsumexp(0) - math.log(len(stacked))


def loss_and_top1(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return mean cross-entropy (no label smoothing) and accuracy, both over images; (N, K) and (N,)."""
    loss = nn.functional.nll_loss(log_probs, labels)
    return float(loss), float((log_probs.argmax(1) == labels).float().mean())
