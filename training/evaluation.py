"""Accuracy of a classifier: log-probabilities in several test views and their average."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from training.distributed import all_rows
from transforms import normalize
from utils import autocast, memory_errors

AVERAGE = "average"  # of the softmax over all views


@torch.inference_mode()
def predict(
    networks: Mapping[str, nn.Module],
    loader: DataLoader,
    view_names: Sequence[str],
    device: torch.device,
    amp: str = "none",
    normalize: Callable[[torch.Tensor], torch.Tensor] = normalize,
) -> tuple[dict[str, dict[str, torch.Tensor]], torch.Tensor]:
    """Return the log-probabilities by network and view, each (N, K) on the CPU, and the labels (N,).

    With several views the mean of their probabilities is added as ``average``. Each of several processes evaluates
    its own shard and gets the results of all.

    Args:
        networks: map (B, 3, H, W) normalised images to (B, K) logits; left in eval mode.
        loader: yields a tuple of views, each (B, 3, H, W) uint8, and labels (B,).
        amp: precision of the forward passes on CUDA: none | bf16 | fp16.
    """
    for network in networks.values():
        network.eval()
    log_probs, labels = {name: {view: [] for view in view_names} for name in networks}, []
    for batch, batch_labels in loader:
        for view, images in zip(view_names, batch, strict=True):
            what = f"view {view}, {len(images)} images of {images.shape[-1]} pixels"
            with memory_errors(what, "lower eval.batch_size or eval.size"):
                pixels = normalize(images.to(device, non_blocking=True))
                for name, network in networks.items():
                    with autocast(device, amp):
                        logits = network(pixels)
                    log_probs[name][view].append(logits.float().log_softmax(1))
        labels.append(batch_labels)
    for by_view in log_probs.values():
        for view, parts in by_view.items():
            by_view[view] = all_rows(torch.cat(parts).cpu())
        if len(by_view) > 1:
            by_view[AVERAGE] = average(by_view.values())
    return log_probs, all_rows(torch.cat(labels))


def average(log_probs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of the mean of probabilities that are given by their logarithms."""
    stacked = torch.stack(list(log_probs))
    return stacked.logsumexp(0) - math.log(len(stacked))


def loss_and_top1(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return mean cross-entropy (no label smoothing) and accuracy, both over images; (N, K) and (N,)."""
    loss = nn.functional.nll_loss(log_probs, labels)
    return float(loss), float((log_probs.argmax(1) == labels).float().mean())
