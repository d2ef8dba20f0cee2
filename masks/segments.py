"""Candidate masks without any trained network: a classical over-segmentation whose regions are merged step by step.

After Selective Search (Uijlings et al., IJCV 2013): Felzenszwalb and Huttenlocher's graph segmentation gives small
regions; the two neighbours that fit best are merged until one is left; every region on the way is a candidate. It
knows nothing of objects, so its candidates are many and its scores weak: a classifier has to choose among them.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import sobel
from skimage.segmentation import felzenszwalb
from torchvision.ops import box_convert, nms

from masks.mask_files import mask_record, tight_box

SAME_IOU = 0.85 - 1e-9  # non-maximum suppression of candidates, by their boxes


SETTINGS = {  # as masks_info.json keeps them
    "scales": [50.0, 150.0],  # of the over-segmentations: larger ones give larger regions, candidates of all are kept
    "sigma": 0.8,  # of the blur before the over-segmentation, pixels
    "min_size": 30,  # of its regions, pixels
    # weights of colour, size and fill in the distance of two regions; candidates of both ways of merging are kept
    "merging": [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
    "min_area": 0.01,  # of a candidate, share of the image
    "max_area": 0.8,
    "max_masks": 40,  # of an image, those of the highest score
}


def segment_image(image: np.ndarray, settings: Mapping[str, Any] = SETTINGS) -> list[dict[str, Any]]:
    """Return the candidates of an image (H, W, 3) uint8 RGB, the highest score first, as records of SAM's generator.

    ``predicted_iou`` and ``stability_score`` are both the score of `boundary_score`; neither is a prediction.
    """
    lab, masks = rgb2lab(image), []
    for scale in settings["scales"]:
        labels = felzenszwalb(image, scale, settings["sigma"], settings["min_size"], channel_axis=-1)
        for weights in settings["merging"]:
            regions = merged_regions(labels, lab, weights)
            masks += [mask for mask in regions if settings["min_area"] <= mask.mean() <= settings["max_area"]]
    edges = edge_strength(lab)
    scores = [boundary_score(mask, edges) for mask in masks]
    boxes = torch.tensor([tight_box(mask) for mask in masks], dtype=torch.float64).reshape(-1, 4)
    distinct = nms(box_convert(boxes, "xywh", "xyxy"), torch.tensor(scores, dtype=torch.float64), SAME_IOU)
    return [
        mask_record(
            masks[row], predicted_iou=scores[row], stability_score=scores[row], point_coords=[middle(masks[row])]
        )
        for row in distinct[: settings["max_masks"]].tolist()
    ]


# --- regions ------------------------------------------------------------------------------------------------------


class Regions:
    """The regions of a segmentation while they are merged."""

    def __init__(self, labels: np.ndarray, lab: np.ndarray, weights: Sequence[float]) -> None:
        """Take (H, W) int labels from 0, (H, W, 3) colours, and the weights of colour, size and fill."""
        count = int(labels.max()) + 1
        self.pixels, self.weights = labels.size, weights
        self.masks = {region: labels == region for region in range(count)}  # those that are not merged yet
        self.areas = [float(mask.sum()) for mask in self.masks.values()]
        self.colours = [lab[mask].mean(0) for mask in self.masks.values()]
        self.bounds = [(rows.start, columns.start, rows.stop, columns.stop)
                       for rows, columns in ndimage.find_objects(labels + 1)]  # fmt: skip
        self.neighbours = touching(labels, count)

    def distance(self, first: int, second: int) -> float:
        """Return the dissimilarity of two regions: colour difference, joint size, and unfilled part of their box."""
        colour = float(np.linalg.norm(self.colours[first] - self.colours[second])) / 100
        size = self.areas[first] + self.areas[second]
        top, left, bottom, right = self.joint_bounds(first, second)
        parts = colour, size / self.pixels, ((bottom - top) * (right - left) - size) / self.pixels
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))

    def joint_bounds(self, first: int, second: int) -> tuple[int, int, int, int]:
        """Return (top, left, bottom, right) of two regions together."""
        a, b = self.bounds[first], self.bounds[second]
        return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])

    def merge(self, first: int, second: int) -> int:
        """Put two regions together; return the number of the new one."""
        new, area = len(self.areas), self.areas[first] + self.areas[second]
        colour = (self.areas[first] * self.colours[first] + self.areas[second] * self.colours[second]) / area
        self.areas.append(area)
        self.colours.append(colour)
        self.bounds.append(self.joint_bounds(first, second))
        self.masks[new] = self.masks.pop(first) | self.masks.pop(second)
        self.neighbours.append((self.neighbours[first] | self.neighbours[second]) - {first, second})
        for near in self.neighbours[new]:
            self.neighbours[near] = self.neighbours[near] - {first, second} | {new}
        return new


def merged_regions(labels: np.ndarray, lab: np.ndarray, weights: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield the masks (H, W) bool of all `Regions`, and of all that arise while they are merged."""
    regions = Regions(labels, lab, weights)
    yield from list(regions.masks.values())
    pairs = [(a, b) for a, near in enumerate(regions.neighbours) for b in near if a < b]
    queue = [(regions.distance(*pair), *pair) for pair in pairs]
    heapq.heapify(queue)
    while queue:
        _, first, second = heapq.heappop(queue)
        if first in regions.masks and second in regions.masks:
            new = regions.merge(first, second)
            for near in regions.neighbours[new]:
                heapq.heappush(queue, (regions.distance(near, new), near, new))
            yield regions.masks[new]


def touching(labels: np.ndarray, count: int) -> list[set[int]]:
    """Return for each of ``count`` regions which ones share an edge of two pixels with it."""
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        for first, second in np.unique(np.stack([a[a != b], b[a != b]], axis=1), axis=0).tolist():
            neighbours[first].add(second)
            neighbours[second].add(first)
    return neighbours


# --- candidates ---------------------------------------------------------------------------------------------------


def edge_strength(lab: np.ndarray) -> np.ndarray:
    """Return how fast the colour changes at each pixel, (H, W), over the largest change in the image, in [0, 1]."""
    edges = np.sqrt(sum(sobel(ndimage.gaussian_filter(lab[..., channel], 0.7)) ** 2 for channel in range(3)))
    return edges / max(float(edges.max()), 1e-9)


def boundary_score(mask: np.ndarray, edges: np.ndarray) -> float:
    """Return the mean edge strength along a mask's boundary times the square root of its share of the image."""
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    boundary = np.zeros_like(mask)
    boundary[1:] |= down
    boundary[:-1] |= down
    boundary[:, 1:] |= right
    boundary[:, :-1] |= right
    return float(edges[boundary].mean() * np.sqrt(mask.mean())) if boundary.any() else 0.0


def middle(mask: np.ndarray) -> list[float]:
    """Return x, y of the pixel of a mask (H, W) bool that is nearest to the mean of all its pixels."""
    points = np.argwhere(mask)
    row, column = points[np.abs(points - points.mean(0)).sum(1).argmin()].tolist()
    return [float(column), float(row)]
