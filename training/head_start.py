"""A classifier layer that starts as a linear probe of the backbone's features."""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from training.distributed import rank, shares_of_all
from training.run import Run
from transforms import flip_images

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
    features, labels = (torch.cat(shares_of_all(torch.cat(mine))).numpy() for mine in (features, labels))
    weights, biases = models.fit_linear(features, labels, len(run.class_names), PENALTY)
    for network in (run.model, run.ema.module):
        head = models.head_of(network)
        with torch.no_grad():
            head.weight[: len(weights)].copy_(torch.from_numpy(weights))
            head.bias[: len(biases)].copy_(torch.from_numpy(biases))
