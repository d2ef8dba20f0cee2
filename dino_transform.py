"""Density-map crops: where attention is high, crops are centred more often.

An attention map (attention.py) is cleaned (map_boxes.py), made once and read from a cache; here it becomes a density
and a crop. Nothing in this module's transform needs a model or a GPU, so it works in any loader worker.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from localized_crops.attention import cls_attention, cls_attention_and_logits
from localized_crops.crops import plain_corners, random_shapes
from localized_crops.density import (
    crops_around,
    density_points,
    map_to_density,
    sample_density_crops,
    unnormalised_densities,
)
from localized_crops.transforms import AttentionMap, DinoRandomResizedCrop

__all__ = [
    "AttentionMap",
    "DinoRandomResizedCrop",
    "MapCrops",
    "cls_attention",
    "cls_attention_and_logits",
    "density_points",
    "map_to_density",
    "sample_density_crops",
]

MAPS_AT_ONCE = 64  # are summed in one go


class MapCrops:
    """The density-map crops of a data set, drawn for whole epochs; a plain crop where an image has no map."""

    def __init__(
        self,
        maps: Mapping[int, np.ndarray],
        ids: np.ndarray,
        image_sizes: np.ndarray,
        *,
        temperature: float,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        """Keep what crops are drawn from.

        Args:
            maps: image id -> attention map (feat_h, feat_w); read when crops are drawn.
            ids: (N,) image ids.
            image_sizes: (N, 2) width height in pixels.
            temperature, scale, ratio: see `DinoRandomResizedCrop`.
        """
        self.maps, self.ids, self.image_sizes = maps, ids, image_sizes
        self.temperature, self.scale, self.ratio = temperature, scale, ratio

    def draw(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Draw the crops of some epochs, of which each has its ``rng``: (E, N, 4) int64 top left height width.

        A map is read, and its running sum taken, once for all of them.
        """
        shapes, uniform, crops = (np.stack(one, axis=1) for one in zip(*map(self._draw_plain, rngs), strict=True))
        for start in range(0, len(self.ids), MAPS_AT_ONCE):
            maps = enumerate(map(self.maps.get, self.ids[start : start + MAPS_AT_ONCE].tolist()), start)
            found = {row: one for row, one in maps if one is not None}
            if found:
                rows = list(found)
                centres = self._points(rows, list(found.values()), uniform[rows])
                crops[rows] = crops_around(centres, shapes[rows], self.image_sizes[rows, None])
        return crops.swapaxes(0, 1)

    def _points(self, rows: list[int], maps: list[np.ndarray], uniform: np.ndarray) -> np.ndarray:
        feats = np.array([one.shape for one in maps])
        densities = unnormalised_densities(maps, feats, self.temperature)
        return density_points(densities, feats, self.image_sizes[rows], uniform)

    def _draw_plain(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw shapes (N, 2) width height, three uniform numbers (N, 3), and the crops (N, 4) of images without map."""
        shapes, found = random_shapes(self.image_sizes, self.scale, self.ratio, rng)
        uniform = rng.random((len(shapes), 3))
        left_top = plain_corners(shapes, found, self.image_sizes, uniform[:, 1:])
        return shapes, uniform, np.concatenate([left_top[:, ::-1], shapes[:, ::-1]], axis=1)
