"""Print images/s of one prompt an image over SAM's automatic masks: same network, random weights, alternated rounds.

python benchmarks/prompt_speed.py [small|vit_b|vit_l|vit_h] [cpu|cuda] [points a side]
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from mask_speed import SIZES, build_images, build_network
from masks.mask_generator import MaskGenerator
from masks.sam_prompts import PromptedMasks
from utils import environment

ROUNDS, IMAGES = 3, 2
PROMPT = {"box": True, "points": 3, "background": 3, "threshold": 0.3}
PROMPT |= {"upsample": 4, "choose": "heaviest", "size_factor": 1.0}


def main(model: str = "small", device: str = "cpu", points: str = "10") -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    sam = build_network({"model": model, "device": device})
    images, maps = build_images(IMAGES, SIZES), [np.random.default_rng(n).random((37, 49)) for n in range(IMAGES)]
    automatic = MaskGenerator(sam, points_per_side=int(points), stability_score_thresh=0.5)
    prompted = PromptedMasks(sam, **PROMPT)
    prompted.generate(images[:1], maps[:1])  # warms up
    work = (lambda: automatic.generate(images), lambda: prompted.generate(images, maps))
    times = np.array([[seconds(one) for one in work] for _ in range(ROUNDS)])
    ratios = times[:, 0] / times[:, 1]
    automatic_rate, prompted_rate = IMAGES / np.median(times, axis=0)
    print(f"{model} on {device}, {points} points a side: automatic {automatic_rate:.2f} images/s, prompted "
          f"{prompted_rate:.2f}, ratio {np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f}), "
          f"{ROUNDS} rounds; {environment()['gpu'] or environment()['processor']}")  # fmt: skip


def seconds(work) -> float:
    """Return the seconds that ``work()`` takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
