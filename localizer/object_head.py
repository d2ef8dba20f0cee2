"""Boxes without labels from many images at once: a linear classifier learns from attention maps where the object is.

A single attention map also marks branches and leaves. Over many images only the object comes back, so a linear
classifier on the frozen features of an ImageNet network cannot learn the rest: it is fitted to the pseudo masks of the
training images' attention maps, then several times to the masks that it finds itself. The idea of PSOL (Zhang, Cao and
Wu, CVPR 2020), cell by cell in place of a regressed box. No box and no class label of the data set is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from localized_crops import map_boxes
from localized_crops.files import UserError
from localizer.attention_maps import load_batches, plan_batches
from localizer.networks import Localizer, create_network, input_of, state_hash
from models import fit_linear, timm_name
from readers.data_set import DataSet

OBJECT = 0.5  # a cell of at least this probability is object: the classifier's decision boundary
CELLS_PER_IMAGE = 120  # sampled from each training image: neighbouring cells are redundant
L2 = 6e-3  # of the classifier, on standardised features
BATCH = 8  # images of one shape


class ObjectHead(NamedTuple):
    """The linear classifier of cells; with its network it finds the object in any image."""

    weight: np.ndarray  # (D,) float64
    bias: float

    def plain(self) -> dict[str, Any]:
        """Return it as a box file and a checkpoint hold it."""
        return {"weight": self.weight.tolist(), "bias": self.bias}

    @staticmethod
    def of_plain(content: Mapping[str, Any]) -> "ObjectHead":
        """Return it from what `plain` gave."""
        return ObjectHead(np.asarray(content["weight"], dtype=np.float64), float(content["bias"]))


def build_features(model_type: str, weights: str) -> Localizer:
    """Build the convolutional network whose last two feature maps, at strides 16 and 32 for most, describe the cells.

    Args:
        weights: "hub", "random" (to test a pipeline) or a state dict's path.

    Raises:
        UserError: if the network gives no such maps, or the weights do not fit.
    """
    model = create_network(model_type, weights, "dino.object_model", "dino.object_weights")
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"dino.object_model={model_type}: gives no feature maps; take an EfficientNet or a ResNet")
    stride = max(level["reduction"] for level in model.feature_info)
    name, patch = timm_name(model_type), (stride, stride)
    return Localizer(model.eval(), name, weights, state_hash(model), patch=patch, **input_of(model))


def learn_head(
    network: Localizer,
    data: DataSet,
    attention: Mapping[int | str, np.ndarray],
    settings: Mapping[str, Any],
    num_workers: int,
) -> ObjectHead:
    """Return the classifier that the attention maps of the training images teach.

    Args:
        network: of `build_features`.
        data: the data set; test images teach nothing.
        attention: image id -> cleaned attention map; a blank one teaches nothing.
        settings: the section ``dino`` of the config. The training images are evenly spread, at most ``object_images``;
            ``threshold`` cuts the components that teach the first classifier.

    Raises:
        UserError: if no training image has a map that points anywhere.
    """
    teachers = [row for row in np.flatnonzero(data.split != "test").tolist()
                if not map_boxes.is_blank(attention[data.ids[row]])]  # fmt: skip
    if not teachers:
        raise UserError(f"{data.root}: no training image whose attention map points anywhere; see dino.model")
    teachers = np.array(teachers[:: -(-len(teachers) // settings["object_images"])])
    paths, sizes, side = data.paths[teachers], data.image_sizes[teachers], settings["object_image_size"]
    cells = _features(network, paths, sizes, side, num_workers)
    cells = tqdm(cells, total=len(teachers), desc="teach", unit=" images", mininterval=1.0)
    features = {int(teachers[n]): grid.astype(np.float16) for n, grid, error in cells if error is None}
    if not features:
        raise UserError(f"{data.root}: none of the training images can be read any more")
    masks = {
        row: attention_mask(attention[data.ids[row]], grid.shape[:2], settings["threshold"])
        for row, grid in features.items()
    }
    return teach(features, masks, settings["object_rounds"])


def find_objects(
    network: Localizer,
    head: ObjectHead,
    paths: Sequence[Path],
    image_sizes: np.ndarray,
    settings: Mapping[str, Any],
    num_workers: int,
) -> Iterator[tuple[int, map_boxes.MapBox, str | None]]:
    """Yield the row of each image, its box, and why it could not be read (None: it was); in batches of one shape.

    Args:
        network: of `build_features`.
        head: of `learn_head`, with the same network and ``object_image_size``.
        image_sizes: (N, 2) width height.
        settings: the section ``dino`` of the config.
    """
    for row, grid, error in _features(network, paths, image_sizes, settings["object_image_size"], num_workers):
        size = tuple(image_sizes[row].tolist())
        if error is None:
            yield row, object_box(object_map(grid, head), size, upsample=settings["upsample"]), None
        else:
            yield row, map_boxes.MapBox(0, 0, *size, found=False), error


def attention_mask(attention_map: np.ndarray, grid: tuple[int, int], threshold: float) -> np.ndarray:
    """Return the heaviest component of a map stretched to ``grid`` (feat_h, feat_w), bool."""
    cells = torch.from_numpy(np.asarray(attention_map, dtype=np.float32))[None, None]
    stretched = F.interpolate(cells, size=grid, mode="bilinear", antialias=True)[0, 0].double().numpy()
    return map_boxes.component_mask(map_boxes.min_max(stretched), threshold)


def teach(features: dict[int, np.ndarray], masks: dict[int, np.ndarray], rounds: int) -> ObjectHead:
    """Fit the classifier to masks, then by self-training ``rounds`` times to the masks that it predicts.

    Args:
        features: row -> (feat_h, feat_w, D).
        masks: row -> (feat_h, feat_w) bool, where the object is thought to be.
    """
    rng, drawn, places = np.random.default_rng(0), [], []
    for grid in features.values():
        cells = grid.reshape(-1, grid.shape[-1])
        places.append(rng.choice(len(cells), min(CELLS_PER_IMAGE, len(cells)), replace=False))
        drawn.append(cells[places[-1]].astype(np.float32))
    drawn = np.concatenate(drawn)
    for _ in range(rounds + 1):
        labels = np.concatenate([masks[row].ravel()[at] for row, at in zip(masks, places, strict=True)])
        weights, biases = fit_linear(drawn, labels.astype(np.int64), 2, L2)
        head = ObjectHead(weights[1] - weights[0], float(biases[1] - biases[0]))
        probabilities = {row: object_map(grid, head) for row, grid in features.items()}
        masks = {
            row: map_boxes.component_mask(cells, min(OBJECT, 0.8 * cells.max())) for row, cells in probabilities.items()
        }
    return head


def object_map(features: np.ndarray, head: ObjectHead) -> np.ndarray:
    """Return the probability of "object" of each cell, (feat_h, feat_w) float64; features (feat_h, feat_w, D)."""
    return 1 / (1 + np.exp(-np.clip(features.astype(np.float64) @ head.weight + head.bias, -50, 50)))


def object_box(probability: np.ndarray, image_size: tuple[int, int], *, upsample: int) -> map_boxes.MapBox:
    """Return the box of an object map: of its heaviest component, as the classifier's own masks are chosen."""
    return map_boxes.component_box(probability, image_size, threshold=min(OBJECT, probability.max()), upsample=upsample)


def _features(
    network: Localizer, paths: Sequence[Path], image_sizes: np.ndarray, side: int, num_workers: int
) -> Iterator[tuple[int, np.ndarray, str | None]]:
    """Yield (row, features (feat_h, feat_w, D) float32, why the image could not be read) in batches of a shape."""
    batches = plan_batches(image_sizes, side, network.patch, BATCH)
    for batch, images, errors in load_batches(network, batches, paths, num_workers):
        yield from zip(batch.rows, cell_features(network, images), errors, strict=True)


@torch.inference_mode()
def cell_features(network: Localizer, images: torch.Tensor) -> np.ndarray:
    """Return the features of images (B, 3, H, W) uint8: (B, feat_h, feat_w, D) float32, on the finer of two grids."""
    images = network.normalize(images)
    fine, coarse = network.model.forward_intermediates(images, indices=2, intermediates_only=True)
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
    return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).float().cpu().numpy()
