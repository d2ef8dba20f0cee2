"""Training crops, drawn for whole epochs: held to boxes, or centred where attention is high."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from localized_crops.crops import plain_corners, random_shapes, sample_crops
from localized_crops.density import crops_around, density_points, running_sums, unnormalised_densities
from localized_crops.image_ids import ImageId, compact_ids, listed_ids

MAPS_AT_ONCE = 64  # are summed in one go
KEPT_BYTES = 2**27  # of running sums that a process keeps for the next epochs: 12,000 maps of 37 x 37 cells


@dataclass(eq=False)
class BoxCrops:
    """Crops that are held to the boxes of a data set, drawn for whole epochs."""

    boxes: np.ndarray  # (N, 4) x y width height in pixels
    image_sizes: np.ndarray  # (N, 2) width height in pixels
    thr: float  # this and the next three: see `sample_crops`
    mode: str = "exact"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    redraw: Callable[[np.random.Generator], np.ndarray] | None = None  # draws the boxes of an epoch, where several are

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the crops of one epoch, (N, 4) int64 top left height width."""
        boxes = self.boxes if self.redraw is None else self.redraw(rng)
        return sample_crops(boxes, self.image_sizes, self.thr, self.mode, self.scale, self.ratio, rng)


@dataclass(eq=False)
class MapCrops:
    """The density-map crops of a data set, drawn for whole epochs; a plain crop where an image has no map.

    A map is read, and its running sum taken, in the first epoch, and again in the later ones only where `KEPT_BYTES`
    do not hold all of them.
    """

    maps: Mapping[ImageId, np.ndarray]  # image id -> attention map (feat_h, feat_w); read when crops are drawn
    ids: np.ndarray  # (N,) image ids
    image_sizes: np.ndarray  # (N, 2) width height in pixels
    temperature: float  # this and the others: see `DinoRandomResizedCrop`
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        self.ids = compact_ids(np.asarray(self.ids))
        self._kept: dict[int, MapSums | None] = {}
        self._room = KEPT_BYTES

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the crops of one epoch, (N, 4) int64 top left height width."""
        shapes, fitted = random_shapes(self.image_sizes, self.scale, self.ratio, rng)
        uniform = rng.random((len(shapes), 3))
        left_top = plain_corners(shapes, fitted, self.image_sizes, uniform[:, 1:])  # of the images without a map
        crops = np.concatenate([left_top[:, ::-1], shapes[:, ::-1]], axis=1)
        for start in range(0, len(self.ids), MAPS_AT_ONCE):
            sums = self._sums_from(start)
            if sums is not None:
                rows, sizes = sums.rows, self.image_sizes[sums.rows]
                points = density_points(sums.sums, sums.feats, sizes, uniform[rows, None])[:, 0]
                crops[rows] = crops_around(points, shapes[rows], sizes)
        return crops

    def _sums_from(self, start: int) -> "MapSums | None":
        """Return the running sums of the maps of MAPS_AT_ONCE images; None where none of them has a map."""
        if start in self._kept:
            return self._kept[start]
        ids = enumerate(listed_ids(self.ids[start : start + MAPS_AT_ONCE]), start)
        maps = {row: cells for row, image_id in ids if (cells := self.maps.get(image_id)) is not None}
        sums, size = None, 0
        if maps:
            feats = np.array([cells.shape for cells in maps.values()])
            densities = unnormalised_densities(list(maps.values()), feats, self.temperature)
            sums = MapSums(np.array(list(maps)), feats, running_sums(densities))
            size = sums.sums.nbytes
        if self._room >= size:
            self._kept[start], self._room = sums, self._room - size
        return sums


class MapSums(NamedTuple):
    """The running sums of some maps' densities, from which cells are drawn."""

    rows: np.ndarray  # (B,) of the data set
    feats: np.ndarray  # (B, 2) feat_h, feat_w
    sums: torch.Tensor  # (B, most feat_h, most feat_w) float64


Crops = BoxCrops | MapCrops


def draw_seed(seed: int, epoch: int, image_id: int | str) -> int:
    """Return the seed of the colours of one image in one epoch."""
    number = image_id if isinstance(image_id, int) else int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8])
    return int(np.random.SeedSequence([seed, epoch, number]).generate_state(1, np.uint64)[0]) >> 1
