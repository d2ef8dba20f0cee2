"""Accuracy of a classifier: logits in several test views, their average, and the comparison of two sets of runs."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils.data import DataLoader

from training.distributed import all_rows
from transforms import normalize

AVERAGE = "average"  # of the softmax over all views
LEVEL, POWER = 0.05, 0.8  # of the tests: chance of a false alarm, and of finding the difference that is told as seen


@torch.inference_mode()
def predict(
    models: Sequence[nn.Module],
    loader: DataLoader,
    view_names: Sequence[str],
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Return for each model the log-probabilities by view, each (N, K) on the CPU, and the labels (N,).

    The images are loaded once for all models. With several views their average (of the probabilities) is added as
    ``average``. Several processes look at the rows of their own loaders and get the answers on all of them.

    Args:
        models: map (B, 3, H, W) normalised images to (B, K) logits; left in eval mode.
        loader: yields a tuple of views, each (B, 3, H, W) uint8, and labels (B,).
        view_names: of the tuple's members.
        device: where the models are.
        autocast: entered around each forward pass; None: the models' own precision.
        mean, std: of the models' input, by which the images are normalised.
    """
    for model in models:
        model.eval()
    found, labels = [[[] for _ in view_names] for _ in models], []
    for batch, batch_labels in loader:
        for number, images in enumerate(batch):
            pixels = normalize(images.to(device, non_blocking=True), mean, std)
            for model, views in zip(models, found, strict=True):
                with autocast or nullcontext():
                    logits = model(pixels)
                views[number].append(logits.float().log_softmax(1))
        labels.append(batch_labels)
    return [_by_view(views, view_names) for views in found], all_rows(torch.cat(labels))


def _by_view(views: list[list[torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    log_probs = {name: all_rows(torch.cat(parts).cpu()) for name, parts in zip(names, views, strict=True)}
    if len(log_probs) > 1:
        stacked = torch.stack(list(log_probs.values()))
        log_probs[AVERAGE] = stacked.logsumexp(0) - math.log(len(stacked))
    return log_probs


def loss_and_top1(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return mean cross-entropy (no label smoothing) and accuracy, both over images; (N, K) and (N,)."""
    loss = nn.functional.nll_loss(log_probs, labels)
    return float(loss), float((log_probs.argmax(1) == labels).float().mean())


# --- comparing two sets of runs -----------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Difference of two methods on the same test images, over paired seeds."""

    difference: float  # mean top-1 of a minus that of b, a fraction
    p_seeds: float  # paired t-test over the seeds' accuracies; nan for fewer than two
    p_images: float  # exact McNemar test over (seed, image) pairs
    only_a: int  # pairs that only a gets right
    only_b: int
    seen_seeds: float  # difference that the t-test would have found in four of five such experiments; nan as p_seeds
    seen_images: float  # the same of McNemar's test


def compare(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """Compare two methods by their (seeds, images) bool arrays of right answers.

    The t-test asks whether another set of seeds would show the difference, McNemar's test whether another set of
    images would. The latter takes the pairs as independent, which repeated seeds on the same images are not: it is
    the weaker word of the two.
    """
    a, b = correct_a.mean(1), correct_b.mean(1)
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    p_seeds = float(stats.ttest_rel(a, b).pvalue) if len(a) > 1 and np.ptp(a - b) > 0 else math.nan
    p_images = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Comparison(
        difference=float((a - b).mean()),
        p_seeds=p_seeds,
        p_images=float(p_images),
        only_a=only_a,
        only_b=only_b,
        seen_seeds=detectable(float((a - b).std(ddof=1)), len(a)) if not math.isnan(p_seeds) else math.nan,
        seen_images=float((stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)) * math.sqrt(only_a + only_b))
        / correct_a.size,
    )


def detectable(spread: float, n: int) -> float:
    """Return the mean of n paired differences that a t-test finds at LEVEL in the share POWER of experiments.

    Args:
        spread: standard deviation of the differences.
        n: how many there are, at least 2.
    """
    return float(stats.t.ppf(1 - LEVEL / 2, n - 1) + stats.t.ppf(POWER, n - 1)) * spread / math.sqrt(n)
