"""Print how good boxes are that TokenCut finds on the keys of the last block, beside those of the attention map.

TokenCut (Wang et al., CVPR 2022): patches are the nodes of a graph, joined where the cosine similarity of their keys
exceeds tau; the second smallest generalised eigenvector of the graph cuts it in two; the connected component that holds
the strongest patch of its part is the object. The rows "centred keys" subtract each image's mean key first. Training
images only, as tau is chosen here.

    python benchmarks/tokencut.py                                        # ToyBirds, built-in localizer
    python benchmarks/tokencut.py preset=photos_dino dataset.name=cub dataset.root=FOLDER dino.weights=VIT.safetensors
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.linalg import eigh

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import load_config
from datasets import read_dataset
from figures.box_report import score_boxes
from localized_crops.attention import cls_attention
from localized_crops.boxes import center_boxes
from localizer.attention_maps import BatchImages, clean, map_to_box, plan_batches
from localizer.networks import build_localizer

IMAGES, TAUS = 150, (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)


def main(words: list[str]) -> None:
    """Print a line per method."""
    config = load_config(words)
    data, localizer = (
        read_dataset(**config["dataset"]),
        build_localizer(config["dino"]["model"], config["dino"]["weights"]),
    )
    rows = data.rows("train")[:: max(1, len(data.rows("train")) // IMAGES)][:IMAGES]
    side = config["dino"]["image_size"] or localizer.image_size
    found: dict[str, list] = {}
    for row in rows:
        size = data.image_sizes[row]
        (batch,) = plan_batches(size[None], side, localizer.patch, 1)
        pixels = torch.from_numpy(
            BatchImages([batch], [[]], localizer.patch, False).read(data.paths[row], batch).copy()
        )
        images = localizer.normalize(pixels.permute(2, 0, 1)[None])
        attn, keys = cls_attention(localizer.model, images, return_keys=True)
        box = map_to_box(clean(attn[0].numpy(), config["dino"]), tuple(size.tolist()), config["dino"])
        found.setdefault("attention, component", []).append(box.xywh)
        flat = keys[0].permute(1, 2, 0, 3).flatten(2).numpy()  # (feat_h, feat_w, heads * head_dim)
        for name, vectors in (("keys", flat), ("centred keys", flat - flat.mean((0, 1)))):
            for tau in TAUS:
                found.setdefault(f"TokenCut, {name}, tau {tau}", []).append(tokencut_box(vectors, size, tau))
    found["centred box"] = center_boxes(data.image_sizes[rows])
    for name, boxes in found.items():
        score = score_boxes(np.array(boxes), data.boxes[rows], data.image_sizes[rows])
        print(f"{name}: mean IoU {score['mean_iou']:.3f}, coverage {score['coverage']:.3f}, IoU >= .5 for "
              f"{score['iou_at']['0.5']:.2f}, {len(rows)} training images")  # fmt: skip


def tokencut_box(keys: np.ndarray, image_size: np.ndarray, tau: float) -> tuple[float, float, float, float]:
    """Return the box x y width height, pixels, of TokenCut on keys (feat_h, feat_w, D)."""
    feat_h, feat_w, _ = keys.shape
    vectors = keys.reshape(feat_h * feat_w, -1)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    edges = np.where(vectors @ vectors.T > tau, 1.0, 1e-5)
    degrees = np.diag(edges.sum(1))
    _, eigen = eigh(degrees - edges, degrees, subset_by_index=[1, 1])
    second = eigen[:, 0]
    seed = np.abs(second).argmax()
    part = second > second.mean()
    if not part[seed]:
        part = ~part
    labels, _ = ndimage.label(part.reshape(feat_h, feat_w))
    rows, columns = np.nonzero(labels == labels.flat[seed])
    cell = np.asarray(image_size) / (feat_w, feat_h)
    near = np.array([columns.min(), rows.min()]) * cell
    far = np.array([columns.max() + 1, rows.max() + 1]) * cell
    return (*near, *(far - near))


if __name__ == "__main__":
    main(sys.argv[1:])
