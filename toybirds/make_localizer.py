"""Train the small ViT whose attention gives ToyBirds its pseudo boxes, and write toybirds/toy_localizer.pt.

A stand-in for DINO, which draws its attention from photographs without any label: this network is supervised by drawn
masks. Its mean CLS attention over the heads of the last block learns to match, cell by cell, where the bird was drawn
(Kullback-Leibler divergence), on birds of other seeds and of random colours, none of the data set. So it shows what
boxes from a good attention map do for a classifier; it shows nothing about learning without labels.

Reads nothing. Writes the weights (float16, under 1 MB) with how they were made. About 2 minutes on one core.

    python -m toybirds.make_localizer out=toybirds/toy_localizer.pt
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from timm.utils import AttentionExtract
from torch import nn
from tqdm import tqdm

from config import load_config
from jobs.guard import run_script
from jobs.machine import seed_everything, set_up_cpu
from localized_crops.files import check_output
from toybirds import drawing
from toybirds.network import build_toy_vit
from transforms import normalize
from utils import environment, save_tensors

ARCHITECTURE = {"image_size": 80, "stride": 8, "width": 96, "depth": 2, "heads": 3}
NUM_IMAGES = 4000
STREAM = 20_011  # first number of the drawings' seeds; the data set's start with its own small seed
EPOCHS, BATCH_SIZE, LR, WARMUP = 6, 16, 3e-3, 0.1
OURS = rb"make_(toy_)?localizer"  # what the file says of itself, the latter of an earlier version
COLOR_RANGE = (50, 230)  # of the random palettes, RGB


def main(config: dict) -> None:
    """Draw, train, save."""
    out, seed = Path(config["out"] or "toybirds/toy_localizer.pt"), config["seed"]
    check_output(out, OURS)
    set_up_cpu(config["num_threads"])
    seed_everything(seed, config["deterministic"])
    images, masks = draw_images(NUM_IMAGES, ARCHITECTURE["image_size"], seed)
    start = time.perf_counter()
    model = build_toy_vit(**ARCHITECTURE)
    loss = train(model, images, mask_to_density(masks, ARCHITECTURE["stride"]), epochs=EPOCHS)
    about = {
        "architecture": ARCHITECTURE,
        "made_by": "python -m toybirds.make_localizer",
        "supervision": "drawn masks: the mean CLS attention learnt to match the bird's mask; a stand-in for DINO",
        "data": f"{NUM_IMAGES} drawings of toybirds.py version {drawing.VERSION}, random palettes, seeds of their own",
        "toybirds_version": drawing.VERSION,
        "seed": seed,
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "divergence": loss,
        "training_seconds": time.perf_counter() - start,
        "torch": environment()["torch"],
    }
    save_localizer(out, model, about)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, divergence {loss:.3f} nats at the end")


def draw_images(count: int, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw birds in random colours, each from its own seed.

    Returns:
        images (N, 3, side, side) uint8 and masks (N, side, side) float32, the bird's share of each pixel; both are
        squeezed to a square.
    """
    images, masks = [], []
    for number in tqdm(range(count), desc="drawing", unit=" images", mininterval=1.0):
        rng = np.random.default_rng([STREAM, seed, number])
        bird = drawing.draw_toybird(rng, number % len(drawing.CLASS_NAMES), palette=random_palette(rng))
        mask = PIL.Image.fromarray(bird.mask.astype(np.float32))
        images.append(np.asarray(bird.image.resize((side, side), PIL.Image.Resampling.BICUBIC)))
        masks.append(np.asarray(mask.resize((side, side), PIL.Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks))


def random_palette(rng: np.random.Generator) -> drawing.Palette:
    """Return a palette of random colours, as many of each kind as the data set's own has."""
    colors = (rng.integers(*COLOR_RANGE, np.shape(own)).tolist() for own in drawing.PALETTE)
    return drawing.Palette(*colors)


def mask_to_density(masks: torch.Tensor, stride: int) -> torch.Tensor:
    """Return what the attention shall be, (N, cells, cells), each summing to 1.

    The root of the bird's share of a cell: a beak or a tail that fills little of its cell decides the box.
    """
    shares = nn.functional.avg_pool2d(masks[:, None], stride)[:, 0].sqrt()
    return shares / shares.sum((1, 2), keepdim=True)


def train(model: nn.Module, images: torch.Tensor, densities: torch.Tensor, *, epochs: int) -> float:
    """Train the attention of ``model`` in place; return the mean divergence (nats) over the last epoch.

    ``images`` are (N, 3, H, W) uint8, ``densities`` (N, feat_h, feat_w).
    """
    steps = epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=WARMUP)
    attention = _attention_with_gradient(model)
    losses = []
    for _ in tqdm(range(steps), desc="training", unit=" steps", mininterval=1.0):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        batch, expected = normalize(images[rows]), densities[rows]
        mirrored = torch.rand(BATCH_SIZE) < 0.5
        batch[mirrored], expected[mirrored] = batch[mirrored].flip(-1), expected[mirrored].flip(-1)
        loss = divergence(attention(batch), expected)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return float(np.mean(losses[-(steps // epochs) :]))


def _attention_with_gradient(model: nn.Module):
    """Return a function from images to the mean CLS row over the heads, (B, cells), with gradient."""
    last = len(model.blocks) - 1
    model.blocks[last].attn.fused_attn = False  # fused attention makes no matrix
    name = f"blocks.{last}.attn.attn_drop"
    extract = AttentionExtract(model, names=[name], mode="train", method="hook")
    return lambda images: extract(images)[name][:, :, 0, model.num_prefix_tokens :].mean(1)


def divergence(attention: torch.Tensor, densities: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(density || attention) in nats; what CLS gives itself is lost mass and counts against it."""
    expected = densities.flatten(1)
    return (torch.xlogy(expected, expected) - expected * (attention + 1e-8).log()).sum(1).mean()


def save_localizer(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write the weights in float16 (counters unchanged) with their description."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"model": state, "about": description})


if __name__ == "__main__":
    run_script(main, load_config)
