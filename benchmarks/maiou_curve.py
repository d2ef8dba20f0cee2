"""Print the curve maIoU(thr) of both crop modes on a data set's boxes, beside the published proxy, and its time.

Reads a folder in CUB-200-2011's format. A folder without its images has image_sizes.txt (id width height) instead.

    python benchmarks/maiou_curve.py data/CUB_200_2011
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import read_dataset
from localized_crops.boxes import clip_boxes, coverage, crops_to_xywh, maiou_curve
from localized_crops.crops import sample_crops

THRESHOLDS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


def main(folder: Path) -> None:
    """Print the table."""
    boxes, sizes = read_boxes(folder)
    columns, seconds = {}, {}
    for mode in ("reference", "exact"):
        start = time.perf_counter()
        columns[mode] = maiou_curve(boxes, sizes, THRESHOLDS, mode)
        seconds[mode] = time.perf_counter() - start
    print("| thr | reference | share under thr | exact | proxy 0.5 + 0.5 thr^0.4 |\n|---|---|---|---|---|")
    for number, thr in enumerate(THRESHOLDS):
        crops = sample_crops(boxes, sizes, thr, "reference", rng=np.random.default_rng(0))
        under = (coverage(crops_to_xywh(crops), boxes) < thr).mean()
        row = [f"{columns['reference'][number]:.3f}", f"{under:.1%}", f"{columns['exact'][number]:.3f}"]
        print(f"| {thr} | {' | '.join(row)} | {0.5 + 0.5 * thr**0.4:.3f} |")
    plain = maiou_curve(boxes, sizes, [-1.0])[0]
    theirs = torchvision_maiou(boxes[::4], sizes[::4])
    print(f"\nRandomResizedCrop, scale 0.08: {plain:.3f}; torchvision's own, every fourth box: {theirs:.3f}")
    print(f"{len(boxes)} boxes, 5 draws, {len(THRESHOLDS)} thresholds: reference {seconds['reference']:.2f} s, "
          f"exact {seconds['exact']:.2f} s, one core")  # fmt: skip


def read_boxes(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes (N, 4) x y width height of a data set, clipped, and its image sizes (N, 2) width height."""
    if (folder / "images").exists():
        data = read_dataset("cub", folder)
        return data.boxes, data.image_sizes
    sizes = np.loadtxt(folder / "image_sizes.txt")[:, 1:]
    return clip_boxes(np.loadtxt(folder / "bounding_boxes.txt")[:, 1:], sizes), sizes


def torchvision_maiou(boxes: np.ndarray, sizes: np.ndarray) -> float:
    """Return the maIoU of one crop per box (N, 4) drawn by torchvision; sizes (N, 2) width height."""
    torch.manual_seed(0)
    images = (torch.empty(3, int(height), int(width), device="meta") for width, height in sizes)
    crops = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for image in images]
    return float(coverage(crops_to_xywh(np.array(crops)), boxes).mean())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/maiou_curve.py FOLDER (in CUB-200-2011's format)")
    main(Path(sys.argv[1]))
