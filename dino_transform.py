"""Density-map crops: where attention is high, crops are centred more often (DESIGN.md section 3).

An attention map (attention.py) is cleaned (map_boxes.py), made once and read from a cache; here it becomes a density
and a crop. Nothing in this module's transform needs a model or a GPU, so it works in any loader worker.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from attention import cls_attention, cls_attention_and_logits
from crops import plain_corners, random_shapes
from map_boxes import is_blank, softmax_density

__all__ = [
    "DinoRandomResizedCrop",
    "MapCrops",
    "cls_attention",
    "cls_attention_and_logits",
    "density_points",
    "map_to_density",
    "sample_density_crops",
]

MAPS_AT_ONCE = 64  # are summed in one go


def map_to_density(attention_map: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax with ``temperature`` of a map; a constant map, or one with NaN, gives the uniform density.

    Args:
        attention_map: (feat_h, feat_w) float, cleaned (`map_boxes.clean_map`).
        temperature: > 0; towards 0 all mass sits on the largest cell, towards infinity it is uniform. On a map that
            was scaled to [0, 1], T = 2 makes the largest cell only exp(1/2) = 1.65 times as likely as the least one.
    """
    if is_blank(attention_map):
        return np.full(attention_map.shape, 1 / attention_map.size)
    return softmax_density(attention_map, temperature)


def sample_density_crops(
    density: np.ndarray,
    image_size: tuple[int, int],
    num_crops: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draw crops of one image: shape as RandomResizedCrop, centre from ``density``, then moved inside the image.

    Args:
        density: (feat_h, feat_w), non-negative, sums to 1; stretched over the whole image.
        image_size: (width, height) in pixels.
        num_crops: how many crops to draw.
        scale: least and largest area of the crop, as shares of the image's area.
        ratio: least and largest width / height; its logarithm is uniform.
        rng: source of randomness; None: a fresh one.

    Returns:
        (num_crops, 4) int64, top left height width in pixels, inside the image.
    """
    rng = rng if rng is not None else np.random.default_rng()
    image_sizes = np.tile(image_size, (num_crops, 1))
    shapes, _ = random_shapes(image_sizes, scale, ratio, rng)
    densities = torch.from_numpy(np.array(density, dtype=np.float64, order="C"))[None]
    centres = density_points(densities, np.array([density.shape]), image_sizes[:1], rng.random((1, num_crops, 3)))
    return _crops_around(centres[0], shapes, image_sizes)


def density_points(
    densities: torch.Tensor, feats: np.ndarray, image_sizes: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """Return points of B images, (B, K, 2) x y in pixels: a cell by its density, then a uniform point in that cell.

    Args:
        densities: (B, feat_h, feat_w), non-negative; need not sum to 1; zero where a map has fewer cells.
        feats: (B, 2), feat_h and feat_w of each map, which is stretched over the whole of its image.
        image_sizes: (B, 2), width and height in pixels.
        uniform: (B, K, 3) numbers in [0, 1): which cell, where in it along x, along y.
    """
    cumulative = densities.flatten(1).cumsum(1, dtype=torch.float64)
    goals = torch.from_numpy(uniform[..., 0]) * cumulative[:, -1:]
    cells = torch.searchsorted(cumulative, goals, right=True).numpy()
    row_column = np.stack(np.divmod(cells, densities.shape[2]), axis=-1)
    cell = np.minimum(row_column, feats[:, None] - 1)  # a goal may be rounded to the whole sum
    return (cell[..., ::-1] + uniform[..., 1:]) * image_sizes[:, None] / feats[:, None, ::-1]


def _crops_around(centres: np.ndarray, shapes: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Return crops, (..., 4) int64 top left height width, of (width, height) around centres, moved into the images."""
    near = np.clip(np.rint(centres - shapes / 2).astype(np.int64), 0, image_sizes - shapes)
    return np.concatenate([near[..., ::-1], shapes[..., ::-1]], axis=-1)


def _unnormalised_densities(maps: Sequence[np.ndarray], feats: np.ndarray, temperature: float) -> torch.Tensor:
    """Return what `map_to_density` of each map is proportional to: (B, most feat_h, most feat_w), zero beyond a map."""
    padded = np.full((len(maps), *feats.max(axis=0)), -np.inf, dtype=np.result_type(*{one.dtype for one in maps}))
    for cells, one in zip(padded, maps, strict=True):
        cells[: one.shape[0], : one.shape[1]] = one
    cells = torch.from_numpy(padded).float()
    largest = cells.amax((1, 2), keepdim=True)
    weights = cells.sub_(largest).mul_(1 / temperature).exp_()
    for place in (~largest.isfinite()).flatten().nonzero().flatten().tolist():  # NaN or infinity: uniform
        weights[place] = 0
        weights[place, : feats[place, 0], : feats[place, 1]] = 1
    return weights


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
                crops[rows] = _crops_around(centres, shapes[rows], self.image_sizes[rows, None])
        return crops.swapaxes(0, 1)

    def _points(self, rows: list[int], maps: list[np.ndarray], uniform: np.ndarray) -> np.ndarray:
        feats = np.array([one.shape for one in maps])
        densities = _unnormalised_densities(maps, feats, self.temperature)
        return density_points(densities, feats, self.image_sizes[rows], uniform)

    def _draw_plain(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw shapes (N, 2) width height, three uniform numbers (N, 3), and the crops (N, 4) of images without map."""
        shapes, found = random_shapes(self.image_sizes, self.scale, self.ratio, rng)
        uniform = rng.random((len(shapes), 3))
        left_top = plain_corners(shapes, found, self.image_sizes, uniform[:, 1:])
        return shapes, uniform, np.concatenate([left_top[:, ::-1], shapes[:, ::-1]], axis=1)


class DinoRandomResizedCrop(v2.Transform):
    """RandomResizedCrop whose centre is drawn from an image's attention map.

    The random numbers come from torch's global generator, which DataLoader seeds per worker.

    Args:
        size: (height, width) of the output in pixels; one number makes a square.
        scale: least and largest area of the crop, as shares of the image's area.
        ratio: least and largest width / height; its logarithm is uniform.
        temperature: of the softmax that turns the map into a density; None: what is given is a density already.
        interpolation: of the resize.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        temperature: float | None = 2.0,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale and ratio must be (least, largest), both above 0; got {scale} and {ratio}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for a map that is a density; got {temperature}")
        self.size = [size, size] if isinstance(size, int) else list(size)
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.temperature, self.interpolation = temperature, interpolation
        self.plain = v2.RandomResizedCrop(self.size, self.scale, self.ratio)

    def forward(self, image: Any, attention_map: np.ndarray | torch.Tensor | None) -> Any:
        """Return the crop of ``image``, resized to ``size``.

        Args:
            image: PIL image, or uint8 or float tensor (..., H, W).
            attention_map: (feat_h, feat_w), the map of this image, stretched over the whole of it; None: a plain
                RandomResizedCrop.
        """
        return self.transform(image, self.make_params([image, attention_map]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the crop for [image, attention_map]: top, left, height, width (the hook of v2 transforms)."""
        if flat_inputs[1] is None:
            return self.plain.make_params(flat_inputs[:1])
        image, attention_map = flat_inputs[0], np.asarray(flat_inputs[1])
        if attention_map.ndim != 2:
            raise ValueError(f"attention_map must be (feat_h, feat_w), got a shape of {attention_map.shape}")
        density = attention_map if self.temperature is None else map_to_density(attention_map, self.temperature)
        height, width = F.get_size(image)
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        crop = sample_density_crops(density, (width, height), 1, self.scale, self.ratio, rng)[0]
        return dict(zip(("top", "left", "height", "width"), crop.tolist(), strict=True))

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Apply the drawn crop to one image."""
        return self._call_kernel(
            F.resized_crop, inpt, **params, size=self.size, interpolation=self.interpolation, antialias=True
        )

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"size={self.size}, scale={self.scale}, ratio={self.ratio}, temperature={self.temperature}"
