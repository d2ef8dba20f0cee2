"""Print images/s of one prompt an image over SAM's automatic masks: same network, random weights, alternated rounds.

python benchmarks/prompt_speed.py [tiny|small|vit_b|vit_l|vit_h] [cpu|cuda] [points a side]
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from segment_anything.modeling import Sam

from mask_speed import build_network
from masks.mask_generator import MaskGenerator
from masks.sam_prompts import PromptedMasks
from measuring import build_images, timed_on
from utils import environment

ROUNDS, IMAGES = 3, 2
PROMPT = {"box": True, "points": 3, "background": 3, "threshold": 0.3}
PROMPT |= {"upsample": 4, "choose": "heaviest", "size_factor": 1.0}


def main(model: str = "small", device: str = "cpu", points: str = "10") -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    sam = build_network({"model": model, "device": device})
    times = measure(sam, device, int(points), IMAGES, ROUNDS)
    ratios = times[:, 0] / times[:, 1]
    automatic_rate, prompted_rate = IMAGES / np.median(times, axis=0)
    print(f"{model} on {device}, {points} points a side: automatic {automatic_rate:.2f} images/s, prompted "
          f"{prompted_rate:.2f}, ratio {np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f}), "
          f"{ROUNDS} rounds; {environment()['gpu'] or environment()['processor']}")  # fmt: skip


def measure(sam: Sam, device: str, points: int, count: int, rounds: int, **own: object) -> np.ndarray:
    """Return the seconds (rounds, 2) of automatic and prompted masks of ``count`` images; ``own``: settings of ours."""
    images, maps = build_images(count), [np.random.default_rng(n).random((37, 49)) for n in range(count)]
    automatic = MaskGenerator(sam, points_per_side=points, stability_score_thresh=0.5, **own)
    prompted = PromptedMasks(sam, str(own.get("precision", "float32")), **PROMPT)
    prompted.generate(images[0], maps[0])  # warms up
    work = (lambda: automatic.generate(images), lambda: list(map(prompted.generate, images, maps)))
    return np.array([[timed_on(device, one, time.perf_counter) for one in work] for _ in range(rounds)])


if __name__ == "__main__":
    main(*sys.argv[1:])
